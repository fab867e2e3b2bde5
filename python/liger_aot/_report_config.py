"""What bind would do to a model, from its configuration alone: built without weights, on the meta device."""

import inspect
import json
import sys
from pathlib import Path

import torch

from . import _op
from .bind import bind


def main(args):
    given = {"shapes": args.shape, "--dtype": args.dtype, "--arch": args.arch, "--backward": args.backward}
    if unfit := [name for name, value in given.items() if value]:
        print(
            f"explain: for a model, {', '.join(unfit)} must not be given; if {args.what} is meant as an operator, "
            f"it must be one of {', '.join(sorted(_op.PUBLIC))}",
            file=sys.stderr,
        )
        return 2
    options, known = dict(args.set), [*inspect.signature(bind).parameters][1:]
    if unknown := sorted(options.keys() - set(known)):
        print(f"explain: --set must name options of bind, {', '.join(known)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    try:
        config = configuration(args.what)
    except ImportError as error:
        if error.name != "transformers":
            raise
        raise RuntimeError(
            "explain: a model needs transformers, which is missing: pip install 'liger-aot[transformers]'"
        ) from None
    if config is None:
        print(
            f"explain: must be given an operator ({', '.join(sorted(_op.PUBLIC))}), a model type that transformers knows, "
            f"a config.json or the folder of one, got {args.what!r}",
            file=sys.stderr,
        )
        return 2
    try:
        model = build(config)
    except Exception as error:  # of other people's classes, on configurations that may be anything
        reason = f"for {args.what} it raised {type(error).__name__}: {error}"
        raise RuntimeError(
            f"explain: transformers must be able to build the model, but {reason}; give a config.json"
        ) from error
    report = bind(model, **options)
    print(json.dumps([row._asdict() for row in report], indent=1) if args.json else f"{type(model).__name__}\n{report}")
    return 0


def configuration(what):
    """That of a model by its type or its file; None where it is neither."""
    from transformers import CONFIG_MAPPING
    from transformers import AutoConfig

    path = Path(what)
    if path.is_dir() or path.is_file():
        return AutoConfig.from_pretrained(path, local_files_only=True)
    if what in CONFIG_MAPPING:
        return CONFIG_MAPPING[what]()
    return None


def build(config):
    """A model of the class that the configuration names; where it names none, that which has the type's language model head."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for name in config.architectures or ():
        if kind := getattr(transformers, name, None):
            break
    else:
        # A configuration of image and text is in the mapping of causal models too, whose class takes the text's alone.
        names = ("ImageTextToText", "CausalLM", "Seq2SeqLM", "MaskedLM")
        kinds = [getattr(auto, f"AutoModelFor{name}") for name in names]
        kind = next((k for k in kinds if type(config) in k._model_mapping), auto.AutoModel)._model_mapping[type(config)]
    with torch.device("meta"):
        return kind(config)
