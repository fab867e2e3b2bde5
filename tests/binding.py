"""What the tests of binding share."""

import builtins
import types

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)

import liger_aot

from tiny import VOCABULARY
from tiny import batch
from tiny import build
from tiny import check_equal
from tiny import check_identical
from tiny import operators
from tiny import step

LAYERS = {"rms_norm_fwd", "rope_fwd", "swiglu_fwd", "rms_norm_bwd", "rope_bwd", "swiglu_bwd"}


def rows(report, path):
    return [row for row in report if row.path == path]


def row(report, path):
    (found,) = rows(report, path)
    return found


def check_left(made, path, bound_elsewhere="model.layers.0.input_layernorm"):
    """The module at path keeps its class, for a reason; the rest is bound, and computes what it did."""
    model = made()
    kind = type(model.get_submodule(path))
    report = liger_aot.bind(model)
    assert type(model.get_submodule(path)) is kind
    for found in rows(report, path):
        assert found.status != "bound"
        assert found.why
    assert row(report, bound_elsewhere).status == "bound"
    check_equal(step(model, **batch()), step(made(), **batch()))
    return report


def made(family="llama", **options):
    model = build(family, **options)
    if family == "bart":
        model.final_logits_bias.copy_(torch.linspace(-1, 1, VOCABULARY))
    return model


def with_loss(model, loss):
    """Model, of a class whose loss passes for one of transformers' own; what is of others gets logits."""

    def loss_function(*args, **kwargs):
        return loss(*args, **kwargs)

    scope = {"__name__": "transformers.loss.of_a_test", "__builtins__": builtins}
    passing = types.FunctionType(loss_function.__code__, scope, closure=loss_function.__closure__)
    model.__class__ = type(type(model).__name__, (type(model),), {"loss_function": staticmethod(passing)})
    return model


def bound(family="llama", flags=None, **options):
    model = made(family, **options)
    return model, liger_aot.bind(model, **(flags or {}))


def flat(z, y, **options):
    return F.cross_entropy(z.view(-1, z.shape[-1]), y.view(-1), **options)


def check_runs_bound(model, plain):
    with operators() as seen:
        check_equal(step(model, **batch()), plain)
    assert set(seen) >= LAYERS
    assert "linear_cross_entropy_fwd" in seen


def check_runs_plain(model, plain):
    with operators() as seen:
        check_identical(step(model, **batch()), plain)
    assert not seen
