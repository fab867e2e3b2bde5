"""Who sees a call of a module, or changes it, beside its class."""

import torch


def hooked(module):
    """Whether anybody's hooks see a call of module, but for those that only gather its weights."""
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    everybodys = (
        torch.nn.modules.module._global_forward_pre_hooks,
        torch.nn.modules.module._global_forward_hooks,
        torch.nn.modules.module._global_backward_pre_hooks,
        torch.nn.modules.module._global_backward_hooks,
    )
    hooks = [hook for hooks in (*own, *everybodys) for hook in hooks.values()]
    return any(not getattr(hook, "__module__", "").startswith(("torch.distributed.", "deepspeed.")) for hook in hooks)


def altered(module):
    """Whether a call of module may do other than its class's forward does."""
    return "forward" in module.__dict__ or hooked(module)


def shadowed(module):
    """Whether an instance's own forward, or that which accelerate's hook calls, is not its class's."""
    attributes = vars(module)
    method = attributes.get("_old_forward" if "_hf_hook" in attributes else "forward")
    return method is not None and getattr(method, "__func__", None) is not type(module).forward
