"""torch.nn's modules on these operators: torch's constructors and state dicts, and our options as keywords."""

import math

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from . import functional as F  # noqa: N812 (as torch names it)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm; offset and casting as in liger_aot.rms_norm."""

    def __init__(self, *args, offset: float = 0.0, casting: str = "none", **kwargs):
        super().__init__(*args, **kwargs)
        self.offset, self.casting = offset, casting

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps, offset=self.offset, casting=self.casting)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset={self.offset}, casting={self.casting}"


class _OfLastDimension(RMSNorm):
    def __init__(self, hidden_size: int, *args, **kwargs):
        if not isinstance(hidden_size, int):
            raise ValueError(f"{type(self).__name__}: hidden_size must be the size of the last dimension, got {hidden_size!r}")
        super().__init__(hidden_size, *args, **kwargs)


class FusedAddRMSNorm(_OfLastDimension):
    """liger_aot.fused_add_rms_norm, with the weight of an RMSNorm: (the norm of the sum, the sum)."""

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return F.fused_add_rms_norm(input, residual, self.weight, self.eps, offset=self.offset, casting=self.casting)


class ModulatedRMSNorm(_OfLastDimension):
    """liger_aot.modulated_rms_norm over the last dimension, with the weight of an RMSNorm."""

    def forward(self, input: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        return F.modulated_rms_norm(input, scale, shift, self.weight, self.eps, offset=self.offset, casting=self.casting)


class GatedRMSNorm(torch.nn.Module):
    """liger_aot.gated_rms_norm over the last dimension, of hidden_size; its weight starts as one."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        groups: int = 1,
        gate_first: bool = False,
        activation: str = "silu",
        casting: str = "none",
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.groups, self.gate_first, self.activation, self.casting = eps, groups, gate_first, activation, casting

    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        options = {"groups": self.groups, "gate_first": self.gate_first}
        options |= {"activation": self.activation, "casting": self.casting}
        return F.gated_rms_norm(input, gate, self.weight, self.eps, **options)

    def extra_repr(self) -> str:
        options = f"gate_first={self.gate_first}, activation={self.activation}, casting={self.casting}"
        return f"{len(self.weight)}, eps={self.eps}, groups={self.groups}, {options}"


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm."""

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class Rope(torch.nn.Module):
    """liger_aot.rope, whose keywords this takes; cos and sin are given with q and k."""

    def __init__(
        self,
        unsqueeze_dim: int = 1,
        *,
        rotary_dim: int | None = None,
        order: str = "half",
        sections: list[int] | None = None,
        parts: int = 1,
        last: bool = False,
        reverse: bool = False,
    ):
        super().__init__()
        self.options = {"unsqueeze_dim": unsqueeze_dim, "rotary_dim": rotary_dim, "order": order, "sections": sections}
        self.options |= {"parts": parts, "last": last, "reverse": reverse}

    def forward(self, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return F.rope(q, k, cos, sin, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class SwiGLU(torch.nn.Module):
    """liger_aot.swiglu."""

    def __init__(self, gate_multiplier: float = 1.0, down_multiplier: float = 1.0):
        super().__init__()
        self.gate_multiplier, self.down_multiplier = gate_multiplier, down_multiplier

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.swiglu(gate, up, gate_multiplier=self.gate_multiplier, down_multiplier=self.down_multiplier)

    def extra_repr(self) -> str:
        return f"gate_multiplier={self.gate_multiplier}, down_multiplier={self.down_multiplier}"


class GEGLU(torch.nn.Module):
    """liger_aot.geglu."""

    def __init__(self, approximate: str = "tanh"):
        super().__init__()
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.geglu(gate, up, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate}"


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax; dim must be given, which torch guesses, with a warning, where it is None."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim)


class Sparsemax(torch.nn.Module):
    """liger_aot.sparsemax along dim."""

    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return F.sparsemax(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class DyT(torch.nn.Module):
    """liger_aot.dyt over the last dimension, of hidden_size; alpha starts as init_alpha, gamma as one, beta as zero."""

    def __init__(self, hidden_size: int, bias: bool = True, init_alpha: float = 0.5, device=None, dtype=None):
        super().__init__()
        self.hidden_size, self.init_alpha = hidden_size, init_alpha
        self.alpha = torch.nn.Parameter(torch.full((1,), init_alpha, device=device, dtype=dtype))
        self.gamma = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter(
            "beta", torch.nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, input: Tensor) -> Tensor:
        return F.dyt(input, self.alpha, self.gamma, self.beta)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, init_alpha={self.init_alpha}, bias={self.beta is not None}"


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding; max_norm, scale_grad_by_freq and sparse are refused."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, value in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
            if getattr(self, name) != value:
                raise NotImplementedError(
                    f"Embedding: {name} must be {value}, got {getattr(self, name)}; torch.nn.Embedding takes others"
                )

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, self.padding_idx)


class PolyNorm(torch.nn.Module):
    """liger_aot.poly_norm over the last dimension; its weights start as a third each, its bias as one."""

    def __init__(self, eps: float = 1e-6, device=None, dtype=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), 1 / 3, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.tensor(1.0, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        return F.poly_norm(input, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class ReLUSquared(torch.nn.Module):
    """liger_aot.relu_squared."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu_squared(input)


class _Options:
    """A loss with the options that are ours, which torch's constructors do not know."""

    def __init__(
        self,
        *args,
        softcap: float | None = None,
        lse_square_scale: float = 0.0,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.ours = {
            "softcap": softcap,
            "lse_square_scale": lse_square_scale,
            "return_z_loss": return_z_loss,
            "return_token_accuracy": return_token_accuracy,
            "return_predicted_tokens": return_predicted_tokens,
        }

    def extra_repr(self) -> str:
        ours = [f"{name}={value}" for name, value in self.ours.items() if value]
        return ", ".join(filter(None, [super().extra_repr(), *ours]))


class CrossEntropyLoss(_Options, torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss; further keywords as in liger_aot.cross_entropy."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor | F.CrossEntropyOutput:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.ours,
        )


class _LinearCrossEntropyLoss(_WeightedLoss):
    """The constructor and the state of torch 2.13's LinearCrossEntropyLoss, for torch before it."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object | None = None,
    ):
        super().__init__(weight, reduction=reduction)
        self.num_classes, self.out_features, self.options = num_classes, out_features, options
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        size = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, size, bias=bias, device=device, dtype=dtype)


class LinearCrossEntropyLoss(_Options, getattr(torch.nn, "LinearCrossEntropyLoss", _LinearCrossEntropyLoss)):
    """torch.nn.LinearCrossEntropyLoss, which torch has since 2.13; further keywords as in liger_aot.linear_cross_entropy."""

    def __init__(self, *args, scale: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.ours["scale"] = scale

    def forward(self, input: Tensor, target: Tensor) -> Tensor | F.CrossEntropyOutput:
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        return F.linear_cross_entropy(
            input,
            self.linear.weight.view(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.view(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **self.ours,
        )


class LinearLogprob(torch.nn.Module):
    """liger_aot.linear_logprob of a linear layer of its own: (log-probability of target, entropy, logsumexp)."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        temperature: float = 1.0,
        ignore_index: int = -100,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.temperature, self.ignore_index = temperature, ignore_index

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        options = {"temperature": self.temperature, "ignore_index": self.ignore_index}
        return F.linear_logprob(input, self.linear.weight, target, bias=self.linear.bias, **options)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, ignore_index={self.ignore_index}"


class KLDivLoss(torch.nn.KLDivLoss):
    """torch.nn.KLDivLoss; ignore_index and eps as in liger_aot.kl_div, which says what shift_labels are."""

    def __init__(self, *args, ignore_index: int = -100, eps: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.ignore_index, self.eps = ignore_index, eps

    def forward(self, input: Tensor, target: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        options = {"shift_labels": shift_labels, "ignore_index": self.ignore_index, "eps": self.eps}
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target, **options)
