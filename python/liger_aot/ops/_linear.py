"""What the linear losses share: logits = hidden · weightᵀ + bias in fp32, for a chunk of the rows at a time."""

import torch

from ._check import FLOATS
from ._check import under_autocast

# Each chunk adds to the fp32 gradient of weight (V, H), which moves 8·V·H bytes, for 6·rows·V·H flops of matmul. A GPU that
# does 150 to 200 flops in the time of a byte spends a fifth of its time on that at 1024 rows, a tenth at 2048, where the
# matmuls also have enough tiles for all of it. So: 2048 rows if the memory they take is there anyway, but at least 1024.
CHUNK = 2048
# A CPU does fewer flops in the time of a byte, and is as fast with a tile's rows.
LEAST = 1024  # and more rows than this are always cut in two, so that the logits never exist whole
TILE = 128  # what the rows of a chunk are a multiple of, as those of a matmul's tiles


def chunk_rows(rows, width, itemsize, least):
    """How many rows a chunk has: equal shares of all, at least two.

    Their fp32 logits and the gradient of those take no more memory than the gradient of weight rounded to its own dtype, which
    in backward lies beside the fp32 one for a moment: so they do not add to the peak, where `least` does not make them.
    """
    fits = itemsize * width // (4 + itemsize)
    most = min(CHUNK, max(least, fits // TILE * TILE))
    count = max(-(-rows // most), 2 if rows > least else 1)
    share = -(-rows // count)
    return min(most, -(-share // TILE) * TILE)


def chunks(hidden):
    """Slices over the rows of hidden (rows, width)."""
    rows, width = hidden.shape
    step = chunk_rows(rows, width, hidden.element_size(), TILE if hidden.is_cpu else LEAST)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)] if rows else []


def logits_of(hidden, weight, bias):
    """hidden · weightᵀ + bias, not rounded to 16 bits on the way."""
    if hidden.dtype is torch.float32:
        logits = hidden @ weight.t()
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.float().t()
    return logits if bias is None else logits.add_(bias)


def accumulate(dweight, dlogits, hidden, beta):
    """dweight = beta · dweight + dlogitsᵀ · hidden, in fp32."""
    if hidden.dtype is torch.float32:
        dweight.addmm_(dlogits.t(), hidden, beta=beta)
    elif hidden.is_cuda:
        torch.addmm(dweight, dlogits.t(), hidden, beta=beta, out_dtype=torch.float32, out=dweight)
    else:
        dweight.addmm_(dlogits.float().t(), hidden.float(), beta=beta)


class Gradients:
    """The gradients of hidden, weight and bias, from those of the logits of one chunk after another; only those needed."""

    def __init__(self, hidden, weight, bias, need_hidden, need_weight, need_bias):
        self.hidden, self.weight = hidden, weight
        self.dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
        self.dweight = hidden.new_empty(weight.shape if need_weight else 0, dtype=torch.float32)
        self.dbias = hidden.new_zeros(bias.shape if need_bias else 0, dtype=torch.float32)
        self.needed = need_hidden, need_weight, need_bias
        if not hidden.shape[0]:
            self.dweight.zero_()

    def add(self, rows, dlogits):
        need_hidden, need_weight, need_bias = self.needed
        if need_hidden:
            torch.mm(dlogits, self.weight, out=self.dhidden[rows])
        if need_weight:
            accumulate(self.dweight, dlogits, self.hidden[rows], 1 if rows.start else 0)  # the first chunk finds it empty
        if need_bias:
            self.dbias += dlogits.sum(0, dtype=torch.float32)

    @property
    def results(self):
        return self.dhidden, self.dweight, self.dbias


def fake_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias):
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0),
        hidden.new_empty(weight.shape if need_weight else 0, dtype=torch.float32),
        hidden.new_empty(bias.shape if need_bias else 0, dtype=torch.float32),
    )


def autocast(*tensors):
    """The tensors in the dtype that F.linear would work in."""
    if not under_autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def check_linear(op, name, hidden, weight, bias, prefix=""):
    """hidden (..., H), weight (V, H) and bias (V,) are of one floating dtype and on one device."""
    if hidden.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be float32, float16 or bfloat16, got {hidden.dtype}")
    if not hidden.dim() or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: {name} (..., H) and {prefix}weight (V, H) must agree, got {tuple(hidden.shape)}, {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: {prefix}bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{op}: {prefix}{what} must be on {hidden.device} like {name}, got {tensor.device}; move it with .to()"
            )
        if tensor is not None and tensor.dtype not in FLOATS:
            raise ValueError(f"{op}: {prefix}{what} must be float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor is not None and tensor.dtype is not hidden.dtype and not under_autocast(hidden):
            raise ValueError(
                f"{op}: {prefix}{what} must be {hidden.dtype} like {name}, got {tensor.dtype}; cast one or use autocast"
            )
