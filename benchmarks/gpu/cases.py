"""What is timed: each operator at each size, with what every provider calls it, and the least it must move and compute.

PLAN is in the order of importance: first each operator at the size of a Llama-8B batch, then Liger's own sweeps.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable

import cases
import torch
from torch.nn import functional

from liger_aot.functional import moe_route

OURS, LIGER, EAGER, COMPILED, HF = "liger-aot", "liger-kernel", "torch eager", "torch.compile", "transformers"
QUACK, FUSED, MATMULS, LIGER_FP32 = "quack", "F.linear_cross_entropy", "bare matmuls", "liger-kernel, sums in fp32"
DTYPE = torch.bfloat16
EPS = 1e-6
HEAD = 128
CHANNELS, GROUPS = 512, 32
IMAGE = 1024  # tokens
STREAMS = 4


@dataclasses.dataclass
class Timed:
    inputs: list  # those that require a gradient get one
    calls: dict[str, Callable]
    bytes: tuple[int, int] = (0, 0)  # of a forward and of a backward: each input read once, each output written once
    flops: tuple[int, int] = (0, 0)
    forward_only: tuple = (MATMULS,)  # what does all of its work in one call


def leaf(*shape, scale=1.0):
    return (torch.randn(shape, dtype=DTYPE) * scale).requires_grad_()


def ours(name, **options):
    public, _ = cases.operator(name)
    return lambda *inputs: public(*inputs, **options)


def llama_norm(x, weight):
    xs = x.float()
    return weight * (xs * torch.rsqrt(xs.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def eager_rope(q, k, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    return rotated(q, cos, sin), rotated(k, cos, sin)


def eager_sparsemax(x):
    """The paper's algorithm, which sorts."""
    z = x.float().sort(-1, descending=True).values
    kept = 1 + torch.arange(1, x.shape[-1] + 1, device=x.device) * z > z.cumsum(-1)
    threshold = (torch.where(kept, z, 0).sum(-1, keepdim=True) - 1) / kept.sum(-1, keepdim=True)
    return functional.relu(x.float() - threshold).to(x.dtype)


def eager_multi_token_attention(scores, weight):
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    probabilities = scores.masked_fill(later, -torch.inf).softmax(-1)
    return functional.conv2d(probabilities, weight, padding=1, groups=scores.shape[1]).tril()


def eager_neighborhood_attention(q, k, v):
    token = torch.arange(q.shape[2], device=q.device)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=(token[:, None] - token).abs() <= 3)


def eager_logprob(hidden, weight, target):
    logits = functional.linear(hidden, weight).float()
    return logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)


def eager_jsd(log_q, log_p):
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return sum(functional.kl_div(log_m, x, reduction="batchmean", log_target=True) for x in (log_q, log_p)) / 2


def eager_linear_jsd(*heads):
    return eager_jsd(*(functional.linear(*head).float().log_softmax(-1) for head in (heads[:2], heads[2:])))


def eager_linear_kl_div(hidden, weight, target):
    logs = functional.linear(hidden, weight).float().log_softmax(-1)
    return functional.kl_div(logs, target.float(), reduction="batchmean")


def eager_cross_entropy_tvd(x, teacher, target):
    distance = (x.float().softmax(-1) - teacher.float().softmax(-1)).abs().sum(-1) / 2
    return functional.cross_entropy(x.float(), target, reduction="none"), distance


def eager_poly_norm(x, weight, bias):
    normal = [u * torch.rsqrt(u.square().mean(-1, keepdim=True) + EPS) for u in (x.float() ** 3, x.float().square(), x.float())]
    return (weight[0] * normal[0] + weight[1] * normal[1] + weight[2] * normal[2] + bias).to(x.dtype)


def eager_modulated_rms_norm(x, scale, shift, weight):
    return functional.rms_norm(x, weight.shape, weight, EPS) * (1 + scale[:, None]) + shift[:, None]


def eager_attn_res(v, query, weight):
    scores = (functional.rms_norm(v, weight.shape, weight, EPS) * query).sum(-1)
    return torch.einsum("d...,d...n->...n", scores.softmax(0), v)


def eager_mhc_coeffs(x, phi, b, alpha_pre, alpha_post, alpha_res):
    hc, xs = x.shape[-2], x.flatten(-2)
    mix = (xs @ phi).float() * torch.rsqrt(xs.float().square().mean(-1, keepdim=True) + EPS)
    (pre, post, res), (b_pre, b_post, b_res) = (t.split([hc, hc, hc * hc], -1) for t in (mix, b))
    matrix = (alpha_res * res + b_res).unflatten(-1, (hc, hc)).softmax(-1) + EPS
    for n in range(39):  # columns, rows, columns, ...
        matrix = matrix / (matrix.sum(-1 if n % 2 else -2, keepdim=True) + EPS)
    return torch.sigmoid(alpha_pre * pre + b_pre), 2 * torch.sigmoid(alpha_post * post + b_post), matrix


def eager_mhc_post_res(x, f_out, h_post, h_res):
    return h_res.to(x.dtype) @ x + h_post.to(x.dtype)[..., None] * f_out[..., None, :]


# The same in torch's own parts, as transformers has it where torch has no function of that name.
IN_TORCH = {
    "rms_norm": lambda x, w: functional.rms_norm(x, w.shape, w, EPS),
    "fused_add_rms_norm": lambda x, r, w: (functional.rms_norm(s := x + r, w.shape, w, EPS), s),
    "gated_rms_norm": lambda x, g, w: functional.rms_norm(x, w.shape, w, EPS) * functional.silu(g),
    "layer_norm": lambda x, w, b: functional.layer_norm(x, w.shape, w, b, 1e-5),
    "rope": eager_rope,
    "swiglu": lambda gate, up: functional.silu(gate) * up,
    "geglu": lambda gate, up: functional.gelu(gate, approximate="tanh") * up,
    "packed_glu": lambda x: functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "moe_permute": lambda x, order, position: x[order // position.shape[1]],
    "moe_unpermute": lambda x, weight, order, position: (x[position] * weight[..., None]).sum(1),
    "embedding": lambda weight, indices: functional.embedding(indices, weight),
    "poly_norm": eager_poly_norm,
    "attn_res": eager_attn_res,
    "mhc_coeffs": eager_mhc_coeffs,
    "mhc_pre": lambda x, h_pre: (h_pre[..., None] * x).sum(-2).to(x.dtype),
    "mhc_post_res": eager_mhc_post_res,
    "modulated_rms_norm": eager_modulated_rms_norm,
    "relu_squared": lambda x: functional.relu(x).square(),
    "softmax": lambda x: functional.softmax(x, -1),
    "sparsemax": eager_sparsemax,
    "multi_token_attention": eager_multi_token_attention,
    "neighborhood_attention": eager_neighborhood_attention,
    "dyt": lambda x, alpha, gamma, beta: torch.tanh(alpha * x) * gamma + beta,
    "group_norm": lambda x, w, b: functional.group_norm(x, GROUPS, w, b, 1e-5),
    "cross_entropy": functional.cross_entropy,
    "linear_cross_entropy": lambda h, w, t: functional.cross_entropy(functional.linear(h, w).float(), t),
    "linear_logprob": eager_logprob,
    "kl_div": lambda x, y: functional.kl_div(x, y, reduction="batchmean", log_target=True),
    "jsd": eager_jsd,
    "tvd": lambda x, y: (x - y).abs().sum() / (2 * len(x)),
    "linear_jsd": eager_linear_jsd,
    "linear_kl_div": eager_linear_kl_div,
    "cross_entropy_tvd": eager_cross_entropy_tvd,
    "vocab_parallel_cross_entropy": functional.cross_entropy,
}


def quack_is_there():
    return importlib.util.find_spec("quack") is not None


def fused_of_torch():
    return getattr(functional, "linear_cross_entropy", None)  # torch 2.13 has it, 2.11 does not


def calls(name, theirs, quack=None, **more):
    """{provider: function}; `theirs` and `quack` are their names for it."""
    found = {OURS: ours(name), EAGER: IN_TORCH[name]} | more
    if theirs is not None:
        found[LIGER] = theirs
    if quack is not None and quack_is_there():
        found[QUACK] = quack
    return found


def norm(name):
    def build(tokens, hidden, liger):
        x, weight, bias = leaf(tokens, hidden), leaf(hidden), leaf(hidden)
        size = x.nbytes
        if name == "rms_norm":
            found = calls(
                name,
                liger and (lambda x, w: liger.liger_rms_norm(x, w, EPS)),
                lambda x, w: imported("quack.rmsnorm", "rmsnorm")(x, w, eps=EPS),
                **{HF: llama_norm},
            )
            return Timed([x, weight], found, (2 * size, 3 * size))
        if name == "layer_norm":
            return Timed(
                [x, weight, bias],
                calls(name, liger and (lambda x, w, b: liger.liger_layer_norm(x, w, b, 1e-5))),
                (2 * size, 3 * size),
            )
        found = calls(
            name,
            liger and (lambda x, r, w: liger.liger_fused_add_rms_norm(x, r, w, EPS)),
            lambda x, r, w: imported("quack.rmsnorm", "rmsnorm")(x, w, residual=r, eps=EPS, prenorm=True),
        )
        found[OURS] = lambda x, r, w: ours(name)(x, r, w, EPS)
        return Timed([x, leaf(tokens, hidden), weight], found, (4 * size, 4 * size))

    return build


def imported(module, name):
    return getattr(importlib.import_module(module), name)


def rope(tokens, hidden, liger):
    """q and k as a model has them, with a fourth of the heads for k."""
    heads = max(1, hidden // HEAD)
    q, k = (leaf(1, tokens, h, HEAD).detach().transpose(1, 2).requires_grad_() for h in (heads, max(1, heads // 4)))
    angles = 3 * torch.randn(1, tokens, HEAD)
    size = 2 * (q.nbytes + k.nbytes) + 2 * tokens * HEAD * 2
    inputs = [q, k, angles.cos().to(DTYPE), angles.sin().to(DTYPE)]
    return Timed(inputs, calls("rope", liger and (lambda *i: liger.liger_rope(*i))), (size, size))


def gated(name):
    def build(tokens, hidden, liger):
        gate, up = leaf(tokens, hidden), leaf(tokens, hidden)
        found = calls(name, liger and (lambda gate, up: getattr(liger, f"liger_{name}")(gate, up)))
        return Timed([gate, up], found, (3 * gate.nbytes, 5 * gate.nbytes))

    return build


def pointwise(name):
    def build(tokens, hidden, liger):
        x = leaf(tokens, hidden)
        return Timed([x], calls(name, liger and getattr(liger, f"liger_{name}")), (2 * x.nbytes, 3 * x.nbytes))

    return build


def dyt(tokens, hidden, liger):
    x = leaf(tokens, hidden)
    return Timed(
        [x, leaf(1), leaf(hidden), leaf(hidden)], calls("dyt", liger and liger.liger_dyt), (2 * x.nbytes, 3 * x.nbytes)
    )


def gated_rms_norm(tokens, hidden, liger):
    x, gate = leaf(tokens, hidden), leaf(tokens, hidden)
    found = calls("gated_rms_norm", None) | {OURS: lambda x, g, w: ours("gated_rms_norm")(x, g, w, EPS)}
    return Timed([x, gate, leaf(hidden)], found, (3 * x.nbytes, 5 * x.nbytes))


def packed_glu(tokens, hidden, liger):
    x = leaf(tokens, 2 * hidden)
    return Timed([x], calls("packed_glu", None), (x.nbytes + x.nbytes // 2, 2 * x.nbytes + x.nbytes // 2))


def slots(tokens):
    """Where the rows of a model go that has 8 of 64 experts a token."""
    return moe_route(torch.rand(tokens, 64).topk(8).indices, 64)[:2]


def moe_permute(tokens, hidden, liger):
    x = leaf(tokens, hidden)
    return Timed([x, *slots(tokens)], calls("moe_permute", None), (9 * x.nbytes, 9 * x.nbytes))


def moe_unpermute(tokens, hidden, liger):
    x, weight = leaf(8 * tokens, hidden), torch.rand(tokens, 8, dtype=DTYPE).requires_grad_()
    token = x.nbytes // 8
    return Timed([x, weight, *slots(tokens)], calls("moe_unpermute", None), (9 * token, 17 * token))


def modulated_rms_norm(tokens, hidden, liger):
    """Of images of 1024 tokens, each with a scale and a shift."""
    images = max(1, tokens // IMAGE)
    inputs = leaf(images, tokens // images, hidden), leaf(images, hidden), leaf(images, hidden), leaf(hidden)
    found = calls("modulated_rms_norm", liger and (lambda x, a, b, w: liger.liger_modulated_rms_norm(x, w, a, b, EPS)))
    found[OURS] = lambda *inputs: ours("modulated_rms_norm")(*inputs, EPS)
    size = inputs[0].nbytes
    return Timed(list(inputs), found, (2 * size, 3 * size))


def attn_res(tokens, hidden, liger):
    """Of eight blocks of layers, each an eighth of the tokens, so that v has as many numbers as others' inputs."""
    v = leaf(8, max(1, tokens // 8), hidden)
    inputs = [v, leaf(hidden, scale=hidden**-0.5), leaf(hidden)]
    size = v.nbytes
    return Timed(inputs, calls("attn_res", liger and liger.liger_attn_res), (size + size // 8, 2 * size + size // 8))


def streams(tokens, hidden):
    """Of a layer with four of them, as the paper has: they, the layer's output, and coefficients."""
    h_post, h_res = (torch.rand(tokens, *last).requires_grad_() for last in ((STREAMS,), (STREAMS, STREAMS)))
    return leaf(tokens, STREAMS, hidden), leaf(tokens, hidden), h_post, h_res


def mhc_coeffs(tokens, hidden, liger):
    x, width, heads = streams(tokens, hidden)[0], STREAMS * hidden, STREAMS * (STREAMS + 2)
    inputs = [x, leaf(width, heads, scale=width**-0.5), torch.zeros(heads).requires_grad_()]
    inputs += [torch.ones(()).requires_grad_() for _ in range(3)]
    flops = 2 * tokens * width * heads
    found = calls("mhc_coeffs", liger and liger.liger_mhc_coeffs)
    return Timed(inputs, found, (x.nbytes, 2 * x.nbytes), (flops, 2 * flops))


def mhc_pre(tokens, hidden, liger):
    x, f_out, h_pre, _ = streams(tokens, hidden)
    moved = x.nbytes + f_out.nbytes
    return Timed([x, h_pre], calls("mhc_pre", liger and liger.liger_mhc_pre), (moved, moved + x.nbytes))


def mhc_post_res(tokens, hidden, liger):
    inputs = streams(tokens, hidden)
    x, f_out, *_ = inputs
    moved = 2 * x.nbytes + f_out.nbytes
    found = calls("mhc_post_res", liger and liger.liger_mhc_post_res)
    return Timed(list(inputs), found, (moved, moved + x.nbytes + f_out.nbytes))


def embedding(tokens, hidden, vocabulary, liger):
    weight, indices = leaf(vocabulary, hidden), torch.randint(vocabulary, (tokens,))
    theirs = liger and (lambda w, i: imported("liger_kernel.ops", "LigerEmbeddingFunction").apply(w, i))
    rows = tokens * hidden * weight.element_size()
    return Timed([weight, indices], calls("embedding", theirs), (2 * rows, rows + weight.nbytes))


def poly_norm(tokens, hidden, liger):
    x = leaf(tokens, hidden)
    found = calls("poly_norm", liger and (lambda x, w, b: liger.liger_poly_norm(x, w, b, EPS)))
    return Timed([x, leaf(3), leaf(1)], found, (2 * x.nbytes, 3 * x.nbytes))


def group_norm(tokens, hidden, liger):
    """As image models have it: 512 channels in 32 groups, for as many numbers as tokens times hidden."""
    x, weight, bias = leaf(8, CHANNELS, tokens * hidden // (8 * CHANNELS)), leaf(CHANNELS), leaf(CHANNELS)
    found = calls("group_norm", liger and (lambda x, w, b: liger.liger_group_norm(x, w, b, CHANNELS, GROUPS, 1e-5)))
    found[OURS] = lambda x, w, b: ours("group_norm")(x, GROUPS, w, b, 1e-5)
    return Timed([x, weight, bias], found, (2 * x.nbytes, 3 * x.nbytes))


def cross_entropy(tokens, vocabulary, liger):
    logits, target = leaf(tokens, vocabulary), torch.randint(vocabulary, (tokens,))
    found = calls(
        "cross_entropy",
        liger and (lambda x, t: liger.liger_cross_entropy(x, t)),
        lambda x, t: imported("quack.cross_entropy", "cross_entropy")(x, t),
        **{HF: lambda x, t: functional.cross_entropy(x.float(), t)},
    )
    return Timed([logits, target], found, (logits.nbytes, 2 * logits.nbytes))


def head(tokens, hidden, vocabulary):
    x, weight = leaf(tokens, hidden), leaf(vocabulary, hidden, scale=hidden**-0.5)
    flops = 2 * tokens * hidden * vocabulary
    moved = x.nbytes + weight.nbytes
    return [x, weight, torch.randint(vocabulary, (tokens,))], (moved, 2 * moved), (flops, 2 * flops)


def matmuls(hidden, weight, target):
    """The three products of a forward and backward, with nothing between them."""
    with torch.no_grad():
        logits = hidden @ weight.t()
        return logits @ weight, logits.t() @ hidden


def linear_cross_entropy(tokens, hidden, vocabulary, liger):
    inputs, moved, flops = head(tokens, hidden, vocabulary)
    name = "liger_fused_linear_cross_entropy"
    found = calls(
        "linear_cross_entropy",
        liger and (lambda h, w, t: getattr(liger, name)(h, w, t)),
        lambda h, w, t: imported("quack.linear_cross_entropy", "chunked_linear_cross_entropy")(h, w, t),
        **{MATMULS: matmuls},
    )
    if liger:
        found[LIGER_FP32] = lambda h, w, t: getattr(liger, name)(h, w, t, accum_dtype=torch.float32)
    if fused := fused_of_torch():
        found[FUSED] = fused
    return Timed(inputs, found, moved, flops)


def linear_logprob(tokens, hidden, vocabulary, liger):
    inputs, moved, flops = head(tokens, hidden, vocabulary)
    found = calls("linear_logprob", None)
    found[OURS] = lambda *inputs: ours("linear_logprob")(*inputs)[0]
    return Timed(inputs, found, moved, flops)


def divergence(name, options, log=True):
    """Of a student that learns and a teacher that does not."""

    def distribution(tokens, vocabulary):
        logs = leaf(tokens, vocabulary).detach().float().log_softmax(-1)
        return (logs if log else logs.exp()).to(DTYPE)

    def build(tokens, vocabulary, liger):
        x, y = distribution(tokens, vocabulary).requires_grad_(), distribution(tokens, vocabulary)
        found = calls(name, liger and (lambda x, y: getattr(liger, f"liger_{name}")(x, y, **options)))
        found[OURS] = ours(name, **options)
        return Timed([x, y], found, (2 * x.nbytes, 3 * x.nbytes))

    return build


def linear_jsd(tokens, hidden, vocabulary, liger):
    (x, weight, _), moved, flops = head(tokens, hidden, vocabulary)
    (y, other, _), *_ = head(tokens, hidden, vocabulary)
    found = calls("linear_jsd", liger and (lambda *heads: liger.liger_fused_linear_jsd(*heads)))
    forward, backward = moved
    return Timed([x, weight, y.detach(), other.detach()], found, (2 * forward, backward), (2 * flops[0], flops[1]))


def linear_kl_div(tokens, hidden, vocabulary, liger):
    (x, weight, _), (forward, backward), flops = head(tokens, hidden, vocabulary)
    target = torch.randn(tokens, vocabulary).softmax(-1).to(DTYPE)
    found = calls("linear_kl_div", liger and (lambda *inputs: liger.liger_fused_linear_kl_div(*inputs)))
    return Timed([x, weight, target], found, (forward + target.nbytes, backward), flops)


def cross_entropy_tvd(tokens, vocabulary, liger):
    logits, target = leaf(tokens, vocabulary), torch.randint(vocabulary, (tokens,))
    theirs = liger and (lambda *inputs: imported("liger_kernel.ops", "LigerFusedCETVDFunction").apply(*inputs))
    inputs = [logits, leaf(tokens, vocabulary).detach(), target]
    return Timed(inputs, calls("cross_entropy_tvd", theirs), (2 * logits.nbytes, 3 * logits.nbytes))


def vocab_parallel_cross_entropy(tokens, vocabulary, liger):
    """One process's part, without what they tell each other."""
    logits, target = leaf(tokens, vocabulary), torch.randint(vocabulary, (tokens,))
    found = calls("vocab_parallel_cross_entropy", liger and cases.liger_vocab_parallel_cross_entropy)
    return Timed([logits, target], found, (logits.nbytes, 2 * logits.nbytes))


def multi_token_attention(tokens, hidden, liger):
    """A convolution of 3 x 3 for each head; bytes are those of the scores, of what is kept of them, and of the result."""
    heads = max(1, hidden // HEAD)
    scores, weight = leaf(1, heads, tokens, tokens), leaf(heads, 1, 3, 3)
    theirs = liger and (lambda x, w: liger.liger_multi_token_attention(x, w, padding=1, groups=heads))
    found = calls("multi_token_attention", theirs)
    found[OURS] = ours("multi_token_attention", padding=[1, 1], groups=heads)
    return Timed([scores, weight], found, (4 * scores.nbytes, 6 * scores.nbytes))


def neighborhood_attention(tokens, hidden, liger):
    """Liger's window, of 7 tokens."""
    q, k, v = (leaf(1, tokens, max(1, hidden // HEAD), HEAD).transpose(1, 2).detach().requires_grad_() for _ in range(3))
    found = calls("neighborhood_attention", liger and (lambda *qkv: liger.liger_fused_neighborhood_attention(*qkv)))
    return Timed([q, k, v], found, (4 * q.nbytes, 7 * q.nbytes))


BUILD = {name: norm(name) for name in ("rms_norm", "fused_add_rms_norm", "layer_norm")} | {"rope": rope}
BUILD |= {name: gated(name) for name in ("swiglu", "geglu")} | {
    "dyt": dyt,
    "group_norm": group_norm,
    "gated_rms_norm": gated_rms_norm,
    "packed_glu": packed_glu,
    "moe_permute": moe_permute,
    "moe_unpermute": moe_unpermute,
    "poly_norm": poly_norm,
    "embedding": embedding,
    "attn_res": attn_res,
    "mhc_coeffs": mhc_coeffs,
    "mhc_pre": mhc_pre,
    "mhc_post_res": mhc_post_res,
    "modulated_rms_norm": modulated_rms_norm,
}
BUILD |= {name: pointwise(name) for name in ("relu_squared", "softmax", "sparsemax")}
BUILD |= {"cross_entropy": cross_entropy, "linear_cross_entropy": linear_cross_entropy, "linear_logprob": linear_logprob}
BUILD |= {"kl_div": divergence("kl_div", {"reduction": "batchmean", "log_target": True}), "jsd": divergence("jsd", {})}
BUILD |= {"tvd": divergence("tvd", {"reduction": "batchmean"}, log=False), "linear_jsd": linear_jsd}
BUILD["vocab_parallel_cross_entropy"] = vocab_parallel_cross_entropy
BUILD |= {"linear_kl_div": linear_kl_div, "cross_entropy_tvd": cross_entropy_tvd}
BUILD |= {"multi_token_attention": multi_token_attention, "neighborhood_attention": neighborhood_attention}

TOKENS = [1024, 2048, 4096, 16384, 32768]  # besides 8192, the batch of the first cases
HIDDEN = [1024, 2048, 4096, 8192, 16384, 32768]
VOCABULARY = [32768, 65536, 128256, 262144]
OTHERS = ["softmax", "sparsemax", "relu_squared", "dyt", "group_norm", "gated_rms_norm", "poly_norm"]
OTHERS += ["modulated_rms_norm", "attn_res", "packed_glu", "moe_permute", "moe_unpermute"]
# At the sizes of Llama-8B: hidden 4096, intermediate 14336, vocabulary 128256.
FIRST = [
    ("linear_cross_entropy", {"tokens": 4096, "hidden": 4096, "vocabulary": 128256}),
    ("rms_norm", {"tokens": 8192, "hidden": 4096}),
    ("cross_entropy", {"tokens": 4096, "vocabulary": 128256}),
    ("swiglu", {"tokens": 8192, "hidden": 14336}),
    ("rope", {"tokens": 8192, "hidden": 4096}),
    ("fused_add_rms_norm", {"tokens": 8192, "hidden": 4096}),
    ("layer_norm", {"tokens": 8192, "hidden": 4096}),
    ("geglu", {"tokens": 8192, "hidden": 14336}),
    ("linear_logprob", {"tokens": 4096, "hidden": 4096, "vocabulary": 128256}),
    ("linear_jsd", {"tokens": 4096, "hidden": 4096, "vocabulary": 128256}),
    ("linear_kl_div", {"tokens": 4096, "hidden": 4096, "vocabulary": 128256}),
    *((name, {"tokens": 4096, "vocabulary": 128256}) for name in ("jsd", "kl_div", "tvd", "cross_entropy_tvd")),
    ("vocab_parallel_cross_entropy", {"tokens": 4096, "vocabulary": 32064}),
    ("multi_token_attention", {"tokens": 4096, "hidden": 4096}),
    ("neighborhood_attention", {"tokens": 4096, "hidden": 4096}),
    *((name, {"tokens": 8192, "hidden": 14336 if "glu" in name else 4096}) for name in OTHERS),
    *((name, {"tokens": 8192, "hidden": 4096}) for name in ("mhc_coeffs", "mhc_pre", "mhc_post_res")),
    ("embedding", {"tokens": 8192, "hidden": 4096, "vocabulary": 128256}),
]


def sweeps(places):
    """Widths, for Liger's 2048 tokens, and numbers of tokens, of one operator after another; places 0 and 1 are the ends."""
    widths = [HIDDEN[i] for i in (0, 5, 2, 3, 1, 4)]
    tokens = [TOKENS[i] for i in (0, 4, 2, 3, 1)]
    vocabularies = [VOCABULARY[i] for i in (0, 3, 1, 2)]
    elementwise = ["rms_norm", "swiglu", "rope", "fused_add_rms_norm", "layer_norm", "geglu"]
    elementwise += OTHERS
    for place in places:
        yield from ((name, {"tokens": 2048, "hidden": widths[place]}) for name in elementwise)
        if place < len(tokens):
            n = tokens[place]
            yield "linear_cross_entropy", {"tokens": n, "hidden": 4096, "vocabulary": 128256}
            yield "cross_entropy", {"tokens": n, "vocabulary": 128256}
            yield from ((name, {"tokens": n, "hidden": 14336 if "glu" in name else 4096}) for name in elementwise)
        if place < len(vocabularies):
            v = vocabularies[place]
            yield "cross_entropy", {"tokens": 4096, "vocabulary": v}
            yield "linear_cross_entropy", {"tokens": 4096, "hidden": 4096, "vocabulary": v}
    for hidden in (1024, 2048, 8192):
        yield "linear_cross_entropy", {"tokens": 4096, "hidden": hidden, "vocabulary": 128256}
    for n in (1024, 16384):
        yield "linear_logprob", {"tokens": n, "hidden": 4096, "vocabulary": 128256}


# Where torch.compile takes part, which needs seconds for each size where all else of a sweep's case needs less than one.
AT_ENDS = "rms_norm", "cross_entropy"
WITH_COMPILE = [*FIRST, *(case for case in sweeps(range(2)) if case[0] in AT_ENDS)]


def plan():
    """[(operator, sizes)], each once."""
    once = []
    for case in [*FIRST, *sweeps(range(len(HIDDEN)))]:
        if case not in once:
            once.append(case)
    return once


TINY = {"tokens": 6, "hidden": 256, "vocabulary": 128}


def tiny(sizes):
    """What a dry run has in place of these sizes."""
    return {name: TINY[name] for name in sizes}


def text(operator, sizes):
    return f"{operator} {', '.join(f'{name} {size}' for name, size in sizes.items())}"
