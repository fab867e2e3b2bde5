"""The first call of an operator in a fresh process, in which torch is imported and the device has its context."""

import time

import cases as small
import torch

from . import cases

OPERATORS = "rms_norm", "linear_cross_entropy", "swiglu", "rope"  # few, which Liger has too: each call is a process of seconds
DEVICE = {False: "cuda", True: "cpu"}  # of a dry run or not


def measure(provider, operator, dry):
    """{import_ms, ms} of this process, which must not have called anything before; without figures in a dry run."""
    device = torch.device(DEVICE[dry])
    torch.empty(1, device=device)
    start = time.perf_counter()
    call = prepared(provider, operator, dry)
    imported = time.perf_counter() - start
    with torch.device(device):
        case = small.CASES[operator]()
    plain = [i.detach() for i in case.inputs]
    synchronize(dry)
    start = time.perf_counter()
    call(case, plain)
    synchronize(dry)
    seconds = time.perf_counter() - start
    return {"import_ms": None if dry else 1000 * imported, "ms": None if dry else 1000 * seconds}


def synchronize(dry):
    if not dry:
        torch.cuda.synchronize()


def prepared(provider, operator, dry):
    """What calls the operator, with its library imported."""
    if provider == cases.LIGER:
        if dry:
            import liger

            functional, why = liger.functions(compiled=False)
            if functional is None:
                raise ImportError(why)
        else:
            from liger_kernel.transformers import functional
        return lambda case, plain: case.liger(functional, *plain)
    import liger_aot  # noqa: F401 (all of it, as a user does)

    _, overload = small.operator(operator)
    if not dry:
        return lambda case, plain: case.ours(overload, *plain)
    from stub import stubbed

    def call(case, plain):
        with stubbed(record=False):
            case.ours(overload, *plain)

    return call
