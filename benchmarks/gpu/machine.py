"""The GPU that is measured; and what stands for it in a dry run: a CPU, and the stub driver where kernels are launched.

Both count each launch that the driver took, by variant.
"""

import contextlib
import ctypes
import functools
import subprocess
import time
from collections import Counter

import torch

from liger_aot import _driver
from liger_aot import _runtime
from liger_aot._op import on_cpu
from liger_aot._runtime import kernels

from stub import Launcher
from stub import Stub

MiB = 2**20
LEAD = 2048 * MiB  # written twice before each sample, for about a millisecond in which the host gets ahead
L2_AND_MORE = 256 * MiB  # and then read: a cache full of what was written would be written back in the sample's time


def counted(launcher):
    """The launcher, whose driver counts launches by the kernel's handle."""
    driver, counts = launcher.find_driver(), Counter()
    launch = driver.launch

    def counting(handle, *arguments):
        status = launch(handle, *arguments)
        counts[int(handle)] += not status[0]
        return status

    driver.launch, launcher.counts = counting, counts
    return launcher


def reached(launcher):
    """{cubin: how often it was launched} of all that the launcher selected."""
    found = Counter()
    for device in set(launcher.devices.values()):
        for kernel, plan in device.plans.items():
            table = device.pack.table(kernel)
            for key, (handle, *_) in plan.loaded.items():
                found[table[key].cubin] += launcher.counts[int(handle)]
    return +found


def release():
    """The driver's, as nvidia-smi names it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.split("\n")[0].strip() or None


class Gpu:
    dry, computes = False, True
    autocast = "cuda"
    backend = "inductor"

    def __init__(self):
        torch.cuda.set_device(0)
        self.device = torch.device("cuda", 0)
        self.count = torch.cuda.device_count()
        self.refuse = torch.OutOfMemoryError
        torch.empty(1, device=self.device)  # the context

    def launcher(self):
        """One that has loaded nothing yet."""
        return self.over(_driver.driver().backend)

    def over(self, backend):
        driver = _driver.Driver(backend)
        return counted(_runtime.Cuda(lambda: driver))

    def back_ends(self):
        """{name: a launcher over it} of each way to the driver: the one that is served, and ctypes."""
        found = {_driver.driver().backend.name: self.launcher()}
        return found | {"ctypes": self.over(_driver.Ctypes(ctypes.CDLL("libcuda.so.1")))}

    @contextlib.contextmanager
    def launching(self, launcher):
        with kernels.launched_by(launcher):
            yield

    def serving(self):
        """Launches as a user's are, by the package's own launcher."""
        return contextlib.nullcontext()

    def found(self):
        p, backend = torch.cuda.get_device_properties(0), _driver.driver()
        return {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory_MiB": p.total_memory // MiB,
            "multiprocessors": p.multi_processor_count,
            "L2_MiB": p.L2_cache_size / MiB,
            "devices": self.count,
            "driver": release() or f"CUDA {_runtime.version_text(backend.version)}",
            "cuda": torch.version.cuda,
            "backend": backend.backend.name,
        }

    def synchronize(self):
        torch.cuda.synchronize()

    def alive(self):
        """Whether the device still answers: after an illegal access nothing in the process works any more."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def same(self, got, want, exact=True):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, **({"rtol": 0, "atol": 0} if exact else {}), equal_nan=True)

    # Streams, graphs, contexts

    def stream(self):
        return torch.cuda.Stream()

    def on(self, stream):
        return torch.cuda.stream(stream)

    def wait(self, stream):
        """What the current stream does from now on comes after what stream was given."""
        torch.cuda.current_stream().wait_stream(stream)

    def behind(self, stream):
        stream.wait_stream(torch.cuda.current_stream())

    def launched_on(self, launcher, streams):
        pass

    def capture(self, function):
        """(what replays it, its results)."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function()
        return graph.replay, results

    def context(self):
        return int(_driver.driver().call("cuCtxGetCurrent") or 0)

    def leave_context(self):
        _driver.driver().call("cuCtxSetCurrent", 0)

    def loads(self, launcher):
        """How many variants the launcher has loaded."""
        return sum(len(plan.loaded) for device in set(launcher.devices.values()) for plan in device.plans.values())

    # Time and memory

    def flush(self):
        """Give the host a lead, so that the device waits for no launch that follows, and leave nothing of use in the L2."""
        for _ in range(2):
            self.written.zero_()
        self.unwritten.sum()

    @functools.cached_property
    def written(self):
        return torch.empty(LEAD, dtype=torch.int8, device=self.device)

    @functools.cached_property
    def unwritten(self):
        return torch.zeros(L2_AND_MORE // 4, device=self.device)

    def clock(self):
        return time.perf_counter()

    def since(self, start):
        """Seconds."""
        return time.perf_counter() - start

    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end):
        """Microseconds."""
        return 1000 * start.elapsed_time(end)

    def allocated(self):
        return torch.cuda.memory_allocated()

    def peak(self):
        return torch.cuda.max_memory_allocated()

    def forget_peak(self):
        torch.cuda.reset_peak_memory_stats()

    def free(self):
        torch.cuda.empty_cache()


class Dry:
    """Numbers come from the CPU kernels; launches go to the stub, which computes nothing; nothing is measured."""

    dry, computes = True, False
    autocast = "cpu"
    backend = "eager"
    count = 1
    refuse = torch.OutOfMemoryError

    def __init__(self):
        self.device = torch.device("cpu")
        self.stub = None

    def launcher(self):
        return counted(Launcher(Stub()))

    def back_ends(self):
        return {"stub": self.launcher()}

    @contextlib.contextmanager
    def launching(self, launcher):
        before, self.stub = self.stub, launcher.stub
        try:
            with kernels.launched_by(launcher), on_cpu():
                yield
        finally:
            self.stub = before

    def serving(self):
        return self.launching(self.launcher())

    def found(self):
        return None

    def synchronize(self):
        pass

    def alive(self):
        return True

    def same(self, got, want, exact=True):
        for g, w in zip(got, want, strict=True):
            if g.shape != w.shape or g.dtype != w.dtype:
                raise AssertionError(f"got {g.dtype} {tuple(g.shape)}, not {w.dtype} {tuple(w.shape)}")

    def stream(self):
        return object()

    @contextlib.contextmanager
    def on(self, stream):
        before, self.stub.stream = self.stub.stream, id(stream)
        try:
            yield
        finally:
            self.stub.stream = before

    def wait(self, stream):
        pass

    def behind(self, stream):
        pass

    def launched_on(self, launcher, streams):
        if missing := {id(stream) for stream in streams} - {launch.stream for launch in launcher.stub.launches}:
            raise AssertionError(f"{len(missing)} of {len(streams)} streams got no launch")

    def capture(self, function):
        self.stub.capturing = True
        try:
            return self.synchronize, function()
        finally:
            self.stub.capturing = False

    def context(self):
        return self.stub.context

    def leave_context(self):
        self.stub.thread.context = 0

    loads = Gpu.loads

    def flush(self):
        pass

    def clock(self):
        return None

    def since(self, start):
        return None

    def mark(self):
        return None

    def between(self, start, end):
        return None

    def allocated(self):
        return None

    def peak(self):
        return None

    def forget_peak(self):
        pass

    def free(self):
        pass
