"""Peak memory of a step of the post-training losses, against the same formulas on logits that exist whole.

python benchmarks/chunked_loss.py [--device cuda] [--width 128] [--tokens 512 1024 2048] [--classes 8192 32768]
Counted is what torch's allocator gives out beyond the inputs, forward and backward, with the gradients of hidden states and
head. Tables in MB.
"""

import argparse
import contextlib
import itertools
import math
import unittest.mock

import torch
from torch.nn.functional import linear

from liger_aot._demo import peak_memory
from liger_aot.chunked_loss import _base
from liger_aot.chunked_loss import _preference
from liger_aot.chunked_loss import functional as F  # noqa: N812 (as torch names it)
from liger_aot.chunked_loss import grpo_loss
from liger_aot.chunked_loss import kto_loss

LENGTH = 64  # of a sequence


def whole_logprob(hidden, weight, target, *, bias=None, temperature=1.0, ignore_index=-100):
    """linear_logprob of logits that exist whole."""
    logps = (linear(hidden, weight, bias).float() / temperature).log_softmax(-1)
    keep = target != ignore_index
    return torch.where(keep, logps.gather(-1, torch.where(keep, target, 0)[..., None])[..., 0], 0.0), None, None


def inputs(tokens, classes, width, device):
    hidden = torch.randn(tokens // LENGTH, LENGTH, width, device=device)
    weight = torch.randn(classes, width, device=device) / width**0.5
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(classes, hidden.shape[:2], device=device)


def dpo(hidden, weight, target):
    return F.liger_fused_linear_dpo(hidden, weight, target, ref_input=hidden.detach(), ref_weight=weight.detach())[0]


def kto(hidden, weight, target):
    labels = torch.arange(hidden.shape[0], device=hidden.device) % 2 == 0
    return F.liger_fused_linear_kto(hidden, weight, target, labels, use_ref_model=False)[0]


def grpo(hidden, weight, target):
    zeros = torch.zeros_like(target, dtype=torch.float32)
    advantages = torch.ones_like(zeros[:, 0])
    return F.liger_fused_linear_grpo(hidden, weight, target, zeros == 0, advantages, ref_per_token_logps=zeros)[0]


def distilled(hidden, weight, target, chunk_size=256):
    flat, other = hidden.flatten(0, 1), hidden.detach().flip(1).flatten(0, 1)
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "chunk_size": chunk_size}
    return F.liger_fused_linear_jsd(flat, weight, other, weight.detach(), target.flatten(), None, None, **options)


def distilled_whole(hidden, weight, target):
    student = linear(hidden, weight).log_softmax(-1)
    teacher = linear(hidden.detach().flip(1), weight.detach()).log_softmax(-1)
    m = torch.logaddexp(student, teacher) - math.log(2)
    return (student.exp() * (student - m) + teacher.exp() * (teacher - m)).sum() / 2 / target.numel()


MODULES = _base, _preference, kto_loss, grpo_loss
LOSSES = {"DPO": dpo, "KTO": kto, "GRPO": grpo, "JSD": distilled}


def memory(name, tokens, classes, width, device, whole=False, **options):
    """Peak bytes of a step."""
    given = inputs(tokens, classes, width, device)
    loss = distilled_whole if whole and name == "JSD" else LOSSES[name]

    def step():
        loss(*given, **options).backward()
        for tensor in given:
            tensor.grad = None

    with contextlib.ExitStack() as stack:
        for module in MODULES if whole else ():
            stack.enter_context(unittest.mock.patch.object(module, "linear_logprob", whole_logprob))
        return peak_memory(step, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--classes", type=int, nargs="+", default=[8192, 32768])
    given = parser.parse_args()
    sizes = given.width, given.device
    print(f"{'loss':6} {'vocabulary':>10} {'tokens':>7} {'logits':>8} {'chunked':>8} {'whole':>8}")
    for name, classes, tokens in itertools.product(LOSSES, given.classes, given.tokens):
        chunked, whole = (memory(name, tokens, classes, *sizes, whole=w) / 1e6 for w in (False, True))
        print(f"{name:6} {classes:10} {tokens:7} {tokens * classes * 4e-6:8.0f} {chunked:8.1f} {whole:8.1f}", flush=True)
    print(f"\n{'loss':6} {'vocabulary':>10} {'tokens':>7} {'rows of a chunk':>16} {'peak':>8}")
    for chunk_size in (64, 128, 256, 512):
        chunked = memory("JSD", given.tokens[-1], given.classes[0], *sizes, chunk_size=chunk_size) / 1e6
        print(f"{'JSD':6} {given.classes[0]:10} {given.tokens[-1]:7} {chunk_size:16} {chunked:8.1f}", flush=True)


if __name__ == "__main__":
    main()
