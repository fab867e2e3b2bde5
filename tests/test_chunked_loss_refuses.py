"""What the losses of post-training refuse, and what Liger-Kernel makes of it."""

import re

import pytest
import torch

from liger_aot import chunked_loss
from liger_aot.chunked_loss import functional

from losses import BATCH
from losses import CLIPPED
from losses import GRPO
from losses import LENGTH
from losses import REFERENCE
from losses import by_keywords
from losses import make
from losses import plain
from losses import tokens


def call(name, options=(), **changes):
    """A call with some inputs changed: a value, or a function of the one that was there."""

    def run(function=None):
        inputs = plain(make(name, torch.float32))
        for key, change in changes.items():
            inputs[key] = change(inputs[key]) if callable(change) else change
        return (function or getattr(functional, f"liger_fused_linear_{name}"))(**inputs, **dict(options))

    run.name, run.options, run.changes = name, dict(options), changes
    return run


DPO_TYPES = "sigmoid, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, discopop"
# (the call, the text, what Liger makes of it: an error of any kind, or a number that another meaning gives)
REFUSED = [
    (call("dpo", {"loss_type": "ipo"}), f"dpo: loss_type must be one of {DPO_TYPES}, got 'ipo'", False),
    (
        call("dpo", {"label_smoothing": 0.1}),
        "dpo: label_smoothing must be 0 with loss_type 'sigmoid', got 0.1; exo_pair and robust use it",
        True,
    ),
    (
        call("dpo", {"loss_type": "exo_pair"}),
        "dpo: label_smoothing must be in (0, 1) with loss_type 'exo_pair', got 0.0; exo_pair and robust use it",
        False,
    ),
    (
        call("dpo", {"loss_type": "robust", "label_smoothing": 0.5}),
        "dpo: label_smoothing must be in [0, 0.5) with loss_type 'robust', got 0.5; exo_pair and robust use it",
        False,
    ),
    (call("dpo", {"beta": 0.0}), "dpo: beta must be positive, got 0.0", True),
    (call("dpo", {"discopop_tau": 0.0}), "dpo: discopop_tau must be positive, got 0.0", True),
    (
        call("dpo", ref_input=None, ref_bias=None),
        "dpo: ref_input and ref_weight must be given where use_ref_model is True, got ref_weight; give both, or "
        "use_ref_model=False",
        False,
    ),
    (
        call("dpo", {"use_ref_model": False}),
        "dpo: ref_input, ref_weight, ref_bias must be None where use_ref_model is False; set use_ref_model=True",
        True,
    ),
    (
        call("dpo", _input=lambda x: x.flatten(0, 1)),
        "dpo: _input must be (batch, length, H), got (24, 16); unflatten it, one row a sequence",
        False,
    ),
    (
        call("dpo", _input=lambda x: x[:3], target=lambda t: t[:3], ref_input=lambda x: x[:3]),
        "dpo: _input must hold pairs, chosen then rejected, got an odd batch of 3",
        False,
    ),
    (call("dpo", target=lambda t: t[:, 1:]), "dpo: target must have shape (4, 6), got (4, 5)", False),
    (call("dpo", target=lambda t: t.int()), "dpo: target must be class indices in int64, got torch.int32", True),
    (call("dpo", target=None), "dpo: target must be a tensor of class indices in int64, got NoneType", False),
    (call("dpo", target=lambda t: t + 50), "target must be in [0, 50) or ignore_index -100, got ", False),
    (
        call("dpo", weight=lambda w: w[:, 1:]),
        "dpo: _input (..., H) and weight (V, H) must agree, got (4, 6, 16), (50, 15)",
        False,
    ),
    (
        call("dpo", ref_weight=lambda w: w[:, 1:]),
        "dpo: ref_input (..., H) and ref_weight (V, H) must agree, got (4, 6, 32), (50, 31)",
        False,
    ),
    (
        call("dpo", ref_input=lambda x: x[:, 1:]),
        "dpo: ref_input must be (4, 6) sequences and tokens like _input, got (4, 5)",
        False,
    ),
    (
        call("dpo", weight=lambda w: w.bfloat16()),
        "dpo: weight must be torch.float32 like _input, got torch.bfloat16; cast one or use autocast",
        False,
    ),
    (call("dpo", bias=lambda b: b[1:]), "dpo: bias must have shape (50,), got (49,)", False),
    (call("dpo", weight=lambda w: w.to("meta")), "dpo: weight must be on cpu like _input, got meta", False),
    (call("cpo", {"label_smoothing": 1.5}), "cpo: label_smoothing must be between 0 and 1, got 1.5", True),
    (call("simpo", {"label_smoothing": -0.5}), "simpo: label_smoothing must be between 0 and 1, got -0.5", True),
    (call("orpo", nll_target=tokens()[:2]), "orpo: nll_target must have shape (4, 6), got (2, 6)", False),
    (
        call("kto", preference_labels=None),
        "kto: preference_labels must be torch.bool (4,), true where desirable, got None",
        False,
    ),
    (
        call("kto", preference_labels=lambda m: m.long()),
        "kto: preference_labels must be torch.bool (4,), true where desirable, got torch.int64 (4,)",
        False,
    ),
    (
        call("kto", preference_labels=lambda m: m[1:]),
        "kto: preference_labels must be torch.bool (4,), true where desirable, got torch.bool (3,)",
        False,
    ),
    (
        call("kto", preference_labels=[True] * BATCH),
        "kto: preference_labels must be torch.bool (4,), true where desirable, got [True, True, True, True]",
        False,
    ),
    (
        call("kto", kl=torch.ones(BATCH, 1)),
        "kto: kl must be a number, or have shape () or (1,) or (4,), got (4, 1)",
        True,
    ),
    (call("kto", kl=torch.ones(3)), "kto: kl must be a number, or have shape () or (1,) or (4,), got (3,)", False),
    (call("kto", kl=[0.5]), "kto: kl must be a number, or have shape () or (1,) or (4,), got [0.5]", False),
    (
        call("kto", {"use_ref_model": False}, ref_bias=None),
        "kto: ref_input, ref_weight must be None where use_ref_model is False; set use_ref_model=True",
        True,
    ),
    (call("grpo", {"loss_type": "ppo"}), f"grpo: loss_type must be one of {', '.join(GRPO)}, got 'ppo'", False),
    (
        call("grpo", {"importance_sampling_level": "word"}),
        "grpo: importance_sampling_level must be one of token, sequence, got 'word'",
        False,
    ),
    *(
        (
            call("grpo", {"importance_sampling_level": "sequence", "loss_type": t}),
            f"grpo: importance_sampling_level must be 'token' with loss_type '{t}', got 'sequence'",
            False,
        )
        for t in ("cispo", "sapo", "vespo")
    ),
    (call("grpo", {"loss_type": "dr_grpo"}), "max_completion_length must be given with loss_type 'dr_grpo', got None", False),
    (
        call("grpo", {"loss_type": "sapo", "delta": 2.0}),
        f"grpo: delta must be None with loss_type 'sapo', got 2.0; {', '.join(CLIPPED)} use it",
        True,
    ),
    (call("grpo", {"delta": -1.0}), "grpo: delta must be positive, got -1.0", True),
    (call("grpo", {"temperature": 0.0}), "grpo: temperature must be positive, got 0.0", False),
    (call("grpo", {"sapo_temperature_neg": 0.0}), "grpo: sapo_temperature_neg must be positive, got 0.0", True),
    (
        call("grpo", selected_token_ids=lambda t: t[:, 1:]),
        "grpo, selected_token_ids: target must have shape (4, 6), got (4, 5)",
        False,
    ),
    (call("grpo", attention_mask=lambda m: m[:, 1:]), "grpo: attention_mask must have shape (4, 6), got (4, 5)", False),
    (call("grpo", attention_mask=None), "grpo: attention_mask must have shape (4, 6), got None", False),
    (call("grpo", advantages=None), "grpo: advantages must have shape (4,), got None", False),
    (call("grpo", advantages=lambda a: a[:, None]), "grpo: advantages must have shape (4,), got (4, 1)", True),
    (
        call("grpo", vllm_is_ratio=torch.ones(3)),
        "grpo: vllm_is_ratio must have shape (4,) or (4, 1) or (4, 6), got (3,)",
        False,
    ),
    (
        call("grpo", ref_per_token_logps=torch.zeros(BATCH, LENGTH)),
        "grpo: ref_input must be None where ref_per_token_logps is given; give one of the two",
        True,
    ),
    (
        call("grpo", {"use_ref_model": False}, **dict.fromkeys(REFERENCE), ref_per_token_logps=torch.zeros(BATCH, LENGTH)),
        "grpo: ref_per_token_logps must be None where use_ref_model is False; set use_ref_model=True",
        True,
    ),
    (
        call("grpo", **dict.fromkeys(REFERENCE)),
        "grpo: ref_input and ref_weight must be given where use_ref_model is True, got neither; give both, or "
        "use_ref_model=False",
        False,
    ),
    (call("jsd", {"beta": 1.5}), "jsd: beta must be between 0 and 1, got 1.5", False),
    (call("jsd", {"temperature": 0.0}), "jsd: temperature must be positive, got 0.0", True),
    (call("cosine", {"chunk_size": 0}), "cosine: chunk_size must be positive, got 0", False),
    (
        call("jsd", student_weight=lambda w: w[:40], student_bias=lambda b: b[:40], true_labels=lambda t: t % 40),
        "jsd: student_weight and teacher_weight must have one vocabulary, got 40 and 50; where the larger is padded, leave "
        "its last rows out",
        True,
    ),
    (
        call("jsd", teacher_input=lambda x: x[1:]),
        "jsd: student_input and teacher_input must have the same tokens, got (24, 16) and (23, 32)",
        False,
    ),
    (
        call("jsd", teacher_bias=lambda b: b[1:]),
        "jsd: teacher_bias must have shape (50,), got (49,)",
        False,
    ),
    (call("jsd", true_labels=lambda t: t[1:]), "jsd, true_labels: target must have shape (24,), got (23,)", False),
]


@pytest.mark.parametrize(("wrong", "text", "accepted"), REFUSED, ids=[r[1][:60] for r in REFUSED])
def test_refuses(wrong, text, accepted):
    """With what was got and what is accepted. `accepted` by Liger are options that it drops, and inputs that it misreads."""
    with pytest.raises(ValueError, match=re.escape(text)):
        wrong()
    if accepted:
        wrong(by_keywords(wrong.name))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("DPO", {"loss_type": "ipo"}, "LigerFusedLinearDPOLoss: loss_type must be one of sigmoid, "),
        ("CPO", {"label_smoothing": 2}, "LigerFusedLinearCPOLoss: label_smoothing must be between 0 and 1, got 2"),
        ("SimPO", {"label_smoothing": 2}, "LigerFusedLinearSimPOLoss: label_smoothing must be between 0 and 1, got 2"),
        ("GRPO", {"delta": 0}, "LigerFusedLinearGRPOLoss: delta must be positive, got 0"),
        ("JSD", {"temperature": 0}, "LigerFusedLinearJSDLoss: temperature must be positive, got 0"),
        ("CosineSimilarity", {"beta": 2}, "LigerFusedLinearCosineSimilarityLoss: beta must be between 0 and 1, got 2"),
    ],
)
def test_modules_refuse_when_they_are_made(name, options, text):
    with pytest.raises(ValueError, match=text):
        getattr(chunked_loss, f"LigerFusedLinear{name}Loss")(**options)
