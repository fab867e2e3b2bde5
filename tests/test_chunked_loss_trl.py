"""TRL's trainers on our losses: in place of its own, and, up to TRL 1.12, through its use_liger_kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liger_aot.chunked_loss import LigerFusedLinearDPOLoss
from liger_aot.chunked_loss import LigerFusedLinearGRPOLoss
from liger_aot.chunked_loss import LigerFusedLinearKTOLoss

from tiny import VOCABULARY
from tiny import build
from training import arguments

HERE = Path(__file__).parent
ROWS, STEPS = 16, 3
WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text(seed, length):
    ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    return "".join(f" {WORDS[i]}" for i in ids)


def data(kind):
    """Prompts and completions of many lengths."""
    from datasets import Dataset

    rows = [{"prompt": text(i, 3 + i % 3).strip()} for i in range(ROWS)]
    for i, row in enumerate(rows):
        if kind == "dpo":
            row |= {"chosen": text(100 + i, 2 + i % 5), "rejected": text(200 + i, 3 + i % 4)}
        if kind == "kto":
            row |= {"completion": text(100 + i, 2 + i % 5), "label": i % 3 > 0}
    return Dataset.from_list(rows)


def reward(completions, **_):
    return [float(c.count("1")) for c in completions]


def trainer(kind, folder, **options):
    """(TRL's class, its arguments) for a tiny model, the same at each call."""
    import trl

    given = arguments(folder, bf16=False, max_steps=STEPS, learning_rate=1e-3, **options)
    given |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "beta": 0.3}
    if kind == "grpo":
        given |= {"num_generations": 4, "max_completion_length": 7, "temperature": 0.9, "loss_type": "dapo"}
    config = getattr(trl, f"{kind.upper()}Config")(**given)
    more = {"reward_funcs": reward} if kind == "grpo" else {"ref_model": build()}
    model = build()
    if kind == "grpo":  # which loads its reference by the model's path
        model.save_pretrained(folder / "model")
        model.config._name_or_path = str(folder / "model")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # the policy is not the reference from the start
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.01)
    given = {"args": config, "train_dataset": data(kind), "processing_class": tokenizer(), **more}
    return getattr(trl, f"{kind.upper()}Trainer"), {"model": model, **given}


def curve(trainer):
    from transformers import PrinterCallback

    torch.manual_seed(0)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row]


def hidden(model, inputs):
    return model.base_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[:, :-1]


def labels(inputs):
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]


def dpo(trainer, model, inputs, return_outputs=False):
    with torch.no_grad():
        reference = hidden(trainer.ref_model, inputs)
    heads = model.lm_head.weight, trainer.ref_model.lm_head.weight
    loss, _ = LigerFusedLinearDPOLoss(beta=trainer.beta)(
        heads[0], hidden(model, inputs), labels(inputs), ref_input=reference, ref_weight=heads[1]
    )
    return loss


def kto(trainer, model, inputs, return_outputs=False):
    own, other = trainer._compute_kl_logps(model, inputs), trainer._compute_kl_logps(trainer.ref_model, inputs)
    with torch.no_grad():
        reference = hidden(trainer.ref_model, inputs)
    loss, _ = LigerFusedLinearKTOLoss(beta=trainer.beta, use_ref_model=True)(
        hidden(model, inputs),
        model.lm_head.weight,
        labels(inputs),
        preference_labels=torch.as_tensor(inputs["label"], dtype=torch.bool),
        ref_input=reference,
        ref_weight=trainer.ref_model.lm_head.weight,
        kl=(own - other).mean().clamp(min=0),
    )
    return loss


def grpo(trainer, model, inputs):
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    whole = {"input_ids": torch.cat((inputs["prompt_ids"], ids), 1)}
    whole["attention_mask"] = torch.cat((inputs["prompt_mask"], mask), 1)
    loss, _ = LigerFusedLinearGRPOLoss(
        beta=trainer.beta,
        loss_type=trainer.loss_type,
        temperature=trainer.temperature,
        use_bias_correction_kl=trainer.args.use_bias_correction_kl,
    )(
        hidden(model, whole)[:, -ids.shape[1] :],
        model.lm_head.weight,
        ids,
        mask,
        inputs["advantages"],
        ref_per_token_logps=inputs["ref_per_token_logps"],
        old_per_token_logps=inputs.get("old_per_token_logps"),
        num_items_in_batch=inputs["num_items_in_batch"],
    )
    return loss * trainer.args.steps_per_generation / trainer.current_gradient_accumulation_steps


LOSSES = {"dpo": dpo, "kto": kto, "grpo": grpo}


@pytest.mark.parametrize("kind", LOSSES)
def test_trainers_learn_as_with_their_own_loss(kind, tmp_path):
    calls = []

    def ours(*given):
        calls.append(kind)
        return LOSSES[kind](*given)

    theirs, given = trainer(kind, tmp_path)
    want = curve(theirs(**given))
    theirs, given = trainer(kind, tmp_path)
    got = curve(type("Ours", (theirs,), {"_compute_loss": ours})(**given))
    assert len(calls) == 2 * STEPS
    check(got, want)


def check(got, want):
    """A policy's loss is a difference of advantages: zero but for rounding."""
    assert len(got) == len(want) == STEPS
    assert any(norm > 0.01 for _, norm in want)
    for (loss, norm), (own, size) in zip(got, want, strict=True):
        assert loss == pytest.approx(own, rel=1e-5, abs=1e-6)
        assert norm == pytest.approx(size, rel=1e-5)


# --- use_liger_kernel, in a process of its own, in which liger-kernel is not installed


def main(folder):
    import liger_aot

    results = {}
    with liger_aot.as_liger():
        import trl.trainer.dpo_trainer as module

        results["class"] = module.LigerFusedLinearDPOLoss.__module__
        for kind in LOSSES:
            for name, options in (("own", {}), ("liger", {"use_liger_kernel": True})):
                theirs, given = trainer(kind, folder, **options)
                made = theirs(**given)
                results[f"{kind} {name}"] = curve(made)
                results[f"{kind} {name} loss"] = type(getattr(made, "liger_loss", None)).__name__
    print(json.dumps(results))


def test_losses_of_liger_kernel_are_ours(tmp_path):
    """By any path, while liger_aot answers for liger_kernel."""
    from test_ways_in import alone
    from test_ways_in import without

    code = """if True:
        import liger_aot
        with liger_aot.as_liger():
            from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
            from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
            from liger_kernel.chunked_loss.functional import liger_fused_linear_kto
        for name in LigerFusedLinearDPOLoss, LigerFusedLinearGRPOFunction, liger_fused_linear_kto:
            print(name.__module__)
    """
    modules = [f"liger_aot.chunked_loss.{name}_loss" for name in ("dpo", "grpo", "kto")]
    assert alone(code, without(tmp_path, "liger_kernel", "trl", "transformers")).split() == modules


@pytest.mark.skipif(
    "LIGER_AOT_TRL_1_12" not in os.environ,
    reason="TRL from 1.13 on has losses of its own alone; make floor runs this, with TRL 1.12 in LIGER_AOT_TRL_1_12",
)
def test_use_liger_kernel_reaches_our_losses(tmp_path):
    from test_ways_in import without

    folder = without(tmp_path, "liger_kernel", "trl")
    (folder / "trl").symlink_to(Path(os.environ["LIGER_AOT_TRL_1_12"], "trl").resolve())
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{HERE}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", str(Path(__file__)), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=HERE)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["class"] == "liger_aot.chunked_loss.dpo_loss"
    for kind in LOSSES:
        assert results[f"{kind} liger loss"] == f"LigerFusedLinear{kind.upper()}Loss"
        assert results[f"{kind} own loss"] == "NoneType"
        check(results[f"{kind} liger"], results[f"{kind} own"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
