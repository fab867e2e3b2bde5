"""What the operators require of their inputs, and how they see them as rows."""

import os

import torch
from torch._C import _is_any_autocast_enabled
from torch._subclasses.fake_tensor import FakeTensor

from .._op import DIRECT_ON_CPU

CHECK = os.environ.get("LIGER_AOT_CHECK") == "1"  # look at indices on CUDA too, which waits for the device
FLOATS = {torch.float32, torch.float16, torch.bfloat16}


def looks_at(indices):
    """Whether a function that serves CPU and CUDA looks at numbers; kernels on CPU tensors, in tests, do as on CUDA."""
    return (CHECK or (indices.is_cpu and not DIRECT_ON_CPU)) and not isinstance(indices, FakeTensor) and not indices.is_meta


def check_indices(op, name, indices, count, rest="", ignored=None):
    """Every index is one of `count`, or the ignored one, which `rest` says: for CPU tensors and LIGER_AOT_CHECK=1."""
    bad = indices[(indices < 0) | (indices >= count)]
    if ignored is not None:
        bad = bad[bad != ignored]
    if bad.numel():
        raise ValueError(f"{op}: {name} must be in [0, {count}){rest}, got {bad[0].item()}")


def wide(x):
    """x in the dtype that a reference computes in: fp32, or fp64 if x is."""
    return x if x.dtype is torch.float64 else x.float()


def check_same(op, name, tensor, shape, x):
    """tensor has this shape, a dtype that kernels take, and x's device."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like the input, got {tensor.device}; move it with .to()")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be float32, float16 or bfloat16, got {tensor.dtype}")


def along(op, x, dim):
    """x with its dimension dim last, and what puts that of a result back in its place."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x must be float32, float16 or bfloat16, got {x.dtype}")
    dims = x.dim()
    if not -dims <= dim < dims:
        raise ValueError(f"{op}: dim must be a dimension of x, of shape {tuple(x.shape)}, got {dim}")
    if dim == -1 or dim == dims - 1:
        return x, lambda y: y
    return x.movedim(dim, -1), lambda y: y.movedim(-1, dim)


def rows_of(x):
    """x as rows: (x or, only where its rows are not evenly spaced, a copy; its row stride; how many rows; their width)."""
    n = x.shape[-1]
    rows = x.numel() // n if n else x.shape[:-1].numel()
    if x.is_contiguous():
        return x, n, rows, n
    stride = row_stride(x.shape, x.stride())
    return (x.contiguous(), n, rows, n) if stride is None else (x, stride, rows, n)


def row_stride(shape, strides):
    """The one distance between rows, such as those of a chunk of a wider tensor; None where there is no such."""
    if strides[-1] != 1:
        return None
    step = None
    for i in range(len(shape) - 2, -1, -1):
        if shape[i] == 1:
            continue
        if step is None:
            step = reach = strides[i]
        elif strides[i] != reach:
            return None
        reach *= shape[i]
    return step


def under_autocast(x):
    """Whether autocast is on for x's device; torch cannot be asked of meta tensors."""
    return _is_any_autocast_enabled() and not x.is_meta and torch.is_autocast_enabled(x.device.type)
