"""Embedding: rows of a table by their numbers, and the sums of the gradients of each row."""

import triton
import triton.language as tl

from _aot import variants

TYPES = ["fp32", "bf16", "fp16"]


@variants(
    weight="*T",
    indices="*i64",
    y="*T",
    weight_stride="i32:16",
    classes="i32",
    n="i32:16",
    T=TYPES,
    BLOCK=[1024],
    num_warps=4,
)
@triton.jit
def embedding_fwd(weight, indices, y, weight_stride, classes, n, BLOCK: tl.constexpr):
    # What is no row of the table is NaN.
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index, keep = tl.load(indices + row), col < n
    known = (index >= 0) & (index < classes)
    ws = tl.load(weight + index * weight_stride + col, mask=keep & known, other=float("nan"))
    tl.store(y + row * n + col, ws, mask=keep)


@variants(
    dy="*T",
    key="*i64",
    order="*i64",
    share="*fp32",
    rows="i32",
    n="i32:16",
    T=TYPES,
    CHUNK=[32],
    BLOCK=[128],
    num_warps=4,
    scalar=("stores",),
    mixed=("loads",),  # each row's key and place
)
@triton.jit
def embedding_shares(dy, key, order, share, rows, n, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    # Program (c, b): of chunk c of the rows, sorted by their keys, the sum of those that go on with the last key of the chunk
    # before, in the columns of block b.
    first = tl.program_id(0).to(tl.int64) * CHUNK
    at, col = first + tl.arange(0, CHUNK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(key + first - 1, mask=first > 0, other=-1)
    same = (first > 0) & (tl.load(key + at, mask=at < rows, other=-1) == before) & (at < rows)
    row = tl.load(order + at, mask=same, other=0)
    dys = tl.load(dy + row[:, None] * n + col[None, :], mask=same[:, None] & (col < n)[None, :], other=0.0).to(tl.float32)
    goes_on = tl.max(tl.where(same, 1, 0), axis=0) != 0
    tl.store(share + tl.program_id(0).to(tl.int64) * n + col, tl.sum(dys, axis=0), mask=(col < n) & goes_on)


@variants(
    dy="*T",
    key="*i64",
    order="*i64",
    share="*fp32",
    dweight="*T",
    rows="i32",
    classes="i32",
    padding="i32",
    n="i32:16",
    T=TYPES,
    CHUNK=[32],
    SHARES=[4],
    BLOCK=[512],
    num_warps=2,
)
@triton.jit
def embedding_bwd(
    dy,
    key,
    order,
    share,
    dweight,
    rows,
    classes,
    padding,
    n,
    CHUNK: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Program (c, b) writes the sums of the runs of one key that begin in chunk c, in the columns of block b. The run that goes
    # on in the chunks after it ends with their shares, as long as they begin with its key.
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = col < n
    k = tl.load(key + first)
    begun = (first == 0) | (tl.load(key + first - 1, mask=first > 0, other=-1) != k)
    last, sums = k, tl.full((BLOCK,), 0.0, tl.float32)
    for ahead in range(CHUNK):
        at = first + ahead
        row = tl.load(order + at, mask=at < rows, other=0)
        sums += tl.load(dy + row * n + col, mask=keep & begun & (at < rows), other=0.0).to(tl.float32)
        following = tl.load(key + at + 1, mask=at + 1 < rows, other=k)
        ends = (at + 1 == rows) | ((at + 1 < rows) & (following != k))
        known = (k >= 0) & (k < classes) & (k != padding)
        tl.store(dweight + k * n + col, sums, mask=keep & ends & begun & known)
        sums = tl.where(ends, 0.0, sums)
        begun = begun | ends
        last, k = k, following
    after = first + CHUNK
    more = begun & (after < rows) & (last == k)
    goes_on = more & (k >= 0) & (k < classes) & (k != padding)
    later = chunk + 1 + tl.arange(0, SHARES)
    while more:
        same = (later * CHUNK < rows) & (tl.load(key + later * CHUNK, mask=later * CHUNK < rows, other=0) == k)
        shares = tl.load(share + later[:, None] * n + col[None, :], mask=same[:, None] & keep[None, :], other=0.0)
        sums += tl.sum(shares, axis=0)
        more = tl.min(tl.where(same, 1, 0), axis=0) != 0
        later += SHARES
    tl.store(dweight + k * n + col, sums, mask=keep & goes_on)
