"""The losses in torch's own parts: what the operators are held to, differentiable, in the dtype that they are called in."""

import torch
from torch.nn import functional


def cross_entropy(softcap=None, lse_square_scale=0.0, reduction="mean", **options):
    def formula(x, target, weight=None):
        z = x if softcap is None else softcap * torch.tanh(x / softcap)
        loss = functional.cross_entropy(z, target, weight, reduction=reduction, **options)
        valid = target != options.get("ignore_index", -100)
        squares = lse_square_scale * torch.where(valid, torch.logsumexp(z, -1), 0).square()
        return loss + {"none": squares, "sum": squares.sum(), "mean": squares.sum() / valid.sum()}[reduction]

    return formula


def linear_cross_entropy(scale=1.0, **options):
    def formula(hidden, weight, target, bias=None, class_weight=None):
        return cross_entropy(**options)(functional.linear(hidden, weight, bias) * scale, target, class_weight)

    return formula


def linear_logprob(temperature=1.0, ignore_index=-100):
    def formula(hidden, weight, target, bias=None):
        z = functional.linear(hidden, weight, bias) / temperature
        logps, valid = z.log_softmax(-1), target != ignore_index
        logp = logps.gather(-1, torch.where(valid, target, 0)[..., None])[..., 0]
        results = logp, -(logps.exp() * logps).sum(-1), torch.logsumexp(z, -1)
        return tuple(torch.where(valid, r, 0.0) for r in results)

    return formula


def reduced(losses, labels, reduction, ignore_index=-100, batch=None):
    """The loss of losses (..., C)."""
    count = losses[..., 0].numel()
    if labels is not None:
        losses = torch.where((labels != ignore_index)[..., None], losses, 0.0)
        count = (labels != ignore_index).sum()
    elif reduction == "batchmean" and batch:
        count = batch
    divisor = {"mean": count * losses.shape[-1], "batchmean": count, "sum": 1}
    return losses if reduction == "none" else losses.sum() / divisor[reduction]


def kl_div(reduction="mean", log_target=False, ignore_index=-100, eps=0.0):
    """torch's, reduced by hand where rows are ignored."""

    def formula(x, target, labels=None):
        if eps:
            losses = target * (target.clamp(min=eps).log() - x)
        else:
            losses = functional.kl_div(x, target, reduction="none", log_target=log_target)
        return reduced(losses, labels, reduction, ignore_index, batch=x.shape[0])

    return formula


def jsd_of_each(log_q, log_p, beta):
    """Agarwal et al. 2024 (arXiv 2306.13649), equation 1, and the two Kullback-Leibler divergences."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return p * (log_p - log_q)
    if beta == 1:
        return q * (log_q - log_p)
    log_m = torch.log(beta * p + (1 - beta) * q)
    return beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)


def jsd(beta=0.5, reduction="batchmean", ignore_index=-100):
    return lambda log_q, log_p, labels=None: reduced(jsd_of_each(log_q, log_p, beta), labels, reduction, ignore_index)


def tvd(reduction="batchmean", ignore_index=-100):
    return lambda p, q, labels=None: reduced((p - q).abs() / 2, labels, reduction, ignore_index)


def linear_jsd(beta=0.5, temperature=1.0, reduction="batchmean", ignore_index=-100):
    """Of logits that exist whole."""

    def formula(x, w, y, v, b=None, c=None, labels=None):
        logs = (functional.linear(*head).div(temperature).log_softmax(-1) for head in ((x, w, b), (y, v, c)))
        losses = jsd_of_each(*logs, beta)
        return (
            reduced(losses, labels, "none", ignore_index).sum(-1)
            if reduction == "none"
            else reduced(losses, labels, reduction, ignore_index)
        )

    return formula


def linear_kl_div(temperature=1.0, reduction="batchmean", ignore_index=-100, eps=0.0):
    """Of logits that exist whole."""

    def formula(x, w, target, b=None, labels=None):
        logs = functional.linear(x, w, b).div(temperature).log_softmax(-1)
        losses = torch.where(target == 0, 0.0, target * (target.clamp(min=eps).log() - logs))
        return (
            reduced(losses, labels, "none", ignore_index).sum(-1)
            if reduction == "none"
            else reduced(losses, labels, reduction, ignore_index)
        )

    return formula


def cross_entropy_tvd(ignore_index=-100):
    def formula(x, teacher, target):
        loss = functional.cross_entropy(x, target, ignore_index=ignore_index, reduction="none")
        distance = (x.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2
        return loss, torch.where(target != ignore_index, distance, 0.0)

    return formula


def packed_glu(activation="silu"):
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}

    def formula(x):
        gate, up = x.chunk(2, -1)
        if activation == "silu":
            return functional.silu(gate) * up
        return functional.gelu(gate, approximate=approximate[activation]) * up

    return formula


def moe_permute(x, order, position):
    return x[order // position.shape[1]]


def moe_unpermute(x, weight, order, position):
    """One slot of a token after another, each where it is."""
    y = x.new_zeros(position.shape[0], x.shape[1])
    for rows, weights in zip(position.unbind(1), weight.unbind(1), strict=True):
        there = torch.nonzero(rows >= 0)[:, 0]
        y = y.index_add(0, there, weights[there, None] * x[rows[there]])
    return y


class Rounded(torch.autograd.Function):
    """The softmax of x, and the gradient of what is kept of it: its numbers rounded to dtype."""

    @staticmethod
    def forward(ctx, x, dtype):
        y = x.softmax(-1)
        ctx.save_for_backward(y.to(dtype).to(x.dtype))
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return y * (dy - (dy * y).sum(-1, keepdim=True)), None


def sparsemax(x):
    """Martins and Astudillo 2016 (arXiv 1602.02068), algorithm 1."""
    z = x.sort(-1, descending=True).values
    k = torch.arange(1, x.shape[-1] + 1, device=x.device)
    kept = 1 + k * z > z.cumsum(-1)
    threshold = (torch.where(kept, z, 0).sum(-1, keepdim=True) - 1) / kept.sum(-1, keepdim=True)
    return functional.relu(x - threshold)


def gated_rms_norm(groups=1, gate_first=False, activation="silu", eps=1e-6):
    def formula(x, gate, weight):
        gates = {"silu": functional.silu, "sigmoid": torch.sigmoid}[activation](gate)
        u = (x * gates if gate_first else x).unflatten(-1, (groups, x.shape[-1] // groups))
        y = (u / torch.sqrt(u.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
        return y if gate_first else y * gates

    return formula


def modulated_rms_norm(eps=2**-23, offset=0.0):
    def formula(x, scale, shift=None, weight=None):
        def met(t):
            return t.view(*t.shape[:-1], *[1] * (x.dim() - t.dim()), t.shape[-1])

        y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
        y = (y if weight is None else y * (offset + weight)) * (1 + met(scale))
        return y if shift is None else y + met(shift)

    return formula


def attn_res(eps=1e-6):
    """Kimi Team 2026 (arXiv 2603.15031)."""

    def formula(v, query, weight):
        keys = v / torch.sqrt(v.square().mean(-1, keepdim=True) + eps) * weight
        return ((keys @ query).softmax(0)[..., None] * v).sum(0)

    return formula


def mhc_coeffs(tmax=20, rms_eps=1e-6, pre_eps=0.0, sinkhorn_eps=1e-6, post_mult=2.0):
    """Xie et al. 2025 (arXiv 2512.24880), with Liger-Kernel's constants: in its first iteration rows are divided by softmax."""

    def formula(x, phi, b, alpha_pre, alpha_post, alpha_res):
        hc, xs = x.shape[-2], x.flatten(-2)
        mix = (xs / torch.sqrt(xs.square().mean(-1, keepdim=True) + rms_eps)) @ phi
        (pre, post, res), (b_pre, b_post, b_res) = (t.split([hc, hc, hc * hc], -1) for t in (mix, b))
        matrix = (alpha_res * res + b_res).unflatten(-1, (hc, hc)).softmax(-1) + sinkhorn_eps
        for n in range(2 * tmax - 1):  # columns, rows, columns, ...
            matrix = matrix / (matrix.sum(-1 if n % 2 else -2, keepdim=True) + sinkhorn_eps)
        return torch.sigmoid(alpha_pre * pre + b_pre) + pre_eps, post_mult * torch.sigmoid(alpha_post * post + b_post), matrix

    return formula


def mhc_pre(x, h_pre):
    return torch.einsum("...i,...in->...n", h_pre, x)


def mhc_post_res(x, f_out, h_post, h_res):
    return torch.einsum("...oi,...in->...on", h_res, x) + torch.einsum("...o,...n->...on", h_post, f_out)


def poly_norm(eps=1e-6):
    """Zhuo et al. 2024 (arXiv 2411.03884), as their code has it."""

    def formula(x, weight, bias):
        normal = [u / torch.sqrt(u.square().mean(-1, keepdim=True) + eps) for u in (x**3, x**2, x)]
        return sum(w * u for w, u in zip(weight, normal, strict=True)) + bias.view(())

    return formula


class Through(torch.autograd.Function):
    """x and its gradient, rounded to dtype."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        return dy.to(ctx.dtype).to(dy.dtype), None


def multi_token_attention(dtype, sparse=False, **convolution):
    """Golovneva et al. 2025 (arXiv 2504.00927), section 3.1, of probabilities that are kept in dtype."""

    def formula(scores, weight, bias=None):
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        masked = scores.masked_fill(later, -torch.inf)
        probabilities = sparsemax(masked) if sparse else Rounded.apply(masked, dtype)
        y = functional.conv2d(Through.apply(probabilities, dtype), weight, bias, **convolution)
        return y.masked_fill(torch.ones(y.shape[-2:], dtype=torch.bool, device=y.device).triu(1), 0.0)

    return formula


def neighborhood_attention(kernel_size=7, dilation=1, scale=None):
    """Attention with a mask: the window of Liger-Kernel, which is cut off at the ends."""

    def formula(q, k, v):
        token = torch.arange(q.shape[2], device=q.device)
        away = (token[:, None] - token).abs()
        near = (away <= kernel_size // 2 * dilation) & (away % dilation == 0)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        return scores.masked_fill(~near, -torch.inf).softmax(-1) @ v

    return formula


def softmax(dtype):
    return lambda x: Rounded.apply(x, dtype)
