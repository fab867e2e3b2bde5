"""Putting these operators in the places of Megatron-Core's own: opt-in, and undone by the handle.

The one function that changes another library, because that is what it is for: Megatron has no hook for its norms, its loss
and its activation.
"""

import importlib
import logging
import sys
from contextlib import ExitStack

from ..functional import packed_glu
from ..transformers._functions import LigerVocabParallelCEFunction
from .rms_norm import LigerMegatronRMSNorm
from .swiglu import Deferred

logger = logging.getLogger(__name__)
MARKER = "__liger_patched__"  # liger-kernel's, so that neither of the two replaces what the other has replaced
OURS = "liger_aot"
IGNORED = -100


def layer_norm(original):
    def layer_norm(self, rms_norm=False, *args, **kwargs):
        return LigerMegatronRMSNorm if rms_norm else original(self, rms_norm, *args, **kwargs)

    return layer_norm


def final_norm(original):
    """A class, as Megatron does not build what a function would."""

    class LigerOrTorchNorm(original):
        def __new__(cls, config, hidden_size, eps=1e-5, **options):
            norm = LigerMegatronRMSNorm if config.normalization == "RMSNorm" else original
            return norm(config=config, hidden_size=hidden_size, eps=eps, **options)

    return LigerOrTorchNorm


def loss(logits, target, label_smoothing, tp_group):
    """Targets below 0 are of no class: their losses, which Megatron masks afterwards, are 0."""
    if tp_group is None:  # as Megatron itself reads it
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        tp_group = get_tensor_model_parallel_group(check_initialized=False)
    target = target.masked_fill(target < 0, IGNORED)
    return LigerVocabParallelCEFunction.apply(logits, target, tp_group, IGNORED, label_smoothing, "megatron", "partition")


def fused_cross_entropy(original):
    def fused_vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group=None):
        return loss(vocab_parallel_logits, target, 0.0, tp_group)

    return fused_vocab_parallel_cross_entropy


def cross_entropy(original):
    def vocab_parallel_cross_entropy(vocab_parallel_logits, target, label_smoothing=0.0, tp_group=None):
        return loss(vocab_parallel_logits, target, label_smoothing, tp_group)

    return vocab_parallel_cross_entropy


def swiglu_function(original):
    deferred = Deferred()

    class LigerSwiGLUFunction:
        @staticmethod
        def apply(input, fp8_input_store=False, cpu_offload_input=False):
            if reason := deferred.reason(None, fp8_input_store, cpu_offload_input):
                deferred.log(reason)
                return original.apply(input, fp8_input_store, cpu_offload_input)
            return packed_glu(input)

    return LigerSwiGLUFunction


# Where each option's things stand, and what is made of them to stand there instead.
PLACES = {
    "rms_norm": [
        ("megatron.core.models.backends", "LocalSpecProvider.layer_norm", layer_norm),
        ("megatron.core.transformer.transformer_block", "LayerNormImpl", final_norm),
    ],
    "cross_entropy": [
        ("megatron.core.fusions.fused_cross_entropy", "fused_vocab_parallel_cross_entropy", fused_cross_entropy),
        ("megatron.core.tensor_parallel.cross_entropy", "vocab_parallel_cross_entropy", cross_entropy),
    ],
    "swiglu": [("megatron.core.fusions.fused_bias_swiglu", "SwiGLUFunction", swiglu_function)],
}


def symbol(module, path):
    """(what holds it, its name there, it) of module.path; an ImportError that names it where Megatron has it no more."""
    try:
        holder = importlib.import_module(module)
        *classes, name = path.split(".")
        for part in classes:
            holder = getattr(holder, part)
        return holder, name, getattr(holder, name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ImportError(
            f"apply_liger_kernel_to_megatron: {module}.{path} must be there, got {type(error).__name__}: {error}; install "
            "megatron-core, or leave out the option that needs it if your version of Megatron-Core has moved it"
        ) from error


def copies(value):
    """(module, name) of each name by which Megatron's modules hold value: `from … import` makes them."""
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "megatron" and m is not None]
    return [(module, name) for module in modules for name, held in list(vars(module).items()) if held is value]


def put_back(holder, name, original, replacement, title):
    places = copies(replacement)
    if (now := vars(holder).get(name)) is replacement:
        places.append((holder, name))
    elif now is not original:
        logger.warning("%s is left as it is: somebody has replaced it since", title)
    for place, held in places:
        setattr(place, held, original)


def apply_liger_kernel_to_megatron(rms_norm: bool = True, cross_entropy: bool = False, swiglu: bool = False):
    """Megatron-Core's models that are built from here on have these operators; close() of what this returns undoes it.

    rms_norm: of LocalSpecProvider, and the final norm where it is torch's. cross_entropy: fused and unfused, over the tensor
    parallel group. swiglu: of dense MLPs and shared experts, without bias; what is kept in fp8 or offloaded is left to
    Megatron. A second call changes nothing more. ImportError, and nothing is changed, where Megatron has no such symbol;
    RuntimeError where liger-kernel has replaced it already. Where a module refuses, what was replaced before is put back.
    """
    asked = {"rms_norm": rms_norm, "cross_entropy": cross_entropy, "swiglu": swiglu}
    found = [(*symbol(module, path), make, f"{module}.{path}") for o in asked if asked[o] for module, path, make in PLACES[o]]
    for _, _, original, _, title in found:
        if getattr(original, MARKER, OURS) != OURS:
            raise RuntimeError(
                f"apply_liger_kernel_to_megatron: {title} must be Megatron's own, got liger-kernel's; call one of the two only"
            )
    torchs = symbol("megatron.core.transformer.torch_norm", "WrappedTorchNorm")[2] if rms_norm else None
    with ExitStack() as handle:
        for holder, name, original, make, title in found:
            if getattr(original, MARKER, None) == OURS:
                logger.info("%s has been replaced already", title)
            elif make is final_norm and original is not torchs:
                logger.info("%s is %s, not torch's norm, and is left as it is", title, original)
            else:
                replacement = make(original)
                setattr(replacement, MARKER, OURS)
                replacement.__wrapped__ = original
                handle.callback(put_back, holder, name, original, replacement, title)
                # Not of the norm: Megatron refers to torch's for other purposes, too.
                for place, held in [(holder, name), *([] if make is final_norm else copies(original))]:
                    setattr(place, held, replacement)
                logger.info("%s has been replaced by %s", title, OURS)
        return handle.pop_all()
