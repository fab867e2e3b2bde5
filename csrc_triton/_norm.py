"""What the norm kernels share: the widths they are built for, and how a normalised row meets its weight."""

import triton
import triton.language as tl

BLOCK = [1024, 2048, 4096, 8192]
ROWS = {128: 16, 1024: 2}  # rows a program takes of that BLOCK, else 1
# ROWS and BLOCK of rows that are wider than the largest BLOCK, which are walked in a loop. A backward reads and writes its
# share of a weight's gradient once for all of its rows.
LOOP_FORWARD, LOOP_BACKWARD = (1, 4096), (2, 2048)


def num_warps(BLOCK, LOOP):
    return 8 if LOOP else {4096: 8, 8192: 16}.get(BLOCK, 4)


def tile(ROWS, BLOCK, LOOP, looped):
    """Whether a kernel is built for this combination, whose loop takes `looped` rows and columns at once."""
    return looped == (ROWS, BLOCK) if LOOP else globals()["ROWS"].get(BLOCK, 1) == ROWS


# (x, weight, y) of RMSNorm: y has the dtype of x, or of weight where that is wider and the norm is cast to x before the product
RMS_DTYPES = [
    ("fp32", "fp32", "fp32"),
    *((t, w, y) for t in ("bf16", "fp16") for w, y in ((t, t), ("fp32", t), ("fp32", "fp32"))),
]


def rms_axes(blocks, looped):
    return {
        "X": ["fp32", "bf16", "fp16"],
        "W": ["fp32", "bf16", "fp16"],
        "Y": ["fp32", "bf16", "fp16"],
        "ROWS": [1, 2, 16],
        "BLOCK": blocks,
        "LOOP": [False, True],
        "num_warps": num_warps,
        "where": lambda X, W, Y, ROWS, BLOCK, LOOP: (X, W, Y) in RMS_DTYPES and tile(ROWS, BLOCK, LOOP, looped),
    }


@triton.jit
def normalise(xs, ws, scale, offset, cast, T: tl.constexpr):
    """(xs · scale) · (offset + ws), the first product rounded to T where cast says so, and that first product."""
    xhat = xs * scale[:, None]
    xhat = tl.where(cast != 0, xhat.to(T).to(tl.float32), xhat)
    return xhat * (offset + ws)[None, :], xhat
