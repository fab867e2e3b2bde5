"""Liger's names for rotary position embeddings by halves."""

from .functional import liger_rope


def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    """transformers' apply_rotary_pos_emb: liger_rope."""
    return liger_rope(q, k, cos, sin, position_ids, unsqueeze_dim, rotary_dim)


def liger_rotary_pos_emb_gpt_oss(q, k, cos, sin):
    """GPT-OSS's, whose cos and sin are half as wide as a head."""
    return liger_rope(q, k, cos, sin, rotary_dim=q.shape[-1])


def liger_rotary_pos_emb_vision(q, k, cos, sin):
    """apply_rotary_pos_emb_vision: q and k (length, heads, d), cos and sin (length, d); computed in fp32, in q's dtype."""
    rotated = liger_rope(q[None], k[None], cos.float(), sin.float(), unsqueeze_dim=2)
    return tuple(r[0].to(x.dtype) for r, x in zip(rotated, (q, k), strict=True))
