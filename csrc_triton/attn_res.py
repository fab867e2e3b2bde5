"""Attention residuals, a token a program, arithmetic in fp32. Rows wider than the largest BLOCK are walked in a loop."""

import triton
import triton.language as tl

from _aot import variants

AXES = {
    "T": ["fp32", "bf16", "fp16"],
    "BLOCK": [2048, 8192],
    "LOOP": [False, True],
    "num_warps": lambda BLOCK: BLOCK // 512,
    "where": lambda BLOCK, LOOP: not LOOP or BLOCK == 8192,
}


@variants(
    v="*T",
    query="*fp32",
    y="*T",
    score="*fp32",
    rstd="*fp32",
    lse="*fp32",
    v_stride="i32:16",
    depth="i32",
    tokens="i32",
    n="i32:16",
    eps="fp32",
    **AXES,
)
@triton.jit
def attn_res_fwd(v, query, y, score, rstd, lse, v_stride, depth, tokens, n, eps, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    # A token has `depth` rows, `tokens` apart. Their softmax is summed as they come, relative to the largest score so far.
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    row, largest, total = token, -float("inf"), 0.0
    if LOOP:
        for _ in range(depth):
            squares, products = tl.full((BLOCK,), 0.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
            for start in range(0, n, BLOCK):
                keep = start + col < n
                vs = tl.load(v + row * v_stride + start + col, mask=keep, other=0.0).to(tl.float32)
                squares += vs * vs
                products += vs * tl.load(query + start + col, mask=keep, other=0.0)
            r = tl.rsqrt(tl.sum(squares, axis=0) / n + eps)
            s = tl.sum(products, axis=0) * r
            tl.store(rstd + row, r)
            tl.store(score + row, s)
            before, largest = largest, tl.maximum(largest, s)
            total = total * tl.exp(before - largest) + tl.exp(s - largest)
            row += tokens
        all_of_it = largest + tl.log(total)
        tl.debug_barrier()  # one thread wrote the scores that all read
        for start in range(0, n, BLOCK):
            keep = start + col < n
            mixed = tl.full((BLOCK,), 0.0, tl.float32)
            row = token
            for _ in range(depth):
                vs = tl.load(v + row * v_stride + start + col, mask=keep, other=0.0).to(tl.float32)
                mixed += vs * tl.exp(tl.load(score + row) - all_of_it)
                row += tokens
            tl.store(y + token * n + start + col, mixed, mask=keep)
        tl.store(lse + token, all_of_it)
    else:
        keep = col < n
        us = tl.load(query + col, mask=keep, other=0.0)
        mixed = tl.full((BLOCK,), 0.0, tl.float32)
        for _ in range(depth):
            vs = tl.load(v + row * v_stride + col, mask=keep, other=0.0).to(tl.float32)
            r = tl.rsqrt(tl.sum(vs * vs, axis=0) / n + eps)
            s = tl.sum(vs * us, axis=0) * r
            tl.store(rstd + row, r)
            tl.store(score + row, s)
            before, largest = largest, tl.maximum(largest, s)
            fade, part = tl.exp(before - largest), tl.exp(s - largest)
            total = total * fade + part
            mixed = mixed * fade + vs * part
            row += tokens
        tl.store(y + token * n + col, mixed / total, mask=keep)
        tl.store(lse + token, largest + tl.log(total))


@variants(
    dy="*T",
    v="*T",
    query="*fp32",
    score="*fp32",
    rstd="*fp32",
    lse="*fp32",
    dv="*T",
    along="*fp32",
    partial="*fp32",
    v_stride="i32:16",
    depth="i32",
    tokens="i32",
    n="i32:16",
    **AXES,
)
@triton.jit
def attn_res_bwd(
    dy,
    v,
    query,
    score,
    rstd,
    lse,
    dv,
    along,
    partial,
    v_stride,
    depth,
    tokens,
    n,
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):
    # Program p owns the tokens p, p + P, p + 2P, ...; partial[p] is its share of the gradient of query.
    # `along` is dy · v of each row, and `mean` the same of the result; d score is their difference, weighted.
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    own = partial + program * n
    if LOOP:
        for ahead in range(0, tokens - tl.program_id(0), programs):
            token = program + ahead
            dy_at, whole = dy + token * n, tl.load(lse + token)
            row, mean = token, 0.0
            for _ in range(depth):
                products = tl.full((BLOCK,), 0.0, tl.float32)
                for start in range(0, n, BLOCK):
                    keep = start + col < n
                    vs = tl.load(v + row * v_stride + start + col, mask=keep, other=0.0).to(tl.float32)
                    products += vs * tl.load(dy_at + start + col, mask=keep, other=0.0).to(tl.float32)
                product = tl.sum(products, axis=0)
                tl.store(along + row, product)
                mean += tl.exp(tl.load(score + row) - whole) * product
                row += tokens
            tl.debug_barrier()  # one thread wrote what all read
            for start in range(0, n, BLOCK):
                keep = start + col < n
                dys = tl.load(dy_at + start + col, mask=keep, other=0.0).to(tl.float32)
                us = tl.load(query + start + col, mask=keep, other=0.0)
                # This program wrote these numbers for the token before; the sums above are a barrier between the two.
                dus = tl.load(own + start + col, mask=keep & (ahead != 0), other=0.0)
                row = token
                for _ in range(depth):
                    vs = tl.load(v + row * v_stride + start + col, mask=keep, other=0.0).to(tl.float32)
                    s, r = tl.load(score + row), tl.load(rstd + row)
                    part = tl.exp(s - whole)
                    slope = part * (tl.load(along + row) - mean) * r
                    tl.store(dv + row * n + start + col, part * dys + slope * (us - vs * (s * r / n)), mask=keep)
                    dus += slope * vs
                    row += tokens
                tl.store(own + start + col, dus, mask=keep)
    else:
        keep = col < n
        us = tl.load(query + col, mask=keep, other=0.0)
        dus = tl.full((BLOCK,), 0.0, tl.float32)
        for ahead in range(0, tokens - tl.program_id(0), programs):
            token = program + ahead
            dys = tl.load(dy + token * n + col, mask=keep, other=0.0).to(tl.float32)
            whole = tl.load(lse + token)
            row, mean = token, 0.0
            for _ in range(depth):
                vs = tl.load(v + row * v_stride + col, mask=keep, other=0.0).to(tl.float32)
                mean += tl.exp(tl.load(score + row) - whole) * tl.sum(dys * vs, axis=0)
                row += tokens
            row = token
            for _ in range(depth):
                vs = tl.load(v + row * v_stride + col, mask=keep, other=0.0).to(tl.float32)
                s, r = tl.load(score + row), tl.load(rstd + row)
                part = tl.exp(s - whole)
                slope = part * (tl.sum(dys * vs, axis=0) - mean) * r
                tl.store(dv + row * n + col, part * dys + slope * (us - vs * (s * r / n)), mask=keep)
                dus += slope * vs
                row += tokens
        tl.store(own + col, dus, mask=keep)
