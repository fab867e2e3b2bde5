"""A few layers of Llama-8B's shape that train: seconds to the first step, time of a step, memory, the longest sequence.

One process for each provider, because Liger changes transformers for the whole process it is in.
"""

import time

import torch

from .machine import MiB

LAYERS, TOKENS, STEPS = 4, 8192, 12
SHORTEST, LONGEST = 1024, 2**20  # between which the longest sequence is looked for
MEMORY = 40960 * MiB  # that it may take; in all that an H200 has, attention to it would take most of a minute
SECONDS = 10  # of that search
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
COLD, WARM, SEARCH = "cold", "warm", "longest"
# (provider, compiled, a training step with empty caches or those of the one before it, or the longest sequence)
JOBS = [
    *((provider, False, COLD) for provider in (OURS, LIGER, HF)),
    *((provider, True, COLD) for provider in (OURS, LIGER, HF)),
    (LIGER, False, WARM),
    *((provider, False, SEARCH) for provider in (OURS, LIGER, HF)),
]


def text(provider, compiled, what):
    more = {COLD: "", WARM: ", caches filled", SEARCH: ", the longest sequence"}
    return f"stack: {provider}{', compiled' if compiled else ''}{more[what]}"


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


def train(provider, compiled, started, spread, note):
    """Fill in, and note, what was found so far: a process that runs out of time leaves what it has.

    started is the wall clock's time at which the process was started; a dry run has none.
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


def timed(training, ids):
    """Milliseconds of a step, the host's part of it in it."""
    training.synchronize()
    start = time.perf_counter()
    training.step(ids)
    training.synchronize()
    return None if training.dry else 1000 * (time.perf_counter() - start)


def search(provider, dry, deadline, note):
    """Note the longest sequence of which a forward and backward fit into MEMORY, beside all that a training step keeps."""
    if not dry:
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY / torch.cuda.mem_get_info()[1]))
    training = Training(model_of(provider, False, dry), dry)
    training.step(training.batch(16 if dry else SHORTEST))  # from now on the optimizer's state takes its part

    def found(fits, fails):
        note(
            {
                "provider": provider,
                "layers": 2 if dry else LAYERS,
                "memory_MiB": MEMORY // MiB,
                "longest": fits,
                "too_long": fails,
            }
        )

    if dry:
        training.fits(16)
        found(None, None)
    else:
        longest(training, min(deadline, time.monotonic() + SECONDS), found)


def longest(training, deadline, note):
    """Note the longest that fitted and the shortest that did not, so far: doubled until one does not, then halved."""
    fits, fails = None, None
    while time.monotonic() < deadline and fits != LONGEST and (fails is None or (fits and fails - fits > fits // 4)):
        tried = SHORTEST if fits is None else min(2 * fits, LONGEST) if fails is None else (fits + fails) // 2
        if training.fits(tried):
            fits = tried
        else:
            fails = tried
        note(fits, fails)
