"""AutoModelForCausalLM, and what it gives bound."""

from transformers import AutoModelForCausalLM

from .monkey_patch import FLAGS
from .monkey_patch import OPTIONS
from .monkey_patch import _apply_liger_kernel_to_instance


def split(kwargs):
    flags = {name: kwargs.pop(name) for name in (*FLAGS, *OPTIONS) if name in kwargs}
    return flags, kwargs


class AutoLigerKernelForCausalLM(AutoModelForCausalLM):
    """Liger's flags (rope, rms_norm, ...) go to the binder, over the defaults of the model type, as do compile, keep_logits and
    strict; the rest to transformers."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        flags, kwargs = split(kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        _apply_liger_kernel_to_instance(loaded[0] if isinstance(loaded, tuple) else loaded, **flags)
        return loaded

    @classmethod
    def from_config(cls, config, **kwargs):
        flags, kwargs = split(kwargs)
        model = super().from_config(config, **kwargs)
        _apply_liger_kernel_to_instance(model, **flags)
        return model
