"""What the losses share: log-probabilities of tokens and sequences, from a head whose logits never exist whole.

Everywhere `compiled` has no effect, because nothing is compiled inside a call: compile the model and the loss with it. Nor has
`chunk_size`, but in the distillation losses: linear_logprob takes chunks of its own size.
"""

import torch
from torch.nn.functional import logsigmoid

from ..functional import linear_logprob
from ..ops._linear import check_linear


class Loss(torch.nn.Module):
    """A module that keeps the options of its function as attributes."""

    def __init__(self, **options):
        super().__init__()
        self._names = (*options,)
        for name, value in options.items():
            setattr(self, name, value)

    @property
    def options(self):
        return {name: getattr(self, name) for name in self._names}


def check_positive(op, **values):
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{op}: {name} must be positive, got {value}")


def check_sequences(op, name, x, weight, bias, prefix=""):
    """x (batch, length, H), weight (V, H) and bias (V,) agree."""
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} must be (batch, length, H), got {tuple(x.shape)}; unflatten it, one row a sequence")
    check_linear(op, name, x, weight, bias, prefix)


def check_reference(op, use_ref_model, input, weight, **others):
    """A reference is there where one is asked for, and nowhere else: it must not be dropped in silence."""
    given = [name for name, tensor in {"ref_input": input, "ref_weight": weight, **others}.items() if tensor is not None]
    if use_ref_model and (input is None or weight is None):
        raise ValueError(
            f"{op}: ref_input and ref_weight must be given where use_ref_model is True, got {', '.join(given) or 'neither'}; "
            "give both, or use_ref_model=False"
        )
    if not use_ref_model and given:
        raise ValueError(f"{op}: {', '.join(given)} must be None where use_ref_model is False; set use_ref_model=True")


@torch.no_grad()
def reference_logps(op, x, weight, bias, target, **options):
    """(batch, length): the log-probabilities that a reference gives the tokens, without gradients."""
    check_sequences(op, "ref_input", x, weight, bias, "ref_")
    if x.shape[:2] != target.shape:
        raise ValueError(
            f"{op}: ref_input must be {tuple(target.shape)} sequences and tokens like _input, got {tuple(x.shape[:2])}"
        )
    return linear_logprob(x, weight, target, bias=bias, **options)[0]


def sequence_logps(logps, valid, average):
    """(batch,): the sum, or the mean, of the log-probabilities of each sequence's tokens; 0 for one without tokens."""
    total = logps.sum(-1)
    return total / valid.sum(-1).clamp(min=1) if average else total


@torch.no_grad()
def logits_sums(x, weight, bias):
    """(batch,): the sum of all logits of each sequence, from sums over tokens and vocabulary, not from logits."""
    sums = x.sum(1, dtype=torch.float32) @ weight.sum(0, dtype=torch.float32)
    return sums if bias is None else sums + x.shape[1] * bias.sum(dtype=torch.float32)


def smoothed(margin, label_smoothing):
    """-log σ(margin), where a share label_smoothing of the preferences is taken to be the other way round."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
