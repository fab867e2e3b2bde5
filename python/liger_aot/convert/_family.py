"""What a family is beyond its rules: which configurations are its own, and how each side's is made from the other's."""

from typing import ClassVar

import torch

from ._error import ConvertError
from ._rules import Frequencies
from ._rules import Tied
from ._settings import Settings

# What SAT takes where model_config.json says nothing, of the arguments that change what is computed.
DEFAULTS = {
    "layernorm_order": "pre",
    "is_decoder": False,
    "cross_attn_hidden_size": None,
    "cross_num_multi_query_heads": 0,
    "use_bias": True,
    "use_qkv_bias": False,
    "use_final_layernorm": True,
    "row_parallel_linear_final_bias": True,
    "is_gated_mlp": False,
    "is_rotary_emb": False,
    "num_experts": 1,
}


# SAT's arguments of a model's size, and what most configurations of HF call them.
NAMES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "inner_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
}
# What shapes are spelled with, and which of SAT's arguments that is.
SIZES = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "inner": "inner_hidden_size",
    "heads": "num_attention_heads",
    "positions": "max_sequence_length",
}
# What transformers reads beside sliding_window; a Mistral with layer_types is a Ministral to it. Llama and GLM have no window.
SWITCHES = {"mistral": ("layer_types",), "mixtral": ()}
TOKENS = [f"{name}_token_id" for name in ("bos", "eos", "pad", "mask", "gmask")]


class Family:
    """`hf_accepts` and `sat_accepts` are the values that the other side computes; anything else is refused."""

    name = ""
    title = ""
    rules = ()
    model_types = ()
    model_classes = ()
    architecture = ""
    foreign = ""  # why transformers cannot run it
    causal = True
    sees = False
    prefix = ""  # of the names of the whole model, which the files of its base model lack
    old_names: ClassVar[dict] = {}  # ends of names, as transformers reads them in old files
    names: ClassVar[dict] = NAMES
    epsilon = ("rms_norm_eps",)  # its name in HF's configuration, and what that is by default
    order = "pre"
    tokenizer = "fake"
    tied = False  # whether the head is the embedding, where the configuration does not say
    rope_share = 1  # of a head: all of it is rotated, or a half
    hf_defaults: ClassVar[dict] = {}  # of each model_type, what transformers takes for what we read, where it is no other's
    hf_accepts: ClassVar[dict] = {}
    sat_accepts: ClassVar[dict] = {}
    sat_fixed: ClassVar[dict] = {}  # of SAT's arguments, those of all of the family's models

    def claims_hf(self, config):
        return config.get("model_type") in self.model_types

    def claims_sat(self, args):
        return self.sat_class(args) is not None

    def sat_class(self, args):
        """Which of the family's classes it is. Training gives a class a name that ends with its own."""
        name = str(args.get("model_class"))
        of = [own for own in self.model_classes if name == own or (name.startswith("FineTune") and name.endswith(own))]
        return of[0] if of else None

    def filled(self, config):
        """With what transformers takes where the configuration says nothing."""
        return Settings({**self.hf_defaults.get(str(config.get("model_type")), {}), **config}, config.path)

    def args(self, config):
        args = {
            "model_class": self.model_classes[0],
            "tokenizer_type": config.text("_name_or_path") or self.tokenizer,
            "layernorm_order": self.order,
            "layernorm_epsilon": config.number(*self.epsilon),
        }
        return args | self.sat_fixed | to_args(config, self.names) | tokens(config)

    def config(self, args):
        config = {"model_type": self.model_types[0]} if self.model_types else {}
        config |= {"architectures": [self.architecture], self.epsilon[0]: args.number("layernorm_epsilon", 1e-5)}
        config |= to_config(args, self.names) | tokens(args)
        return {key: value for key, value in config.items() if (key, value) != ("pad_token_id", -1)}  # SAT's word for none

    def check_hf(self, config, problems):
        kind = config.get("model_type")
        if self.model_types and kind is not None and kind not in self.model_types:
            own = " or ".join(map(repr, self.model_types))
            problems.add(f"{config.path}: model_type is {kind!r}; {self.name} converts {own} alone")
        causal = {"is_causal": (True,) if self.causal else (False, None)}
        for key, accepted in (causal | self.hf_accepts).items():
            if key in config and config[key] not in accepted:
                wanted = " or ".join(map(repr, accepted))
                problems.add(f"{config.path}: {key} is {config[key]!r}; SAT's {self.model_classes[0]} computes {wanted} alone")
        if self.rotates():
            check_rope(config, problems)
        kinds, layers = config.listed("layer_types"), config[self.names["num_layers"]]
        if kinds and len(kinds) != layers:
            problems.add(f"{config.path}: layer_types lists {len(kinds)} layers, {self.names['num_layers']} is {layers}")

    def check_sat(self, args, problems):
        if self.sat_class(args) is None:
            own = " or ".join(self.model_classes)
            problems.add(f"{args.path}: model_class is {args['model_class']!r}; {self.name} converts {own} alone")
        alone = {key: (value,) for key, value in (DEFAULTS | self.sat_fixed | {"layernorm_order": self.order}).items()}
        for key, accepted in (alone | self.sat_accepts).items():
            value = args.get(key, DEFAULTS.get(key))
            if value not in accepted:
                wanted = " or ".join(map(repr, accepted))
                problems.add(f"{args.path}: {key} is {value!r}; {self.architecture} computes {wanted} alone")
        own = args.get("hidden_size_per_attention_head")
        if own is not None and own != args.divide("hidden_size", "num_attention_heads"):
            problems.add(f"{args.path}: hidden_size_per_attention_head is {own}; must be hidden_size / num_attention_heads")

    def check_code(self, config, problems):
        """What SAT's class has in its code, and a configuration may have otherwise."""

    def sizes(self, config, args):
        """What the rules' shapes are spelled with, of what all configurations say by one name or another."""
        own = self.names
        hidden, heads = own["hidden_size"], own["num_attention_heads"]
        dim = config.divide(hidden, heads)
        turned = dim // self.rope_share
        if turned % 2 and self.rotates():
            by = f"{hidden!r} {config[hidden]} by {heads!r} {config[heads]}"
            raise ConvertError(
                f"{config.path}: {by}: rotary embeddings turn pairs, and their dimension must be even, got {turned}"
            )
        sizes = {size: config.count(own[arg]) for size, arg in SIZES.items() if arg in own}
        if self.head():
            sizes["tied"] = bool(config.get("tie_word_embeddings", self.tied))
        return sizes | {"head_dim": dim, "rope_dim": turned, "rope_half": turned // 2, "i": config.each(own["num_layers"])}

    def rotates(self):
        return any(isinstance(rule, Frequencies) for rule in self.rules)

    def rope_base(self, args):
        """What SAT's class computes with, whatever the file says, once the model is in 16 bits."""
        return 10000.0

    def theta(self, config):
        return rope(config)[0]

    def set_theta(self, config, theta):
        config["rope_theta"] = theta
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}

    def buffer_theta(self, theta):
        """Of the frequencies in HF's own files."""
        return theta

    def prepare_sat(self, model, args):
        """What SAT's class computes with and cannot be told by its arguments."""

    def sat_inputs(self, inputs):
        """What SAT's model is called with where HF's is called with `inputs`."""
        ids = inputs["input_ids"]
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], device=ids.device)
        places = torch.arange(ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
        return (ids, places, mask.tril() if self.causal else mask), {}

    def head(self):
        """(SAT's head, SAT's embedding), if HF may tie the two."""
        for rule in self.rules:
            if isinstance(rule, Tied):
                return rule.sat[0], next(other.sat[0] for other in self.rules if other.hf == rule.hf and other is not rule)
        return None


def grouped(sizes, kv_heads):
    """With the widths of queries, and of keys and values where several heads share theirs."""
    dim = sizes["head_dim"]
    return sizes | {"kv_heads": kv_heads, "q": sizes["heads"] * dim, "kv": kv_heads * dim}


def rotary(config):
    """v4's section or v5's; where both are there, transformers takes v4's."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return config.section(key) if config.get(key) else Settings({}, config.path)


def rope(config):
    """(theta, kind) of v4's keys or v5's."""
    parameters = rotary(config)
    if any(isinstance(value, dict) for value in parameters.values()):
        return 10000.0, "of several kinds"
    found = parameters if parameters.get("rope_theta") is not None else config
    theta = 10000.0 if found.get("rope_theta") is None else float(found.number("rope_theta"))
    return theta, parameters.get("rope_type", parameters.get("type")) or "default"


def check_rope(config, problems):
    kind = rope(config)[1]
    if kind != "default":
        problems.add(f"{config.path}: rope_type is {kind!r}; SAT has unscaled rotary embeddings alone")


def check_window(name, config, problems):
    """A window as long as the model's longest text hides nothing; nor does one that transformers is told not to use."""
    kind = str(config.get("model_type") or name)
    switches = SWITCHES.get(kind, ("use_sliding_window", "layer_types"))
    used = "use_sliding_window" not in switches or config.get("use_sliding_window", True)
    kinds = config.listed("layer_types") if "layer_types" in switches else []
    if config.get("sliding_window") is None or not used or (kinds and "sliding_attention" not in kinds):
        return
    window, longest = config.count("sliding_window"), config.count("max_position_embeddings")
    if window < longest:
        problems.add(
            f"{config.path}: sliding_window is {window}, less than max_position_embeddings {longest}; SAT has none. "
            "Texts that are shorter than the window can be served: set max_position_embeddings to it. "
            f"What switches it off in transformers' {kind} is {', '.join(('sliding_window null', *switches))}"
        )


def to_args(config, names):
    return {ours: config.count(theirs) for ours, theirs in names.items()}


def to_config(args, names):
    """The way back; an MLP of which SAT's arguments do not say the width is four times as wide as the model."""
    usual = {"inner_hidden_size": 4 * args.count("hidden_size")}
    return {theirs: args.count(ours, usual.get(ours)) for ours, theirs in names.items()}


def tokens(settings):
    return {key: settings[key] for key in TOKENS if settings.tokens(key) is not None}


def copied(entries, names, source):
    """Those of {name: name in source} that the source has and that are not None."""
    return entries | {name: source[other] for name, other in names.items() if source.get(other) is not None}
