"""What the losses require of their arguments."""

import math

import torch

from ._check import FLOATS
from ._check import check_indices
from ._check import looks_at
from ._check import under_autocast

REDUCTIONS = "none", "mean", "sum"


def check_target(op, target, ignore_index, classes):
    """Every target is a class or ignore_index."""
    check_indices(op, "target", target, classes, f" or ignore_index {ignore_index}", ignore_index)


def check_target_if_asked(op, target, ignore_index, classes):
    """check_target, in a function that serves CPU and CUDA."""
    if looks_at(target):
        check_target(op, target, ignore_index, classes)


def check_options(op, reduction, label_smoothing, softcap, lse_square_scale, scale=1.0):
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be positive and finite, or None for none, got {softcap}")
    if not abs(lse_square_scale) < math.inf or not abs(scale) < math.inf:
        name, value = ("scale", scale) if abs(lse_square_scale) < math.inf else ("lse_square_scale", lse_square_scale)
        raise ValueError(f"{op}: {name} must be a finite number, got {value}")


def check_classes(op, target, shape, x, name="target"):
    """target as int64: class indices of this shape, on x's device. torch takes uint8 too."""
    if not isinstance(target, torch.Tensor):
        raise ValueError(f"{op}: {name} must be a tensor of class indices in int64, got {type(target).__name__}")
    if target.dtype is not torch.int64 and target.dtype is not torch.uint8:
        raise ValueError(f"{op}: {name} must be class indices in int64, got {target.dtype}; convert it with .long()")
    if target.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(target.shape)}")
    if target.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like the input, got {target.device}; move it with .to()")
    return target if target.dtype is torch.int64 else target.long()


def check_class_weights(op, weight, classes, x):
    """weight as fp32, which the kernels take."""
    if weight is None:
        return None
    if weight.shape != (classes,):
        raise ValueError(f"{op}: weight must have shape ({classes},), got {tuple(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight must be on {x.device} like the input, got {weight.device}; move it with .to()")
    if weight.dtype not in FLOATS:
        raise ValueError(f"{op}: weight must be float32, float16 or bfloat16, got {weight.dtype}")
    if weight.requires_grad:
        raise ValueError(f"{op}: weight must not require a gradient, it gets none, as in torch; pass weight.detach()")
    return weight.float()


def result_dtype(x, dtype):
    """Of a loss: x's, as in torch, whose losses are fp32 under autocast."""
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"loss_dtype must be float32, float16 or bfloat16, or None for the input's, got {dtype}")
    return dtype or (torch.float32 if under_autocast(x) else x.dtype)
