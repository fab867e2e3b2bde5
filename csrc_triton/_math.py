"""Functions that kernels share. They are exact to an ulp or so of fp32, and need no libdevice."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    # exp(-x) may be infinite, for x below -88: its inverse is the right answer, 0.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # Below 0.625 an odd polynomial (4.4e-9 off at most, relative to tanh), because 1 - e loses the digits of small results.
    # Above, exp of a number that is never positive, which cannot overflow. With exp and division exact, fp32 errs 1.9e-7.
    square = x * x
    p = 0.02063908614218235 - 0.005704986397176981 * square
    p = -0.05373971536755562 + p * square
    p = 0.13331441581249237 + p * square
    p = -0.3333328068256378 + p * square
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * (square * p), tl.where(x < 0, -large, large))
