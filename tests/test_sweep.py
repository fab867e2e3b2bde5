"""A few rows of sweep.tsv, made again: between them every formula that the binder knows. `make sweep` makes all of them."""

import pytest

from liger_aot.bind import bind

import sweep

# What a row stands here for. Its numbers in bfloat16 are measured by the sweep alone.
CLASSES = {
    "LlamaForCausalLM": "rms_norm: llama; rope: half, promote; swiglu: 3 linears",
    "Olmo2ForCausalLM": "rms_norm: fp32 weight; rope: half, cast back",
    "Gemma2ForCausalLM": "rms_norm: gemma; geglu: 3 linears, gelu_tanh; a softcap",
    "Gemma4ForCausalLM": "rms_norm: no weight; rope: half, promote, one tensor",
    "Glm4ForCausalLM": "swiglu: gate_up, silu",
    "Qwen3MoeForCausalLM": "swiglu: experts",
    "GPTNeoXForCausalLM": "layer_norm; rope: half, promote, partial",
    "ModernBertForMaskedLM": "geglu: gate_up, gelu",
    "MoonshineForConditionalGeneration": "swiglu: up_gate; sound",
    "GteForMaskedLM": "geglu: 3 linears, gelu",
    "Qwen2VLForConditionalGeneration": "rope: half, fp32; an image",
    "CohereForCausalLM": "rope: interleaved; logits that are scaled",
    "NanoChatForCausalLM": "rope: half, other sign; relu_squared: 2 linears",
    "GptOssForCausalLM": "rope: half, one angle a pair",
    "GlmForCausalLM": "rope: interleaved, doubled angles",
    "GPTJForCausalLM": "rope: interleaved, one angle a pair, one tensor",
    "DeepseekV2ForCausalLM": "rope: interleaved, complex",
    "DeepseekV3ForCausalLM": "rope: interleaved to half",
    "DeepseekV4ForCausalLM": "rope: interleaved, last columns",
    "Gemma4ForConditionalGeneration": "rope: half, in parts; an image",
    "Llama4ForConditionalGeneration": "rope: complex, of text and, in a column, of an image",
    "HubertForSequenceClassification": "group_norm; sound",
    "Mamba2ForCausalLM": "gated_rms_norm: gate first, llama",
    "BartForConditionalGeneration": "logits with a bias; a loss in the model itself",
    "T5ForSequenceClassification": "no head that could be bound",
}


@pytest.fixture(scope="module")
def table():
    return {row["class"]: row for row in sweep.read()[1].values()}


@pytest.fixture(scope="module")
def places():
    return {name: f"{family}.{file}" for family, file, name in sweep.cases()}


@pytest.mark.parametrize("name", CLASSES)
def test_row_is_as_committed(name, table, places):
    row = {"family": table[name]["family"], "class": name, **sweep.one(places[name], name, bf16=False)}
    assert sweep.compared([row]) == sweep.compared([table[name]])
    assert row["fp32"] == "equal"


@pytest.mark.parametrize(
    ("name", "kernels"),
    {
        "LlamaForCausalLM": {"rms_norm", "rope", "swiglu", "cross_entropy"},
        "Olmo2ForCausalLM": {"rms_norm", "rope"},
        "Gemma2ForCausalLM": {"rms_norm", "geglu", "cross_entropy"},
        "Qwen3MoeForCausalLM": {"swiglu"},
        "GPTNeoXForCausalLM": {"layer_norm", "rope"},
        "Gemma4ForCausalLM": {"rms_norm", "rope", "geglu"},
        "ModernBertForMaskedLM": {"geglu"},
        "MoonshineForConditionalGeneration": {"swiglu"},
        "GteForMaskedLM": {"geglu"},
        "Qwen2VLForConditionalGeneration": {"rms_norm", "layer_norm", "rope"},
        "HubertForSequenceClassification": {"group_norm", "layer_norm"},
        "Mamba2ForCausalLM": {"gated_rms_norm"},
    }.items(),
)
def test_kernels_compute_the_same(name, kernels, places, interpreted):
    row = sweep.one(places[name], name, bf16=False)
    assert row["fp32"] == "equal"
    ran = {kernel.rsplit("_", 1)[0] for kernel in map(str, interpreted.launched)}
    assert kernels <= ran, ran


def with_a_wrong_eps(model):
    report = bind(model)
    for module in model.modules():
        if type(module).__name__ == "LigerRMSNorm":
            module.variance_epsilon *= 2
    return report


@pytest.mark.parametrize(
    ("name", "fault", "seen"),
    [("bind", with_a_wrong_eps, "the gradient of"), ("unbind", lambda model: None, "what unbind leaves")],
    ids=["a wrong eps", "no unbind"],
)
def test_faults_are_seen(name, fault, seen, places, monkeypatch):
    monkeypatch.setattr(sweep, name, fault)
    row = sweep.one(places["LlamaForCausalLM"], "LlamaForCausalLM", bf16=False)
    assert row["fp32"].startswith("differs")
    assert seen in row["fp32"]
    assert sweep.verdict(row)


def test_a_model_without_bfloat16_and_a_bound_one_that_breaks_are_told_apart(places, monkeypatch):
    def raising(model):
        bind(model)
        model.forward = lambda **given: 1 / 0

    model = sweep.build(places["FNetForMaskedLM"], "FNetForMaskedLM")
    assert sweep.bf16_of(model, sweep.Form("text")).startswith("unbound raises RuntimeError: Unsupported dtype")
    monkeypatch.setattr(sweep, "bind", raising)
    model = sweep.build(places["LlamaForCausalLM"], "LlamaForCausalLM")
    said = sweep.bf16_of(model, sweep.Form("text"))
    assert said.startswith("differs: ZeroDivisionError")
    assert sweep.verdict({"fp32": "equal", "bf16": said}) == said
