"""What a module computes is found by running it: names lie, and formulas differ where nobody looks."""

import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

import liger_aot

from binding import check_left
from binding import row
from tiny import WIDTH
from tiny import batch
from tiny import build
from tiny import check_as_exact
from tiny import check_equal
from tiny import operators
from tiny import step


def classes(model):
    return [type(m) for m in model.modules()]


def with_norm(kind, *args, **options):
    """A llama, and the same bound, whose last norm is another."""

    def made():
        model = build(**options)
        weight = model.model.norm.weight
        model.model.norm = kind(*args)
        if getattr(model.model.norm, "weight", None) is not None:
            model.model.norm.weight = weight
        return model.train()

    return made


def norm_named(name, compute, eps=1e-6, **members):
    """A class of that name whose forward is compute(self, x)."""

    def init(self, size=WIDTH):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        return compute(self, hidden_states)

    return type(name, (nn.Module,), {"__init__": init, "forward": forward, **members})


def unit(x, eps):
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def llama(m, x, of=None, weight=None):
    """Llama's norm but for one thing."""
    y = unit(x, m.variance_epsilon) if of is None else of.float()
    return (m.weight if weight is None else weight) * y.to(x.dtype)


def scale(x, eps, dim=-1):
    return x.float() * torch.rsqrt(x.float().square().mean(dim, keepdim=True) + eps)


def rounded_first(m, x):
    return m.weight * x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)


def within(most, x, dtype):
    return x.clamp(-most, most) if x.dtype is dtype else x


IMPOSTORS = {
    "offset 2": lambda m, x: ((2.0 + m.weight.float()) * unit(x, m.variance_epsilon)).to(x.dtype),
    "no eps": lambda m, x: llama(m, x, unit(x, 0.0)),
    "eps outside the root": lambda m, x: llama(
        m, x, x / (x.float().square().mean(-1, keepdim=True).sqrt() + m.variance_epsilon)
    ),
    "eps ten times": lambda m, x: llama(m, x, unit(x, 10 * m.variance_epsilon)),
    "sum, not mean": lambda m, x: llama(m, x, unit(x, m.variance_epsilon) / x.shape[-1] ** 0.5),
    "of the wrong dimension": lambda m, x: llama(m, x, scale(x, m.variance_epsilon, dim=-2)),
    "half the features": lambda m, x: llama(m, x, torch.cat([unit(x[..., :16], 1e-6), x[..., 16:]], -1)),
    "centred": lambda m, x: llama(m, x, unit(x.float() - x.float().mean(-1, keepdim=True), m.variance_epsilon)),
    "one part in a thousand": lambda m, x: llama(m, x, 1.001 * unit(x, m.variance_epsilon)),
    "clamped": lambda m, x: llama(m, x, unit(x, m.variance_epsilon).clamp(-2.5, 2.5)),
    "in training otherwise": lambda m, x: llama(m, x, unit(x, m.variance_epsilon) * (2 if m.training else 1)),
    "in evaluation otherwise": lambda m, x: llama(m, x, unit(x, m.variance_epsilon) * (1 if m.training else 2)),
    "dropout": lambda m, x: llama(m, x, nn.functional.dropout(unit(x, m.variance_epsilon), 0.05, m.training)),
    "weight unused": lambda m, x: llama(m, x, weight=1 + 0 * m.weight),
    "square of the weight": lambda m, x: llama(m, x, weight=m.weight**2),
    "the mean clamped": lambda m, x: llama(
        m, x, x * torch.rsqrt(x.float().square().mean(-1, keepdim=True).clamp(max=1e6) + m.variance_epsilon)
    ),
    "clamped in float32": lambda m, x: llama(m, x, unit(within(100, x, torch.float32), m.variance_epsilon)),
    "clamped in bfloat16": lambda m, x: llama(m, x, unit(within(100, x, torch.bfloat16), m.variance_epsilon)),
    "clamped in float16": lambda m, x: llama(m, x, unit(within(100, x, torch.float16), m.variance_epsilon)),
    "another rounding": rounded_first,
    "another rounding in bfloat16": lambda m, x: rounded_first(m, x) if x.dtype is torch.bfloat16 else llama(m, x),
}


def test_without_the_difference_an_impostor_is_bound():
    model = with_norm(norm_named("LlamaRMSNorm", llama))()
    assert row(liger_aot.bind(model), "model.norm").status == "bound"


@pytest.mark.parametrize("compute", [pytest.param(f, id=name) for name, f in IMPOSTORS.items()])
def test_a_module_named_as_a_norm_with_another_formula_is_left(compute):
    made = with_norm(norm_named("LlamaRMSNorm", compute))
    model = made()
    report = liger_aot.bind(model)
    assert type(model.model.norm).__name__ == "LlamaRMSNorm"
    assert row(report, "model.norm").status == "left"
    assert row(report, "model.norm").why
    if "dropout" not in compute.__code__.co_names:
        check_equal(step(model, **batch()), step(made(), **batch()))


def test_a_norm_of_any_name_with_the_formula_is_bound():
    kind = norm_named("Whatever", lambda m, x: m.weight * unit(x, m.variance_epsilon).to(x.dtype))
    made = with_norm(kind)
    model = made()
    report = liger_aot.bind(model)
    assert row(report, "model.norm").status == "bound"
    assert type(model.model.norm).__name__ == "LigerRMSNorm"
    check_equal(step(model, **batch()), step(made(), **batch()))


def test_a_norm_with_an_optional_second_argument_is_left():
    def init(self, size=WIDTH):
        nn.Module.__init__(self)
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, hidden_states, factor=None):
        if factor is not None:
            hidden_states = hidden_states * nn.functional.silu(factor)
        return llama(self, hidden_states)

    kind = type("LlamaRMSNorm", (nn.Module,), {"__init__": init, "forward": forward})
    check_left(with_norm(kind), "model.norm")


@pytest.mark.parametrize(("family", "options"), {"bamba": {}, "falcon_h1": {"mamba_rms_norm": True}}.items())
def test_a_models_gated_norms_are_bound(family, options):
    model = build(family, **options)
    assert "gated_rms_norm" in {found.operator for found in liger_aot.bind(model).bound}
    with operators() as seen:
        check_equal(step(model, **batch()), step(build(family, **options), **batch()))
    assert {"gated_rms_norm_fwd", "gated_rms_norm_bwd"} <= {*seen}


GATED_NORMS = {
    "gate first, silu, llama, 4 groups": (Zamba2RMSNormGated, 48, 12),
    "gate first, silu, llama": (Zamba2RMSNormGated, 48, 48),
    "gate last, silu, llama": (Qwen3NextRMSNormGated, 48),
    "gate last, sigmoid, none": (KimiLinearRMSNormGated, 48),
    "gate first, silu, none, 3 groups": (FalconH1RMSNormGated, 48, 1e-5, 3, False),
    "gate last, silu, none, 2 groups": (FalconH1RMSNormGated, 48, 1e-5, 2, True),
}


def gated_norms(kind, *args):
    norms = [kind(*args) for _ in range(2)]
    for norm in norms:
        nn.init.normal_(norm.weight, 1, 0.3, generator=torch.Generator().manual_seed(3))
    return norms


@pytest.mark.parametrize(("formula", "made"), GATED_NORMS.items(), ids=GATED_NORMS)
def test_a_gated_norm_is_bound_and_given_back(formula, made):
    norm, plain = gated_norms(*made)
    assert [found[2:5] for found in liger_aot.bind(nn.Sequential(norm))] == [("gated_rms_norm", "bound", formula)]
    assert type(norm).__name__ == "LigerGatedRMSNorm"
    x, gate, dy = (torch.randn(2, 3, 48, requires_grad=True) for _ in range(3))
    for given in {"hidden_states": x, "gate": gate}, {"hidden_states": x.bfloat16(), "gate": gate.bfloat16()}:
        expected = plain(**given)
        for y in norm(*given.values()), norm(given["hidden_states"], gate=given["gate"]), norm(**given):
            torch.testing.assert_close(y, expected)
    with operators() as seen:
        results = [torch.autograd.grad(m(x, gate), [x, gate, m.weight], dy) for m in (norm, plain)]
    torch.testing.assert_close(*results)
    assert seen == ["gated_rms_norm_fwd", "gated_rms_norm_bwd"]
    liger_aot.unbind(norm)
    assert type(norm) is made[0]


def test_without_a_gate_that_fits_a_gated_norm_runs_as_its_own():
    norm, plain = gated_norms(Zamba2RMSNormGated, 48, 12)
    assert liger_aot.bind(nn.Sequential(norm)).bound
    x, gate = torch.randn(2, 3, 48), torch.randn(3, 48)
    for given in (x,), (x, None), (x, gate), (x, gate.expand(2, 3, 48).bfloat16()):
        with operators() as seen:
            torch.testing.assert_close(norm(*given), plain(*given))
        assert not seen
    with pytest.raises(TypeError, match="multiple values"):
        norm(x, hidden_states=x)


def test_a_norm_with_another_gate_is_left():
    def forward(self, x, gate):
        return llama(self, x * torch.tanh(gate))

    norm = norm_named("RMSNormGated", None, forward=forward)()
    (found,) = liger_aot.bind(nn.Sequential(norm))
    assert (found.status, found.why) == ("left", "equals no known formula")


class ScaledNorm(nn.Module):
    """The formula is another for each instance."""

    def __init__(self, multiplier):
        super().__init__()
        self.weight, self.variance_epsilon, self.multiplier = nn.Parameter(torch.ones(WIDTH)), 1e-6, multiplier

    def forward(self, hidden_states):
        return llama(self, hidden_states, self.multiplier * unit(hidden_states, self.variance_epsilon))


class ScaledMLP(LlamaMLP):
    def __init__(self, config, multipliers):
        super().__init__(config)
        self.first, self.second = multipliers

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x) * self.first) * self.up_proj(x)) * self.second


class ListedMLP(ScaledMLP):
    """The multipliers are kept where nobody takes them for plain attributes."""

    def __init__(self, config, multipliers):
        super().__init__(config, multipliers)
        self.multipliers = list(multipliers)

    first = property(lambda self: self.multipliers[0], lambda self, value: None)
    second = property(lambda self: self.multipliers[1], lambda self, value: None)


class LayeredMLP(ScaledMLP):
    """The multipliers are a matter of the layer's number."""

    def __init__(self, config, multipliers):
        super().__init__(config, multipliers)
        self.layer_idx = int(multipliers != (1.0, 1.0))
        del self.first, self.second

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * (1.5 if self.layer_idx else 1.0)


@pytest.mark.parametrize("kind", [ScaledMLP, ListedMLP, LayeredMLP])
@pytest.mark.parametrize("order", [1, -1])
def test_multipliers_that_differ_per_instance(kind, order):
    def made():
        model = build()
        for layer, multipliers in zip(model.model.layers, [(1.0, 1.0), (0.5, 1.5)][::order], strict=True):
            mlp = kind(model.config, multipliers)
            mlp.load_state_dict(layer.mlp.state_dict())
            layer.mlp = mlp
        model.model.layers[1].input_layernorm = ScaledNorm(1.0 if order == 1 else 0.5)
        model.model.layers[0].input_layernorm = ScaledNorm(0.5 if order == 1 else 1.0)
        return model.train()

    model = made()
    report = liger_aot.bind(model)
    plain, scaled = (0, 1)[::order]
    assert row(report, f"model.layers.{plain}.mlp").status == "bound"
    assert row(report, f"model.layers.{scaled}.mlp").status == "left"
    assert row(report, "model.layers.0.input_layernorm").status == ("left" if order == 1 else "bound")
    assert row(report, "model.layers.1.input_layernorm").status == ("bound" if order == 1 else "left")
    assert row(report, f"model.layers.{plain}.mlp").operator == "swiglu"
    check_equal(step(model, **batch()), step(made(), **batch()))


@pytest.mark.parametrize("multipliers", [[1.0, 1.0], [0.5, 1.5]], ids=str)
def test_falcon_h1_and_its_multipliers(multipliers):
    options = {"mlp_multipliers": multipliers}
    model = build("falcon_h1", **options)
    liger_aot.bind(model)
    check_equal(step(model, **batch()), step(build("falcon_h1", **options), **batch()))


def test_a_rope_swapped_in_by_others_is_seen(model, monkeypatch):
    """The function is that which the attention finds among its globals when it is bound."""
    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, unsqueeze_dim=1: own(q, k, -cos, sin))
    plain = step(build(), **batch())
    report = liger_aot.bind(model)
    assert row(report, "model.layers.0.self_attn").status == "left"
    check_equal(step(model, **batch()), plain)


@pytest.mark.parametrize(
    "act", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "relu", "relu2", "tanh", "sigmoid"]
)
def test_every_activation_is_bound_as_itself_or_left(act):
    model = build(hidden_act=act)
    report = liger_aot.bind(model)
    operator = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}.get(act)
    found = row(report, "model.layers.0.mlp")
    assert (found.status, found.operator) == (("bound", operator) if operator else ("left", None))
    check_equal(step(model, **batch()), step(build(hidden_act=act), **batch()))


CLAMPED = {
    "clamped": lambda x: nn.functional.silu(x).clamp(max=500),
    "clamped in float16": lambda x: nn.functional.silu(within(2, x, torch.float16)),
}


@pytest.mark.parametrize("compute", CLAMPED.values(), ids=CLAMPED)
def test_an_activation_that_clamps_is_left(compute):
    model = build()
    model.model.layers[0].mlp.act_fn = type("Act", (nn.Module,), {"forward": lambda self, x: compute(x)})()
    report = liger_aot.bind(model)
    assert [row(report, f"model.layers.{n}.mlp").status for n in (0, 1)] == ["left", "bound"]


@pytest.mark.parametrize(("act", "operator"), {"relu2": "relu_squared", "relu": None, "silu": None, "gelu": None}.items())
def test_an_activation_without_a_gate(act, operator):
    model = build("nanochat", hidden_act=act)
    found = row(liger_aot.bind(model), "model.layers.0.mlp")
    assert (found.status, found.operator) == ("bound" if operator else "left", operator)
    with operators() as seen:
        check_equal(step(model, **batch()), step(build("nanochat", hidden_act=act), **batch()))
    assert {name for name in seen if "relu" in name} == ({"relu_squared_fwd", "relu_squared_bwd"} if operator else set())


def test_dropout_within_an_mlp_is_kept():
    def run(model):
        torch.manual_seed(3)
        return step(model.train(), **batch())

    model = build("t5", dropout_rate=0.5)
    liger_aot.bind(model)
    check_equal(run(model), run(build("t5", dropout_rate=0.5)))
    assert run(model)["loss"] != run(build("t5"))["loss"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "phi3", "t5", "gpt2"])
@pytest.mark.parametrize("kept", ["norms in float32", "all in bfloat16"])
def test_mixtures_of_dtypes_round_as_plain_does(family, kept):
    def made():
        model = build(family, dtype=torch.bfloat16)
        if kept == "norms in float32":
            for module in model.modules():
                if "Norm" in type(module).__name__:
                    module.float()
        return model

    def run(model):
        return step(model, **batch())

    try:
        plain = run(made())
    except RuntimeError:  # where a model refuses the mixture, bound refuses it as well
        model = made()
        liger_aot.bind(model)
        with pytest.raises(RuntimeError):
            run(model)
        return
    model = made()
    liger_aot.bind(model)
    check_as_exact(run(made().double()), plain, run(model))


def test_float64_models_are_left_with_their_reason():
    model = build(dtype=torch.float64)
    report = liger_aot.bind(model)
    check_equal(step(model, **batch()), step(build(dtype=torch.float64), **batch()))
    assert all(found.why for found in report.left)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_without_a_weight_refuses_another_width(kind):
    norm = kind(WIDTH, elementwise_affine=False)
    assert row(liger_aot.bind(nn.Sequential(norm)), "0").status == "bound"
    with operators() as seen:
        norm(torch.randn(2, WIDTH))
    assert len(seen) == 1
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(torch.randn(2, 2 * WIDTH))


def test_a_norm_without_a_weight_that_takes_any_width_is_the_operators_at_each():
    norm = norm_named("L2Norm", lambda m, x: unit(x, 1e-6).to(x.dtype), __init__=nn.Module.__init__)()
    assert row(liger_aot.bind(nn.Sequential(norm)), "0").status == "bound"
    with operators() as seen:
        norm(torch.randn(2, WIDTH)), norm(torch.randn(2, 2 * WIDTH))
    assert len(seen) == 2


LEFT = {
    "over 2 dimensions": (nn.LayerNorm((4, 8)), "is over 2 dimensions"),
    "over 2 dimensions, without a weight": (nn.RMSNorm((4, 8), elementwise_affine=False), "is over 2 dimensions"),
    "with buffers": (nn.BatchNorm1d(8), "has buffers: running_mean, running_var, num_batches_tracked"),
}


@pytest.mark.parametrize(("norm", "why"), LEFT.values(), ids=LEFT)
def test_norms_of_other_forms_are_left_for_a_reason(norm, why):
    (found,) = liger_aot.bind(nn.Sequential(norm), strict=True)
    assert (found.status, found.operator, found.why) == ("left", None, why)


def test_a_buffer_that_is_not_used_does_not_stand_in_the_way():
    norm = norm_named("LlamaRMSNorm", lambda m, x: llama(m, x if m.absent is None else 2 * x))()
    norm.register_buffer("steps", torch.zeros(()))
    norm.register_buffer("absent", None)
    assert row(liger_aot.bind(nn.Sequential(norm)), "0").status == "bound"


def test_a_shape_may_be_a_number():
    norm = norm_named(
        "LayerNorm", lambda m, x: nn.functional.layer_norm(x, (m.normalized_shape,), eps=1e-6), __init__=nn.Module.__init__
    )()
    norm.normalized_shape = WIDTH
    assert row(liger_aot.bind(nn.Sequential(norm)), "0").formula == "layer norm"


def test_one_norm_used_twice_is_bound_once(model):
    model.model.layers[0].post_attention_layernorm = model.model.layers[0].input_layernorm
    plain = build()
    plain.model.layers[0].post_attention_layernorm = plain.model.layers[0].input_layernorm
    liger_aot.bind(model)
    check_equal(step(model, **batch()), step(plain, **batch()))
    liger_aot.unbind(model)
    assert classes(model) == classes(plain)


def test_modules_that_cannot_run_alone_are_left(model):
    """A probe may raise anything; that is no reason for bind to."""

    class Odd(LlamaRMSNorm):
        def forward(self, hidden_states):
            raise LookupError("not today") if hidden_states.shape[0] != 2 or hidden_states.shape[1] != 11 else None

    model.model.norm.__class__ = Odd
    report = liger_aot.bind(model)
    found = row(report, "model.norm")
    assert found.status == "left"
    assert "LookupError" in found.why


# --- What a probe of one form does not show


def test_a_probe_leaves_nothing_in_a_modules_lists():
    def seen(m, x):
        m.seen.append(x.shape)
        m.seen_by["any"] = m.seen_by.get("any", 0) + 1
        return llama(m, x)

    model = with_norm(norm_named("LlamaRMSNorm", seen))()
    model.model.norm.seen, model.model.norm.seen_by = [], {}
    assert row(liger_aot.bind(model), "model.norm").status == "bound"
    assert (model.model.norm.seen, model.model.norm.seen_by) == ([], {})


@pytest.mark.parametrize("dim", [1, 2, 4, 5])
def test_inputs_of_dimensions_in_which_a_norm_is_another_are_its_own(dim):
    def compute(m, x):
        return -llama(m, x) if x.dim() == dim else llama(m, x)

    model, plain = (with_norm(norm_named("LlamaRMSNorm", compute))() for _ in range(2))
    assert row(liger_aot.bind(model), "model.norm").status == "bound"
    for dims in range(1, 7):
        x = torch.randn(*[2] * (dims - 1), WIDTH)
        with operators() as ran:
            torch.testing.assert_close(model.model.norm(x), plain.model.norm(x))
        assert ("rms_norm_fwd" in ran) is (dims not in (dim, 6))


GROUP_NORMS = {
    "groups": (3, 6, {}),
    "one group": (1, 5, {}),
    "a group a channel": (512, 512, {}),
    "without affine": (5, 15, {"affine": False}),
    "without bias": (2, 14, {"bias": None}),
}


class SpeltOut(nn.GroupNorm):
    times = 1

    def forward(self, x):
        rows = x.float().reshape(len(x), self.num_groups, -1)
        y = (rows - rows.mean(-1, keepdim=True)) * (rows.var(-1, correction=0, keepdim=True) + self.times * self.eps).rsqrt()
        shape = self.num_channels, *[1] * (x.dim() - 2)
        return (y.view(x.shape) * self.weight.float().view(shape) + self.bias.float().view(shape)).to(x.dtype)


def group_norms(kind, groups, channels, **options):
    """Two that are equal, whose parameters are no plain ones and zeros; with a bias of None as torch 2.12 can make it."""
    norms = [kind(groups, channels, affine=options.get("affine", True)) for _ in range(2)]
    for norm in norms:
        if "bias" in options:
            norm.bias = None
        for p in norm.parameters():
            nn.init.normal_(p, 1, 0.3, generator=torch.Generator().manual_seed(3))
    return norms


@pytest.mark.parametrize(("groups", "channels", "options"), GROUP_NORMS.values(), ids=GROUP_NORMS)
def test_a_group_norm_is_bound_and_given_back(groups, channels, options):
    norm, plain = group_norms(nn.GroupNorm, groups, channels, **options)
    assert [found[2:5] for found in liger_aot.bind(nn.Sequential(norm))] == [("group_norm", "bound", "group norm")]
    assert isinstance(norm, nn.GroupNorm)
    shape = (channels,) if norm.affine else None
    assert repr(norm) == f"LigerGroupNorm({shape}, eps=1e-05, num_groups={groups}, was=GroupNorm)"
    torch.testing.assert_close(dict(norm.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    for sizes in (7,), (5, 3), (3, 1, 5):
        x = torch.randn(3, channels, *sizes, requires_grad=True)
        dy = torch.randn_like(x)
        with operators() as seen:
            results = [(y, *torch.autograd.grad(y, [x, *m.parameters()], dy)) for m in (norm, plain) for y in (m(x),)]
        torch.testing.assert_close(*results)
        assert seen == ["group_norm_fwd", "group_norm_bwd"]
    liger_aot.unbind(norm)
    assert type(norm) is nn.GroupNorm


@pytest.mark.parametrize(("times", "status"), {1: "bound", 2: "left"}.items())
def test_a_group_norm_spelt_out_is_bound_by_its_numbers(times, status):
    norm, _ = group_norms(type("Whatever", (SpeltOut,), {"times": times}), 3, 12)
    assert [found.status for found in liger_aot.bind(nn.Sequential(norm))] == [status]


def test_a_flag_keeps_group_norms():
    norm, _ = group_norms(nn.GroupNorm, 3, 12)
    assert not [*liger_aot.bind(nn.Sequential(norm), group_norm=False)]
    assert type(norm) is nn.GroupNorm


def test_a_group_norm_of_channels_that_are_last_keeps_them_so():
    norm, plain = group_norms(nn.GroupNorm, 3, 12)
    assert liger_aot.bind(nn.Sequential(norm)).bound
    x = torch.randn(2, 12, 5, 3).to(memory_format=torch.channels_last)
    y, expected = norm(x), plain(x)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


def test_inputs_of_dimensions_in_which_a_group_norm_is_another_are_its_own():
    def forward(self, input):
        return nn.GroupNorm.forward(self, input) * (-1 if input.dim() == 4 else 1)

    norm, plain = group_norms(type("Turned", (nn.GroupNorm,), {"forward": forward}), 3, 12)
    assert liger_aot.bind(nn.Sequential(norm)).bound
    for sizes in (5,), (5, 3):
        x = torch.randn(2, 12, *sizes)
        torch.testing.assert_close(norm(x), plain(x))


def calling_group_norm(channels):
    """A norm of no class of torch's."""

    def forward(self, x):
        return nn.functional.group_norm(x, self.num_groups, self.weight, None, self.eps)

    norm = type("Norm", (nn.Module,), {"forward": forward})()
    norm.weight, norm.num_groups, norm.eps = nn.Parameter(torch.ones(channels)), 4, 1e-6
    return norm


WiderGroups = type("WiderGroups", (nn.GroupNorm,), {"forward": lambda self, input: nn.GroupNorm.forward(self, input)})
NORMS = {
    "torch's LayerNorm": nn.LayerNorm,
    "a subclass of GroupNorm": functools.partial(WiderGroups, 4),
    "calling group_norm": calling_group_norm,
    "torch's RMSNorm": nn.RMSNorm,
    "a subclass": type("Wider", (nn.LayerNorm,), {"forward": lambda self, input: nn.LayerNorm.forward(self, input)}),
    "spelt out": norm_named("LlamaRMSNorm", llama),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)
def test_cudas_autocast_widens_what_it_widens_on_the_plain_model(kind, dtype):
    """Shown on a GPU's tensors that have no memory: torch's list of what autocast widens is one of CUDA's alone."""
    norms = [kind(WIDTH).to(dtype) for _ in range(2)]
    assert liger_aot.bind(nn.Sequential(norms[0])).bound
    dtypes = []
    with FakeTensorMode():
        for norm in norms:
            fakes = {name: torch.empty(p.shape, dtype=p.dtype, device="cuda") for name, p in norm.named_parameters()}
            x = torch.empty(2, WIDTH, WIDTH, dtype=torch.bfloat16, device="cuda")
            try:
                torch.set_autocast_enabled("cuda", True)
                dtypes.append(torch.func.functional_call(norm, fakes, (x,)).dtype)
            finally:
                torch.set_autocast_enabled("cuda", False)
    assert dtypes[0] == dtypes[1]


class Rotating(nn.Module):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q=q, sin=sin, unsqueeze_dim=1, cos=cos, k=k)


def test_a_rotation_called_by_keywords_runs_the_operator():
    module = Rotating()
    assert [found.status for found in liger_aot.bind(nn.Sequential(module))] == ["bound"]
    inputs = *(torch.randn(2, heads, 5, 16) for heads in (4, 2)), *(torch.randn(2, 5, 16) for _ in range(2))
    with operators() as seen:
        torch.testing.assert_close(module(*inputs), Rotating()(*inputs))
    assert seen == ["rope_fwd"]


def decorated(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


def undeclared(forward):
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return wrapper


def with_decorated(path, decorator):
    model = build()
    module = model.get_submodule(path)
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": decorator(kind.forward)})
    return model


@pytest.mark.parametrize("decorator", [decorated, undeclared])
@pytest.mark.parametrize("path", ["model.norm", "model.layers.0.mlp"])
def test_a_decorated_forward_is_bound_by_its_numbers(path, decorator):
    model, plain = (with_decorated(path, decorator) for _ in range(2))
    assert row(liger_aot.bind(model), path).status == "bound"
    assert "Liger" in type(model.get_submodule(path)).__name__
    check_equal(step(model, **batch()), step(plain, **batch()))


def test_a_decorated_attention_is_left_with_its_reason():
    report = check_left(lambda: with_decorated("model.layers.0.self_attn", decorated), "model.layers.0.self_attn")
    assert "decorated" in row(report, "model.layers.0.self_attn").why
    with pytest.raises(RuntimeError, match="decorated"):
        liger_aot.bind(with_decorated("model.layers.0.self_attn", decorated), strict=True)


BROKEN = {
    "rms_norm_fwd": "model.norm",
    "rms_norm_bwd": "model.norm",
    "swiglu_fwd": "model.layers.0.mlp",
    "swiglu_bwd": "model.layers.0.mlp",
    "rope": "model.layers.0.self_attn",
    "cross_entropy_fwd": "lm_head",
    "cross_entropy_bwd": "lm_head",
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # masked lanes of the interpreter
@pytest.mark.parametrize("fault", ["writes nothing", "raises"])
@pytest.mark.parametrize(("kernel", "path"), BROKEN.items(), ids=str)
def test_an_operator_that_fails_on_this_device_is_not_bound(interpreted, monkeypatch, kernel, path, fault):
    launch = interpreted.launch

    def broken(name, *args, **constants):
        if name != kernel:
            return launch(name, *args, **constants)
        if fault == "raises":
            raise NotImplementedError(f"{name}: no variant for this device")
        return None

    monkeypatch.setattr(interpreted, "launch", broken)
    report = liger_aot.bind(build(num_hidden_layers=1))
    found = row(report, path)
    assert found.status == "left"
    assert ("no variant for this device" in found.why) is (fault == "raises")
    others = {*BROKEN.values()} - {path}
    assert {row(report, other).status for other in others} == {"bound"}
