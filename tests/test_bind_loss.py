"""The loss of a bound model: without logits where transformers' own code allows it, and never another number."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from transformers import LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

import liger_aot
from liger_aot.bind._lazy import LazyLogits

from binding import bound
from binding import flat
from binding import made
from binding import with_loss
from tiny import VOCABULARY
from tiny import WIDTH
from tiny import batch
from tiny import check_as_exact
from tiny import check_equal
from tiny import nodes
from tiny import operators
from tiny import recorder
from tiny import step

FAMILIES = ["llama", "gemma2", "cohere", "granite", "phi3", "mixtral", "gpt2", "bart", "t5", "bert", "olmo2"]


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


class Whole(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Part(LlamaForCausalLM):
    """Its own second argument is a mask; labels are handed on by name."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return super().forward(input_ids, attention_mask, **kwargs)


class Longer(Whole):
    """Another argument comes first: where labels are among the rest nobody can tell."""

    def forward(self, input_ids, unused=None, *args, **kwargs):
        return super().forward(input_ids, *args, **kwargs)


@pytest.mark.parametrize("kind", [Whole, Part, Longer])
def test_labels_that_a_forward_hands_on(kind, forbidden):
    model = made()
    model.__class__ = kind
    report = liger_aot.bind(model, strict=True)
    assert "linear_cross_entropy" in {found.operator for found in report.bound}
    check_equal(step(model, **batch()), step(made(), **batch()))
    assert report.counts == {"fused": 1}
    assert model(**batch(), skip_logits=True).logits is None
    inputs = batch()
    if kind is Whole:
        assert model(inputs["input_ids"], None, None, None, None, inputs["labels"]).logits is None
        assert report.counts == {"fused": 3}
    if kind is Longer:
        embeddings = model.model.embed_tokens(inputs["input_ids"])
        assert isinstance(model(None, None, None, None, None, embeddings).logits, torch.Tensor)


def test_a_forward_without_labels_has_no_fused_loss():
    class Bare(LlamaForCausalLM):
        def forward(self, input_ids, labels_of_mine=None):
            return super().forward(input_ids)

    model = made()
    model.__class__ = Bare
    assert "linear_cross_entropy" not in {found.operator for found in liger_aot.bind(model)}
    assert isinstance(model(batch()["input_ids"]).logits, torch.Tensor)


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
    assert report.counts == {"materialised: a loss_function that is not transformers'": 1}


def test_a_loss_function_of_the_models_own_class_gets_tensors():
    def loss_function(self, logits, labels, **_):
        return CrossEntropy.apply(logits.view(-1, VOCABULARY), labels.clamp(min=0).view(-1))

    model, plain = made(), made()
    for each in model, plain:
        each.__class__ = type("Own", (type(each),), {"loss_function": loss_function})
    report = liger_aot.bind(model)
    check_equal(step(model, **batch()), step(plain, **batch()))
    assert report.counts == {"materialised: a loss_function that is not transformers'": 1}


@pytest.mark.parametrize("flags", [{}, {"linear_cross_entropy": False, "cross_entropy": True}], ids=str)
def test_a_forward_that_hands_logits_to_an_autograd_function_is_told(flags):
    """torch would lose their gradient without a word."""

    class Own(type(made())):
        exact = False

        def forward(self, input_ids=None, labels=None):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            logits = (logits + 0 if self.exact else logits).view(-1, VOCABULARY)
            return CausalLMOutput(CrossEntropy.apply(logits, labels.clamp(min=0).view(-1)))

    model, plain = made(), made()
    model.__class__ = plain.__class__ = Own
    liger_aot.bind(model, **flags)
    with pytest.raises(RuntimeError, match=r"bind: an autograd.Function must be given tensors.*logits \+ 0"):
        model(**batch())
    model.exact = True
    check_equal(step(model, **batch()), step(plain, **batch()))


class OfViews(torch.autograd.Function):
    """Nothing that is made inside requires a gradient."""

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.shape = logits.shape
        return flat(logits.float(), labels)

    @staticmethod
    def backward(ctx, upstream):
        return upstream.expand(ctx.shape), None


WITHIN = {
    "autograd.Function": OfViews.apply,
    "reentrant checkpoint": lambda z, y: torch.utils.checkpoint.checkpoint(flat, z, y, use_reentrant=True),
}


@pytest.mark.parametrize("loss", WITHIN.values(), ids=WITHIN)
def test_logits_viewed_within_an_autograd_function_are_told_of(loss):
    model = with_loss(made(), lambda logits, labels, **_: loss(logits, labels))
    liger_aot.bind(model)
    with pytest.raises(RuntimeError, match=r"bind: an autograd.Function must be given tensors.*logits \+ 0"):
        model(**batch())
    with torch.no_grad():
        model(**batch())


@pytest.mark.parametrize("scale", [np.float64(0.5), np.float32(0.5)], ids=["float64", "float32"])
def test_numpys_numbers_scale_logits(scale):
    model, plain = (with_loss(made(), lambda logits, labels, **_: flat(scale * logits, labels)) for _ in range(2))
    liger_aot.bind(model)
    check_equal(step(model, **batch()), step(plain, **batch()))


def keeping(kept):
    def loss_function(logits, labels, vocab_size, **kwargs):
        kept.append(logits)
        return ForCausalLMLoss(logits, labels, vocab_size, **kwargs)

    return loss_function


@pytest.mark.parametrize("ask", [lambda z: z.square().mean(), lambda z: flat(z, batch()["labels"])], ids=["computed", "fused"])
def test_kept_logits_are_those_of_their_forward_or_an_error(ask):
    kept = []
    model = with_loss(made(), keeping(kept))
    liger_aot.bind(model)
    model(**batch()), model(**batch())
    first, second = kept
    with torch.no_grad():
        logits = made().eval()(**batch()).logits
        torch.testing.assert_close(ask(first).detach(), ask(logits), rtol=1e-4, atol=0)
        model.lm_head.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"bind: logits .* must be asked for before the weights change"):
            ask(second)
        if first.computed:
            torch.testing.assert_close(ask(first).detach(), ask(logits), rtol=1e-4, atol=0)


def test_transformers_own_function_assigned_stays_fused(forbidden):
    model, report = bound()
    model.loss_function = ForCausalLMLoss
    check_equal(step(model, **batch()), step(made(), **batch()))
    assert report.counts == {"fused": 1}


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
