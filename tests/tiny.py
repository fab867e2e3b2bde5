"""transformers' own models, small enough to train a step in a few milliseconds, and what one step of them gives."""

import torch
import transformers
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from harness import average

VOCABULARY, WIDTH = 97, 32

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
LAYERS = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = TOKENS | LAYERS | {"num_key_value_heads": 2}
ENCODER_DECODER = TOKENS | {"d_model": WIDTH, "decoder_start_token_id": 1}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}
# family: (configuration class, model class, what the configuration is given)
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", DECODER | {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        DECODER | {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", DECODER | {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", DECODER | {"logits_scaling": 4.0}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", DECODER),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", DECODER),
    "nanochat": ("NanoChatConfig", "NanoChatForCausalLM", DECODER),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
    "falcon_h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        DECODER | MAMBA | {"mamba_d_ssm": 32, "mamba_d_head": 8, "mlp_multipliers": [0.5, 1.5], "lm_head_multiplier": 0.25},
    ),
    "bamba": ("BambaConfig", "BambaForCausalLM", DECODER | MAMBA | {"mamba_d_head": 16, "attn_layer_indices": [1]}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        TOKENS
        | {"n_layer": 2, "n_head": 4, "n_embd": WIDTH, "n_positions": 32}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        TOKENS | LAYERS | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        ENCODER_DECODER
        | {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32}
        | {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "forced_eos_token_id": None},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        ENCODER_DECODER
        | {"d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}


def build(family="llama", dtype=torch.float32, **options):
    """A model of the family in training, the same at each call; vectors (norms' weights, biases) are no plain ones or zeros."""
    configuration, kind, sizes = MODELS[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, configuration)(**{**sizes, **options}))
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() == 1:
                    p.add_(torch.randn_like(p), alpha=0.3)
    return model.to(dtype).train()


def batch(rows=2, length=11):
    """Inputs and labels, of which some are to be ignored."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, **inputs):
    """The loss and every gradient, by the parameters' names in a model that nobody wrapped."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **gradients}


def check_equal(bound, plain):
    """In float32: the loss to 1e-5 of itself, and each gradient, or other result, to 1e-4 in norm.

    A gradient that is zero but for rounding, as that of a bias of attention's keys, is held to the rounding of the largest one.
    """
    assert bound.keys() == plain.keys()
    largest = max(value.detach().double().norm() for value in plain.values() if value is not None)
    for name, expected in plain.items():
        if expected is None:
            assert bound[name] is None, f"{name}: plain has none"
            continue
        assert bound[name] is not None, f"{name}: bound has none"
        assert bound[name].dtype == expected.dtype, f"{name}: {bound[name].dtype}, plain {expected.dtype}"
        size = expected.detach().double().norm()
        allowed = 1e-5 * size if name == "loss" else max(1e-4 * size, 2.0**-24 * largest)
        error = (bound[name].detach().double() - expected.detach().double()).norm()
        assert error <= allowed, f"{name}: differs by {error:.1e} of {size:.1e}"


def check_as_exact(exact, plain, bound):
    """Bound errs no more than twice as much as plain does, on average; where plain is exact, by one unit of its dtype."""
    assert bound.keys() == plain.keys()
    unit = max(torch.finfo(p.dtype).eps for p in plain.values())
    for name, truth in exact.items():
        allowed = max(2 * average(plain[name], truth), unit * truth.abs().max().item())
        assert average(bound[name], truth) <= allowed, name
        assert bound[name].dtype == plain[name].dtype


def check_identical(got, expected):
    """Bit by bit."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value is got[name] is None or torch.equal(got[name], value), name


class operators(TorchDispatchMode):  # noqa: N801 (used as `with operators() as seen`)
    """The names of the liger operators that run inside, each as often as it ran."""

    def __enter__(self):
        super().__enter__()
        self.names = []
        return self.names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "liger":
            self.names.append(function._schema.name.removeprefix("liger::"))
        return function(*args, **(kwargs or {}))


def recorder(graphs):
    """A backend that keeps the graphs of forward and backward and runs them as they are."""

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


def nodes(graphs):
    """The liger operators in them."""
    names = (str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function")
    return {name.split(".")[1] for name in names if name.startswith("liger.")}


def materialised(report):
    """How often logits were made after all, and what for."""
    return {what: count for what, count in report.counts.items() if what.startswith("materialised")}
