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
