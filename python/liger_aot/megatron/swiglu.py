"""Megatron's SwiGLU, of gate and up side by side in one tensor."""

import logging
from collections.abc import Callable

import torch

from ..functional import packed_glu

logger = logging.getLogger(__name__)


class Deferred:
    """Calls that are left to Megatron's own code, each reason logged once."""

    def __init__(self):
        self.logged = set()

    def reason(self, bias, fp8_input_store, cpu_offload_input):
        if bias is not None:
            return "there is a bias"
        if fp8_input_store:
            return "the input is kept in fp8 (activation_func_fp8_input_store)"
        if cpu_offload_input:
            return "the input is kept on the CPU (activation offloading)"
        return None

    def log(self, reason):
        if reason not in self.logged:
            self.logged.add(reason)
            logger.info("SwiGLU is computed by Megatron's own code: %s", reason)


class LigerMegatronSwiGLU(torch.nn.Module):
    """Called as Megatron's bias_swiglu_impl, which may be the fallback_impl: for a bias, fp8 storage and offloading, which
    without it raise NotImplementedError. in_place has no effect."""

    def __init__(self, fallback_impl: Callable | None = None, in_place: bool = False):
        super().__init__()
        self.fallback_impl, self.in_place, self.deferred = fallback_impl, in_place, Deferred()

    def forward(
        self,
        input: torch.Tensor,
        bias: torch.Tensor | None = None,
        fp8_input_store: bool = False,
        cpu_offload_input: bool = False,
    ) -> torch.Tensor:
        if reason := self.deferred.reason(bias, fp8_input_store, cpu_offload_input):
            if self.fallback_impl is None:
                raise NotImplementedError(
                    f"LigerMegatronSwiGLU: {reason}, for which we have no kernel; pass Megatron's bias_swiglu_impl"
                    " as fallback_impl"
                )
            self.deferred.log(reason)
            return self.fallback_impl(input, bias, fp8_input_store, cpu_offload_input)
        if input.dim() not in (2, 3) or input.shape[-1] % 2:
            raise ValueError(
                "LigerMegatronSwiGLU: input must have shape (tokens, 2·n) or (sequence, batch, 2·n), gate and up side by side, "
                f"got {tuple(input.shape)}"
            )
        return packed_glu(input)
