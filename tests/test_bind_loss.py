"""The loss of a bound model: without logits where transformers' own code allows it, and never another number."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from transformers.loss.loss_utils import ForCausalLMLoss

import liger_aot
from liger_aot.bind._lazy import LazyLogits

from tiny import VOCABULARY
from tiny import WIDTH
from tiny import batch
from tiny import build
from tiny import check_as_exact
from tiny import check_equal
from tiny import materialised
from tiny import nodes
from tiny import operators
from tiny import recorder
from tiny import step

FAMILIES = ["llama", "gemma2", "cohere", "granite", "phi3", "mixtral", "gpt2", "bart", "t5", "bert", "olmo2"]


def made(family="llama", **options):
    model = build(family, **options)
    if family == "bart":
        model.final_logits_bias.copy_(torch.linspace(-1, 1, VOCABULARY))
    return model


def with_loss(model, loss):
    """Model, of a class that has this loss as its own; what is assigned to a model gets logits."""
    model.__class__ = type(type(model).__name__, (type(model),), {"loss_function": staticmethod(loss)})
    return model


def bound(family="llama", flags=None, **options):
    model = made(family, **options)
    return model, liger_aot.bind(model, **(flags or {}))


@pytest.fixture
def forbidden(monkeypatch):
    """Whoever computes logits fails."""
    monkeypatch.setattr(LazyLogits, "compute", lambda *args, **kwargs: pytest.fail("logits were computed"))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_never_computed(family, forbidden):
    model, report = bound(family)
    with operators() as seen:
        check_equal(step(model, **batch()), step(made(family), **batch()))
    assert "linear_cross_entropy_fwd" in seen
    assert report.counts == {"fused": 1}
    assert model(**batch()).logits is None


@pytest.mark.parametrize("family", FAMILIES)
def test_without_labels_and_in_evaluation_logits_are_logits(family):
    model, report = bound(family)
    plain = made(family)
    inputs = batch()
    if family in ("bart", "t5"):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    alone = {name: value for name, value in inputs.items() if name != "labels"}
    for training, given in (True, alone), (False, alone), (False, inputs):
        got, expected = (m.train(training)(**given) for m in (model, plain))
        assert isinstance(got.logits, torch.Tensor)
        check_equal({"logits": got.logits}, {"logits": expected.logits})
        if "labels" in given:
            check_equal({"loss": got.loss}, {"loss": expected.loss})
    assert not report.counts["fused"]


def test_the_routers_loss_is_transformers_own():
    model, report = bound("mixtral")
    got, expected = model(**batch()), made("mixtral")(**batch())
    assert expected.aux_loss > 0
    torch.testing.assert_close(got.aux_loss, expected.aux_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
    assert report.counts["fused"] == 1


INPUTS = {
    "num_items_in_batch, int": {"num_items_in_batch": 7},
    "num_items_in_batch, tensor": {"num_items_in_batch": torch.tensor(7)},
    "ignore_index": {"labels": batch()["labels"].clamp(min=0), "ignore_index": int(batch()["labels"][1, 3])},
    "shift_labels": {"shift_labels": batch()["labels"].flip(1)},
    "shift_labels, num_items_in_batch": {"shift_labels": batch()["labels"].flip(1), "num_items_in_batch": torch.tensor(5)},
    "logits_to_keep": {"logits_to_keep": 5, "shift_labels": batch()["labels"][:, :5].contiguous()},
    "logits_to_keep, indices": {
        "logits_to_keep": torch.tensor([0, 3, 8]),
        "shift_labels": batch()["labels"][:, :3].contiguous(),
    },
    "attention_mask": {"attention_mask": torch.ones(2, 11, dtype=torch.long).index_fill(1, torch.tensor([0, 1]), 0)},
    "inputs_embeds": {"input_ids": None, "inputs_embeds": torch.linspace(-1, 1, 2 * 11 * WIDTH).view(2, 11, WIDTH)},
}


@pytest.mark.parametrize("given", INPUTS.values(), ids=INPUTS)
def test_transformers_own_arguments_of_the_loss_are_obeyed(given, forbidden):
    model, report = bound()
    expected = step(made(), **batch() | given)
    check_equal(step(model, **batch() | given), expected)
    assert expected["loss"] != step(made(), **batch())["loss"]
    assert report.counts == {"fused": 1}


def test_logits_to_keep_of_another_length_than_labels_is_refused_as_ever():
    for model in made(), bound()[0]:
        with pytest.raises(ValueError, match=r"batch_size|target"):
            model(**batch(), logits_to_keep=5)


def test_labels_by_position(forbidden):
    model, report = bound()
    inputs = batch()
    out = model(inputs["input_ids"], None, None, None, None, inputs["labels"])
    check_equal({"loss": out.loss.detach()}, {"loss": made()(**inputs).loss.detach()})
    assert out.logits is None
    assert report.counts == {"fused": 1}


def test_return_dict_false(forbidden):
    model, _ = bound()
    out, expected = model(**batch(), return_dict=False), made()(**batch(), return_dict=False)
    assert type(out) is tuple
    assert len(out) == len(expected)
    check_equal({"loss": out[0].detach()}, {"loss": expected[0].detach()})
    assert out[1] is None


def test_shift_labels_without_labels_leave_the_logits_to_the_caller():
    """As transformers' own context and sequence parallelism call it: they compute the loss themselves."""
    model, _ = bound()
    given = {"input_ids": batch()["input_ids"], "shift_labels": batch()["labels"]}
    out = model(**given)
    assert out.loss is None
    check_equal({"logits": out.logits}, {"logits": made()(**given).logits})


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5", "mixtral"])
def test_skip_logits_is_honoured(family):
    model, report = bound(family)
    expected = made(family).eval()(**batch())
    out = model.train()(**batch(), skip_logits=False)
    assert isinstance(out.logits, torch.Tensor)
    check_equal({"loss": out.loss, "logits": out.logits}, {"loss": expected.loss, "logits": expected.logits})
    report.counts.clear()
    out = model.eval()(**batch(), skip_logits=True)
    assert out.logits is None
    check_equal({"loss": out.loss}, {"loss": expected.loss})
    assert report.counts == {"fused": 1}
    assert model.train()(**batch(), skip_logits=True).logits is None
    assert isinstance(model.eval()(**batch(), skip_logits=False).logits, torch.Tensor)
    assert isinstance(model.eval()(**batch()).logits, torch.Tensor)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "bart", "t5", "gpt2"])
def test_kept_logits_are_tensors_beside_the_fused_loss(family):
    model, report = bound(family, {"keep_logits": True})
    got, expected = model(**batch()), made(family)(**batch())
    assert isinstance(got.logits, torch.Tensor)
    check_equal({"loss": got.loss, "logits": got.logits}, {"loss": expected.loss, "logits": expected.logits})
    assert report.counts["fused"] == 1
    check_equal(step(model, **batch()), step(made(family), **batch()))
    assert isinstance(model(**batch(), return_dict=False)[1], torch.Tensor)


def test_kept_logits_carry_gradients():
    model, _ = bound(flags={"keep_logits": True})
    gradients = []
    for each in model, made():
        out = each(**batch())
        (out.loss + out.logits.square().mean()).backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    check_equal(*gradients)


# --- A loss of the user's own


@pytest.mark.parametrize("first", ["assign", "bind"])
def test_an_assigned_loss_function_is_called_with_logits(first):
    def run(act):
        calls = []

        def loss_function(logits, labels, vocab_size, **_):
            calls.append((type(logits), tuple(logits.shape)))
            return (logits[..., :-1, :] * 2).square().mean() + torch.cat([logits]).abs().mean() + 2 * logits.mean()

        model = made()
        acts = [lambda: setattr(model, "loss_function", loss_function), lambda: act(model)]
        for each in acts if first == "assign" else reversed(acts):
            each()
        assert model.loss_function is loss_function
        return step(model, **batch()), calls, model

    got, calls, model = run(liger_aot.bind)
    expected, plain_calls, _ = run(lambda model: None)
    check_equal(got, expected)
    assert calls == plain_calls == [(torch.Tensor, (2, 11, VOCABULARY))]
    assigned = model.loss_function
    liger_aot.unbind(model)
    assert model.loss_function is assigned


class CrossEntropy(torch.autograd.Function):
    """As in many programs: torch hands it whatever it is called with, and gives gradients for tensors alone."""

    @staticmethod
    def forward(ctx, logits, target):
        ctx.save_for_backward(logits.softmax(-1) - F.one_hot(target, VOCABULARY))
        return F.cross_entropy(logits, target, reduction="sum")

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None


ASSIGNED = {
    "autograd.Function": CrossEntropy.apply,
    "liger_aot's": liger_aot.cross_entropy,
    "reentrant checkpoint": lambda z, y: torch.utils.checkpoint.checkpoint(F.cross_entropy, z, y, use_reentrant=True),
    "traced": lambda z, y: torch.jit.trace(F.cross_entropy, (z.detach(), y), check_trace=False)(z, y),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("flags", [{}, {"linear_cross_entropy": False, "cross_entropy": True}], ids=str)
@pytest.mark.parametrize("loss", ASSIGNED.values(), ids=ASSIGNED)
def test_an_assigned_loss_function_may_be_what_takes_nothing_but_tensors(loss, flags):
    model, report = bound(flags=flags)
    plain = made()
    model.loss_function = plain.loss_function = lambda logits, labels, **_: loss(
        logits.view(-1, VOCABULARY), labels.clamp(min=0).view(-1)
    )
    check_equal(step(model, **batch()), step(plain, **batch()))
    assert report.counts == {"materialised: an assigned loss_function": 1}


def test_transformers_own_function_assigned_stays_fused(forbidden):
    model, report = bound()
    model.loss_function = ForCausalLMLoss
    check_equal(step(model, **batch()), step(made(), **batch()))
    assert report.counts == {"fused": 1}


def flat(z, y, **options):
    return F.cross_entropy(z.view(-1, z.shape[-1]), y.view(-1), **options)


BIAS = torch.linspace(-1, 1, VOCABULARY)
LEARNT = torch.linspace(-1, 1, VOCABULARY).requires_grad_()
MIX = torch.linspace(-1, 1, VOCABULARY * 3).view(VOCABULARY, 3)
ROWS = torch.linspace(0.5, 1.5, 22).view(2, 11, 1)

FUSED = {
    "as it is": flat,
    "float": lambda z, y: flat(z.float(), y),
    "to its own dtype": lambda z, y: flat(z.to(torch.float32), y),
    "to its own device": lambda z, y: flat(z.to(y.device), y),
    "contiguous": lambda z, y: flat(z.contiguous(), y),
    "made contiguous where it is not": lambda z, y: flat(z if z.is_contiguous() else z.contiguous(), y),
    "asked of what was made of them": lambda z, y: (
        flat((z / 2).float(), y) if (z / 2).view(2, -1, 97).is_contiguous() else None
    ),
    "asked of a copied part": lambda z, y: (
        flat(z[..., :50].contiguous(), y.clamp(max=49)) if z[:, 1:].contiguous().is_contiguous() else None
    ),
    "reshape": lambda z, y: F.cross_entropy(z.reshape(-1, VOCABULARY), y.reshape(-1)),
    "a shape in a tuple": lambda z, y: F.cross_entropy(z.view((22, VOCABULARY)), y.view(-1)),
    "input by name": lambda z, y: F.cross_entropy(input=z.view(-1, VOCABULARY), target=y.view(-1)),
    "module": lambda z, y: torch.nn.CrossEntropyLoss()(z.view(22, VOCABULARY), y.view(22)),
    "sum": lambda z, y: flat(z, y, reduction="sum"),
    "label smoothing": lambda z, y: flat(z, y, label_smoothing=0.1),
    "ignored index": lambda z, y: flat(z, y.clamp(min=0), ignore_index=0),
    "times a number": lambda z, y: flat(z * 0.5, y),
    "a number times": lambda z, y: flat(2 * z, y),
    "over a number": lambda z, y: flat(z / 3, y),
    "scaled twice": lambda z, y: flat(z * 3 / 2, y),
    "softcap": lambda z, y: flat(torch.tanh(z / 2) * 2, y),
    "softcap, written as a method": lambda z, y: flat((z / 2).tanh() * 2, y),
    "scale, then softcap": lambda z, y: flat(torch.tanh(z * 4 / 2) * 2, y),
    "softcap, then float": lambda z, y: flat((torch.tanh(z / 2) * 2).float(), y),
    "constant bias": lambda z, y: flat(z + BIAS, y),
    "vocabulary slice": lambda z, y: flat(z[..., :50], y.clamp(max=49)),
}


@pytest.mark.parametrize("loss", FUSED.values(), ids=FUSED)
def test_known_operations_stay_fused(loss, forbidden):
    model, plain = (with_loss(made(num_hidden_layers=1), lambda logits, labels, **_: loss(logits, labels)) for _ in range(2))
    report = liger_aot.bind(model)
    check_equal(step(model, **batch()), step(plain, **batch()))
    assert report.counts == {"fused": 1}


def both(loss):
    """What a step of a bound and of a plain model gives that has this loss."""
    model, plain = (with_loss(made(num_hidden_layers=1), lambda logits, labels, **_: loss(logits, labels)) for _ in range(2))
    report = liger_aot.bind(model)
    results = []
    for each in model, plain:
        LEARNT.grad = None
        results.append(step(each, **batch()) | {"learnt": LEARNT.grad})
    return results, report


def after(change, loss=flat):
    """The loss after logits were changed in place, whatever the change returned."""

    def run(z, y):
        change(z)
        return loss(z, y)

    return run


def set_item(z):
    z[..., 3] = -1e4


def set_rows(z):
    z[:, 2:4] = 0.5


def halve_a_part(z):
    z[:, :, :50] /= 2


def seen_by_a_view(z, y):
    rows = z.view(-1, VOCABULARY)
    z.div_(2)
    return F.cross_entropy(rows, y.view(-1))


def seen_through_a_view(z, y):
    z.view(-1, VOCABULARY).div_(2)
    return flat(z, y)


def scaled_before(z, y):
    scaled, biased = z * 2, z + BIAS
    z.zero_()
    return flat(scaled, y) + flat(torch.tanh(biased / 2) * 2, y) + z.sum()


def cut_before(z, y):
    part, rows = z[..., :50], z[:, 1:]
    z.add_(BIAS)
    return flat(part, y.clamp(max=49)) + flat(rows.contiguous(), y[:, 1:].contiguous())


def masked_before(z, y):
    """Unlike a slice, what a mask or indices choose is a copy."""
    chosen, some = z[y >= 0], z[:, torch.tensor([1, 3])]
    z.zero_()
    return F.cross_entropy(chosen, y[y >= 0]) + flat(some, y[:, 5:7].contiguous())


def quiet_clamp(z):
    with torch.no_grad():
        z.clamp_(-0.1, 0.1)


def each_row(z, y):
    return sum(F.cross_entropy(row, labels) for row, labels in zip(z, y.clamp(min=0), strict=True))


UNKNOWN = {
    # changed in place
    "setitem": after(set_item),
    "setitem of rows": after(set_rows),
    "augmented part": after(halve_a_part),
    "div_": after(lambda z: z.div_(2)),
    "what mul_ returns": lambda z, y: flat(z.mul_(2), y),
    "clamp_ without gradients": after(quiet_clamp),
    "masked_fill_": after(lambda z: z.masked_fill_(BIAS > 0.5, -1e4)),
    "index_fill_": after(lambda z: z.index_fill_(-1, torch.tensor([1, 5]), -1e4)),
    "a function in place": after(lambda z: F.relu(z, inplace=True)),
    "a part zeroed": after(lambda z: z[..., :50].zero_()),
    "an older view sees it": seen_by_a_view,
    "through a view": seen_through_a_view,
    "scaled, then in place": lambda z, y: after(lambda s: s.add_(1.0).mul_(BIAS))(z * 2, y),
    "scaled before it was changed": scaled_before,
    "cut before it was changed": cut_before,
    "masked before it was changed": masked_before,
    "a hook on its gradient": after(lambda z: z.register_hook(lambda gradient: 2 * gradient)),
    # shapes
    "transposed": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "permuted": lambda z, y: F.cross_entropy(z.permute(0, 2, 1), y),
    "mT": lambda z, y: F.cross_entropy(z.mT, y),
    "another view": lambda z, y: F.cross_entropy(z.view(2, -1)[:, :VOCABULARY], y[:, 5]),
    "classes in the middle": lambda z, y: F.cross_entropy(z, torch.arange(VOCABULARY).remainder(11).expand(2, VOCABULARY)),
    "one dimension": lambda z, y: z.view(-1).square().mean(),
    "unsqueezed": lambda z, y: z.unsqueeze(1).square().mean(),
    "split": lambda z, y: z.split(40, dim=-1)[1].square().mean(),
    "unbound": lambda z, y: torch.stack(z.unbind(1)[1:]).square().mean(),
    # parts
    "upper vocabulary": lambda z, y: flat(z[..., 50:], y.clamp(max=20)),
    "every other word": lambda z, y: flat(z[..., ::2], y.clamp(max=40)),
    "some words": lambda z, y: z[..., torch.tensor([1, 2])].square().mean(),
    "one word": lambda z, y: z[..., 7].square().mean(),
    "gather": lambda z, y: z.gather(-1, y.clamp(min=0)[..., None]).mean(),
    "None in the index": lambda z, y: z[:, None].square().mean(),
    # arithmetic
    "plus a number": lambda z, y: (z + 1).square().mean(),
    "minus": lambda z, y: (1 - z).square().mean() + (z - 1).abs().mean(),
    "negative": lambda z, y: (-z).exp().mean(),
    "power": lambda z, y: (z**2).mean() + (2**z).mean(),
    "over logits": lambda z, y: (1 / (z + 100)).mean(),
    "matmul": lambda z, y: (z @ MIX).square().mean() + (MIX.T @ z.mT).square().mean(),
    "compared": lambda z, y: (z * (z > 0)).mean() + (z * (z == z.amax(-1, keepdim=True))).sum() + (z * (z <= 0.1)).mean(),
    "per row": lambda z, y: flat(z * ROWS, y),
    "per row bias": lambda z, y: flat(z + ROWS, y),
    "to a tensor": lambda z, y: (BIAS + z).square().mean() + (BIAS * z).mean(),
    "added to itself": lambda z, y: flat(z + z, y),
    # casts and caps that are not what they look like
    "rounded": lambda z, y: flat(z.to(torch.bfloat16).float(), y),
    "bfloat16": lambda z, y: flat(z.bfloat16(), y).float(),
    "double": lambda z, y: flat(z.double(), y).float(),
    "tanh alone": lambda z, y: flat(torch.tanh(z), y),
    "twice capped": lambda z, y: flat(torch.tanh(torch.tanh(z / 2) * 2 / 3) * 3, y),
    "bias between cap and loss": lambda z, y: flat(torch.tanh((z + BIAS) / 2) * 2 + BIAS, y),
    # functions
    "argmax": lambda z, y: flat(z, z.argmax(-1)),
    "topk": lambda z, y: z.topk(3, dim=-1).values.mean() + torch.topk(z, 2).values.mean(),
    "cat": lambda z, y: torch.cat([z, z.detach()], dim=1).square().mean(),
    "stack": lambda z, y: torch.stack([z, 2 * z]).square().mean(),
    "where": lambda z, y: torch.where(BIAS > 0, z, 0.0).square().mean(),
    "einsum": lambda z, y: torch.einsum("btv,vk->bk", z, MIX).square().mean(),
    "log_softmax": lambda z, y: F.nll_loss(F.log_softmax(z, dim=-1).view(-1, VOCABULARY), y.view(-1)),
    "logsumexp": lambda z, y: torch.logsumexp(z, -1).square().mean() + z.logsumexp(-1).mean(),
    "kl_div": lambda z, y: F.kl_div(z.log_softmax(-1), z.detach().roll(1, 1).softmax(-1), reduction="batchmean"),
    "linear": lambda z, y: F.linear(z, MIX.T).square().mean(),
    "number": lambda z, y: z.mean() * float(z.detach().sum()),
    "numpy": lambda z, y: z.mean() * float(z.detach().numpy().sum()),
    "formatted": lambda z, y: z.mean() * float(f"{z.std():.3f}"),
    "targets of probabilities": lambda z, y: F.cross_entropy(z.view(-1, VOCABULARY), MIX[:, 1].softmax(0).expand(22, -1)),
    "reduce=False": lambda z, y: flat(z, y, reduce=False).sum(),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("loss", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_operations_give_the_plain_result_and_are_counted(loss):
    results, report = both(loss)
    check_equal(*results)
    assert materialised(report)
    assert set(report.counts) - {"fused"} == set(materialised(report))


EITHER = {
    "iterated": each_row,
    "a cap of two numbers": lambda z, y: flat(torch.tanh(z / 2) * 3, y),
    "learnt bias": lambda z, y: flat(z + LEARNT, y),
    "rows": lambda z, y: flat(z[:, :-1].contiguous(), y[:, 1:].contiguous()),
    "rows, ellipsis": lambda z, y: flat(z[..., :-1, :].reshape(-1, VOCABULARY), y[..., 1:].reshape(-1)),
    "rows from the end": lambda z, y: flat(z[:, -5:].contiguous(), y[:, -5:].contiguous()),
    "rows by a mask": lambda z, y: F.cross_entropy(z[y >= 0], y[y >= 0]),
    "rows by a mask, shifted": lambda z, y: F.cross_entropy(z[:, :-1][y[:, 1:] >= 0], y[:, 1:][y[:, 1:] >= 0]),
    "one sample": lambda z, y: F.cross_entropy(z[1], y[1]),
    "last sample": lambda z, y: F.cross_entropy(z[-1], y[-1]),
    "a row of each": lambda z, y: F.cross_entropy(z[:, -1], y[:, -1]),
    "rows by indices": lambda z, y: F.cross_entropy(z[torch.arange(2), torch.tensor([3, 5])], y[:, 7]),
    "flattened": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "flattened by torch": lambda z, y: F.cross_entropy(torch.flatten(z, 0, 1), y.flatten()),
    "size by name": lambda z, y: F.cross_entropy(z.view(size=(22, VOCABULARY)), y.view(-1)),
    "float by torch": lambda z, y: F.cross_entropy(torch.reshape(z, (-1, VOCABULARY)), y.flatten()),
    "to, by name": lambda z, y: flat(z.to(dtype=torch.float32, copy=True), y),
    "to, like another": lambda z, y: flat(z.to(BIAS), y),
    "type": lambda z, y: flat(z.type(torch.float32), y),
    "scaled by a scalar tensor": lambda z, y: flat(z * torch.tensor(0.5), y),
    "scaled by torch": lambda z, y: flat(torch.div(torch.mul(z, 3), 2), y),
    "divided and rounded": lambda z, y: torch.div(z * 100, 3, rounding_mode="floor").mean() + z.mean(),
    "scaled by a negative": lambda z, y: flat(z * -2, y),
    "scaled by zero": lambda z, y: flat(z * 0, y),
    "scaled by True": lambda z, y: flat(z * True, y),
    "scaled after the cap": lambda z, y: flat(torch.tanh(z / 2) * 2 * 3, y),
    "negative cap": lambda z, y: flat(torch.tanh(z / -2) * -2, y),
    "cap of a negative": lambda z, y: flat(torch.tanh(z / -2) * 2, y),
    "scale, then bias": lambda z, y: flat(z * 2 + BIAS, y),
    "bias, then scale": lambda z, y: flat((z + BIAS) * 2, y),
    "bias, then cap": lambda z, y: flat(torch.tanh((z + BIAS) / 2) * 2, y),
    "two biases": lambda z, y: flat(z + BIAS + BIAS.flip(0), y),
    "bias of three dimensions": lambda z, y: flat(z + BIAS.view(1, 1, -1), y),
    "bias of one number": lambda z, y: flat(z + BIAS[:1], y),
    "bias subtracted": lambda z, y: flat(z - BIAS, y),
    "slice of a slice": lambda z, y: flat(z[..., :80][..., :50], y.clamp(max=49)),
    "slice by a negative end": lambda z, y: flat(z[..., :-7], y.clamp(max=89)),
    "slice that is all": lambda z, y: flat(z[..., :VOCABULARY], y),
    "slice beyond the end": lambda z, y: flat(z[..., :1000], y),
    "slice and bias": lambda z, y: flat(z[..., :50] + BIAS[:50], y.clamp(max=49)),
    "bias and slice": lambda z, y: flat((z + BIAS)[..., :50], y.clamp(max=49)),
    "slice, scale and cap": lambda z, y: flat(torch.tanh(z[..., :50] * 3 / 2) * 2, y.clamp(max=49)),
    "augmented": lambda z, y: flat(after_augmenting(z), y),
    "class weights": lambda z, y: flat(z, y, weight=BIAS + 2),
    "weights by position": lambda z, y: F.cross_entropy(z.view(-1, VOCABULARY), y.view(-1), BIAS + 2),
    "no reduction": lambda z, y: (flat(z, y, reduction="none") * ROWS.view(-1)).sum(),
    "no reduction, dot": lambda z, y: flat(z, y, reduction="none").square().mean(),
    "twice": lambda z, y: flat(z, y) + flat(z, y.clamp(min=0).flip(1)),
    "capped and not": lambda z, y: flat(torch.tanh(z / 2) * 2, y) + flat(z, y),
    "and more": lambda z, y: flat(z, y) + 1e-2 * z.logsumexp(-1).square().mean(),
    "detached": lambda z, y: flat(z, y) * flat(z.detach(), y),
    "to a device by name": lambda z, y: flat(z.to("cpu"), y),
    "checkpointed": lambda z, y: torch.utils.checkpoint.checkpoint(flat, z * 2, y, use_reentrant=False),
    "asked about": lambda z, y: flat(z, y) * asked(z),
    "asked of a part": lambda z, y: flat(z, y) * (2 + z[:, 1:].is_contiguous() + 4 * z[1:].is_contiguous()),
    "asked of another format": lambda z, y: flat(z, y) * (2 + z.is_contiguous(memory_format=torch.channels_last)),
    "new tensors of its kind": lambda z, y: flat(z, y) + z.new_ones(()) + torch.zeros_like(z).sum() + torch.ones_like(z).mean(),
}


def after_augmenting(z):
    z *= 3
    z /= 2
    z += BIAS
    z -= 0.5
    return z


def smoothed(z, y):
    return flat(z.float(), y) - 0.1 * z.float().log_softmax(-1).mean()


def asked(z):
    """A number made of what a tensor says of itself."""
    numbers = [*z.shape, *z.size(), z.size(-1), z.size(1), z.dim(), z.ndim, len(z), z.numel(), z.element_size(), *z.stride()]
    truths = [z.dtype == torch.float32, z.device.type == "cpu", z.is_floating_point(), not z.is_cuda, z.is_contiguous()]
    truths += [z.requires_grad, z.layout == torch.strided, not z.is_sparse, z.grad_fn is not None, not z.is_leaf]
    return sum(numbers) / 1000 + sum(2**n for n, truth in enumerate(truths) if truth) / 1000


@pytest.mark.parametrize("loss", EITHER.values(), ids=EITHER)
def test_other_operations_give_the_plain_result(loss):
    results, report = both(loss)
    check_equal(*results)
    assert report.counts.total() >= 1


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
@pytest.mark.parametrize("loss", ["no reduction", "and more", "class weights", "bias, then cap", "scaled after the cap"])
def test_other_operations_after_what_the_model_itself_did(family, loss):
    model, plain = (with_loss(made(family), lambda logits, labels, *_, **__: EITHER[loss](logits, labels)) for _ in range(2))
    liger_aot.bind(model)
    check_equal(step(model, **batch()), step(plain, **batch()))


def test_counts_say_what_was_asked_of_the_logits():
    model = with_loss(made(), lambda logits, labels, **_: logits.topk(3, dim=-1).values.mean())
    report = liger_aot.bind(model)
    model(**batch())
    assert any("topk" in what for what in materialised(report))
    assert sum(materialised(report).values()) == 1
    assert "topk" in str(report)


@pytest.mark.parametrize("loss", [flat, smoothed])
def test_a_loss_that_is_compiled_by_itself(loss):
    torch._dynamo.reset()
    results, _ = both(torch.compile(lambda z, y: loss(z * 2, y), backend="eager"))
    check_equal(*results)


# --- Around the forward


def test_after_an_exception_in_the_loss_the_head_gives_logits():
    def broken(logits, labels, **_):
        raise RuntimeError("broken")

    model = with_loss(made(), broken)
    liger_aot.bind(model)
    with pytest.raises(RuntimeError, match="broken"):
        model(**batch())
    assert isinstance(model.lm_head(torch.zeros(2, WIDTH)), torch.Tensor)
    assert isinstance(model(batch()["input_ids"]).logits, torch.Tensor)


def test_the_head_called_by_itself_gives_logits():
    model, _ = bound()
    step(model, **batch())
    x = torch.randn(3, WIDTH)
    assert torch.equal(model.lm_head(x), made().lm_head(x))
    assert torch.equal(model.get_output_embeddings()(x), made().lm_head(x))


def test_the_head_called_again_within_the_loss():
    def loss_function_of(model):
        def loss_function(logits, labels, vocab_size, **kwargs):
            more = model.lm_head(torch.linspace(-1, 1, 2 * 11 * WIDTH).view(2, 11, WIDTH))
            return ForCausalLMLoss(logits, labels, vocab_size) + 0.1 * ForCausalLMLoss(more * 2, labels, vocab_size)

        return loss_function

    model, plain = (with_loss(m, loss_function_of(m)) for m in (made(), made()))
    liger_aot.bind(model)
    check_equal(step(model, **batch()), step(plain, **batch()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
def test_without_gradients(family, forbidden):
    model, report = bound(family)
    with torch.no_grad():
        got, expected = model(**batch()).loss, made(family)(**batch()).loss
    check_equal({"loss": got}, {"loss": expected})
    assert not got.requires_grad
    assert report.counts == {"fused": 1}


def test_in_inference_mode(forbidden):
    model, _ = bound()
    with torch.inference_mode():
        check_equal({"loss": model(**batch()).loss}, {"loss": made()(**batch()).loss})


def test_frozen_parts_get_no_gradient(forbidden):
    results = []
    for model in bound()[0], made():
        model.lm_head.requires_grad_(False)
        model.model.norm.requires_grad_(False)
        results.append(step(model, **batch()))
    check_equal(*results)
    assert "lm_head.weight" not in results[0]


def test_only_the_head_trains(forbidden):
    results = []
    for model in bound()[0], made():
        model.model.requires_grad_(False)
        results.append(step(model, **batch()))
    check_equal(*results)
    assert list(results[0]) == ["loss", "lm_head.weight"]


def test_gradients_accumulate(forbidden):
    results = []
    for model in bound()[0], made():
        for inputs in batch(), batch(3, 7):
            model(**inputs, num_items_in_batch=31).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    check_equal(*results)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "bart", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_errs_as_plain_does(family, dtype):
    def run(model):
        return step(model, **batch())

    model, _ = bound(family, dtype=dtype)
    check_as_exact(run(made(family, dtype=dtype).double()), run(made(family, dtype=dtype)), run(model))


@pytest.mark.parametrize("family", ["llama", "gemma2", "bart", "t5", "bert", "a loss without float()"])
def test_under_autocast(family, forbidden):
    def built(family):
        model = made(family if family in FAMILIES else "llama")
        return model if family in FAMILIES else with_loss(model, lambda logits, labels, **_: flat(logits, labels))

    def run(model):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype != torch.float64):
            return step(model, **batch())

    model = built(family)
    liger_aot.bind(model)
    exact, plain, got = run(built(family).double()), run(built(family)), run(model)
    for name, truth in exact.items():  # activations are bf16, results are not
        assert got[name].dtype == plain[name].dtype == torch.float32
        unit = torch.finfo(torch.bfloat16).eps * truth.norm()
        assert (got[name] - truth).norm() <= max(2 * (plain[name] - truth).norm(), unit), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("loss", ["as it is", "log_softmax"])
def test_a_loss_that_switches_autocast_off(family, loss):
    """Whose logits the head made under it: their dtype is the one that they would have had."""
    functions = FUSED | UNKNOWN | EITHER
    seen, losses = [], []

    def loss_function(logits, labels, *_, **__):
        with torch.autocast("cpu", enabled=False):
            value = functions[loss](logits, labels).float()
            seen.append((logits.dtype, (logits + 0).dtype))
        return value

    models = [with_loss(made(family), loss_function) for _ in range(2)]
    liger_aot.bind(models[0])
    for model in models:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(step(model, **batch())["loss"])
    assert seen[0] == seen[1]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


def test_logits_of_a_frozen_model_need_no_gradient():
    seen = []
    models = [
        with_loss(made(), lambda logits, labels, **_: seen.append(logits.requires_grad) or flat(logits, labels))
        for _ in range(2)
    ]
    liger_aot.bind(models[0])
    for model in models:
        model.requires_grad_(False)
        assert not model(**batch()).loss.requires_grad
    assert seen == [False, False]


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_logits_keep_their_dtype_under_autocast(family):
    seen = []
    models = [
        with_loss(made(family), lambda logits, *_, **__: seen.append((logits.dtype, (logits + 0).dtype)) or logits.mean())
        for _ in range(2)
    ]
    liger_aot.bind(models[0])
    for model in models:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch())
    assert seen[0] == seen[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "t5", "bert", "mixtral"])
def test_cross_entropy_mode_makes_logits_and_runs_liger_on_them(family):
    model, report = bound(family, {"linear_cross_entropy": False, "cross_entropy": True})
    with operators() as seen:
        check_equal(step(model, **batch()), step(made(family), **batch()))
    assert "cross_entropy_fwd" in seen
    assert "linear_cross_entropy_fwd" not in seen
    got, expected = model(**batch()), made(family)(**batch())
    assert isinstance(got.logits, torch.Tensor)
    check_equal({"logits": got.logits}, {"logits": expected.logits})
    assert "cross_entropy" in {row.operator for row in report.bound}


NO_LOSS = {
    "neither loss": lambda model: liger_aot.bind(model, linear_cross_entropy=False),
    "a head that is left": lambda model: liger_aot.bind(with_a_head_of_its_own(model)),
}


def with_a_head_of_its_own(model):
    model.lm_head = torch.nn.Sequential(model.lm_head)
    return model


@pytest.mark.parametrize("act", NO_LOSS.values(), ids=NO_LOSS)
@pytest.mark.parametrize("skip_logits", [True, False])
def test_skip_logits_does_not_reach_a_model_whose_loss_is_its_own(act, skip_logits):
    seen = []

    class Strict(type(made())):
        def forward(self, input_ids=None, labels=None, **kwargs):
            seen.append(kwargs)
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    model = made()
    model.__class__ = Strict
    act(model)
    assert "loss=liger" not in repr(model)
    out = model(**batch(), skip_logits=skip_logits)
    check_equal({"loss": out.loss}, {"loss": made()(**batch()).loss})
    assert isinstance(out.logits, torch.Tensor)
    assert seen == [{}]
    liger_aot.unbind(model)
    assert type(model) is Strict


@pytest.mark.parametrize("flags", [{}, {"linear_cross_entropy": False, "cross_entropy": True}], ids=str)
def test_labels_of_another_kind_are_refused_in_torchs_words(flags):
    said = []
    inputs = {**batch(), "labels": batch()["labels"].float()}
    for model in bound(flags=flags)[0], made():
        with pytest.raises(RuntimeError) as raised:
            model(**inputs)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_neither_loss_leaves_the_loss_plain():
    model, report = bound(flags={"linear_cross_entropy": False})
    with operators() as seen:
        check_equal(step(model, **batch()), step(made(), **batch()))
    assert not [name for name in seen if "cross_entropy" in name]
    assert isinstance(model(**batch()).logits, torch.Tensor)
    assert type(model.lm_head) is torch.nn.Linear
    assert not report.counts


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_cross_entropy_module_within_the_model_compiles_whole(family):
    """Dynamo cannot call torch.nn.CrossEntropyLoss with what is no tensor: compiled, these models compute their logits."""
    model, report = bound(family)
    expected = step(made(family), **batch())
    torch._dynamo.reset()
    try:
        step(torch.compile(made(family), fullgraph=True, backend="eager"), **batch())
    except torch._dynamo.exc.Unsupported as error:
        pytest.xfail(f"the unbound model does not compile whole: {error}")
    torch._dynamo.reset()
    check_equal(step(torch.compile(model, fullgraph=True, backend="eager"), **batch()), expected)
    check_equal(step(model, **batch()), expected)
    assert report.counts == {"materialised: CrossEntropyLoss, traced": 1, "fused": 1}


@pytest.mark.parametrize("family", ["cohere", "granite"])
def test_a_compiled_scale_stays_fused(family):
    model, _ = bound(family, num_hidden_layers=1)
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=recorder(graphs))
    check_equal(step(compiled, **batch()), step(made(family, num_hidden_layers=1), **batch()))
    assert "linear_cross_entropy_fwd" in nodes(graphs)


TRACED = {
    "fused": (flat, {"fused, traced": 1}),
    "materialised": (lambda z, y: z.topk(3, dim=-1).values.mean(), {"materialised: topk, traced": 1}),
}


@pytest.mark.parametrize(("loss", "counts"), TRACED.values(), ids=TRACED)
def test_what_is_compiled_is_counted_once_for_each_graph(loss, counts):
    model = with_loss(made(num_hidden_layers=1), lambda logits, labels, **_: loss(logits, labels))
    report = liger_aot.bind(model)
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=recorder(graphs))
    for _ in range(3):
        step(compiled, **batch())
    assert report.counts == counts
    step(compiled, **batch(2, 7))
    assert report.counts == {what: 2 * count for what, count in counts.items()}
    assert len(graphs) == 4  # forward and backward, twice


def test_two_models_count_each_for_itself():
    (first, one), (_, other) = bound(), bound()
    step(first, **batch())
    assert one.counts == {"fused": 1}
    assert other.counts == {}


@pytest.mark.parametrize("family", ["gpt2", "cohere"])
def test_tied_weights_get_both_gradients(family, forbidden):
    model, _ = bound(family, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    check_equal(step(model, **batch()), step(made(family, tie_word_embeddings=True), **batch()))
