"""A few layers of Llama-8B's shape that train: seconds to the first step, time of a step, memory, the longest sequence.

One process for each provider, because Liger changes transformers for the whole process it is in.
"""

import time

import torch

from .machine import MiB

LAYERS, TOKENS, STEPS, LONGEST = 4, 8192, 12, 2**20
SEARCH = 25  # seconds for the longest sequence
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": LONGEST,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
DEVICE = {False: "cuda", True: "cpu"}  # of a dry run or not
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
HF, LIGER, OURS = "transformers", "liger-kernel", "liger-aot"
# (provider, compiled, caches of the one before it); the first three before the compiled, which take longer to start.
JOBS = [
    *((provider, False, "cold") for provider in (OURS, LIGER, HF)),
    *((provider, True, "cold") for provider in (OURS, LIGER, HF)),
    (LIGER, False, "warm"),
]


def text(provider, compiled, cache):
    return f"stack: {provider}{', compiled' if compiled else ''}{', caches filled' if cache == 'warm' else ''}"


def model_of(provider, compiled, dry):
    """The model, in training, with the provider's kernels in it."""
    if provider == LIGER:
        if dry:
            import liger

            liger.functions(compiled=False)
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    config = LlamaConfig(
        **(SHAPE | (TINY if dry else {})), num_hidden_layers=2 if dry else LAYERS, use_cache=False, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE[dry]):
            model = LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)
    if provider == OURS:
        import liger_aot

        liger_aot.bind(model)
    return torch.compile(model, backend="eager" if dry else "inductor") if compiled else model


class Training:
    def __init__(self, model, dry):
        self.model, self.dry = model, dry
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=not dry)
        self.vocabulary = model.config.vocab_size

    def batch(self, tokens):
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(self.vocabulary, (1, tokens), generator=generator).to(DEVICE[self.dry])

    def step(self, ids):
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def synchronize(self):
        if not self.dry:
            torch.cuda.synchronize()

    def fits(self, tokens):
        """Whether a forward and backward of one sequence of so many tokens fits into the device's memory."""
        try:
            self.model(input_ids=(ids := self.batch(tokens)), labels=ids).loss.backward()
            self.synchronize()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            if not self.dry:
                torch.cuda.empty_cache()


def train(provider, compiled, started, deadline, spread, note):
    """Fill in, and note, what was found so far: a process that runs out of time leaves what it has.

    started is the wall clock's time at which the process was started, deadline the monotonic clock's; a dry run has none.
    """
    dry = started is None
    row = {"provider": provider, "compiled": compiled, "layers": 2 if dry else LAYERS, "tokens": 16 if dry else TOKENS}
    training = Training(model_of(provider, compiled, dry), dry)
    row["import_seconds"] = None if dry else time.time() - started
    ids = training.batch(row["tokens"])
    loss = training.step(ids)
    training.synchronize()
    row["seconds_to_first_step"] = None if dry else time.time() - started
    row["loss"] = None if dry else loss.item()
    note(row)
    for _ in range(2):
        training.step(ids)
    if not dry:
        torch.cuda.reset_peak_memory_stats()
    samples = [timed(training, ids) for _ in range(1 if dry else STEPS)]
    times = spread(samples)
    row |= {"step_ms": times.pop("median"), **times}
    row["tokens_per_s"] = None if dry else row["tokens"] / row["step_ms"] * 1e3
    row["peak_MiB"] = None if dry else torch.cuda.max_memory_allocated() / MiB
    note(row)
    if not compiled:  # a length of its own each would be compiled anew
        row["longest"] = None if dry else longest(training, row["tokens"], min(deadline, time.monotonic() + SEARCH))
        if dry:
            training.fits(row["tokens"])
        note(row)


def timed(training, ids):
    """Milliseconds of a step, the host's part of it in it."""
    training.synchronize()
    start = time.perf_counter()
    training.step(ids)
    training.synchronize()
    return None if training.dry else 1000 * (time.perf_counter() - start)


def longest(training, tokens, deadline):
    """The longest sequence that fits, to an eighth of it: doubled until it does not, then halved; None without time."""
    fits, fails = None, None
    while time.monotonic() < deadline and (fails is None or fails - fits > fits // 8):
        tried = tokens if fits is None else min(2 * fits, LONGEST) if fails is None else (fits + fails) // 2 // 256 * 256
        if tried == fits:
            break
        if training.fits(tried):
            fits = tried
        elif fits is None:
            return None
        else:
            fails = tried
    return fits if fails or fits == LONGEST else None
