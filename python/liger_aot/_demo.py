"""The `demo` command: train a small Llama plain and with the operators bound, and hold one against the other.

The same in float64 is the truth, and what the plain model in float32 loses against it is what rounding costs. From the same
weights a bound step may lose STEP times that, the rule that the tests have. A training run amplifies rounding, and by chance:
of two correct runs one has been seen to end three times as far from the truth as the other, so a bound run may be RUN times as
far as the plain one.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)

from . import __version__
from . import _runtime
from .bind import bind
from .ops.rms_norm import forward_reference

STEP, RUN = 2, 10
WORDS = re.compile(rb" ?\w+|\s+|[^\w\s]")
SIZE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 8192}
BATCH, LENGTH = 4, 256
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 300}


def corpus(vocabulary):
    """The Python standard library's source as token ids: bytes, and the commonest words of that source."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    text = b"".join(p.read_bytes() for p in sorted(folder.glob("*.py")))
    if not text:
        raise SystemExit(f"demo: needs the standard library's source files as text, found none in {folder}")
    words = WORDS.findall(text)
    common = collections.Counter(w for w in words if len(w) > 1).most_common(vocabulary - 256)
    ids = {word: 256 + n for n, (word, _) in enumerate(common)}
    return torch.tensor([i for w in words for i in ([ids[w]] if w in ids else w)]), len(text)


def batches(tokens, count, batch, length, device):
    starts = torch.randint(len(tokens) - length, (count, batch), generator=torch.Generator().manual_seed(0)).tolist()
    return [torch.stack([tokens[s : s + length] for s in row]).to(device) for row in starts]


def new_model(size, device):
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**size, **heads, use_cache=False)).to(device).train()


def exact(model):
    """The model in float64, also where transformers computes in float32 whatever the model's dtype: norms and the loss."""
    for m in model.double().modules():
        if type(m).__name__ == "LlamaRMSNorm":
            m.forward = lambda x, m=m: forward_reference(x, m.weight, m.variance_epsilon, 0.0, False)[0]
    model.loss_function = lambda logits, labels, **_: F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return model


def one_step(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return {"loss": loss.detach(), "gradients": gradients}


def train(label, model, data):
    """(losses, seconds) of one step for each batch."""
    # With Adam's usual eps, 1e-8, gradients that are nothing but rounding would make full steps.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    losses, seconds = [], []
    for ids in data:
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        progress(label, losses, seconds, len(data))
    return losses, seconds


def progress(label, losses, seconds, total):
    done = len(losses)
    bar, time_text = "█" * (20 * done // total), f"{statistics.median(seconds):.2f} s a step"
    line = f"  {label:10} {bar:░<20} {done:3}/{total}  loss {losses[-1]:.4f}  {time_text}"
    if sys.stdout.isatty():
        print("\r" + line, end="\n" if done == total else "", flush=True)
    elif done == total or done % 20 == 0:
        print(line, flush=True)


def step_and_forget(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()


def peak_memory(step, device):
    """Bytes that step() allocates at most beyond what is there before it, as torch's allocator counts them."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with tempfile.TemporaryDirectory() as folder, silent_stderr():
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            step()  # all that was allocated is to be free again: what outlives the profile would spoil the next
        trace = pathlib.Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate(e["args"]["Bytes"] for e in changes))


@contextlib.contextmanager
def silent_stderr():
    """The profiler's own library writes to the file descriptor."""
    saved = os.dup(2)
    with pathlib.Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@torch.no_grad()
def state(model, losses, ids):
    model.eval()
    parameters = torch.cat([p.flatten() for p in model.parameters()])
    return {
        "loss curve": torch.tensor(losses, dtype=torch.float64),
        "final logits": model(input_ids=ids).logits,
        "final parameters": parameters,
    }


def distances(states, slack):
    """{what: {run: root mean square distance from the float64 run, "allowed": ..., "largest": of bound from plain}}."""
    table = {}
    for what, exact in states["float64"].items():
        plain, bound = states["plain"][what].double(), states["bound"][what].double()
        row = {name: (x - exact).square().mean().sqrt().item() for name, x in (("plain", plain), ("bound", bound))}
        # How far a single number is off is chance: it is granted a unit in its last place.
        luck = torch.finfo(torch.float32).eps * exact.abs().item() if exact.numel() == 1 else 0.0
        row["allowed"] = slack * max(row["plain"], luck)
        row["largest"] = (bound - plain).abs().max().item()
        table[what] = row
    return table


def interpreted_step():
    """One step's loss and gradients: in float64, plain, and through the kernels as Triton interprets them. Printed as JSON."""
    try:
        from . import _jit
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    tokens, _ = corpus(TINY["vocab_size"])
    (ids,) = batches(tokens, 1, 2, 24, "cpu")
    states = {"float64": one_step(exact(new_model(TINY, "cpu")), ids), "plain": one_step(new_model(TINY, "cpu"), ids)}
    with _jit.interpreted() as launcher:
        model = new_model(TINY, "cpu")
        bind(model)
        states["bound"] = one_step(model, ids)
    launched = dict(sorted(collections.Counter(launcher.launched).items()))
    print(json.dumps({"distances": distances(states, STEP), "launched": launched}))


def run_interpreted():
    """interpreted_step in a process of its own: Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-c", "from liger_aot import _demo; _demo.interpreted_step()"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"demo: the interpreted step failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def verdict(title, table):
    """Print the rows; whether every distance is allowed."""
    print(f"  {title}")
    for what, row in table.items():
        note = "" if row["bound"] <= row["allowed"] else "  TOO FAR"
        print(f"    {what:30} {row['plain']:10.2e} {row['bound']:10.2e} {row['allowed']:10.2e} {row['largest']:26.2e}{note}")
    return all(row["bound"] <= row["allowed"] for row in table.values())


def path_of(device):
    if device == "cpu":
        packs = ", ".join(p.name for p in _runtime.pack_paths().values()) or "none"
        return (
            f"CPU, {torch.get_num_threads()} threads",
            f"CPU reference: no speed claim (packs installed, not used: {packs})",
        )
    pack = _runtime.kernels.launcher.device(torch.empty(1, device=device)).pack
    return torch.cuda.get_device_name(device), f"compiled kernels of {pack.path.name}"


def draw(path, curves, title):
    """The loss curves, and how far they are apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, len(curves["plain"]) + 1)
    left.plot(steps, curves["plain"], color="0.75", linewidth=6, label="plain")
    left.plot(steps, curves["bound"], color="tab:blue", linewidth=1.5, label="bound")
    left.set(title="Loss", xlabel="step")
    for a, b, color in ("plain", "float64", "0.6"), ("bound", "float64", "tab:blue"), ("bound", "plain", "tab:red"):
        apart = [abs(x - y) or math.nan for x, y in zip(curves[a], curves[b], strict=True)]
        right.plot(steps, apart, color=color, marker="o", markersize=4, linestyle="none", label=f"|{a} - {b}|")
    right.set(title="Distance between the curves, where not 0", xlabel="step", yscale="log")
    for axes in left, right:
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def add_arguments(parser):
    parser.add_argument("--steps", type=int, default=60, help="training steps of each run (60)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, or cuda where there is one"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the picture and the numbers (out)"
    )


def main(args):
    if args.steps < 1:
        raise ValueError(f"demo: --steps must be at least 1, got {args.steps}")
    if args.device != "cpu" and not (args.device == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"demo: --device must be cpu, or cuda where torch finds a device, got {args.device}")
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise RuntimeError(f"demo: needs transformers: pip install liger-aot[transformers] ({error})") from error
    transformers.logging.set_verbosity_error()
    device, path = path_of(args.device)
    tokens, size = corpus(SIZE["vocab_size"])
    data = batches(tokens, args.steps + 1, BATCH, LENGTH, args.device)
    models = {name: new_model(SIZE, args.device) for name in ("plain", "bound", "float64")}
    exact(models["float64"])
    count = sum(p.numel() for p in models["plain"].parameters())
    print(f"liger-aot {__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"device  {device}")
    print(f"path    {path}")
    print(f"model   Llama: {SIZE['num_hidden_layers']} layers, width {SIZE['hidden_size']}, {count / 1e6:.1f} M parameters")
    print(f"text    {size / 1e6:.1f} MB of Python's own source, {SIZE['vocab_size']} tokens, {BATCH * LENGTH} of them a step")
    print(f"\nbound\n{textwrap.indent(str(bind(models['bound'])), '  ')}\n\ntraining")

    first = distances({name: one_step(model, data[0]) for name, model in models.items()}, STEP)
    runs = {name: train(name, model, data[:-1]) for name, model in models.items()}
    curves = {name: losses for name, (losses, _) in runs.items()}
    seconds = {name: statistics.median(times) for name, (_, times) in runs.items()}
    memory = {name: peak_memory(partial(step_and_forget, models[name], data[-1]), args.device) for name in ("plain", "bound")}
    whole = distances({name: state(model, curves[name], data[-1]) for name, model in models.items()}, RUN)

    print(f"\n{'':34} {'plain':>10} {'bound':>10}")
    compare("loss of the first step", "{:.5f}", *(curves[n][0] for n in memory))
    compare("loss of the last step", "{:.5f}", *(curves[n][-1] for n in memory))
    compare("time of a step (median)", "{:.3f} s", *(seconds[n] for n in memory))
    compare("peak memory of a step's tensors", "{:.1f} MB", *(memory[n] / 1e6 for n in memory))
    print(f"\n{'distance from float64 (rms)':34} {'plain':>10} {'bound':>10} {'allowed':>10} {'largest of bound - plain':>26}")
    fine = verdict("one step, from the same weights", first)
    fine &= verdict(f"{args.steps} steps of training", whole)
    step = run_interpreted()
    if "missing" in step:
        print(f"  not run: one step through the kernels as Triton interprets them, for {step['missing']}")
    else:
        fine &= verdict("one small step, Triton kernels interpreted", step["distances"])
        launched = ", ".join(f"{name}\N{NO-BREAK SPACE}x{count}" for name, count in step["launched"].items())
        print(textwrap.fill(f"launched: {launched}", 96, initial_indent="    ", subsequent_indent="    "))

    args.out.mkdir(parents=True, exist_ok=True)
    numbers = {
        "device": device,
        "path": path,
        "curves": curves,
        "seconds": seconds,
        "memory": memory,
        "step": first,
        "run": whole,
    }
    (args.out / "demo.json").write_text(json.dumps({**numbers, "interpreted": step}, indent=1))
    try:
        draw(args.out / "demo.png", curves, f"Training a small Llama: {device}, {path}")
        print(f"\nLoss curves: {(args.out / 'demo.png').resolve()}")
    except ModuleNotFoundError as error:
        print(f"\nNo picture, for {error}: pip install liger-aot[plots]")
    print("PASS: the bound model trains as the plain one, up to rounding" if fine else "FAIL: the bound model is too far off")
    return 0 if fine else 1


def compare(label, form, plain, bound):
    print(f"  {label:32} {form.format(plain):>10} {form.format(bound):>10}")
