"""Liger-Kernel's functions that patch a model, by its names, parameters and defaults (0.8.5): each is bind with flags.

bind finds modules by what they compute, so that a flag that is on binds what equals the operator, and the report says what was
left. An operator for which Liger's function has no flag stays off; the functions that pass **kwargs on to their inner models'
have it on. A model type that Liger has no function for is bound with bind's defaults.
"""

import contextlib
import functools
import inspect
import logging
from ast import literal_eval
from contextvars import ContextVar

from ..bind import bind
from ..bind import check_module
from ..bind import unbind
from ..bind._swap import is_bound
from ..bind._swap import loss_of
from ..bind._swap import swap_all

logger = logging.getLogger(__name__)

# Liger's flags and the operators of bind.
FLAGS = {
    "rope": "rope",
    "cross_entropy": "cross_entropy",
    "fused_linear_cross_entropy": "linear_cross_entropy",
    "rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "group_norm": "group_norm",
    "gated_rms_norm": "gated_rms_norm",
    "swiglu": "swiglu",
    "geglu": "geglu",
    "relu_squared": "relu_squared",
}
OPTIONS = {"compile", "keep_logits", "strict"}
PASS_ON = {"internvl", "llava", "smolvlm"}

LOSS = "cross_entropy=False, fused_linear_cross_entropy=True"
PARAMETERS = {
    f"rope=True, {LOSS}, rms_norm=True, swiglu=True, model=None": (
        "exaone4 falcon_h1 hunyuan_v1_dense hunyuan_v1_moe llama ministral mistral mixtral olmo2 olmo3 phi3 qwen2 qwen2_5_vl"
        " qwen3 qwen3_moe qwen3_vl_moe smollm3"
    ),
    f"rope=False, {LOSS}, rms_norm=True, swiglu=True, model=None": (
        "deepseek_v2 deepseek_v3 glm4 glm4v glm4v_moe qwen3_5 qwen3_5_moe qwen3_next"
    ),
    f"rope=True, {LOSS}, rms_norm=True, swiglu=False, model=None": "gpt_oss qwen3_vl",
    f"rope=False, {LOSS}, rms_norm=True, swiglu=False, model=None": "deepseek_v4",
    "rope=True, cross_entropy=True, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True, model=None": "granite",
    f"rope=True, {LOSS}, layer_norm=True, rms_norm=True, swiglu=True, model=None": "mllama muse_glimmer",
    f"rope=True, {LOSS}, rms_norm=True, layer_norm=True, swiglu=True, model=None": "qwen2_vl",
    f"rope=True, {LOSS}, rms_norm=True, swiglu=True, model=None, layer_norm=True": "llama4",
    f"rope=True, {LOSS}, rms_norm=True, geglu=True, model=None": "gemma gemma2 gemma3_text",
    f"rope=False, {LOSS}, rms_norm=True, geglu=True, model=None": "gemma4_text",
    f"rope=True, {LOSS}, layer_norm=True, rms_norm=True, geglu=True, model=None": "gemma3 paligemma",
    f"rope=False, {LOSS}, layer_norm=False, rms_norm=True, geglu=True, model=None": "gemma4",
    f"{LOSS}, rms_norm=True, layer_norm=True, model=None, **kwargs": "internvl smolvlm",
    f"{LOSS}, model=None, **kwargs": "llava",
    f"relu_squared=True, {LOSS}, model=None, **kwargs": "nemotron",
    "rope=True, rms_norm=True, swiglu=True, model=None": "pixtral",
}
# Model types that another type's function serves.
ALIASES = {
    "llama4_text": "llama4",
    "mllama_text_model": "mllama",
    "qwen2_vl_text": "qwen2_vl",
    "qwen2_5_vl_text": "qwen2_5_vl",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_vl_text": "qwen3_vl",
    "qwen3_vl_moe_text": "qwen3_vl_moe",
}


def signature(text):
    parameters = []
    for parameter in text.split(", "):
        name, _, default = parameter.partition("=")
        if default:
            parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=literal_eval(default)))
        else:
            parameters.append(inspect.Parameter(name.lstrip("*"), inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


def apply_function(model_type, text):
    def apply(*args, **kwargs):
        try:
            given = apply.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{apply.__name__}: {error}; it takes {apply.__signature__}") from None
        flags = {**given.arguments, **given.arguments.get("kwargs", {})}
        flags.pop("kwargs", None)
        return _apply_liger_kernel(model_type, **flags)

    apply.__name__ = apply.__qualname__ = f"apply_liger_kernel_to_{model_type}"
    apply.__doc__ = f"liger_aot.bind(model) with the flags of Liger's function for {model_type}. Returns the report."
    apply.__signature__ = signature(text)
    return apply


FUNCTIONS = {type_: apply_function(type_, text) for text, types in PARAMETERS.items() for type_ in types.split()}
MODEL_TYPE_TO_APPLY_LIGER_FN = {**FUNCTIONS, **{alias: FUNCTIONS[type_] for alias, type_ in ALIASES.items()}}
globals().update({function.__name__: function for function in FUNCTIONS.values()})

__all__ = [
    "MODEL_TYPE_TO_APPLY_LIGER_FN",
    "_apply_liger_kernel",
    "_apply_liger_kernel_to_instance",
    "bind_new_models",
    *(function.__name__ for function in FUNCTIONS.values()),
]


def bind_options(model_type, given):
    """bind's options for Liger's flags (or bind's own options), over the defaults of the model type's function."""
    if unknown := given.keys() - FLAGS.keys() - OPTIONS:
        raise TypeError(f"liger: flags must be of {', '.join([*FLAGS, *sorted(OPTIONS)])}; got {', '.join(sorted(unknown))}")
    flags = given
    if function := MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type):
        defaults = {p.name: p.default for p in function.__signature__.parameters.values() if p.name in FLAGS}
        flags = {**dict.fromkeys(FLAGS, model_type in PASS_ON), **defaults, **given}
    if flags.get("cross_entropy") and flags.get("fused_linear_cross_entropy", True):
        raise ValueError(
            f"liger: cross_entropy and fused_linear_cross_entropy cannot both be True, got them for {model_type}; "
            "set fused_linear_cross_entropy=False, or leave cross_entropy"
        )
    return {FLAGS.get(flag, flag): value for flag, value in flags.items()}


def rebind(model, options):
    """bind, also of a model that is bound: as with Liger's functions, the last call holds, unless it fails."""
    check_module("bind", model)
    before = [(m, type(m), loss_of(m)) for m in model.modules() if is_bound(m)]
    unbind(model)
    try:
        report = bind(model, **options)
    except BaseException:
        swap_all(model, before)
        raise
    logger.info("%s", report)
    return report


def _apply_liger_kernel_to_instance(model, **kwargs):
    """Bind a model with the flags of Liger's function for its type. The Trainer calls this with its liger_kernel_config."""
    return rebind(model, bind_options(getattr(getattr(model, "config", None), "model_type", None), kwargs))


def _apply_liger_kernel(model_type: str, **kwargs):
    """The same by a model type: of this model, or of each model built while bind_new_models() is open."""
    model = kwargs.pop("model", None)
    options = bind_options(model_type, kwargs)
    if model is not None:
        return rebind(model, options)
    if not NewModels.opened:
        function = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
        name = function.__name__ if function else "_apply_liger_kernel_to_instance"
        raise RuntimeError(
            f"{name}: model must be given, got none for {model_type}: no class of transformers is changed. Build the model, "
            f"then call {name}(model=model) or liger_aot.bind(model); to have models bound that are built after this call, "
            "make it while liger_aot.transformers.monkey_patch.bind_new_models() is open"
        )
    NewModels.opened[0].options.update(
        dict.fromkeys([model_type, *(a for a, t in ALIASES.items() if t == model_type)], options)
    )
    return None


class NewModels(contextlib.ExitStack):
    """The types that are bound as they are built, and with which options; close() gives transformers its own methods back."""

    opened = []  # noqa: RUF012 (one at a time in the process)

    def __init__(self):
        super().__init__()
        self.options = {}

    def bind(self, model):
        if (options := self.options.get(model.config.model_type)) is not None:
            rebind(model, options)


def bind_new_models():
    """While this is open, apply_liger_kernel_to_<type>() without a model binds the models of that type that are built after it.

    For programs that cannot be given the model: PreTrainedModel.post_init and .from_pretrained are replaced, process-wide,
    until close() of what this returns, or the end of a with statement. Models that were bound stay bound.
    """
    from transformers import PreTrainedModel

    if NewModels.opened:
        raise RuntimeError("bind_new_models: must not be open already; close the other one first")
    handle = NewModels()
    post_init, from_pretrained = PreTrainedModel.post_init, PreTrainedModel.__dict__["from_pretrained"]
    loading = ContextVar("loading", default=False)

    @functools.wraps(post_init)
    def post_init_and_bind(self):
        post_init(self)
        # While its weights are not there yet, a model may still be taken apart: quantisers replace its Linears.
        if not loading.get():
            handle.bind(self)

    @functools.wraps(from_pretrained.__func__)
    def from_pretrained_and_bind(cls, *args, **kwargs):
        outer = loading.set(True)
        try:
            loaded = from_pretrained.__func__(cls, *args, **kwargs)
        finally:
            loading.reset(outer)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Inner models first, as where they are built: the outermost of a type that is bound decides.
        for part in [m for m in model.modules() if isinstance(m, PreTrainedModel)][::-1]:
            handle.bind(part)
        return loaded

    PreTrainedModel.post_init, PreTrainedModel.from_pretrained = post_init_and_bind, classmethod(from_pretrained_and_bind)
    handle.callback(setattr, PreTrainedModel, "post_init", post_init)
    handle.callback(setattr, PreTrainedModel, "from_pretrained", from_pretrained)
    handle.callback(NewModels.opened.clear)
    NewModels.opened.append(handle)
    return handle
