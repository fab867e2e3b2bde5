"""What the operators of hyper-connections share: their streams."""

from ._check import FLOATS

LANES = 4, 16  # that kernels have lanes for
BLOCK = 1024


def check_streams(op, x):
    """x (..., hc, n) as the kernels take it: (hc, n)."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() < 2 or not 1 <= x.shape[-2] <= LANES[-1]:
        raise ValueError(f"{op}: x must have shape (..., hc, n), 1 to {LANES[-1]} streams hc, got {tuple(x.shape)}")
    return int(x.shape[-2]), x.shape[-1]  # kernels are chosen by the number of streams, so that a graph is of one number
