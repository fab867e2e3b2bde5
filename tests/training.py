"""A few steps of transformers' Trainer and of TRL's SFTTrainer, with ragged labels and gradient accumulation; no network."""

import json
import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback
from transformers import Trainer
from transformers import TrainingArguments

from tiny import VOCABULARY
from tiny import build

STEPS, ACCUMULATED = 5, 3
ROWS = 2 * ACCUMULATED * STEPS


def example(i):
    """Each is of another length, and has other labels to ignore: a mean over micro-batches is not one over tokens."""
    ids = torch.randint(3, VOCABULARY, (5 + i % 9,), generator=torch.Generator().manual_seed(i))
    labels = ids.clone()
    labels[: i % 4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def padded(rows):
    values = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {k: pad_sequence([row[k] for row in rows], batch_first=True, padding_value=v) for k, v in values.items()}


def arguments(folder, **options):
    sizes = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": ACCUMULATED}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    return {"output_dir": str(folder), "learning_rate": 1e-2, **sizes, **quiet, **options}


def logged(trainer):
    """What the Trainer logs of each step, and its loss over the same data afterwards."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    steps = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
    evaluated = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    return {"loss": [loss for loss, _ in steps], "norm": [norm for _, norm in steps], "eval": evaluated}


def train(folder, model=None, callbacks=(), model_init=None, **options):
    torch.manual_seed(0)
    data = [example(i) for i in range(ROWS)]
    options = TrainingArguments(**arguments(folder, **options))
    return logged(Trainer(model, options, padded, data, model_init=model_init, callbacks=[*callbacks]))


def fine_tune(folder, model, callbacks=(), **options):
    """TRL's, on text: losses of the completions alone."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig
    from trl import SFTTrainer

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    texts = [[words[i] for i in example(row)["input_ids"]] for row in range(ROWS)]
    data = Dataset.from_list([{"prompt": " ".join(text[:3]), "completion": " " + " ".join(text[3:])} for text in texts])
    torch.manual_seed(0)
    options = SFTConfig(**arguments(folder, bf16=False, **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    return logged(SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer, callbacks=[*callbacks]))


def main(folder):
    """In a process of its own, where liger-kernel is not installed: what use_liger_kernel gives under as_liger()."""
    from transformers.utils import is_liger_kernel_available

    import liger_aot

    results, available = {}, [is_liger_kernel_available()]
    with liger_aot.as_liger():
        available.append(is_liger_kernel_available())
        for name, run in {"train": train, "fine_tune": fine_tune}.items():
            model = build("llama")
            results[name] = run(folder, model, use_liger_kernel=True)
            results[name]["model"] = repr(model)
        model = build("llama")
        results["logits"] = train(
            folder, model, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": False}
        )
    available.append(is_liger_kernel_available())
    print(json.dumps({**results, "available": available, "left": [n for n in sys.modules if n.startswith("liger_kernel")]}))


if __name__ == "__main__":
    main(sys.argv[1])
