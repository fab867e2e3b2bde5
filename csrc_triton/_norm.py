"""What the norm kernels share: the widths they are built for, and how a normalised row meets its weight."""

import triton
import triton.language as tl

BLOCK = [1024, 2048, 4096, 8192]
ROWS = {128: 16, 1024: 2}  # rows a program takes of that BLOCK, else 1
LOOP_BLOCK = 4096  # of rows that are wider than the largest BLOCK, walked in a loop


def num_warps(BLOCK):
    return {4096: 8, 8192: 16}.get(BLOCK, 4)


def tile(ROWS, BLOCK, LOOP):
    """Whether a kernel is built for this combination."""
    return globals()["ROWS"].get(BLOCK, 1) == ROWS and (not LOOP or BLOCK == LOOP_BLOCK)


# (x, weight, y) of RMSNorm: y has the dtype of x, or of weight where that is wider and the norm is cast to x before the product
RMS_DTYPES = [
    ("fp32", "fp32", "fp32"),
    *((t, w, y) for t in ("bf16", "fp16") for w, y in ((t, t), ("fp32", t), ("fp32", "fp32"))),
]
RMS_AXES = {
    "X": ["fp32", "bf16", "fp16"],
    "W": ["fp32", "bf16", "fp16"],
    "Y": ["fp32", "bf16", "fp16"],
    "ROWS": [1, 2, 16],
    "LOOP": [False, True],
    "num_warps": num_warps,
    "where": lambda X, W, Y, ROWS, BLOCK, LOOP: (X, W, Y) in RMS_DTYPES and tile(ROWS, BLOCK, LOOP),
}


@triton.jit
def normalise(xs, ws, scale, offset, cast, T: tl.constexpr):
    """(xs · scale) · (offset + ws), the first product rounded to T where cast says so, and that first product."""
    xhat = xs * scale[:, None]
    xhat = tl.where(cast != 0, xhat.to(T).to(tl.float32), xhat)
    return xhat * (offset + ws)[None, :], xhat
