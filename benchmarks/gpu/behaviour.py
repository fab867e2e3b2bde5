"""What a launcher must do besides the right sums: under opcheck, compile, CUDA graphs, streams, threads, contexts, preload;
and what becomes of programs that were exported where no GPU is.

Each check takes the machine and what it is of; it raises, or returns a note. Bits are compared with those of an eager call.
"""

import contextlib
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading

import torch
from torch.export.passes import move_to_device_pass

import liger_aot
from liger_aot import _op
from liger_aot import export
from liger_aot._runtime import kernels
from liger_aot.functional import moe_route
from liger_aot.functional import packed_glu
from liger_aot.ops._norm import SUM_BLOCK
from liger_aot.ops._norm import SUM_ROWS
from liger_aot.ops._norm import column_sum
from liger_aot.ops.packed_glu import packed_glu_in_place

import examples
import formulas
from examples import EXAMPLES
from examples import call
from examples import leaves
from stub import Launcher
from stub import On
from stub import Stub

# Of these matmuls or convolutions are torch's, whose algorithm may differ where memory, streams or a compiler do.
LINEAR = "linear_cross_entropy", "linear_jsd", "linear_kl_div", "linear_logprob"  # which autocast changes, too
BY_TORCH = *LINEAR, "mhc_coeffs", "multi_token_attention"
THREADED = "rms_norm", "cross_entropy", "swiglu", "linear_cross_entropy"
TIMES = 20


def example(machine, name, dtype=torch.bfloat16):
    with torch.device(machine.device):
        arguments, options = EXAMPLES[name](dtype)
        return leaves(arguments), options


def outcome(function, arguments):
    """Results that have gradients, and the gradients of their sum."""
    outputs = [o for o in function(*arguments) if o.requires_grad]
    wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])
    return [o.detach() for o in outputs] + list(gradients)


def of(name, options):
    return lambda *arguments: call(name, arguments, options)


def refill(arguments, others):
    for a, other in zip(arguments, others, strict=True):
        if isinstance(a, torch.Tensor):
            a.detach().copy_(other.detach())


def opcheck(machine, name):
    for dtype in (torch.float32, torch.bfloat16):
        arguments, options = example(machine, name, dtype)
        torch.library.opcheck(getattr(torch.ops.liger, name).default, arguments, options)


def compiled(machine, name):
    for dynamic in (False, True):
        torch._dynamo.reset()
        arguments, options = example(machine, name)
        function = torch.compile(of(name, options), fullgraph=True, dynamic=dynamic, backend=machine.backend)
        machine.same(outcome(function, arguments), outcome(of(name, options), arguments), exact=name not in BY_TORCH)


def cuda_graph(machine, name):
    arguments, options = example(machine, name)
    others, _ = example(machine, name)
    with machine.launching(machine.launcher()):
        function = of(name, options)
        want = outcome(function, others)
        stream = machine.stream()
        machine.behind(stream)
        with machine.on(stream):  # a warm-up, as torch asks for
            outcome(function, arguments)
        machine.wait(stream)
        replay, results = machine.capture(lambda: outcome(function, arguments))
        for _ in range(3):
            refill(arguments, others)
            replay()
            machine.synchronize()
            machine.same(results, want, exact=name not in BY_TORCH)


def first_call_in_a_graph(machine, name):
    """What is launched for the first time while a graph is captured is loaded then."""
    arguments, options = example(machine, name)
    function = of(name, options)
    want = outcome(function, arguments)
    launcher = machine.launcher()
    with machine.launching(launcher):
        replay, results = machine.capture(lambda: outcome(function, arguments))
        if not machine.loads(launcher):
            raise AssertionError("nothing was loaded during the capture, so nothing was tried")
        replay()
        machine.synchronize()
        machine.same(results, want, exact=name not in BY_TORCH)


def two_streams(machine, name):
    """On each stream the numbers arrive late: a launch on another stream would read the old ones."""
    pairs = [(example(machine, name)[0], example(machine, name)) for _ in range(2)]
    launcher = machine.launcher()
    with machine.launching(launcher):
        want = [outcome(of(name, options), new) for _, (new, options) in pairs]
        machine.synchronize()
        streams, got = [machine.stream(), machine.stream()], []
        for stream, (old, (new, options)) in zip(streams, pairs, strict=True):
            machine.behind(stream)
            with machine.on(stream):
                machine.flush()
                refill(old, new)
                got.append(outcome(of(name, options), old))
        for stream in streams:
            machine.wait(stream)
        machine.synchronize()
        machine.launched_on(launcher, streams)
        for g, w in zip(got, want, strict=True):
            machine.same(g, w, exact=name not in BY_TORCH)


def in_threads(*works):
    """Run each in a thread of its own, and raise here what one raised there."""
    errors = []

    def run(work):
        try:
            work()
        except Exception as error:  # raised below, in the thread that can report it
            errors.append(error)

    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def two_threads(machine, name):
    """Two threads, of other numbers and sizes each, launch the same kernels and load them at the same time."""
    launcher, works = machine.launcher(), []
    with machine.launching(launcher):
        for dtype in (torch.bfloat16, torch.float32):
            arguments, options = example(machine, name, dtype)
            want = outcome(of(name, options), arguments)
            function = of(name, options)

            def work(function=function, arguments=arguments, want=want):
                for _ in range(TIMES):
                    machine.same(outcome(function, arguments), want, exact=name not in BY_TORCH)

            works.append(work)
        in_threads(*works)


def thread_without_a_context(machine, name):
    arguments, options = example(machine, name)
    function, notes = of(name, options), []
    with torch.device(machine.device):
        partial, out = torch.randn(37, 64), torch.empty(64)
    with machine.launching(machine.launcher()):
        want = outcome(function, arguments)

        def work():
            machine.leave_context()
            notes.append("no context" if not machine.context() else "the context could not be left")
            # A launch alone, without an allocation before it that might make a context current.
            column_sum(partial, 37, out)
            machine.synchronize()
            machine.same([out], [partial.sum(0)], exact=False)
            machine.leave_context()
            machine.same(outcome(function, arguments), want, exact=name not in BY_TORCH)

        in_threads(work)
    if notes != ["no context"]:
        raise AssertionError(f"nothing was tried: {notes}")


def other_device(machine, name):
    """Tensors of a device that is not the current one are served there; without a second one, over the stub."""
    if machine.count > 1:
        arguments, options = example(machine, name)
        there = [a.detach().to("cuda:1").requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in arguments]
        got, want = (outcome(of(name, options), a) for a in (there, arguments))
        if torch.cuda.current_device():
            raise AssertionError(f"the current device is {torch.cuda.current_device()}, was 0")
        machine.same([g.cpu() for g in got], [w.cpu() for w in want], exact=name not in BY_TORCH)
        return "two devices"
    stub = Stub()
    with kernels.launched_by(Launcher(stub)):
        tensor = On(torch.ones(64), 1)
        kernels.column_sum[(1,)](tensor, tensor, 1, 64, ROWS=SUM_ROWS, BLOCK=SUM_BLOCK)
    if [launch.device for launch in stub.launches] != [1] or stub.context != 0x1000:
        raise AssertionError(f"launched on {stub.launches}, then context {stub.context:#x}")
    return "one device: over the stub"


def back_ends(machine, name):
    """Every way to the driver launches the same."""
    arguments, options = example(machine, name)
    function, results = of(name, options), {}
    for back_end, launcher in machine.back_ends().items():
        with machine.launching(launcher):
            results[back_end] = outcome(function, arguments)
    for got in results.values():
        machine.same(got, outcome(function, arguments))
    return ", ".join(results)


def preload(machine, _):
    """Everything is loaded at once; no call loads anything after it."""
    launcher = machine.launcher()
    with machine.launching(launcher):
        start = machine.clock()
        count = liger_aot.preload()
        seconds = machine.since(start)
        pack = launcher.at(0).pack
        if count != pack.manifest["variants"] or count != machine.loads(launcher):
            raise AssertionError(f"loaded {count} of {pack.manifest['variants']} variants, {machine.loads(launcher)} are there")
        for name in EXAMPLES:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                arguments, options = example(machine, name, dtype)
                outcome(of(name, options), arguments)
        if machine.loads(launcher) != count:
            raise AssertionError(f"{machine.loads(launcher) - count} variants were loaded after all of them")
    return f"{count} variants" + ("" if seconds is None else f" in {seconds:.2f} s")


def same_bits_of_wide_rows(machine, name):
    """Whose backward reads and writes its share of a weight's gradient again and again."""
    same_bits(machine, name, *((15, 8200) if machine.dry else (2099, 16400)))


def same_bits(machine, name, rows=4099, n=4097):
    """The same call gives the same bits every time: what differs is a race."""
    if machine.dry and n < 8192:
        rows, n = 7, 96
    with torch.device(machine.device):
        x = [torch.randn(rows, n).bfloat16().requires_grad_() for _ in range(2)]
        weight, bias = (torch.randn(n).bfloat16().requires_grad_() for _ in range(2))
        q, k = (torch.randn(1, rows, heads, 64).bfloat16().transpose(1, 2).requires_grad_() for heads in (8, 2))
        angles, target = torch.randn(2, 1, rows, 64).unbind(), torch.randint(n, (rows,))
        slots, weights = moe_route(torch.randint(8, (rows, 2)), 8)[:2], torch.rand(rows, 2).requires_grad_()
        mixing = torch.rand(rows, 2, 2).requires_grad_()
    calls = {
        "rms_norm": [x[0], weight],
        "fused_add_rms_norm": [*x, weight],
        "layer_norm": [x[0], weight, bias],
        "gated_rms_norm": [*x, weight],
        "rope": [q, k, *angles],
        "swiglu": x,
        "geglu": x,
        "packed_glu": [torch.cat(x, -1).detach().requires_grad_()],
        "moe_permute": [x[0], *slots],
        "moe_unpermute": [torch.cat(x).detach().requires_grad_(), weights, *slots],
        "relu_squared": x[:1],
        "softmax": x[:1],
        "sparsemax": x[:1],
        "dyt": [x[0], weight[:1].detach(), weight, bias],
        "modulated_rms_norm": [x[0][None], weight, bias, weight.detach()],
        "attn_res": [torch.stack([t.detach() for t in x]).requires_grad_(), weight, bias],
        "mhc_pre": [torch.stack([t.detach() for t in x], 1).requires_grad_(), weights],
        "mhc_post_res": [torch.stack([t.detach() for t in x], 1).requires_grad_(), x[0], weights, mixing],
        "embedding": [x[0], target % 7],
        "poly_norm": [x[0], weight[:3].detach(), bias[:1].detach()],
        "group_norm": [x[0], 1, weight, bias],
        "cross_entropy": [x[0], target],
    }
    function = of(name, {})
    with machine.launching(machine.launcher()):
        want = outcome(function, calls[name])
        for _ in range(TIMES):
            machine.same(outcome(function, calls[name]), want)


def in_place(machine, activation):
    """A gradient written over what it is the gradient of has the bits of one that lies elsewhere."""
    rows, n = (7, 96) if machine.dry else (4099, 4097)
    with torch.device(machine.device):
        leaf = torch.randn(rows, 2 * n).bfloat16().requires_grad_()
    with machine.launching(machine.launcher()):
        want = outcome(lambda x: [packed_glu(x, activation)], [leaf])
        for _ in range(TIMES):
            x = leaf * 1
            machine.same(outcome(lambda _, x=x: [packed_glu_in_place(x, activation)], [leaf]), want)
            machine.same([x.detach()], want[1:])


NORMS = "rms_norm", "layer_norm", "fused_add_rms_norm", "gated_rms_norm", "modulated_rms_norm"
ONE_TENSOR = "rms_norm", "layer_norm", "packed_glu", "relu_squared", "softmax", "sparsemax"
ROW_WISE = (
    *ONE_TENSOR,
    "fused_add_rms_norm",
    "gated_rms_norm",
    "modulated_rms_norm",
    "poly_norm",
    "dyt",
    "rope",
    "swiglu",
    "geglu",
    "cross_entropy",
)


def beyond_31_bits(machine, name):
    """A tensor of more than 2^31 numbers: its last rows come out as they do alone."""
    least, n = (2**10, 64) if machine.dry else (2**31, 131072 if name == "cross_entropy" else 4096)
    rows, options = least // n + 5, {}
    with torch.device(machine.device):
        x = torch.empty(rows, n, dtype=torch.bfloat16).normal_()
        if name == "rope":
            x = x.view(1, rows, n // 32, 32).transpose(1, 2)
            k = torch.empty(1, 1, rows, 32, dtype=torch.bfloat16).normal_()
            angles = torch.randn(2, 1, rows, 32).unbind()
            whole, last = [x, k, *angles], [x[:, :, -3:], k[:, :, -3:], *(a[:, -3:] for a in angles)]
        elif name == "cross_entropy":
            target, options = torch.randint(n, (rows,)), {"reduction": "none"}
            whole, last = [x, target], [x[-3:], target[-3:]]
        elif name == "dyt":
            parameters = torch.ones(1), torch.randn(n), torch.randn(n)
            whole, last = [x, *parameters], [x[-3:], *parameters]
        elif name == "modulated_rms_norm":
            both = torch.randn(2, n).bfloat16().unbind()
            whole, last = ([t, *both] for t in (x, x[-3:]))
        elif name == "poly_norm":
            parameters = torch.randn(3), torch.randn(1)
            whole, last = ([t, *parameters] for t in (x, x[-3:]))
        elif name == "gated_rms_norm":
            whole, last = ([t, t, torch.ones(n)] for t in (x, x[-3:]))
        else:
            count = 1 if name in ONE_TENSOR else 2
            whole, last = [x] * count, [x[-3:]] * count
    with machine.launching(machine.launcher()):
        function = of(name, options)
        machine.same(tail(function, whole, name), tail(function, last, name))
    machine.free()


def tail(function, arguments, name):
    """The last three rows of the first result, and of the first argument's gradient for an upstream that is the argument."""
    first, *others = [a.detach() for a in arguments]
    output = function(first.requires_grad_(), *others)[0]
    upstream = torch.ones_like(output) if name in ("cross_entropy", "packed_glu") else first.detach()
    (gradient,) = torch.autograd.grad(output, first, upstream)
    return [t[:, :, -3:] if name == "rope" else t[-3:] for t in (output.detach(), gradient)]


NOT_FINITE = {
    "softmax": lambda x: torch.softmax(x, -1),
    "sparsemax": formulas.sparsemax,
    "cross_entropy": formulas.cross_entropy(reduction="none"),
}


def not_finite(machine, name):
    """A row with NaN or +inf, or of -inf alone, is NaN, and so is one whose target is out of range; what is masked weighs
    nothing; an ignored row may hold anything. No row has a part in another, nor does it matter how a kernel walks them."""
    for n in (96, 9001):
        poisoned, target, options = [0, 1, 2], [], {}
        with torch.device(machine.device):
            x = torch.randn(8, n)
            x[0, n // 2], x[1, n - 1], x[2], x[3, : n // 2], x[4, 1:] = torch.nan, torch.inf, -torch.inf, -torch.inf, -torch.inf
            if name == "cross_entropy":
                target, options = [torch.tensor([0, 0, 0, n - 1, 0, -100, 1, 2])], {"reduction": "none"}
        clean = x.clone()
        if name == "cross_entropy":
            x[5] = torch.nan
            if machine.computes:  # a target out of range is an error on a CPU
                poisoned, target[0][6], target[0][7] = [0, 1, 2, 6, 7], -1, n
        others = [row for row in range(8) if row not in poisoned]
        with machine.launching(machine.launcher()) if machine.computes else contextlib.nullcontext():
            got = squared(of(name, options), x, *target)
        want = squared(lambda *tensors: [NOT_FINITE[name](*tensors)], clean[others], *(t[others] for t in target))
        for result, g, w in zip(("result", "gradient"), got, want, strict=True):
            # sparsemax promises nothing of the gradient there: nothing of such a row was kept.
            if not g[poisoned].isnan().all() and (name, result) != ("sparsemax", "gradient"):
                raise AssertionError(f"{result} of {n} columns: rows {poisoned} must be NaN, got {g[poisoned]}")
            torch.testing.assert_close(g[others], w, msg=functools.partial("{} of {} columns: {}".format, result, n))


def squared(function, x, *others):
    """The square of what function gives, which has a gradient where a sum of one has none, and the gradient of its sum."""
    return outcome(lambda *tensors: [function(*tensors)[0].square()], [x.detach().requires_grad_(), *others])


def in_a_process(code, *arguments, **environment):
    """Run Python code in a process of its own; what that says is raised where it fails."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"a process ended with status {done.returncode}: {done.stderr[-1500:]}")


ONE, ALL = "rms_norm", "all"  # operators together
EXPORT = """
import sys
sys.path[:0] = sys.argv[3:]
import torch
from gpu import behaviour
assert not torch.cuda.is_available()
behaviour.export_to(*sys.argv[1:3])
"""


def export_to(folder, subject):
    """The file of a program: of one operator, or of all of them together."""
    if subject == ALL:
        modules, tensors = zip(*(examples.example(name, torch.bfloat16) for name in _op.PUBLIC), strict=True)
        module = examples.Everything(dict(zip(_op.PUBLIC, modules, strict=True)))
        inputs = (dict(zip(_op.PUBLIC, tensors, strict=True)),)
    else:
        module, inputs = examples.example(subject, torch.bfloat16)
    export.save(torch.export.export(module, inputs), f"{folder}/{subject}.pt2")


@functools.cache
def carried(subject):
    """The folder of a program that a process exported which sees no GPU; there while this process is."""
    folder = tempfile.TemporaryDirectory()
    in_a_process(EXPORT, folder.name, subject, *sys.path, CUDA_VISIBLE_DEVICES="")
    return folder


def carried_program(machine, subject):
    """(a program that was exported without a GPU, its inputs on the machine's device, what they give in eager execution)."""
    found = {}
    for name in _op.PUBLIC if subject == ALL else [subject]:
        module, tensors = examples.example(name, torch.bfloat16)
        tensors = tuple(t.to(machine.device) for t in tensors)
        found[name] = tensors, module(*tensors)
    inputs, want = ({name: pair[n] for name, pair in found.items()} for n in range(2))
    program = export.load(f"{carried(subject).name}/{subject}.pt2")
    return program, (inputs,) if subject == ALL else inputs[subject], want if subject == ALL else {subject: want[subject]}


def same_results(machine, got, want, exact=False):
    got = got if isinstance(got, dict) else dict.fromkeys(want, got)
    for name in want:
        if {g.device for g in got[name]} != {machine.device}:
            raise AssertionError(f"{name}: results are on {[str(g.device) for g in got[name]]}, not on {machine.device}")
        try:
            machine.same(got[name], want[name], exact=exact and name not in BY_TORCH)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def from_a_cpu(machine, name):
    """A graph that was exported where no GPU is runs on one as it is."""
    with machine.launching(machine.launcher()):
        program, inputs, want = carried_program(machine, name)
        same_results(machine, program.module()(*inputs), want, exact=True)


def package(machine, subject):
    """A package of AOTInductor of it, beside this library."""
    if not shutil.which("g++"):
        return "no C++ compiler"
    program, inputs, want = carried_program(machine, subject)
    with tempfile.TemporaryDirectory() as folder:
        path = compile_into(folder, move_to_device_pass(program, machine.device))
        same_results(machine, beside_library(path, inputs), want)
        return f"{pathlib.Path(path).stat().st_size / 1e6:.1f} MB"


def compile_into(folder, program):
    return torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/package.pt2")


def beside_library(package, inputs):
    """What a package gives for inputs in this process."""
    return export.load(package)(*inputs)


WITHOUT = """
import sys
sys.modules["liger_aot"] = None
import torch
package, inputs, outputs = sys.argv[1:]
torch.save(torch._inductor.aoti_load_package(package)(*torch.load(inputs)), outputs)
"""


def without_library(package, inputs):
    """What a package gives for inputs in a process that has no liger_aot."""
    folder = pathlib.Path(package).parent
    torch.save(inputs, folder / "inputs.pt")
    in_a_process(WITHOUT, package, folder / "inputs.pt", folder / "outputs.pt")
    return torch.load(folder / "outputs.pt")


def lowered(machine, subject):
    """A package of a lowered program, in a process that has no liger_aot: our kernels as Triton compiles them here."""
    program, inputs, want = carried_program(machine, subject)
    multiprocessors = machine.launcher().at(0).multiprocessors
    program = export.lower(move_to_device_pass(program, machine.device), multiprocessors=multiprocessors)
    launches = sum("triton_kernel_wrapper" in str(node.target) for node in program.graph.nodes)
    if machine.dry or not shutil.which("g++"):
        return f"{launches} launches, which only a GPU and a C++ compiler make a package of"
    with tempfile.TemporaryDirectory() as folder:
        path = compile_into(folder, program)
        same_results(machine, without_library(path, inputs), want)
        return f"{launches} launches, {pathlib.Path(path).stat().st_size / 1e6:.1f} MB"


def autocast(machine, name):
    """Under autocast a linear loss is what it is for inputs that were cast before."""
    arguments, options = example(machine, name, torch.float32)
    if name in ("linear_cross_entropy", "linear_jsd", "linear_kl_div"):  # whose dtype autocast changes as well
        options = options | {"loss_dtype": torch.float32}
    with machine.launching(machine.launcher()):
        with torch.autocast(machine.autocast, torch.bfloat16):
            got = [o.float() for o in call(name, arguments, options)]
        cast = [a.detach().bfloat16() if torch.is_tensor(a) and a.requires_grad else a for a in arguments]
        machine.same(got, [o.float() for o in call(name, cast, options)], exact=False)


def bound_model(machine, family):
    """A bound model of transformers against itself unbound: in float32 closely, in bfloat16 as exact as unbound is."""
    import tiny

    inputs = {name: t.to(machine.device) for name, t in tiny.batch().items()}

    def step(dtype, bound=False):
        model = tiny.build(family, dtype).to(machine.device)
        if bound:
            liger_aot.bind(model)
        return tiny.step(model, **inputs)

    launcher = machine.launcher()
    if machine.dry:  # where numbers count, and come from the CPU kernels
        tiny.check_equal(step(torch.float32, bound=True), step(torch.float32))
        return "over the CPU kernels"
    with machine.launching(launcher):
        tiny.check_equal(step(torch.float32, bound=True), step(torch.float32))
        exact, plain, bound = step(torch.float64), step(torch.bfloat16), step(torch.bfloat16, bound=True)
        tiny.check_as_exact(exact, plain, bound)
    return f"{sum(launcher.counts.values())} launches"


# In the order of their importance: (check, what it is of). Those of PROGRAMS take minutes of a CPU and little of the GPU.
CHECKS = [
    (preload, "all"),
    *((cuda_graph, name) for name in EXAMPLES),
    (first_call_in_a_graph, "rms_norm"),
    *((two_streams, name) for name in EXAMPLES),
    *((two_threads, name) for name in THREADED),
    (thread_without_a_context, "rms_norm"),
    (back_ends, "rms_norm"),
    (other_device, "rms_norm"),
    *((same_bits, name) for name in (*ROW_WISE, "group_norm", "attn_res", "mhc_pre", "mhc_post_res", "embedding")),
    *((same_bits_of_wide_rows, name) for name in NORMS),
    *((in_place, activation) for activation in ("silu", "gelu", "gelu_tanh")),
    *((not_finite, name) for name in NOT_FINITE),
    *((beyond_31_bits, name) for name in ROW_WISE),
    *((autocast, name) for name in LINEAR),
    *((bound_model, family) for family in ("llama", "gemma2")),
]
PROGRAMS = [
    *((from_a_cpu, subject) for subject in (ONE, ALL)),
    *((opcheck, name) for name in EXAMPLES),
    *((compiled, name) for name in EXAMPLES),
    *((check, subject) for subject in (ONE, ALL) for check in (lowered, package)),
]
COSTLY = opcheck, compiled, bound_model, from_a_cpu, package, lowered  # of which a dry run tries one subject each


def named(check, subject):
    return f"{check.__name__}: {subject}"
