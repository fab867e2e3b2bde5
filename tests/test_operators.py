"""What holds for every operator."""

import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import liger_aot
from liger_aot import _jit
from liger_aot import _op
from liger_aot.ops.rms_norm import rms_norm_fwd

from examples import EXAMPLES
from examples import call
from examples import leaves
from stub import stubbed

OPERATORS = pytest.mark.parametrize("name", EXAMPLES)
SCHEMAS = pathlib.Path(__file__).parent / "schemas.txt"


def gradients(outputs, arguments):
    wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    return torch.autograd.grad([o.float().sum() for o in outputs if o.requires_grad], wanted)


def test_every_operator_has_an_example():
    assert set(EXAMPLES) == {name for name in _op.PUBLIC if not name.endswith("_stats")}


def test_schemas_are_the_committed_ones():
    """Arguments are only ever appended, keyword-only, with defaults: exported graphs and other people's code hold these."""
    now = sorted(str(getattr(torch.ops.liger, name).default._schema) for name in {*_op.PUBLIC, *_op.BODIES})
    assert SCHEMAS.read_text().splitlines() == now


def test_schemas_are_what_torch_infers():
    names = {*_op.PUBLIC, *_op.BODIES}
    modules = [importlib.import_module(f"liger_aot.ops.{m.name}") for m in pkgutil.iter_modules(liger_aot.ops.__path__)]
    found = {name: inspect.unwrap(f) for module in modules for name, f in vars(module).items() if name in names and callable(f)}
    assert set(found) == names
    for name, function in found.items():
        assert _op.schema(function) == name + torch.library.infer_schema(function, mutates_args=())


def test_a_type_that_no_operator_has_is_refused():
    def of_many(xs: list[torch.Tensor]) -> torch.Tensor: ...

    with pytest.raises(TypeError, match=r"of_many: xs must be annotated as Tensor, SymInt, .*, got list\[torch.Tensor\]"):
        _op.schema(of_many)


def every_second(tensor):
    """The same numbers, each followed by another that nobody may read."""
    if not isinstance(tensor, torch.Tensor) or not tensor.dim():
        return tensor
    beside = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 2**40)
    return torch.stack((tensor.detach(), beside), -1)[..., 0].requires_grad_(tensor.requires_grad)


@OPERATORS
def test_kernels_read_views_where_they_lie(name):
    def numbers(form):
        inputs = [form(a) for a in leaves(arguments)]
        outputs = call(name, inputs, options)
        floats, wanted = ([t for t in ts if isinstance(t, torch.Tensor) and t.requires_grad] for ts in (outputs, inputs))
        upstream = [form(torch.linspace(-1, 1, o.numel()).view(o.shape)) for o in floats]
        return [*outputs, *torch.autograd.grad(floats, wanted, upstream)]

    arguments, options = EXAMPLES[name](torch.float32)
    with _jit.interpreted():
        torch.testing.assert_close(numbers(every_second), numbers(lambda tensor: tensor))


@OPERATORS
def test_double_backward_is_refused(path, name):
    arguments, options = EXAMPLES[name](torch.float32)
    arguments = leaves(arguments)
    outputs = call(name, arguments, options)
    with pytest.raises(
        RuntimeError, match=f"{name}: double backward is not supported; call backward without create_graph=True"
    ):
        torch.autograd.grad([o.sum() for o in outputs], arguments[0], create_graph=True)


@OPERATORS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(path, name, reentrant):
    arguments, options = EXAMPLES[name](torch.float32)
    arguments = leaves(arguments)
    expected = gradients(call(name, arguments, options), arguments)
    outputs = checkpoint(lambda *a: tuple(call(name, a, options)), *arguments, use_reentrant=reentrant)
    for output in outputs:
        assert output.requires_grad
    if reentrant:  # which only serves backward(), and sums into .grad
        torch.autograd.backward([o.float().sum() for o in outputs])
        got = [a.grad for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    else:
        got = gradients(outputs, arguments)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(path, name, dtype):
    """Autocast changes the inputs of those alone that multiply matrices or convolve; losses are fp32 then, as torch's."""
    arguments, options = EXAMPLES[name](dtype)
    arguments = leaves(arguments)
    plain = call(name, arguments, options)
    has_loss_dtype = "loss_dtype" in {a.name for a in getattr(torch.ops.liger, name).default._schema.arguments}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = call(name, arguments, options)
        got = gradients(under, arguments)
    cast = name.startswith("linear") or name == "multi_token_attention"
    for o, p in zip(under, plain, strict=True):
        own = torch.bfloat16 if cast else p.dtype
        assert o.dtype == (torch.float32 if has_loss_dtype or "logprob" in name else own)
        if not cast:
            torch.testing.assert_close(o, p.to(o.dtype), rtol=1e-2 if o.dtype != p.dtype else 0, atol=0)
    if cast and dtype == torch.float32:
        halves = [a.bfloat16() if torch.is_tensor(a) and a.requires_grad else a for a in arguments]
        options |= {"loss_dtype": torch.float32} if has_loss_dtype else {}
        for o, h in zip(under, call(name, halves, options), strict=True):
            assert torch.equal(o, h)
    for g, a in zip(got, [a for a in arguments if torch.is_tensor(a) and a.requires_grad], strict=True):
        assert g.dtype == a.dtype


@OPERATORS
def test_function_transforms_are_refused(name):
    arguments, options = EXAMPLES[name](torch.float32)
    with pytest.raises(RuntimeError, match=f"{name}: torch.func transforms are not supported"):
        torch.func.grad(lambda x: call(name, [x, *arguments[1:]], options)[0].sum())(arguments[0])


@OPERATORS
def test_what_needs_no_gradient_gets_none(path, name):
    """Each tensor alone requires a gradient: it gets the one it gets with all others, and nothing else gets any."""
    arguments, options = EXAMPLES[name](torch.float32)
    everything = leaves(arguments)
    expected = gradients(call(name, everything, options), everything)
    places = [n for n, a in enumerate(everything) if torch.is_tensor(a) and a.requires_grad]
    for place, want in zip(places, expected, strict=True):
        alone = [a.detach() if torch.is_tensor(a) else a for a in everything]
        alone[place].requires_grad_()
        (got,) = gradients(call(name, alone, options), alone)
        assert torch.equal(got, want)


@OPERATORS
def test_forward_mode_is_refused(name):
    arguments, options = EXAMPLES[name](torch.float32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
        with pytest.raises(RuntimeError, match=f"{name}: forward-mode differentiation is not supported"):
            call(name, [dual, *arguments[1:]], options)


@OPERATORS
def test_the_function_is_the_operator(name):
    """It skips the dispatcher; a graph holds the operator all the same."""
    arguments, options = EXAMPLES[name](torch.float32)
    arguments, function = leaves(arguments), getattr(importlib.import_module(f"liger_aot.ops.{name}"), name)

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args, **options)

    got, expected = Module()(*arguments), call(name, arguments, options)
    got = list(got) if isinstance(got, tuple) else [got]
    for g, e in zip([*got, *gradients(got, arguments)], [*expected, *gradients(expected, arguments)], strict=True):
        assert torch.equal(g, e)
    plain = tuple(a.detach() if torch.is_tensor(a) else a for a in arguments)
    for strict in (False, True):
        program = torch.export.export(Module(), plain, strict=strict)
        assert f"liger.{name}.default" in {str(node.target) for node in program.graph.nodes}


@OPERATORS
def test_without_gradients_no_graph(name, monkeypatch):
    (function,) = (f for f in _op.Function.__subclasses__() if f.__module__ == f"liger_aot.ops.{name}")
    monkeypatch.setattr(function, "apply", lambda *_: pytest.fail("an idle autograd.Function costs 10 us"))
    arguments, options = EXAMPLES[name](torch.float32)
    for output in call(name, arguments, options):
        assert not output.requires_grad
    with torch.no_grad():
        for output in call(name, leaves(arguments), options):
            assert not output.requires_grad


@OPERATORS
def test_inputs_are_never_written(path, name):
    arguments, options = EXAMPLES[name](torch.float32)
    arguments = leaves(arguments)
    before = [a.detach().clone() if torch.is_tensor(a) else a for a in arguments]
    outputs = call(name, arguments, options)
    upstream = [torch.ones_like(o) for o in outputs]
    torch.autograd.backward(outputs, upstream)
    for a, b in zip(arguments, before, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    assert all(torch.equal(u, torch.ones_like(u)) for u in upstream)


@OPERATORS
def test_neg_views_are_what_they_say(path, name):
    """A tensor whose minus sign is still to be applied (torch._neg_view) reaches no kernel as it lies in memory."""
    arguments, options = EXAMPLES[name](torch.float32)
    plain = call(name, arguments, options)
    lazy = [torch._neg_view(-a) if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    for got, want in zip(call(name, lazy, options), plain, strict=True):
        torch.testing.assert_close(got, want)


@OPERATORS
def test_a_dispatch_mode_sees_it(interpreted, name):
    """Tracing, selective checkpointing and counters of operations stand on this."""
    seen = set()

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(str(function))
            return function(*args, **kwargs or {})

    arguments, options = EXAMPLES[name](torch.float32)
    with Look():
        call(name, arguments, options)
    assert f"liger.{name}_fwd.default" in seen


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_tensor_on_another_device_reaches_no_kernel(name):
    """Also where nothing has looked at the tensors before: operators of graphs, and those called by name."""
    fwd = getattr(torch.ops.liger, f"{name}_fwd").default
    arguments, options = EXAMPLES[name](torch.float32)
    seen = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((function, args))
            return function(*args, **kwargs or {})

    with Look():
        call(name, arguments, options)
    (args,) = (args for function, args in seen if function is fwd)
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for place in [n for n, a in enumerate(args) if n and torch.is_tensor(a)]:
        apart = [a.to("meta") if n == place else a for n, a in enumerate(args)]
        text = f"^{name}_fwd: tensors must be on one device, got one on cpu and one on meta; move it with .to\\(\\)$"
        with pytest.raises(ValueError, match=text):
            fwd.redispatch(cuda, *apart)


def far_apart(t, stride, path):
    """t with rows that far from each other in memory: a file with holes, which takes no room."""
    rows = t.numel() // t.shape[-1]
    memory = torch.from_file(str(path), shared=True, size=(rows - 1) * stride + t.shape[-1], dtype=t.dtype)
    path.unlink()
    view = memory.as_strided((rows, t.shape[-1]), (stride, 1)).unflatten(0, t.shape[:-1])
    return view.copy_(t.detach()).requires_grad_()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.startswith("linear")])
def test_offsets_beyond_int32(interpreted, name, tmp_path):
    arguments, options = EXAMPLES[name](torch.float16)
    stride = 2**28 if name == "rope" else 2**29  # of rope, heads have a stride too, which is five times that
    near = leaves(arguments)
    far = [
        far_apart(a, stride + 16, tmp_path / "far") if torch.is_tensor(a) and a.requires_grad and a.dim() > 1 else a
        for a in near
    ]
    outputs, expected = call(name, far, options), call(name, near, options)
    for got, want in zip([*outputs, *gradients(outputs, far)], [*expected, *gradients(expected, near)], strict=True):
        assert torch.equal(got, want)


@OPERATORS
def test_source_is_named(name):
    """The page of an operator starts with its formula."""
    module = __import__(f"liger_aot.ops.{name}", fromlist=["_"])
    assert re.search(r"=|softmax|log", module.__doc__.splitlines()[0]), module.__doc__.splitlines()[0]


@OPERATORS
def test_meta_tensors_have_shapes_alone(name):
    arguments, options = EXAMPLES[name](torch.float32)
    expected = call(name, arguments, options)
    got = call(name, [a.to("meta") if torch.is_tensor(a) else a for a in arguments], options)
    assert [(g.shape, g.dtype, g.device.type) for g in got] == [(e.shape, e.dtype, "meta") for e in expected]


def test_tracing_before_the_first_call():
    fresh = _op.direct(rms_norm_fwd.__wrapped__, _op.BODIES["rms_norm_fwd"])
    x = torch.randn(2, 8)
    traced, _ = torch.compile(fresh, fullgraph=True, backend="eager")(x, None, 1e-6, offset=0.0, cast=False)
    assert torch.equal(traced, rms_norm_fwd(x, None, 1e-6, 0.0, False)[0])


def test_tracing_between_calls():
    """A call that is not traced lies between two that are, of other shapes: what Dynamo knows of the function still holds."""
    fresh = _op.direct(rms_norm_fwd.__wrapped__, _op.BODIES["rms_norm_fwd"])
    compiled = torch.compile(lambda *args: fresh(*args), fullgraph=True, backend="eager")
    for rows in 2, 3, 4:
        x = torch.randn(rows, 8)
        assert torch.equal(compiled(x, None, 1e-6, 0.0, False)[0], fresh(x, None, 1e-6, 0.0, False)[0])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["packed_glu", "softmax", "rms_norm"])
def test_tracing_after_kernels_have_been_launched(name, dynamic):
    """What a launch has prepared must leave alone what an operator makes of fake tensors: copies, views, sums."""
    form = {
        "packed_glu": lambda x, w: liger_aot.packed_glu(x),
        "softmax": lambda x, w: liger_aot.softmax(x, 0),
        "rms_norm": lambda x, w: liger_aot.rms_norm(x, (64,), w),
    }[name]
    x, w = torch.randn(6, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    torch._dynamo.reset()
    with stubbed():
        form(x, w).sum().backward()
        compiled = torch.compile(form, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        y = compiled(x, w)
        y.sum().backward()
    assert y.shape == form(x, w).shape
