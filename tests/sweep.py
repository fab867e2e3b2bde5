"""Every family of the installed transformers, built tiny and run as it is and bound: what is recognised, and what differs.

    python tests/sweep.py [NAME ...]

makes the rows of those classes or families, of all of them without a name, and puts them into sweep.tsv. What changed there is
printed as a diff and fails, as does any model that differs once it is bound. Numbers are measured and not compared.
"""

import collections
import copy
import difflib
import importlib
import inspect
import itertools
import logging
import math
import multiprocessing
import multiprocessing.connection
import random
import re
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy
import torch
from torch.overrides import TorchFunctionMode

from liger_aot.bind import bind
from liger_aot.bind import unbind

HERE = Path(__file__).parent
TASKS = ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForSequenceClassification"]
VOCAB, WIDTH, LENGTH, LABELS = 131, 64, 12, 3

# A number in a config, by the name of its field, and the most that it is in a tiny model; the first that fits counts. Every
# width that is added to or multiplied with another is WIDTH.
LIMITS = [
    (r".*loss.*|.*dropout|.*_(rate|prob|ratio|factor)|initializer.*", math.inf),
    (r"temporal_.*|spatial_.*|.*merge_size|.*num_channels|in_channels|.*(kernel|stride|dilation).*", math.inf),
    (r"(type|modality_type|task_type|num_speakers)_vocab_size", 32),
    (r".*vocab.*|num_embeddings|n_token", VOCAB),
    (r"codebook_size", 64),
    (r"mm_tokens_per_image", 4),
    (r".*(experts_per_tok|moe_k|top_?k(_experts)?|_topk)", 2),
    (r"n_group|topk_group|num_expert_groups?|.*shared_experts", 1),
    (r".*num.*experts|n_routed_experts", 4),
    (r".*(interval|period|frequency|sparse_step|layer_step|_pattern|every_n_layers)", 2),
    (r"first_k_dense_replace|(num|n)_dense_layers|.*layer_offset|.*layer_start_index|.*feature_layer", 1),
    (r"(num_)?(mtp|nextn|residual|adapter|lstm).*layers.*", 1),
    (r"num_kv_shared_layers", 0),
    (r"num_latents", 16),
    (r".*layers?|.*depth|num_blocks|n_layer", 2),
    (r".*head_(dim|size)|d_kv|d_head|dim_head|kv_channels|rotary_dim", 16),
    (r".*heads?|.*_groups", 4),
    (r".*lora_rank|image_size|img_size|input_size|max_source_positions", 32),
    (r"patch_size", 8),
    (r"max_(target|2d)?_?position.*|n_positions|n_ctx|.*position_embeddings", 512),
    (r".*window.*|.*chunk_size", 8),
    (r".*(intermediate|ffn|mlp|inner|d_ff).*", 96),
    (r".*(hidden|d_model|embd|embed|dim|size|width|channels|features|rank|state|d_latents).*", WIDTH),
]
LIMITS = [(re.compile(pattern), limit) for pattern, limit in LIMITS]

# What no rule can know: the fields of a config class.
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
MOE = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
CONFIGS = {
    "AriaConfig": {"projector_patch_to_query_dict": {16: 4}},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 7, "IMGIMGAAZ": 8}},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE}},
    "Cosmos3EdgeTextConfig": {"rope_parameters": MROPE},
    "DeepseekV2Config": MOE,
    "Dots1Config": MOE,
    "Emu3Config": {"vocabulary_map": {"<image>": 7}},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": MROPE},
    "EsmConfig": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 32},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": WIDTH // 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma4AssistantTextConfig": {"hidden_size_per_layer_input": 0},
    "LayoutLMv3Config": {"coordinate_size": 12, "shape_size": 8},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LiltConfig": {"hidden_size": 96},
    "Mamba2Config": {"num_heads": 8},
    "MarkupLMConfig": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "NystromformerConfig": {"segment_means_seq_len": LENGTH, "num_landmarks": 4},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 91},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 91},
    "ReformerConfig": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [3, 4]},
    "Step3p7TextConfig": {"sliding_window": 8},
    "VibeVoiceAsrConfig": {"acoustic_tokenizer_chunk_size": 3200},
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    "ZambaConfig": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
}
PLAIN = {"transformers_version", "architectures", "id2label", "label2id", "dtype"}


def limited(name, n):
    """A config's number in a tiny model."""
    if re.search(r"token_(id|index)s?$", name):
        return n if n < 90 else 90 + n % (VOCAB - 91)  # within the vocabulary, and seldom the same for two
    if name == "window_size":
        return n if n < 16 else 32  # of patches, or of pixels
    if n < 0:
        return max(n, -2)
    return next((min(n, limit) for pattern, limit in LIMITS if pattern.fullmatch(name)), n)


def cases():
    """(family, class) of every model that is swept, found in the sources: importing them all takes a minute."""
    import transformers

    pattern = re.compile(rf"^class (\w+(?:{'|'.join(TASKS)}))\(", re.M)
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in pattern.findall(file.read_text()):
            if file.parent.name != "auto":
                yield file.parent.name, file.stem, name


def tiny(config_class, defaults=None):
    """A small config of that class: what is a number by default is limited, configs inside through here."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    defaults = {name: p.default for name, p in inspect.signature(config_class).parameters.items()} | (defaults or {})
    fields = {}
    for name, default in defaults.items():
        if type(default) is int:
            fields[name] = limited(name, default)
            if re.fullmatch(r".*(key_value|kv)_.*heads|n_kv_head", name):
                same = default == defaults.get("num_attention_heads", defaults.get("num_heads"))
                fields[name] = min(default, 4 if same else 2)
        elif name in ("head_dim", "num_key_value_heads") and default is None:
            fields[name] = 16 if name == "head_dim" else 4
        elif isinstance(default, float) and "drop" in name:
            fields[name] = 0.0
        elif isinstance(default, list | tuple) and re.search("indexes|indices|layer_ids", name):
            fields[name] = type(default)(range(min(len(default), 2)))
        elif isinstance(default, list | tuple) and name in ("image_size", "patch_size"):
            fields[name] = type(default)(limited(name, n) for n in default)
        elif isinstance(default, list | tuple) and "feature_layer" in name:
            fields[name] = type(default)((-2, -1))
        elif name == "image_grid_pinpoints":
            fields[name] = [[32, 32]]
        elif isinstance(default, list | tuple) and re.fullmatch("depths|conv_dim|tdnn_dim|(hidden|embed).*", name):
            fields[name] = type(default)(max(n // 8, 1) for n in default)
        elif default is not inspect.Parameter.empty and name not in PLAIN:
            fields[name] = default
    for name, part in config_class.sub_configs_defaults.items():
        known = hasattr(part.config_class, "sub_configs_defaults")
        fields[name] = tiny(part.config_class if known else CONFIG_MAPPING[part.model_type], part.init_kwargs)
    more = CONFIGS.get(config_class.__name__, {})
    config = config_class(**{**fields, **more})
    for name in more.keys() - vars(config).keys():
        setattr(config, name, more[name])
    return config


def parts(config):
    """A config and all configs inside."""
    yield config
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            yield from parts(getattr(config, key))


def build(module, name):
    """The model with fixed random weights, none of them what it was initialised to."""
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    config = tiny(cls.config_class)
    for part in parts(config):
        part.use_cache = False
        for key in ["pad_token_id", "decoder_start_token_id"]:
            if getattr(part, key, None) is None:
                setattr(part, key, 0)
        if getattr(part, "image_token_index", 0) is None:
            part.image_token_index = VOCAB - 1
        rope = getattr(part, "rope_parameters", None)
        if isinstance(rope, dict) and rope.get("rope_theta", 0) is None:
            rope["rope_theta"] = 10000.0
        if isinstance(rope, dict) and "rope_theta" in rope and hasattr(part, "num_attention_heads"):
            width = getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads
            half = int(width * rope.get("partial_rotary_factor", 1)) // 2
            if sum(rope.get("mrope_section", [])) != half:
                rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    config.num_labels = LABELS
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    convolutions = {id(p) for m in model.modules() if "Conv" in type(m).__name__ for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.dim() < 2:
                parameter += 0.2 * noise
            else:
                fan = parameter[0].numel() if id(parameter) in convolutions else parameter.shape[-1]
                parameter.copy_(noise * fan**-0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def first(config, *names):
    """The value of the first of those fields that any config inside has."""
    for name in names:
        for part in parts(config):
            if getattr(part, name, None) is not None:
                return getattr(part, name)
    return None


def side(value):
    return value if isinstance(value, int) else value[0]


class Form(NamedTuple):
    """What a model is given beside its text."""

    kind: str
    floats: Mapping = MappingProxyType({})  # name -> shape of random numbers
    fixed: Mapping = MappingProxyType({})  # name -> tensor
    tokens: int = 0  # of its text that stand for an image


def forms(model):
    """The inputs that a model may want, the most telling first."""
    wants = inspect.signature(model.forward).parameters
    size, channels = image_size(model.config), first(model.config, "num_channels", "in_channels", "in_chans") or 3
    if "pixel_values" in wants and hasattr(getattr(model, "model", model), "get_image_features"):
        yield from images(model, wants)
    if "pixel_values" in wants:
        yield Form("image", {"pixel_values": (channels, size, size)})
    if not {"input_values", "input_features"} & set(wants) or "input_ids" in wants:
        yield Form("text")
    if "input_values" in wants:
        yield Form("audio", {"input_values": (4000,)})
    if "input_features" in wants:
        names = "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim"
        bins = first(model.config, *names) or WIDTH
        for shape in [(bins, 64), (64, bins)]:
            yield Form("audio", {"input_features": shape})


def image_size(config):
    return side(first(getattr(config, "vision_config", None) or config, "image_size") or 32)


def images(model, wants):
    """The forms in which this model's own get_image_features takes one image of 16 patches, with the number of its tokens."""
    vision = getattr(model.config, "vision_config", None) or model.config
    size, patch = image_size(model.config), side(first(vision, "patch_size") or 8)
    channels = first(vision, "num_channels", "in_channels", "in_chans") or 3
    frames = side(first(vision, "temporal_patch_size") or 1)
    grid, places = torch.tensor([[1, 4, 4]]), torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    # Each may be left out; what a model needs it asks for.
    more = {
        "image_grid_thw": [grid],
        "image_sizes": [torch.tensor([[size, size]])],
        "image_position_ids": [places],
        "pixel_position_ids": [places],
        "spatial_shapes": [grid[:, 1:]],
        "target_sizes": [grid[:, 1:]],
        "image_merge_sizes": [torch.tensor([2]), torch.tensor([1])],
        "pixel_attention_mask": [torch.ones(1, 16, dtype=torch.long)],
    }
    options = [[None, *more[name]][::-1] for name in more if name in wants]
    shapes = [(*extra, channels, size, size) for extra in [(1,), (1, 1), (1, 2)]]
    patches = [(16, channels * frames * patch**2), (1, 16, channels * frames * patch**2), (16, channels, patch, patch)]
    method = (model if hasattr(model, "get_image_features") else model.model).get_image_features
    for shape in [*patches, *shapes] if "image_grid_thw" in wants else [*shapes, *patches]:
        for values in itertools.product(*options):
            given = {name: v for name, v in zip((n for n in more if n in wants), values, strict=True) if v is not None}
            try:
                with torch.no_grad():
                    found = method(pixel_values=torch.randn(shape), **given)
                found = getattr(found, "pooler_output", found)
                tokens = sum(f.shape[:-1].numel() for f in (found if isinstance(found, list | tuple) else [found]))
            except Exception:  # whatever a model says to pixels of another form
                continue
            yield Form("image", {"pixel_values": shape}, given, tokens)


def form_of(model):
    """The first form with which the model gives a loss; if none does, what it says to the first."""
    failure = None
    for form in forms(model):
        try:
            with torch.no_grad():
                if model(**batch(model, form)).loss is None:
                    raise ValueError("gives no loss")
            return form
        except Exception as error:  # whatever a model says to inputs that it does not take
            failure = failure or error
    raise failure


def batch(model, form, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    wants, config = inspect.signature(model.forward).parameters, model.config
    vocabulary = min(first(config, "vocab_size", "src_vocab_size") or VOCAB, VOCAB)
    fields = {key: value for part in parts(config) for key, value in vars(part).items()}
    special = {value for key, value in fields.items() if re.search("token_(id|index)$", key) and isinstance(value, int)}
    special |= {*(fields.get("vocabulary_map") or {}).values()}
    usual = torch.tensor([i for i in range(6, vocabulary) if i not in special])

    def draw(*shape):
        return usual[torch.randint(len(usual), shape, generator=generator)]

    ids, given = draw(rows, LENGTH), dict(form.fixed)
    for name, shape in form.floats.items():
        given[name] = torch.randn(shape if form.tokens else (rows, *shape), generator=generator)
    if form.tokens:
        image_token = first(config, "image_token_id", "image_token_index")
        ids = torch.cat([ids[0, :4], torch.full((form.tokens,), image_token), ids[0, 4:]])[None]
        given |= {types: (ids == image_token).long() for types in ["token_type_ids", "mm_token_type_ids"] if types in wants}
    if "input_ids" in wants:
        given["input_ids"] = ids
    if "attention_mask" in wants and "input_ids" in wants:
        given["attention_mask"] = torch.ones_like(ids)
    if "qformer_input_ids" in wants:
        given["qformer_input_ids"] = ids
    if "bbox" in wants:
        given["bbox"] = torch.tensor([1, 2, 30, 40]).expand(*ids.shape, 4)
    if type(model).__name__.endswith("SequenceClassification"):
        given["labels"] = torch.arange(len(ids)) * 2 % LABELS
        ends = first(config, "eos_token_id")
        ids[:, -1] = ends if isinstance(ends, int) else ids[:, -1]
    else:
        labels = draw(*ids.shape)
        labels[0, :3] = -100
        given["labels"] = labels
    return given


class Choices(TorchFunctionMode):
    """The first run under it chooses and draws, the runs after it do as that did: a router that chose another expert for one
    rounding, or drew another number for its dtype, says nothing about the rounding."""

    def __init__(self):
        super().__init__()
        self.made, self.next = [], None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found, name = function(*args, **(kwargs or {})), getattr(function, "__name__", "")
        if name not in ("rand_like", "gt", "__gt__") and not (name in ("topk", "max") and isinstance(found, tuple)):
            return found
        if self.next is None:
            self.made.append(found)
            return found
        made = next(self.next)
        if isinstance(made, torch.Tensor):
            return made.to(found.dtype)
        if name == "max":
            return type(found)((found.values, made.indices))
        dim = (kwargs or {}).get("dim", args[2] if len(args) > 2 else -1)
        return type(found)((args[0].gather(dim, made.indices), made.indices))

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.next = iter(self.made)

    def __enter__(self):
        if self.next is not None:
            self.next = iter(self.made)
        return super().__enter__()


def forward_backward(model, given):
    """The loss and every parameter's gradient, in double precision; a parameter that has none is not among them."""
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def as_dtype(model, dtype):
    """A copy with its weights in dtype; what a model computes for itself, such as rope's frequencies, stays as it is."""
    model = copy.deepcopy(model)
    kept = {
        id(b) for m in model.modules() for name, b in m.named_buffers(recurse=False) if name in m._non_persistent_buffers_set
    }
    for module in model.modules():
        for tensors in [module._parameters, module._buffers]:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and id(tensor) not in kept:
                    if tensors is module._parameters:
                        tensor.data = tensor.data.to(dtype)
                    else:
                        tensors[name] = tensor.to(dtype)
    return model


def inputs_as(given, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}


def worst(got, want):
    """The largest relative difference of a gradient, in norm, and whose it is; infinite where only one of both has one."""
    if got.keys() != want.keys():
        return float("inf"), f"only one has {sorted(got.keys() ^ want.keys())[0]}"
    size = sum(g.square().sum() for g in want.values()).sqrt()
    # A gradient that is zero but for rounding, as of a bias before softmax, is measured by the size of all of them.
    apart = {name: ((got[name] - g).norm() / max(g.norm(), 1e-3 * size, 1e-30)).item() for name, g in want.items()}
    return max(((d, name) for name, d in apart.items()), default=(0.0, ""))


def bf16_ratio(model, form, least=6, most=32):
    """How many times the unbound model's error the bound one's is, both in bfloat16; its standard error; what was the truth.

    An error is the distance in norm of the loss or of one parameter's gradient for one batch; the ratios of all are averaged
    as logarithms. So each counts the same: where a model is so badly conditioned that rounding is all there is of a gradient,
    that decides no more than the others, whichever of the two it favours. The truth is float64, float32 where a model cannot.
    There are as many batches as it takes to tell on which side of BF16 it is, 32 at most.
    """
    plain, bound = as_dtype(model, torch.bfloat16), as_dtype(model, torch.bfloat16)
    bind(bound)
    exact, dtype = as_dtype(plain, torch.float64), torch.float64
    if any(hasattr(m, "_apply_gate") for m in model.modules()):
        exact.set_experts_implementation("eager")
    if not finite(exact, inputs_as(batch(model, form), dtype)):
        exact, dtype = as_dtype(plain, torch.float32), torch.float32
    ratios = []
    while len(ratios) < least or (len(ratios) < most and abs(average(ratios) - BF16) < 2 * standard_error(ratios)):
        seed = len(ratios)
        given, choices = batch(model, form, seed, 8), Choices()
        with choices:
            truth = forward_backward(exact, inputs_as(given, dtype))
        apart = []
        for each in (plain, bound):
            with choices:
                apart.append(distances(forward_backward(each, inputs_as(given, torch.bfloat16)), truth))
        ratios.append(statistics.fmean(math.log(b / a) for a, b in zip(*apart, strict=True)))
    return average(ratios), standard_error(ratios), dtype


def average(logarithms):
    return math.exp(statistics.fmean(logarithms))


def standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5


def distances(run, truth):
    """Of the loss and each gradient, at least a thousandth of bfloat16's rounding: below that is chance."""
    (loss, grads), (true_loss, true_grads) = run, truth
    pairs = [(torch.tensor(loss), torch.tensor(true_loss)), *((grads[name], g) for name, g in true_grads.items())]
    return [max(norm([a - b]), 2**-18 * norm([b]), 1e-30) for a, b in pairs]


def norm(tensors):
    return sum(t.square().sum() for t in tensors).sqrt().item()


def finite(model, given):
    try:
        return math.isfinite(forward_backward(model, given)[0])
    except Exception:  # whatever a model says to a dtype that it does not take
        return False


def counted(texts):
    texts = (re.sub(r"(raises \w+):.*", r"\1", text) for text in texts)
    return "; ".join(f"{text} x {n}" for text, n in sorted(collections.Counter(texts).items())) or "-"


def said(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:140]


def one(module, name, bf16=True):
    """The row of one class: built, run, bound, compared, unbound, compared again."""
    try:
        model = build(module, name)
        form = form_of(model)
        given = batch(model, form)
        # Copied before they run: some models keep what they computed, which cannot be.
        bound, spare = copy.deepcopy(model), copy.deepcopy(model)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}

        def run(other):
            """From the same statistics, which some models keep of what they have seen."""
            for name, buffer in other.named_buffers():
                buffer.copy_(before[name])
            return forward_backward(other, given)

        loss, grads = run(model)
        weights = {key: value.clone() for key, value in model.state_dict().items()}
    except Exception as error:  # a model that does not run as it is says why, whatever that is
        return {"inputs": "-", "fp32": said(error)}
    classes = [type(m) for m in model.modules()]

    def as_before(other):
        again, grads_again = run(other)
        state = other.state_dict()
        return (
            [type(m) for m in other.modules()] == classes
            and state.keys() == weights.keys()
            and all(torch.equal(state[key], value) for key, value in weights.items())
            and (again, grads_again.keys()) == (loss, grads.keys())
            and all(torch.equal(grads_again[key], g) for key, g in grads.items())
        )

    try:
        report = bind(bound)
        bound_loss, bound_grads = run(bound)
        row = {
            "inputs": form.kind,
            "bound": counted(f"{r.operator}: {r.formula}" for r in report.bound),
            "left": counted(f"{r.formula or r.kind}: {r.why}" for r in report.left),
            "loss": counted(report.counts.elements()),
        }
        apart, where = worst(bound_grads, grads)
        loss_apart = abs(bound_loss - loss) / abs(loss)
        faults = []
        if not loss_apart <= LOSS:
            faults.append(f"the loss by {loss_apart:.0e}")
        if not apart <= GRADIENT:
            faults.append(f"the gradient of {where} by {apart:.0e}")
        if not as_before(model):
            faults.append("another model, by binding this one")
        unbind(bound)
        if not as_before(bound):
            faults.append("what unbind leaves")
        row["fp32"] = f"differs: {'; '.join(faults)}" if faults else "equal"
    except Exception as error:  # that binding broke a model is what this looks for
        return {"inputs": form.kind, "fp32": f"differs: {said(error)}"}
    if bf16:
        row["bf16"] = bf16_of(spare, form)
    return row


def bf16_of(model, form):
    """The cell of that column."""
    try:
        forward_backward(as_dtype(model, torch.bfloat16), inputs_as(batch(model, form), torch.bfloat16))
    except Exception as error:  # a model that has no bfloat16 says why; it has run in float32
        return f"unbound raises {said(error)}"
    try:
        ratio, error, truth = bf16_ratio(model, form)
    except Exception as error:  # that binding broke a model is what this looks for
        return f"differs: {said(error)}"
    return f"{ratio:.2f} ± {error:.2f}{'' if truth is torch.float64 else ' of float32'}"


LOSS, GRADIENT, BF16 = 1e-5, 1e-4, 1.1
COLUMNS = ["family", "class", "inputs", "bound", "left", "loss", "fp32", "bf16"]
TABLE = HERE / "sweep.tsv"
PROCESSES, SECONDS, BYTES = 2, 300, 8 << 30


def child(family, file, name, sender):
    """One class in a process of its own: it gives its memory back, and what it prints is nobody's."""
    quiet()
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    sender.send({"family": family, "class": name, **one(f"{family}.{file}", name)})


def rows_of(chosen):
    """The rows of those cases, in their order; a few processes at a time, which start with what all of them import."""
    for name in ["modeling_utils", "generation", "modeling_layers", "masking_utils", "models.auto.modeling_auto"]:
        importlib.import_module(f"transformers.{name}")
    context, waiting, running, rows = multiprocessing.get_context("fork"), list(enumerate(chosen)), {}, {}
    while waiting or running:
        while waiting and len(running) < PROCESSES:
            place, (family, file, name) = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(family, file, name, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = place, family, name, process, time.monotonic()
        ready = multiprocessing.connection.wait(running, timeout=1)
        for receiver, (place, family, name, process, start) in list(running.items()):
            if receiver not in ready and time.monotonic() - start < SECONDS:
                continue
            try:
                row = receiver.recv() if receiver in ready else {"inputs": "-", "fp32": f"takes more than {SECONDS} seconds"}
            except EOFError:
                row = {"inputs": "-", "fp32": "its process died"}
            rows[place] = {"family": family, "class": name, **row}
            process.kill()
            process.join()
            del running[receiver]
            print("\t".join(line(rows[place])), file=sys.stderr, flush=True)
    return [rows[place] for place in sorted(rows)]


def line(row):
    return [str(row.get(column, "")) for column in COLUMNS]


def verdict(row):
    """What makes a row a failure; empty where nothing does."""
    for column in ("fp32", "bf16"):
        if row.get(column, "").startswith("differs"):
            return row[column]
    measured = re.match(r"([\d.]+) ± ([\d.]+)", row.get("bf16", ""))
    if measured and float(measured[1]) - 2 * float(measured[2]) > BF16:
        return f"in bfloat16 its error is {measured[0]} times the unbound model's"
    return ""


def summary(rows):
    ran = [row for row in rows if row["inputs"] != "-"]
    causal = [row for row in ran if row["class"].endswith(tuple(TASKS[:3]))]
    equal = [row for row in causal if row["fp32"] == "equal" and row["bound"] != "-"]
    fused = [row for row in equal if "fused" in row["loss"]]
    families = ["{} classes of {} families".format(len(r), len({row["family"] for row in r})) for r in (ran, equal, fused)]
    return "\n".join(
        [
            f"run unbound: {families[0]}; {len(rows) - len(ran)} classes do not run",
            f"causal, bound, loss and gradients equal: {families[1]}",
            f"of these with a fused loss: {families[2]}",
            f"differ: {sum(bool(verdict(row)) for row in rows)}",
        ]
    )


def read():
    """The committed table: what transformers it is of, and its rows."""
    version, header, *lines = TABLE.read_text().splitlines()
    return version, {
        tuple(text.split("\t")[:2]): dict(zip(header.split("\t"), text.split("\t"), strict=False)) for text in lines
    }


def compared(rows):
    """A table without its measured column, as lines."""
    return ["\t".join(line({**row, "bf16": ""})).rstrip() for row in rows]


def main(names):
    import transformers

    quiet()
    chosen = [case for case in cases() if not names or {case[0], case[2]} & set(names)]
    version = f"# transformers {transformers.__version__}"
    rows = rows_of(chosen)
    old_version, old = read() if TABLE.exists() else ("", {})
    known = [row for key, row in old.items() if not names or {*key} & set(names)]
    drift = list(
        difflib.unified_diff([old_version, *compared(known)], [version, *compared(rows)], "sweep.tsv", "now", lineterm="", n=0)
    )
    for row in rows:
        last = old.get((row["family"], row["class"]), {})
        # What was measured stays as long as nothing else changes: another machine rounds otherwise.
        kept = last.get("bf16") if compared([last]) == compared([row]) else None
        old[row["family"], row["class"]] = {**row, "bf16": kept or row.get("bf16", "")}
    written = [old[case[0], case[2]] for case in cases() if (case[0], case[2]) in old]
    TABLE.write_text("\n".join([version, "\t".join(COLUMNS), *("\t".join(line(row)) for row in written)]) + "\n")
    print(*drift, sep="\n")
    for row in rows:
        if verdict(row):
            print(row["class"], verdict(row))
    print(summary(rows))
    return bool(drift) or any(map(verdict, rows))


def quiet():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
