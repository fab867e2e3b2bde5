"""Liger's name for rotary position embeddings of positions in time, height and width."""

from .functional import liger_qwen2vl_mrope


def liger_multimodal_rotary_pos_emb(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
    """Qwen2-VL's: liger_qwen2vl_mrope."""
    return liger_qwen2vl_mrope(q, k, cos, sin, mrope_section, unsqueeze_dim)
