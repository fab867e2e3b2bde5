"""The gradient of cross entropy by some of the classes, from the logsumexp over all of them."""

import triton
import triton.language as tl

from _aot import variants
from _math import tanh

IGNORED = tl.constexpr(-100)
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) as exp2(x · log2(e)): tl.exp spends three instructions on denormal results


@variants(
    logits="*X",
    target="*i64",
    lse="*fp32",
    share="*fp32",
    picked="*fp32",
    spread="*fp32",
    dlogits="*X",
    stride="i32:16",
    n="i32:16",
    softcap="fp32",
    X=["fp32", "bf16", "fp16"],
    SOFTCAP=[False, True],
    BLOCK=[2048],
    num_warps=4,
)
@triton.jit
def vocab_parallel_cross_entropy_bwd(
    logits,
    target,
    lse,
    share,
    picked,
    spread,
    dlogits,
    stride,
    n,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program takes one block of one row. A row that is ignored may hold anything; its share, picked and spread are 0.
    blocks = (n + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    keep = at < n
    y = tl.load(target + row)
    z = tl.load(logits + row * stride + at, mask=keep & (y != IGNORED), other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        t = tanh(z * (1.0 / softcap))
        z = softcap * t
        slope = 1.0 - t * t
    p = tl.exp2((z - tl.load(lse + row)) * LOG2E)
    dz = tl.load(share + row) * p - tl.where(at == y, tl.load(picked + row), 0.0) - tl.load(spread + row)
    tl.store(dlogits + row * n + at, dz * slope, mask=keep)
