"""PEFT on a bound model: adapters put on before bind and after it, on the head, merged, and given back."""

import peft
import pytest
import torch

import liger_aot
from liger_aot.transformers import _apply_liger_kernel_to_instance

from binding import LAYERS
from tiny import batch
from tiny import build
from tiny import check_equal
from tiny import check_identical
from tiny import materialised
from tiny import operators
from tiny import step

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing.*deprecated",  # as transformers itself, PEFT and people still call it
)


def adapted(model, **options):
    """The model under LoRA whose adapters are no zeros, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
        return peft.get_peft_model(model, config)


ADAPTED = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "a norm saved": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "the head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", ADAPTED.values(), ids=ADAPTED)
def test_lora_before_bind(model, options):
    plain = step(adapted(build(), **options), **batch())
    model = adapted(model, **options)
    report = liger_aot.bind(model)
    check_equal(step(model, **batch()), plain)
    assert {"rms_norm", "rope"} <= {row.operator for row in report.bound}
    if "lm_head" not in options.get("modules_to_save", []):
        assert report.counts["fused"] == 1
        assert not materialised(report)
    liger_aot.unbind(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in adapted(build(), **options).modules()]
    check_identical(step(model, **batch()), plain)


@pytest.mark.parametrize("options", ADAPTED.values(), ids=ADAPTED)
def test_lora_after_bind(model, options):
    plain = step(adapted(build(), **options), **batch())
    report = liger_aot.bind(model)
    wrapped = adapted(model, **options)
    check_equal(step(wrapped, **batch()), plain)
    assert report.counts["fused"] == 1
    assert not materialised(report)
    liger_aot.unbind(model)
    assert [type(m) for m in wrapped.modules()] == [type(m) for m in adapted(build(), **options).modules()]
    check_identical(step(wrapped, **batch()), plain)


def test_a_forward_that_an_adapter_keeps_of_its_base_is_bound_and_given_back(model):
    """PEFT's AdaptionPromptModel is called by the method that its base had when it was made."""

    def prompted(model):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
            return peft.get_peft_model(model, config).train()

    plain = step(prompted(build()), **batch())
    model = prompted(model)
    kept = vars(model.base_model)["forward"]
    report = liger_aot.bind(model)
    check_equal(step(model, **batch()), plain)
    assert report.counts == {"fused": 1}
    assert liger_aot.verify(model, batch()).worst.relative < 1e-4
    with pytest.raises(ValueError, match="compile"):
        _apply_liger_kernel_to_instance(model, compile="eager")
    assert report.counts["fused"] == 2
    step(model, **batch())
    assert report.counts["fused"] == 3
    liger_aot.unbind(model)
    assert vars(model.base_model)["forward"] == kept
    check_identical(step(model, **batch()), plain)


def test_lora_on_the_head_before_bind_leaves_the_head_with_its_reason(model):
    options = {"target_modules": ["q_proj", "lm_head"]}
    plain = step(adapted(build(), **options), **batch())
    model = adapted(model, **options)
    report = liger_aot.bind(model)
    check_equal(step(model, **batch()), plain)
    (row,) = (row for row in report.left if "lm_head" in row.path)
    assert "lora" in row.why.lower() or "peft" in row.why.lower()
    assert report.counts["fused"] == 0
    logits = model(**batch()).logits
    assert isinstance(logits, torch.Tensor)


ON_THE_HEAD = {
    "a layer": {"target_modules": ["q_proj", "lm_head"]},
    "its weight, while it is called": {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
}


@pytest.mark.parametrize("options", ON_THE_HEAD.values(), ids=ON_THE_HEAD)
def test_lora_on_the_head_after_bind_materialises_and_is_counted(model, options):
    plain = step(adapted(build(), **options), **batch())
    report = liger_aot.bind(model)
    check_equal(step(adapted(model, **options), **batch()), plain)
    assert materialised(report)
    assert report.counts["fused"] == 0


def test_lora_merged_after_bind_then_unbound(model):
    liger_aot.bind(model)
    wrapped = adapted(model, **ADAPTED["all linear layers"])
    expected = step(wrapped, **batch())["loss"]
    merged = wrapped.merge_and_unload()
    with operators() as seen:
        check_equal(step(merged.requires_grad_(), **batch()) | {"loss": expected}, step(merged, **batch()))
    assert set(seen) >= LAYERS
    torch.testing.assert_close(merged(**batch()).loss, expected)
    liger_aot.unbind(merged)
    assert [type(m) for m in merged.modules()] == [type(m) for m in build().modules()]
