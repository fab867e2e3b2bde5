"""Calls that reach every variant that is built: test_launches.py sees that none is built without one."""

import itertools

import torch

from examples import routing
from harness import DTYPES

# Rows of every block size of the norms and the loop, each with a width that is divisible by 16 and one that is not.
WIDTHS = [96, 97, 1008, 1009, 2032, 2033, 4080, 4081, 8176, 8177, 9008, 9009]
LAYOUTS = ["offset", "wide rows", "every second", "transposed", "expanded"]


def few(n):
    """How many rows of width n."""
    return 5


def randn(*shape, dtype, grad=True):
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def laid_out(shape, dtype, layout):
    """Random numbers of one shape, as some view of more memory."""
    if layout == "offset":
        return torch.randn(torch.Size(shape).numel() + 3).to(dtype)[3:].view(shape)
    if layout == "wide rows":
        return torch.randn(*shape[:-1], shape[-1] + 5).to(dtype)[..., 2 : shape[-1] + 2]
    if layout == "every second":
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    if layout == "transposed" and len(shape) > 1:
        return torch.randn(shape[-1], *shape[1:-1], shape[0]).to(dtype).transpose(0, -1)
    if layout == "expanded" and len(shape) > 1:
        return torch.randn(1, *shape[1:]).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


def views(*shape, layouts=LAYOUTS):
    """A tensor of each dtype in each layout, that gets a gradient."""
    for dtype, layout in itertools.product(DTYPES, layouts):
        yield laid_out(shape, dtype, layout).detach().requires_grad_()


def weights(n, dtype):
    """None, and one of each dtype."""
    return [None, *(randn(n, dtype=t) for t in dict.fromkeys([dtype, torch.float32]))]


def rms_norm(rows):
    for dtype, n, casting in itertools.product(DTYPES, WIDTHS, ("none", "llama")):
        for weight in weights(n, dtype):
            yield (randn(rows(n), n, dtype=dtype), weight, 1e-6), {"casting": casting}
    for x in views(rows(65), 65):
        yield (x, randn(65, dtype=x.dtype)), {}


def fused_add_rms_norm(rows):
    """In sixteenths, whose sum every dtype holds: rounding it is the definition's, not the kernel's, error."""
    for (x, weight, *eps), options in rms_norm(rows):
        if x.stride(0) == 0:  # whose numbers cannot be set apart
            continue
        residual = randn(*x.shape, dtype=x.dtype)
        with torch.no_grad():
            for t in (x, residual):
                t.mul_(16).clamp_(-63, 63).round_().div_(16)
        yield (x, residual, weight, *eps), options


def gated_rms_norm(rows):
    for dtype, n, casting in itertools.product(DTYPES, (96, 97, 1008, 1009, 4080, 4081, 8176, 8177), ("none", "llama")):
        for weight in weights(n, dtype)[1:]:
            options = {"gate_first": casting == "none", "activation": ("silu", "sigmoid")[n % 2], "casting": casting}
            yield (randn(rows(n), n, dtype=dtype), randn(rows(n), n, dtype=dtype), weight, 1e-6), options
    for x, gate in zip(views(rows(66), 66), views(rows(66), 66, layouts=LAYOUTS[::-1]), strict=True):
        yield (x, gate, randn(66, dtype=x.dtype), 1e-6), {"groups": 3}


def modulated_rms_norm(rows):
    for dtype, n in itertools.product(DTYPES, (96, 97, 2064, 2065, 4112, 4113)):
        for t in dict.fromkeys([dtype, torch.float32]):
            groups = rows(n) if n % 2 else 2
            x, (scale, shift) = randn(groups, rows(n) // groups + 1, n, dtype=dtype), (randn(groups, n, dtype=t) for _ in "as")
            yield (x, scale, shift, randn(n, dtype=t)), {}
    for x in views(rows(65), 65):
        yield (x, randn(*x.shape, dtype=x.dtype)), {}


def layer_norm(rows):
    for dtype, n in itertools.product(DTYPES, WIDTHS):
        for weight, bias in itertools.product(weights(n, dtype), repeat=2):
            yield (randn(rows(n), n, dtype=dtype), weight, bias), {}
    for x in views(rows(65), 65):
        yield (x, randn(65, dtype=x.dtype), randn(65, dtype=torch.float32)), {}


def rope(rows):
    widths = [(64, 64), (62, 62), (128, 64), (126, 126), (128, 128), (130, 130), (256, 256), (512, 512), (514, 514)]
    for dtype, (n, rotated) in itertools.product(DTYPES, widths):
        tokens = rows(12 * n)  # as many numbers as a token has
        for t in dict.fromkeys([dtype, torch.float32]):
            q, k = randn(2, tokens, 9, n, dtype=dtype), randn(2, tokens, 3, n, dtype=dtype)
            angles = (randn(2, tokens, rotated, dtype=t, grad=False) for _ in ("cos", "sin"))
            yield (q.transpose(1, 2), k.transpose(1, 2), *angles), {}
    # Each order by both tiles of the forms that are not plain, aligned and not; half as sections, and as the last columns.
    forms = [{"order": "interleaved"}, {"order": "interleaved_to_half"}, {"last": True}, {}]
    for dtype, rotated, options in itertools.product(DTYPES, (64, 62, 128, 130), forms):
        tokens = rows(12 * rotated)
        sizes = {} if options else {"sections": [rotated // 8, rotated // 2 - 2 * (rotated // 8), rotated // 8]}
        for t in dict.fromkeys([dtype, torch.float32]):
            q, k = randn(2, tokens, 9, rotated + 16, dtype=dtype), randn(2, tokens, 3, rotated + 16, dtype=dtype)
            shape = (*[3] * len(sizes), 1, tokens, rotated)
            angles = (randn(*shape, dtype=t, grad=False) for _ in ("cos", "sin"))
            yield (q.transpose(1, 2), k.transpose(1, 2), *angles), options | sizes
        angles = torch.complex(*torch.randn(2, tokens, rotated // 2).unbind())
        yield (q.transpose(1, 2), k.transpose(1, 2), angles), {"order": "interleaved"}
    for q in views(2, 3, rows(256), 34):
        yield (q, randn(2, 2, rows(256), 34, dtype=q.dtype), *(torch.randn(1, rows(256), 10) for _ in ("cos", "sin"))), {}


def gated(rows, **options):
    for dtype, n, *values in itertools.product(DTYPES, (64, 63), *options.values()):
        count = rows(n)
        both = randn(count, 2 * n, dtype=dtype)
        for gate, up in [(randn(count, n, dtype=dtype), randn(count, n, dtype=dtype)), both.chunk(2, dim=-1)]:
            yield (gate, up), dict(zip(options, values, strict=True))
    for gate, up in zip(views(rows(65), 65), views(rows(65), 65, layouts=LAYOUTS[::-1]), strict=True):
        yield (gate, up), {name: values[0] for name, values in options.items()}


def swiglu(rows):
    yield from gated(rows, gate_multiplier=(1.0, 0.5))


def geglu(rows):
    yield from gated(rows, approximate=("tanh", "none"))


def packed_glu(rows):
    for dtype, n, activation in itertools.product(DTYPES, (64, 63), ("silu", "gelu", "gelu_tanh")):
        yield (randn(rows(n), 2 * n, dtype=dtype), activation), {}
    for x in views(rows(66), 66):
        yield (x,), {}


def moe_permute(rows):
    for dtype, n in itertools.product(DTYPES, (64, 63, 1040)):
        tokens = rows(2 * n)
        yield (randn(tokens, n, dtype=dtype), *routing(tokens, 2)), {}
    for x in views(rows(65), 65):
        yield (x, *routing(len(x), 3)), {}


def moe_unpermute(rows):
    for dtype, n in itertools.product(DTYPES, (64, 63, 1040)):
        tokens = rows(2 * n)
        for weight in weights(2, dtype)[1:]:
            weight = randn(tokens, 2, dtype=weight.dtype)
            yield (randn(2 * tokens, n, dtype=dtype), weight, *routing(tokens, 2)), {}
    for x in views(rows(65), 65):
        yield (x, randn(len(x), 1, dtype=torch.float32), *routing(len(x), 1)), {}


def relu_squared(rows):
    for (gate, up), _ in gated(rows):
        yield (gate,), {}
        yield (up,), {}


def dyt(rows):
    for dtype, n in itertools.product(DTYPES, (64, 63, 1009, 2032, 2048)):
        for t in dict.fromkeys([dtype, torch.float32]):
            beta = randn(n, dtype=t) if n != 63 else None
            yield (randn(rows(n), n, dtype=dtype), randn(1, dtype=t), randn(n, dtype=t), beta), {}


def poly_norm(rows):
    for dtype, n in itertools.product(DTYPES, (64, 63, 2064)):
        for t in dict.fromkeys([dtype, torch.float32]):
            yield (randn(rows(n), n, dtype=dtype), randn(3, dtype=t), randn(1, dtype=t)), {}
    for x in views(rows(65), 65):
        yield (x, randn(3, dtype=x.dtype), randn(1, dtype=x.dtype)), {}


def attn_res(rows):
    for dtype, n in itertools.product(DTYPES, (96, 97, 4080, 4081, 8208, 8209)):
        yield (randn(2, rows(n), n, dtype=dtype), *((torch.randn(n) / n**0.5).to(dtype).requires_grad_() for _ in "qw")), {}
    for v in views(2, rows(65), 65):
        yield (v, (torch.randn(65) / 8).requires_grad_(), randn(65, dtype=torch.float32)), {}


def mhc_coeffs(rows):
    """Scalars side by side in memory are not aligned, but for the first."""
    for dtype, (hc, n), apart in itertools.product(DTYPES, ((2, 24), (4, 24), (8, 7), (16, 7), (4, 9)), (False, True)):
        width, heads = hc * n, hc * (hc + 2)
        alphas = [randn(dtype=torch.float32) for _ in range(3)] if apart else torch.rand(3).unbind()
        phi = (torch.randn(width, heads) / width**0.5).to(dtype if apart else torch.float32).requires_grad_()
        yield (randn(rows(96 if hc < 5 else 2048), hc, n, dtype=dtype), phi, randn(heads, dtype=torch.float32), *alphas), {}
    for x in views(rows(2048), 4, 9):
        yield (x, randn(36, 24, dtype=x.dtype), randn(24, dtype=x.dtype), *torch.rand(3).unbind()), {"tmax": 2}


def mhc_pre(rows):
    for dtype, n in itertools.product(DTYPES, (64, 63, 1040)):
        tokens = rows(4 * n)
        yield (randn(tokens, 4, n, dtype=dtype), randn(tokens, 4, dtype=torch.float32)), {}
    for x in views(rows(260), 4, 65):
        yield (x, randn(*x.shape[:-1], dtype=x.dtype)), {}


def mhc_post_res(rows):
    for dtype, n, hc in itertools.product(DTYPES, (64, 63, 1040), (4, 5)):
        for layer in dict.fromkeys([dtype, torch.float32]):
            shape, wide = (rows(hc * n),), {"dtype": torch.float32}
            inputs = randn(*shape, hc, n, dtype=dtype), randn(*shape, n, dtype=layer)
            yield (*inputs, randn(*shape, hc, **wide), randn(*shape, hc, hc, **wide)), {}
    for x in views(rows(260), 4, 65):
        *shape, hc, n = x.shape
        yield (x, *(randn(*shape, *last, dtype=x.dtype) for last in ((n,), (hc,), (hc, hc)))), {}


def embedding(rows):
    for dtype, n in itertools.product(DTYPES, (96, 97, 1040)):
        yield (randn(50, n, dtype=dtype), torch.randint(50, (rows(n), 2))), {"padding_idx": 7}
        yield (randn(50, n, dtype=dtype), torch.randint(2, (rows(n) + 70,))), {}
    for weight in views(rows(65), 65):
        yield (weight, torch.randint(len(weight), (3, rows(65)))), {}


def softmax(rows):
    for dtype, n in itertools.product(DTYPES, (48, 63, 1008, 1009, 4096, 4095, 4112, 4113)):
        yield (randn(rows(n), n, dtype=dtype),), {}


def sparsemax(rows):
    for dtype, n in itertools.product(DTYPES, (48, 63, 1008, 1009, 4096, 4095, 4112, 4113)):
        yield (randn(rows(n), n, dtype=dtype),), {}


def multi_token_attention(rows):
    for dtype, n, sparse in itertools.product(DTYPES, (48, 63, 1040, 1041), (False, True)):
        if n < 1000 or not sparse:
            heads = 1 if n > 1000 else 2
            weights = randn(heads, 1, 3, 3, dtype=dtype), randn(heads, dtype=dtype)
            yield (randn(1, heads, n, n, dtype=dtype), *weights), {"padding": [1, 1], "groups": heads, "sparse": sparse}
    for x in views(2, 2, 33, 33):
        yield (x, randn(2, 2, 3, 3, dtype=x.dtype)), {}


def neighborhood_attention(rows):
    for dtype, n in itertools.product(DTYPES, (32, 31, 64, 63, 128, 127)):
        tokens = rows(4 * n)
        q, k, v = (randn(2, tokens, 2, n, dtype=dtype).transpose(1, 2) for _ in range(3))
        yield (q, k, v, 5, 1 + n % 2), {}
    for q in views(2, 2, rows(66), 34):
        yield (q, *(randn(2, 2, rows(66), 34, dtype=q.dtype) for _ in range(2))), {}


def group_norm(rows):
    for dtype, size in itertools.product(DTYPES, (64, 63)):
        for weight, bias in itertools.product(weights(8, dtype), repeat=2):
            yield (randn(rows(8 * size), 8, size, dtype=dtype), 4, weight, bias), {}


def losses(rows, linear):
    """Options of the three losses, for few classes and for many, divisible by 16 and not."""
    options = {"softcap": (None, 30.0), "reduction": ("mean", "none"), "weight": (False, True)}
    for dtype, n, *values in itertools.product(DTYPES, (1008, 1009, 4112, 4113), *options.values()):
        given = dict(zip(options, values, strict=True)) | {"label_smoothing": 0.1, "lse_square_scale": 1e-4}
        given["weight"] = torch.rand(n) if given["weight"] else None
        count = rows(n)
        target = torch.randint(n, (count + 1,))[n % 2 :][:count]
        if linear:  # with weights as a head has them
            yield (randn(count, 16, dtype=dtype), (torch.randn(n, 16) / 4).to(dtype).requires_grad_(), target), given
        else:
            yield (randn(count, n, dtype=dtype), target), given
    for x in views(rows(65), 16 if linear else 65):
        inputs = [x, (torch.randn(65, 16) / 4).to(x.dtype).requires_grad_()] if linear else [x]
        yield (*inputs, torch.randint(65, x.shape[:1])), {"weight": None}


def cross_entropy(rows):
    yield from losses(rows, linear=False)


def cross_entropy_stats(rows):
    yield from losses(rows, linear=False)


def linear_cross_entropy(rows):
    yield from losses(rows, linear=True)


def linear_cross_entropy_stats(rows):
    yield from losses(rows, linear=True)


def linear_logprob(rows):
    for arguments, _ in losses(rows, linear=True):
        yield arguments, {"temperature": 0.7}


def divergences(rows, logs, **options):
    """Of rows shorter and longer than a block, divisible by 16 and not, each number's and reduced to each dtype."""
    for dtype, n, *values in itertools.product(DTYPES, (1008, 4113), *options.values()):
        given, count = dict(zip(options, values, strict=True)), rows(n)
        x, y = torch.randn(2, count, n).log_softmax(-1)
        x, y = (t if log else t.exp() for t, log in zip((x, y), logs(given), strict=True))
        for labels in (None, torch.ones(count + 1, dtype=torch.int64)[n % 2 :][:count]):
            yield (x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_(), labels), given


def kl_div(rows):
    yield from divergences(rows, lambda o: (True, o["log_target"]), reduction=("mean", "none"), log_target=(False, True))


def jsd(rows):
    yield from divergences(rows, lambda _: (True, True), reduction=("batchmean", "none"))


def tvd(rows):
    yield from divergences(rows, lambda _: (False, False), reduction=("batchmean", "none"))


def linear_jsd(rows):
    for dtype, n, reduction in itertools.product(DTYPES, (1008, 4113), ("batchmean", "none")):
        count = rows(n)
        heads = [(torch.randn(size, 16) / scale).to(dtype).requires_grad_() for size, scale in ((count, 1), (n, 4)) * 2]
        for labels in (None, torch.ones(count + 1, dtype=torch.int64)[n % 2 :][:count]):
            yield (*heads, labels), {"temperature": 0.7, "reduction": reduction}


def linear_kl_div(rows):
    for dtype, t, n, reduction in itertools.product(DTYPES, DTYPES, (1008, 4113), ("batchmean", "none")):
        count = rows(n)
        head = [(torch.randn(size, 16) / scale).to(dtype).requires_grad_() for size, scale in ((count, 1), (n, 4))]
        target = torch.randn(count, n).softmax(-1).to(t)
        for labels in (None, torch.ones(count + 1, dtype=torch.int64)[n % 2 :][:count]):
            yield (*head, target, labels), {"temperature": 0.7, "reduction": reduction}


def cross_entropy_tvd(rows):
    for dtype, n in itertools.product(DTYPES, (1008, 4113)):
        count = rows(n)
        target = torch.randint(n, (count + 1,))[n % 2 :][:count]
        yield (randn(count, n, dtype=dtype), randn(count, n, dtype=dtype, grad=False), target), {}
    for x in views(rows(65), 65):
        yield (x, randn(*x.shape, dtype=x.dtype, grad=False), torch.randint(65, x.shape[:1])), {}


def vocab_parallel_cross_entropy(rows):
    for dtype, n, softcap, reduction in itertools.product(DTYPES, (1008, 4113), (None, 30.0), ("mean", "none")):
        count = rows(n)
        target = torch.randint(n, (count + 1,))[n % 2 :][:count]
        given = {"softcap": softcap, "reduction": reduction, "label_smoothing": 0.1, "lse_square_scale": 1e-4}
        yield (randn(count, n, dtype=dtype), target), given


# operator -> rows -> each call's (arguments, options)
CALLS = {f.__name__: f for f in (rms_norm, fused_add_rms_norm, layer_norm, rope, swiglu, geglu, cross_entropy)}
CALLS |= {f.__name__: f for f in (packed_glu, moe_permute, moe_unpermute)}
CALLS |= {f.__name__: f for f in (relu_squared, dyt, softmax, sparsemax, group_norm, gated_rms_norm, poly_norm)}
CALLS |= {f.__name__: f for f in (modulated_rms_norm, attn_res, mhc_coeffs, mhc_pre, mhc_post_res, embedding)}
CALLS |= {f.__name__: f for f in (cross_entropy_stats, linear_cross_entropy, linear_cross_entropy_stats, linear_logprob)}
CALLS |= {f.__name__: f for f in (multi_token_attention, neighborhood_attention)}
CALLS |= {f.__name__: f for f in (kl_div, jsd, tvd, linear_jsd, linear_kl_div, cross_entropy_tvd, vocab_parallel_cross_entropy)}
