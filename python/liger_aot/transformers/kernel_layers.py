"""Layers for the `kernels` library: register_kernel_mapping(kernel_mapping()), then kernelize(model, ...).

A layer there is a forward that borrows its host's attributes, and one name stands for several formulas: transformers' hook
"RMSNorm" is on Llama's norms and on those that round after the weight. So what runs is what bind would give the host, found by
its numbers at the first call; a host that computes none of our formulas keeps its own forward. There is no layer for
"rotary_pos_emb": a function has no host to look at, and NanoChat's, under that name, turns the other way. Losses need bind.
"""

import copy
import weakref

from torch import nn

from ..bind import bind
from ..recognise import identity

HOOKS = ("RMSNorm", "RMSNormZeroCentered", "SwiGLUMLP", "GeGLUMLP")
LAYERS = {"rms_norm": True, "layer_norm": False, "rope": False, "swiglu": True, "geglu": True, "linear_cross_entropy": False}

forwards = weakref.WeakKeyDictionary()
known = {}


class Layer(nn.Module):
    """No member but forward is allowed. Without can_torch_compile the host keeps its own forward for Inductor to fuse."""

    def forward(self, hidden_states):
        if self not in forwards:
            key = identity(self)
            if key not in known:
                known[key] = forward_of(self)
            forwards[self] = known[key]
        return forwards[self](self, hidden_states)


def forward_of(host):
    twin = copy.copy(host)
    del twin.forward  # the layer's
    bind(nn.ModuleList([twin]), **LAYERS)
    return type(twin).forward


class Installed:
    """What a mapping holds in the place of a repository: nothing is downloaded."""

    def load(self):
        return Layer

    def __eq__(self, other):
        return type(other) is Installed

    def __hash__(self):
        return hash(Installed)

    def __str__(self):
        return "liger_aot"


def kernel_mapping():
    """Our layers under each hook that has them, for CUDA devices from 7.5 and for the CPU, in training and inference."""
    from kernels import CUDAProperties
    from kernels import Device
    from kernels import Mode

    modes = {Mode.TRAINING: Installed(), Mode.INFERENCE: Installed()}
    # transformers registers layers of its own for all capabilities, at every set_use_kernels; the narrowest interval counts.
    cuda = Device(type="cuda", properties=CUDAProperties(min_capability=75, max_capability=999))
    return {hook: {cuda: modes, "cpu": modes} for hook in HOOKS}
