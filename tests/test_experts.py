"""transformers' experts on ours, through its registry: what they compute, and who is refused."""

import copy
import re

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations import moe
from transformers.models.aria import modeling_aria
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.mixtral import modeling_mixtral
from transformers.models.muse_spark import modeling_muse_spark
from transformers.models.nemotron_h import modeling_nemotron_h

import liger_aot
import liger_aot.transformers
from liger_aot.transformers import experts

from tiny import TOKENS
from tiny import batch
from tiny import recorder

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "mlp_only_layers": []}),
}
# Gate and activation of transformers' own or of the model's, transposed, with biases, without a gate.
MODULES = {
    "silu": (modeling_mixtral.MixtralExperts, "MixtralConfig", {"num_local_experts": 3}),
    "gelu_pytorch_tanh": (
        modeling_mixtral.MixtralExperts,
        "MixtralConfig",
        {"num_local_experts": 3, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gelu": (modeling_mixtral.MixtralExperts, "MixtralConfig", {"num_local_experts": 3, "hidden_act": "gelu"}),
    "swish": (modeling_mixtral.MixtralExperts, "MixtralConfig", {"num_local_experts": 3, "hidden_act": "swish"}),
    "relu": (modeling_mixtral.MixtralExperts, "MixtralConfig", {"num_local_experts": 3, "hidden_act": "relu"}),
    "transposed": (modeling_aria.AriaExperts, "AriaTextConfig", {"moe_num_experts": 3}),
    "a gate of its own": (modeling_gpt_oss.GptOssExperts, "GptOssConfig", {"num_local_experts": 3}),
    "no gate": (
        modeling_nemotron_h.NemotronHExperts,
        "NemotronHConfig",
        {"n_routed_experts": 3, "moe_intermediate_size": 8, "moe_latent_size": None},
    ),
}
FUSED = {
    "silu": "swiglu_fwd",
    "swish": "swiglu_fwd",
    "gelu_pytorch_tanh": "geglu_fwd",
    "gelu": "geglu_fwd",
    "transposed": "swiglu_fwd",
}


@pytest.fixture(autouse=True)
def registered():
    """For the length of a test: a registry is everybody's."""
    liger_aot.transformers.register_experts_implementation()
    yield
    del moe.ALL_EXPERTS_FUNCTIONS._global_mapping["liger"]


def config(name, options):
    return getattr(transformers, name)(**{**SIZES, **options})


def made(form):
    """Experts, and what they are called with."""
    cls, name, options = MODULES[form]
    module = cls(config(name, options))
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    module.config._experts_implementation = "eager"
    return module, (
        torch.randn(7, 16),
        torch.tensor([[0, 1], [1, 2], [2, 0], [2, 1], [0, 2], [1, 0], [2, 0]]),
        torch.rand(7, 2),
    )


def results(module, hidden, index, weights):
    leaves = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(leaves[0], index, leaves[1])
    wanted = [*leaves, *module.parameters()]
    return y.detach(), *torch.autograd.grad(y, wanted, torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y))


@pytest.mark.parametrize("form", MODULES)
def test_experts_of_each_form_compute_what_they_did(interpreted, form):
    module, given = made(form)
    want = results(module, *given)
    module.config._experts_implementation = "liger"
    torch.testing.assert_close(results(module, *given), want)
    assert interpreted.launched.count("moe_unpermute_fwd") == 2
    assert set(FUSED.values()).intersection(interpreted.launched) == ({FUSED[form]} if form in FUSED else set())


def test_slots_of_experts_of_other_processes(path):
    """Under expert parallelism their index is the number of experts that are here, and their weight is 0."""
    module, (hidden, index, weights) = made("silu")
    index[0], index[3, 1] = 3, 3
    weights = torch.where(index == 3, 0, weights)
    want = results(module, hidden, index, weights)
    module.config._experts_implementation, module._is_expert_parallel = "liger", True
    got = results(module, hidden, index, weights)
    torch.testing.assert_close(got, want)


def test_an_activation_that_somebody_replaced_is_called(path):
    module, given = made("silu")
    module.act_fn.forward = torch.relu
    want = results(module, *given)
    module.config._experts_implementation = "liger"
    torch.testing.assert_close(results(module, *given), want)
    assert experts.gate_of(module) == module._apply_gate
    del module.act_fn.forward
    assert experts.gate_of(module) == "silu"
    hook = module.act_fn.register_forward_hook(lambda *_: None)
    assert experts.gate_of(module) == module._apply_gate
    hook.remove()
    module._apply_gate = lambda x: x[:, :24]
    assert experts.gate_of(module) is module._apply_gate


def test_hidden_states_are_cast_to_the_projections(path):
    module, (hidden, index, weights) = made("silu")
    module.bfloat16().config._experts_implementation = "liger"
    y = module(hidden, index, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, module(hidden.bfloat16(), index, weights).float())


def test_a_norm_after_each_expert_is_refused_by_name():
    module = modeling_muse_spark.MuseSparkExperts.__new__(modeling_muse_spark.MuseSparkExperts)
    nn.Module.__init__(module)
    module.has_post_expert_norm = True
    text = "experts: MuseSparkExperts has a norm after each expert, which the implementation liger does not call; set_experts"
    with pytest.raises(NotImplementedError, match=re.escape(text)):
        experts.experts_forward(module, torch.randn(2, 8), torch.zeros(2, 1).long(), torch.rand(2, 1))


def model_of(name):
    family, options = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(
        config(f"{family}Config", TOKENS | {"num_key_value_heads": 1} | options)
    )


def step(model, inputs):
    out = model(**inputs)
    return out.loss.detach(), out.logits.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_models_train_as_before(interpreted, name):
    model, inputs = model_of(name), batch()
    model.set_experts_implementation("eager")
    want = step(model, inputs)
    model.set_experts_implementation("liger")
    torch.testing.assert_close(step(model, inputs), want)
    assert "moe_unpermute_bwd" in interpreted.launched
    other = copy.deepcopy(model)
    other.set_experts_implementation("grouped_mm")
    interpreted.launched.clear()
    step(other, inputs)
    assert not interpreted.launched


@pytest.mark.parametrize("name", MODELS)
def test_bound_models_compute_their_experts_so(interpreted, name):
    """In the place of grouped_mm alone; afterwards transformers' own."""
    model, inputs = model_of(name), batch()
    assert model.config._experts_implementation == "grouped_mm"
    want = step(model, inputs)
    assert not interpreted.launched
    liger_aot.bind(model, rope=False, rms_norm=False, linear_cross_entropy=False)
    interpreted.launched.clear()
    torch.testing.assert_close(step(model, inputs), want)
    assert {"moe_permute_fwd", "swiglu_bwd", "moe_unpermute_bwd"} <= {*interpreted.launched}
    model.set_experts_implementation("batched_mm")
    interpreted.launched.clear()
    step(model, inputs)
    assert {*interpreted.launched} == {"swiglu_fwd", "swiglu_bwd"}
    model.set_experts_implementation("grouped_mm")
    liger_aot.unbind(model)
    for got, expected in zip(step(model, inputs), want, strict=True):
        assert torch.equal(got, expected)


def test_bound_experts_that_torch_does_not_trace_are_transformers():
    """In fp32, which its own way around grouped_mm takes."""
    model = model_of("mixtral")
    liger_aot.bind(model, compile="liger", rope=False, rms_norm=False, linear_cross_entropy=False)
    layer, given = model.model.layers[0].mlp.experts, made("silu")[1]
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(layer, fullgraph=True, backend=recorder(graphs))
    torch.testing.assert_close(compiled(*given), layer(*given))
    assert "grouped_mm_fallback" in str(graphs[0].code)


def test_bound_experts_with_a_norm_are_transformers(interpreted):
    model, ids = model_of("mixtral"), batch()["input_ids"]
    want = model(ids).logits
    liger_aot.bind(model, rope=False, rms_norm=False, linear_cross_entropy=False)
    layer = model.model.layers[0].mlp.experts
    layer.has_post_expert_norm, layer.post_expert_norm = True, nn.Identity()
    interpreted.launched.clear()
    torch.testing.assert_close(model(ids).logits, want)
    assert set(interpreted.launched) == {"swiglu_fwd"}


def traced(name):
    """In bf16, in which torch traces its grouped product."""
    model, ids = model_of(name).bfloat16(), batch()["input_ids"]
    model.config.output_router_logits = False  # with it transformers itself breaks the graph
    model.set_experts_implementation("liger")
    return model, ids, model(ids).logits


def test_a_model_compiles_whole():
    model, ids, want = traced("mixtral")
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits, want)


def test_a_model_exports():
    model, ids, want = traced("qwen3_moe")
    program = torch.export.export(model, (), {"input_ids": ids})
    names = {str(node.target) for node in program.graph.nodes}
    assert {"liger.moe_permute.default", "liger.packed_glu.default", "liger.moe_unpermute.default"} <= names
    assert torch.equal(program.module()(input_ids=ids).logits, want)
