"""Checkpoints of Hugging Face transformers as SwissArmyTransformer's, and back."""

from ._convert import hf_to_sat
from ._convert import sat_to_hf
from ._error import ConvertError
from ._job import Report
from ._rope import set_rope_theta

__all__ = ["ConvertError", "Report", "hf_to_sat", "sat_to_hf", "set_rope_theta"]
