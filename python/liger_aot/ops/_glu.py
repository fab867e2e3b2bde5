"""What gated linear units require of gate and up, and how their kernels walk over them."""

from .._runtime import cdiv
from ._check import FLOATS
from ._check import check_same
from ._check import rows_of

BLOCK = 1024


def check_pair(op, gate, up):
    if gate.dtype not in FLOATS:
        raise ValueError(f"{op}: gate must be float32, float16 or bfloat16, got {gate.dtype}")
    check_same(op, "up", up, gate.shape, gate)
    if up.dtype is not gate.dtype:
        raise ValueError(f"{op}: gate and up must have one dtype, got {gate.dtype} and {up.dtype}; cast one with .to()")


def walk(*tensors):
    """Tensors of one shape as rows of one width: (how many programs, tensors, their numbers, their row strides, the width)."""
    size = tensors[0].numel()
    for t in tensors:
        if not t.is_contiguous():
            break
    else:  # whatever their shape, as rows that just fill a program
        return cdiv(size, BLOCK), tensors, size, (BLOCK,) * len(tensors), BLOCK
    views, strides, (rows, *_), (n, *_) = zip(*map(rows_of, tensors), strict=True)
    return rows * cdiv(n, BLOCK), views, size, strides, n
