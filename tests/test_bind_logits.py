"""Logits that nobody has computed do what logits do: known operations are folded into the loss, others compute them."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)

import liger_aot
from liger_aot.bind import _lazy

from binding import flat
from binding import made
from binding import with_loss
from tiny import VOCABULARY
from tiny import batch
from tiny import check_equal
from tiny import materialised
from tiny import step

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
def test_known_operations_stay_fused(loss):
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


def test_logits_are_asked_for_by_the_lazy_class_alone(model, monkeypatch, plain):
    """What the other tests take for granted: with labels, in training, the logits are never computed."""
    monkeypatch.setattr(_lazy.LazyLogits, "compute", lambda *args, **kwargs: pytest.fail("logits were computed"))
    liger_aot.bind(model)
    check_equal(step(model, **batch()), plain)
    liger_aot.unbind(model)
    with_loss(model, lambda logits, labels, **_: F.relu(logits).sum())
    liger_aot.bind(model)
    with pytest.raises(pytest.fail.Exception):
        model(**batch())
