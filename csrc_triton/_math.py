"""Functions that kernels share. They are exact to an ulp or so of fp32, and need no libdevice."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
