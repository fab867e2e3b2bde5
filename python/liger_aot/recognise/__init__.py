"""What a module computes, found by running it on random numbers and not by its name.

What equals a formula that an operator of ours computes can be bound; another known one is named where it is left. Nothing here
changes a module, or knows what is done with what was found.
"""

from . import _glu
from . import _norm
from . import _rope
from ._probe import Found
from ._probe import identity
from ._probe import weights_of

__all__ = ["Found", "identity", "recognise", "weights_of"]

# Whether a module looks like one of a kind, and the kind's formulas.
KINDS = {
    "norm": (_norm.norm_like, _norm.find_norm),
    "glu": (_glu.glu_like, _glu.find_glu),
    "experts": (_glu.experts_like, _glu.find_experts),
    "rope": (_rope.attention_like, _rope.find_attention),
}


def recognise(module):
    """Which kind a module is of, what all that compute the same have in common, and a function that finds out what that is."""
    for kind, (like, find) in KINDS.items():
        if like(module):
            return kind, type(module) if kind == "rope" else identity(module), find
    return None
