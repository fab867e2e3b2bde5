"""Rotary bases that SAT's classes would lose."""

import torch


def set_rope_theta(model: torch.nn.Module, theta: float) -> torch.nn.Module:
    """Give a SAT model the rotary base it was converted with: its classes hold literals, which 16-bit models compute with."""
    found = [module for module in model.modules() if type(module).__name__ == "FastRotaryEmbedding"]
    if not found:
        raise ValueError("set_rope_theta: model must be a SAT model with rotary embeddings (FastRotaryEmbedding), and has none")
    for module in found:
        module.base = theta
        module.inv_freq = module._compute_inv_freq(module.inv_freq.device)
        module._seq_len_cached = 0
    return model
