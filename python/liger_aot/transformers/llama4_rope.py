"""Liger's names for Llama 4's rotary position embeddings: neighbouring columns are complex numbers."""

import torch

from ..functional import rope


def liger_llama4_text_rotary_pos_emb(
    xq: torch.Tensor,
    xk: torch.Tensor,
    freqs_cis: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """apply_rotary_emb: xq and xk (batch, length, heads, d), freqs_cis (batch or 1, length, d / 2) or without a batch."""
    if xq.dim() == 4 and freqs_cis.shape[-2:-1] != xq.shape[1:2]:
        raise ValueError(
            f"liger_llama4_text_rotary_pos_emb: freqs_cis must have {xq.shape[1]} rows, one a token, got "
            f"{tuple(freqs_cis.shape)}; cut it to the sequence"
        )
    return rope(xq, xk, freqs_cis, unsqueeze_dim=2, order="interleaved")


def liger_llama4_vision_rotary_pos_emb(
    query: torch.Tensor,
    key: torch.Tensor,
    freqs_ci: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """vision_apply_rotary_emb: freqs_ci (length, d / 2), with dimensions of one between or in front.

    A model cast to a real dtype has lost the imaginary parts, and multiplies by what is left, as transformers does.
    """
    freqs_ci = freqs_ci.reshape(query.shape[1], -1)
    if not freqs_ci.is_complex():
        freqs_ci = torch.complex(freqs_ci.float(), torch.zeros_like(freqs_ci, dtype=torch.float32))
    return liger_llama4_text_rotary_pos_emb(query, key, freqs_ci)
