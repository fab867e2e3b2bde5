"""The first binding: Llama, bound and not."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from transformers import GPT2Config
from transformers import GPT2LMHeadModel
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

import liger_aot
from liger_aot.bind._lazy import LazyLogits

from harness import average


def llama(dtype=torch.float32, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False, **options)
    return LlamaForCausalLM(config).to(dtype).train()


@pytest.fixture
def batch():
    ids = torch.randint(97, (2, 11))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, **batch):
    """The loss and every gradient."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def results(run, model):
    """What run(model) gives, plain in float64, plain, and bound."""
    bound = copy.deepcopy(model)
    liger_aot.bind(bound)
    return run(copy.deepcopy(model).double()), run(model), run(bound)


def check(exact, plain, bound):
    """Bound errs no more than twice as much as plain does, on average; where plain is exact, by one unit of its dtype."""
    assert bound.keys() == plain.keys()
    unit = max(torch.finfo(p.dtype).eps for p in plain.values())
    for name, truth in exact.items():
        allowed = max(2 * average(plain[name], truth), unit * truth.abs().max().item())
        assert average(bound[name], truth) <= allowed, name
        assert bound[name].dtype == plain[name].dtype


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"mlp_bias": True, "attention_bias": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bound_trains_as_plain(path, dtype, options, batch):
    check(*results(lambda model: step(model, **batch), llama(dtype, **options)))
    check(*results(lambda model: step(model, **batch, num_items_in_batch=torch.tensor(7)), llama(dtype, **options)))


def test_the_norm_rounds_where_llamas_does():
    model, x = llama(torch.bfloat16), torch.randn(9, 32).bfloat16()
    model.model.norm.weight.data.normal_()
    plain = model.model.norm(x)
    liger_aot.bind(model)
    assert torch.equal(model.model.norm(x), plain)


def test_every_operator_runs(interpreted, batch):
    model = llama()
    liger_aot.bind(model)
    step(model, **batch)
    launched = set(interpreted.launched)
    assert {"rms_norm_fwd", "rms_norm_bwd", "rope", "swiglu_fwd", "swiglu_bwd", "cross_entropy_fwd"} <= launched


def test_training_computes_no_logits(batch, monkeypatch):
    monkeypatch.setattr(LazyLogits, "compute", lambda self: pytest.fail("logits were computed"))
    model = llama()
    liger_aot.bind(model)
    assert model(**batch).logits is None
    assert model(**batch, return_dict=False)[1:] == (None,)
    loss = model(batch["input_ids"], None, None, None, None, batch["labels"]).loss  # labels by position
    assert torch.equal(loss, model(**batch).loss)


@pytest.mark.parametrize("training", [True, False])
def test_without_labels_or_training_logits_are_logits(training, batch):
    for inputs in [{"input_ids": batch["input_ids"]}] + [batch] * (not training):
        check(*results(lambda model, inputs=inputs: {"logits": model(**inputs).logits.detach()}, llama().train(training)))


def test_a_loss_of_ones_own_gets_logits(batch):
    def squares(logits, labels, vocab_size, **_):
        return (logits[..., :-1, :] * 2).square().mean() + torch.cat([logits]).abs().mean() + 2 * logits.mean()

    model = llama()
    model.loss_function = squares
    check(*results(lambda model: step(model, **batch), model))


LOSSES = {
    "class weights": lambda z, y: F.cross_entropy(z.view(-1, 97), y.view(-1), weight=torch.linspace(0, 1, 97).to(z.dtype)),
    "smoothing": lambda z, y: F.cross_entropy(z.view(-1, 97), y.view(-1), label_smoothing=0.1, reduction="sum"),
    "module": lambda z, y: torch.nn.CrossEntropyLoss()(z.view(22, 97), y.view(22)),
    "by position": lambda z, y: F.cross_entropy(z.view(-1, 97), y.view(-1), torch.linspace(0, 1, 97).to(z.dtype)),
    "three dimensions": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "classes in the middle": lambda z, y: F.cross_entropy(z, torch.arange(97).remainder(11).expand(2, 97)),
    "another view": lambda z, y: F.cross_entropy(z.view(2, -1)[:, :97], y[:, 0] % 97),
    "old": lambda z, y: F.cross_entropy(z.view(-1, 97), y.view(-1), reduce=False).sum(),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_lazy_logits_are_logits(loss):
    head = torch.nn.Linear(16, 97)
    hidden, labels = torch.randn(2, 11, 16), torch.randint(97, (2, 11))
    exact, plain = loss(copy.deepcopy(head).double()(hidden.double()), labels), loss(head(hidden), labels)
    head.__class__ = type("Head", (torch.nn.Linear,), {"forward": lambda self, x, use: use(self, x)})
    bound = loss(LazyLogits(hidden, head, torch.float32), labels)
    check({"loss": exact}, {"loss": plain}, {"loss": bound})


def test_unbind_gives_everything_back(batch):
    model, other = llama(), llama()
    before = step(model, **batch)
    names, text, keys = [type(m) for m in model.modules()], str(model), [set(vars(m)) for m in model.modules()]
    liger_aot.bind(model)
    assert str(other) == text
    assert "LigerRMSNorm" in str(model)
    assert list(model.state_dict()) == list(other.state_dict())
    assert type(model).__name__ == "LlamaForCausalLM"  # which save_pretrained writes down
    liger_aot.unbind(model)
    assert [type(m) for m in model.modules()] == names
    assert [set(vars(m)) for m in model.modules()] == keys
    assert str(model) == text
    after = step(model, **batch)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_report():
    model = llama()
    model.model.layers[1].mlp.forward = model.model.layers[1].mlp.forward
    text = str(liger_aot.bind(model))
    assert text.splitlines() == [
        "linear_cross_entropy   1 x Linear: lm_head",
        "linear_cross_entropy   1 x LlamaForCausalLM: with labels, in training",
        "rope                   2 x LlamaAttention",
        "swiglu                 1 x LlamaMLP",
        "rms_norm               5 x LlamaRMSNorm",
        "left alone             1 x LlamaMLP: this instance has a forward of its own",
    ]


def test_other_activations_and_heads_are_left_alone():
    model = llama(hidden_act="gelu")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    left = {row.why for row in liger_aot.bind(model) if row.operator is None}
    assert left == {"activation gelu", "lm_head is no torch.nn.Linear but Sequential"}


@pytest.mark.parametrize("twice", [False, True])
def test_refuses_where_nothing_is_to_bind(twice):
    model = llama() if twice else GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9))
    if twice:
        liger_aot.bind(model)
    text = f"bind: model must hold modules of transformers' Llama, not bound yet, got {type(model).__name__}"
    with pytest.raises(ValueError, match=re.escape(text)):
        liger_aot.bind(model)


def test_compiles_whole(batch):
    model = llama()
    liger_aot.bind(model)
    expected = step(model, **batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, got in step(compiled, **batch).items():
        torch.testing.assert_close(got, expected[name.removeprefix("_orig_mod.")])


def test_under_autocast(batch):
    def run(model):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype != torch.float64):
            return step(model, **batch)

    exact, plain, bound = results(run, llama())
    for name, truth in exact.items():  # activations are bf16, results are not
        assert bound[name].dtype == plain[name].dtype == torch.float32
        unit = torch.finfo(torch.bfloat16).eps * truth.abs().max().item()
        assert average(bound[name], truth) <= max(2 * average(plain[name], truth), unit), name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_bound_models_are_checkpointed_copied_saved_and_exported(batch, tmp_path):
    model = llama()
    liger_aot.bind(model)
    before = step(model, **batch)
    after = step(copy.deepcopy(model), **batch)
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.norm).__name__ == "LlamaRMSNorm"
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    model.gradient_checkpointing_enable()
    after = step(model, **batch)
    assert all(torch.equal(before[name], after[name]) for name in before)
    program = torch.export.export(model.eval(), (), {"input_ids": batch["input_ids"]}, strict=False)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"liger.rms_norm.default", "liger.rope.default", "liger.swiglu.default"} <= names
