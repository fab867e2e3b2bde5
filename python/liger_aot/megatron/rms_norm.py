"""The RMSNorm that Megatron-Core builds for its layers."""

import torch

from ..functional import rms_norm


class LigerMegatronRMSNorm(torch.nn.Module):
    """x over its root mean square, times weight, or 1 + weight where the weight is centered at zero; rounded once.

    Of config are read normalization, sequence_parallel and layernorm_zero_centered_gamma. persist_layer_norm and normalization
    have no effect: Megatron passes them to all of its norms.
    """

    def __init__(
        self,
        config,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "RMSNorm",
    ):
        super().__init__()
        if (found := getattr(config, "normalization", "RMSNorm")) != "RMSNorm":
            raise ValueError(f"LigerMegatronRMSNorm: config.normalization must be 'RMSNorm', got {found!r}")
        self.config, self.eps = config, eps
        self.hidden_size = torch.Size([hidden_size] if isinstance(hidden_size, int) else hidden_size)
        self.zero_centered_gamma = bool(zero_centered_gamma or getattr(config, "layernorm_zero_centered_gamma", False))
        self.weight = torch.nn.Parameter(torch.empty(self.hidden_size))
        # By this Megatron knows that each process has the gradient of its own tokens alone.
        self.weight.sequence_parallel = bool(getattr(config, "sequence_parallel", False))
        self.reset_parameters()

    def reset_parameters(self):
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.hidden_size, self.weight, self.eps, offset=1.0 if self.zero_centered_gamma else 0.0)

    def extra_repr(self) -> str:
        return f"{tuple(self.hidden_size)}, eps={self.eps}, zero_centered_gamma={self.zero_centered_gamma}"
