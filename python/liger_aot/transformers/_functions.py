"""Liger's autograd functions, for code that calls LigerXFunction.apply(...) by position."""

import torch

from ..functional import CrossEntropyOutput
from ..functional import cross_entropy_tvd
from ..functional import embedding
from ..functional import moe_experts
from ..functional import packed_glu
from ..functional import swiglu
from ..ops.packed_glu import packed_glu_in_place
from ..ops.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from . import functional as L  # noqa: N812
from . import fused_linear_scaled_cross_entropy as scaled
from ._names import one_of
from .grpo_loss import GrpoLossFunction as GrpoLossFunction
from .llama4_rope import liger_llama4_text_rotary_pos_emb
from .mlp import LigerMLPFunction as LigerMLPFunction
from .tiled_mlp import LigerTiledMLPFunction as LigerTiledMLPFunction
from .tiled_mlp import apply_tiled_mlp as apply_tiled_mlp


class LigerRMSNormFunction:
    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        one_of("LigerRMSNormFunction", "row_mode", row_mode, (None, True, False))
        return L.liger_rms_norm(X, W, eps, offset, casting_mode, in_place)


class LigerFusedAddRMSNormFunction:
    @staticmethod
    def apply(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
        return L.liger_fused_add_rms_norm(X, R, W, eps, offset, casting_mode, in_place)


class LigerModulatedRMSNormFunction:
    @staticmethod
    def apply(X, W, scale, shift, eps, offset=0.0, casting_mode="llama", in_place=True):
        return L.liger_modulated_rms_norm(X, W, scale, shift, eps, offset, casting_mode, in_place)


class LigerLayerNormFunction:
    apply = staticmethod(L.liger_layer_norm)


class LigerRopeFunction:
    apply = staticmethod(L.liger_rope)


class LigerQwen2VLMRopeFunction:
    apply = staticmethod(L.liger_qwen2vl_mrope)


class LigerLlama4RopeFunction:
    @staticmethod
    def apply(q, k, freqs_cis, BLOCK_SIZE: int | None = None):
        one_of("LigerLlama4RopeFunction", "BLOCK_SIZE", BLOCK_SIZE, (None,))
        return liger_llama4_text_rotary_pos_emb(q, k, freqs_cis)


class LigerSiLUMulFunction:
    @staticmethod
    def apply(a, b, gate_multiplier: float = 1.0, down_multiplier: float = 1.0):
        return swiglu(a, b, gate_multiplier=gate_multiplier, down_multiplier=down_multiplier)


class LigerFusedGateUpSiLUMulFunction:
    @staticmethod
    def apply(y, in_place=False):
        one_of("LigerFusedGateUpSiLUMulFunction", "in_place", in_place, (True, False))
        return packed_glu_in_place(y) if in_place else packed_glu(y)


class LigerFusedMoEFunction:
    @staticmethod
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        return moe_experts(x, gate_up_proj, down_proj, top_k_index, top_k_weights)


class LigerGELUMulFunction:
    apply = staticmethod(L.liger_geglu)


class LigerReLUSquaredFunction:
    @staticmethod
    def apply(X):
        return L.liger_relu_squared(X)


class LigerDyTFunction:
    apply = staticmethod(L.liger_dyt)


class LigerAttnResFunction:
    @staticmethod
    def apply(V_stacked, w_query, w_norm, eps):
        return L.liger_attn_res(V_stacked, w_query, w_norm, eps)


class LigerMHCCoeffsFunction:
    @staticmethod
    def apply(
        x: torch.Tensor,
        phi: torch.Tensor,
        b: torch.Tensor,
        alpha_pre: torch.Tensor,
        alpha_post: torch.Tensor,
        alpha_res: torch.Tensor,
        allow_fp32: bool,
        tmax: int,
        rms_eps: float,
        pre_eps: float,
        sinkhorn_eps: float,
        post_mult: float,
    ):
        options = {"tmax": tmax, "rms_eps": rms_eps, "pre_eps": pre_eps, "sinkhorn_eps": sinkhorn_eps, "post_mult": post_mult}
        return L.liger_mhc_coeffs(x, phi, b, alpha_pre, alpha_post, alpha_res, allow_fp32=allow_fp32, **options)


class LigerMHCPreFunction:
    @staticmethod
    def apply(x: torch.Tensor, h_pre: torch.Tensor):
        return L.liger_mhc_pre(x, h_pre)


class LigerMHCPostResFunction:
    @staticmethod
    def apply(x: torch.Tensor, f_out: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor):
        return L.liger_mhc_post_res(x, f_out, h_post, h_res)


class LigerEmbeddingFunction:
    @staticmethod
    def apply(embeddings: torch.Tensor, indices: torch.Tensor):
        return embedding(indices, embeddings)


class LigerPolyNormFunction:
    apply = staticmethod(L.liger_poly_norm)


class LigerSoftmaxFunction:
    @staticmethod
    def apply(input_: torch.Tensor):
        return L.liger_softmax(input_)


class LigerSparsemaxFunction:
    @staticmethod
    def apply(x: torch.Tensor, dim: int):
        return L.liger_sparsemax(x, dim)


class LigerMultiTokenAttentionFunction:
    @staticmethod
    def apply(scores, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, sparse=False):
        return L.liger_multi_token_attention(scores, weight, bias, stride, padding, dilation, groups, sparse)


class LigerFusedNeighborhoodAttentionFunction:
    @staticmethod
    def apply(query, key, value, kernel_size=7, dilation=1, scale=None):
        return L.liger_fused_neighborhood_attention(query, key, value, kernel_size, dilation, scale)


class LigerGroupNormFunction:
    apply = staticmethod(L.liger_group_norm)


class LigerCrossEntropyFunction:
    @staticmethod
    def apply(
        _input,
        target,
        weight,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        flags = return_z_loss, return_token_accuracy, return_predicted_tokens
        options = ignore_index, None, reduction, label_smoothing, lse_square_scale, softcap
        return four(L.liger_cross_entropy(_input, target, weight, None, *options, *flags))


class LigerFusedLinearCrossEntropyFunction:
    @staticmethod
    def apply(
        _input,
        weight,
        target,
        bias=None,
        ce_weight=None,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="mean",
        softcap=None,
        return_z_loss: bool = False,
        accum_dtype=None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        ce_impl=None,
        ce_mode=None,
        chunk_mem_const: int = 1,
    ):
        one_of("LigerFusedLinearCrossEntropyFunction", "ce_impl", ce_impl, (None,))
        one_of("LigerFusedLinearCrossEntropyFunction", "ce_mode", ce_mode, (None,))
        options = ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss, accum_dtype
        flags = use_token_scaling, return_token_accuracy, return_predicted_tokens
        return four(L.liger_fused_linear_cross_entropy(_input, weight, target, bias, *options, *flags, chunk_mem_const))


class LigerKLDivLossFunction:
    @staticmethod
    def apply(y_pred, y_true, reduction="batchmean", log_target: bool = False, eps: float = 1e-10):
        return L.liger_kl_div(y_pred, y_true, reduction=reduction, log_target=log_target, eps=eps)


class LigerJSDFunction:
    @staticmethod
    def apply(
        _input: torch.Tensor,
        target: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        beta: float = 0.5,
        ignore_index: int = -100,
        jsd_impl=None,
        jsd_mode=None,
    ):
        one_of("LigerJSDFunction", "jsd_impl", jsd_impl, (None,))
        one_of("LigerJSDFunction", "jsd_mode", jsd_mode, (None,))
        return L.liger_jsd(_input, target, shift_labels, beta, ignore_index)


class LigerFusedLinearJSDFunction:
    @staticmethod
    def apply(
        student_input: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_input: torch.Tensor,
        teacher_weight: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        jsd_impl=None,
        jsd_mode=None,
    ):
        one_of("LigerFusedLinearJSDFunction", "jsd_impl", jsd_impl, (None,))
        one_of("LigerFusedLinearJSDFunction", "jsd_mode", jsd_mode, (None,))
        heads = student_input, student_weight, teacher_input, teacher_weight
        return L.liger_fused_linear_jsd(*heads, shift_labels, jsd_beta, ignore_index, temperature, accum_dtype)


class LigerFusedLinearKLDivFunction:
    apply = staticmethod(L.liger_fused_linear_kl_div)


class LigerFusedLinearScaledCrossEntropyFunction:
    apply = staticmethod(scaled.scaled_cross_entropy)


class LigerFusedLinearScaledCrossEntropyTPFunction:
    apply = staticmethod(scaled.scaled_cross_entropy_tp)


class LigerFusedCETVDFunction:
    @staticmethod
    def apply(
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        target: torch.Tensor,
        ignore_index: int = -100,
    ):
        """(cross entropy, total variation distance) of each token, fp32. The teacher gets no gradient."""
        return cross_entropy_tvd(student_logits, teacher_logits.detach(), target, ignore_index=ignore_index)


class LigerTVDLossFunction:
    @staticmethod
    def apply(p, q, shift_labels=None, reduction="batchmean", ignore_index: int = -100):
        return L.liger_tvd(p, q, shift_labels, reduction, ignore_index)


class LigerVocabParallelCEFunction:
    @staticmethod
    def apply(
        vocab_parallel_logits: torch.Tensor,
        target: torch.Tensor,
        tp_group,
        ignore_index: int,
        label_smoothing: float,
        label_smoothing_formula: str,
        label_smoothing_mode: str,
    ):
        """The loss of each token, fp32. tp_group None is this process alone, as in Liger."""
        name = "LigerVocabParallelCEFunction"
        one_of(name, "label_smoothing_formula", label_smoothing_formula, ("pytorch", "megatron"))
        one_of(name, "label_smoothing_mode", label_smoothing_mode, ("global", "partition"))
        place = ("", 0, 1) if tp_group is None else (tp_group.group_name, tp_group.rank(), tp_group.size())
        everywhere = label_smoothing_mode == "global"
        if label_smoothing_formula == "megatron":  # the target's class gets no share of what is spread
            classes = vocab_parallel_logits.shape[-1] * (place[2] if everywhere else 1)
            label_smoothing = label_smoothing * classes / (classes - 1)
        options = {"label_smoothing": label_smoothing, "smooth_everywhere": everywhere}
        options |= {"ignore_index": ignore_index, "reduction": "none", "loss_dtype": torch.float32}
        return vocab_parallel_cross_entropy(vocab_parallel_logits, target, *place, **options)


def four(out):
    """(loss, z_loss, token_accuracy, predicted_tokens), as Liger's functions return it."""
    return tuple(out) if isinstance(out, CrossEntropyOutput) else (out, None, None, None)
