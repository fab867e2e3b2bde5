"""Small models in our own code, whose code no registry carries: ChatGLM-6B as on the hub, CogVLM and CogVLM2 there and in SAT.

The modules have the names of the checkpoints, so that loading them strictly checks every name; what each side computes is
written down for that side, from its own names.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (as torch names it)
from torch import nn


class Group(nn.Module):
    """A module that only holds others, under names of any kind."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name.replace("__", "-"), module)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Frequencies(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        self.dim, self.base = dim, base
        self.register_buffer("inv_freq", self.exact())

    def exact(self):
        return 1 / self.base ** (torch.arange(0, self.dim, 2).float() / self.dim)

    def forward(self, x, positions):
        """x [batch, heads, length, dim], halves."""
        angle = positions[:, None, :, None] * self.inv_freq
        first, second = x.chunk(2, -1)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def linear(inside, outside, bias=False):
    return nn.Linear(inside, outside, bias=bias)


def heads(x, dim):
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def attend(q, k, v, causal, seen=None):
    """`seen` [batch, 1, length, length] is 1 where a token sees another, and takes the place of `causal`."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    hidden = None if seen is None else -10000.0 * (1 - seen)
    return F.scaled_dot_product_attention(q, k, v, hidden, is_causal=causal and seen is None).transpose(1, 2).flatten(2)


def swiglu(x, gate, up, down):
    return down(F.silu(gate(x)) * up(x))


def sorted_by(mask, x, seen, read):
    """What `seen` makes of the image's tokens and `read` of the text's."""
    return torch.where(mask[..., None], seen(x), read(x))


def wide(config):
    heads = config["num_attention_heads"]
    dim = config["hidden_size"] // heads
    groups = config.get("num_multi_query_heads", heads)
    return dim, [heads * dim, groups * dim, groups * dim]


# -- as on the hub


class HubCogVLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.two = config, "num_multi_query_heads" in config
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        self.model = Group(
            embed_tokens=nn.Embedding(vocabulary, hidden),
            layers=nn.ModuleList(self.layer(config) for _ in range(config["num_hidden_layers"])),
            norm=RMSNorm(hidden, config["rms_norm_eps"]),
            vision=self.vision(config, config["vision_config"]),
        )
        self.lm_head = linear(hidden, vocabulary)

    def layer(self, config):
        hidden, inner, eps = config["hidden_size"], config["intermediate_size"], config["rms_norm_eps"]
        dim, parts = wide(config)

        def mlp():
            return Group(gate_proj=linear(hidden, inner), up_proj=linear(hidden, inner), down_proj=linear(inner, hidden))

        return Group(
            input_layernorm=RMSNorm(hidden, eps),
            post_attention_layernorm=RMSNorm(hidden, eps),
            self_attn=Group(
                rotary_emb=Frequencies(dim, 500000.0 if self.two else 10000.0),
                language_expert_query_key_value=linear(hidden, sum(parts)),
                language_expert_dense=linear(parts[0], hidden),
                vision_expert_query_key_value=linear(hidden, sum(parts), self.two),
                vision_expert_dense=linear(parts[0], hidden),
            ),
            mlp=Group(language_mlp=mlp(), vision_mlp=mlp()),
        )

    def vision(self, config, seen):
        width, inner, hidden = seen["hidden_size"], seen["intermediate_size"], config["hidden_size"]
        patch, eps = seen["patch_size"], seen["layer_norm_eps"]
        module = Group(
            patch_embedding=Group(
                proj=nn.Conv2d(seen["in_channels"], width, patch, patch),
                position_embedding=nn.Embedding(seen["num_positions"], width),
            ),
            transformer=Group(
                layers=nn.ModuleList(
                    Group(
                        input_layernorm=nn.LayerNorm(width, eps),
                        post_attention_layernorm=nn.LayerNorm(width, eps),
                        attention=Group(query_key_value=nn.Linear(width, 3 * width), dense=nn.Linear(width, width)),
                        mlp=Group(fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width)),
                    )
                    for _ in range(seen["num_hidden_layers"])
                )
            ),
            linear_proj=Group(
                linear_proj=linear(width, hidden),
                norm1=nn.LayerNorm(hidden),
                dense_h_to_4h=linear(hidden, config["intermediate_size"]),
                gate_proj=linear(hidden, config["intermediate_size"]),
                dense_4h_to_h=linear(config["intermediate_size"], hidden),
            ),
        )
        module.patch_embedding.cls_embedding = nn.Parameter(torch.zeros(1, width))
        module.boi = nn.Parameter(torch.zeros(1, 1, hidden))
        module.eoi = nn.Parameter(torch.zeros(1, 1, hidden))
        if self.two:
            module.conv = nn.Conv2d(width, width, 2, 2)
        return module

    def see(self, image):
        vision, dim = (
            self.model.vision,
            self.config["vision_config"]["hidden_size"] // self.config["vision_config"]["num_heads"],
        )
        patches = vision.patch_embedding
        x = patches.proj(image).flatten(2).transpose(1, 2)
        x = torch.cat([patches.cls_embedding.expand(len(x), 1, -1), x], 1) + patches.position_embedding.weight
        for layer in vision.transformer.layers:
            q, k, v = (heads(part, dim) for part in layer.attention.query_key_value(x).chunk(3, -1))
            x = x + layer.input_layernorm(layer.attention.dense(attend(q, k, v, False)))
            x = x + layer.post_attention_layernorm(layer.mlp.fc2(F.gelu(layer.mlp.fc1(x))))
        x = x[:, 1:]
        if self.two:
            side = round(x.shape[1] ** 0.5)
            x = vision.conv(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        project = vision.linear_proj
        x = F.gelu(project.norm1(project.linear_proj(x)))
        x = swiglu(x, project.gate_proj, project.dense_h_to_4h, project.dense_4h_to_h)
        return torch.cat([vision.boi.expand(len(x), -1, -1), x, vision.eoi.expand(len(x), -1, -1)], 1)

    def forward(self, ids, positions, image, in_image, by_expert, seen=None):
        dim, parts = wide(self.config)
        x = self.model.embed_tokens(ids)
        x = x.masked_scatter(in_image[..., None], self.see(image))
        for layer in self.model.layers:
            own, y = layer.self_attn, layer.input_layernorm(x)
            fused = sorted_by(by_expert, y, own.vision_expert_query_key_value, own.language_expert_query_key_value)
            q, k, v = (heads(part, dim) for part in fused.split(parts, -1))
            y = attend(own.rotary_emb(q, positions), own.rotary_emb(k, positions), v, True, seen)
            x = x + sorted_by(by_expert, y, own.vision_expert_dense, own.language_expert_dense)
            y, vision, text = layer.post_attention_layernorm(x), layer.mlp.vision_mlp, layer.mlp.language_mlp
            x = x + torch.where(
                by_expert[..., None],
                swiglu(y, vision.gate_proj, vision.up_proj, vision.down_proj),
                swiglu(y, text.gate_proj, text.up_proj, text.down_proj),
            )
        return self.lm_head(self.model.norm(x))


# -- as in SAT


class SATCogVLM(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, self.two = args, args["model_class"] == "CogVLM2Model"
        hidden, layers, inner = args["hidden_size"], args["num_layers"], args["inner_hidden_size"]
        count = layers if self.two else min(layers, 32)
        dim, parts = wide(args)
        eps = args["layernorm_epsilon"]

        def many(number, make):
            return nn.ModuleDict({str(i): make() for i in range(number)})

        self.transformer = Group(
            word_embeddings=nn.Embedding(args["vocab_size"], hidden),
            layers=nn.ModuleList(
                Group(
                    input_layernorm=RMSNorm(hidden, eps),
                    attention=Group(query_key_value=linear(hidden, sum(parts)), dense=linear(parts[0], hidden)),
                    post_attention_layernorm=RMSNorm(hidden, eps),
                    mlp=Group(dense_h_to_4h=linear(hidden, inner), dense_4h_to_h=linear(inner, hidden)),
                )
                for _ in range(layers)
            ),
            final_layernorm=RMSNorm(hidden, eps),
        )
        self.mixins = Group(
            eva=self.eva(args, args["eva_args"]),
            lm=Group(lm_head=linear(hidden, args["vocab_size"])),
            rotary=Group(
                rotary_emb=Frequencies(dim, 500000.0 if self.two else 10000.0),
                vision_query_key_value_list=many(count, lambda: linear(hidden, sum(parts), self.two)),
                vision_dense_list=many(count, lambda: linear(parts[0], hidden)),
            ),
            mlp=Group(
                gate_proj=nn.ModuleList(linear(hidden, inner) for _ in range(layers)),
                vision_gate_proj=many(count, lambda: linear(hidden, inner)),
                vision_dense_h_to_4h_list=many(count, lambda: linear(hidden, inner)),
                vision_dense_4h_to_h_list=many(count, lambda: linear(inner, hidden)),
            ),
        )

    def eva(self, args, seen):
        width, inner, hidden, eps = (
            seen["hidden_size"],
            seen["inner_hidden_size"],
            args["hidden_size"],
            seen["layernorm_epsilon"],
        )
        places = (seen["image_size"][0] // seen["patch_size"]) * (seen["image_size"][1] // seen["patch_size"]) + seen["pre_len"]
        tower = Group(
            word_embeddings=nn.Embedding(seen["vocab_size"], width),
            position_embeddings=nn.Embedding(places, width),
            layers=nn.ModuleList(
                Group(
                    input_layernorm=nn.LayerNorm(width, eps),
                    attention=Group(query_key_value=nn.Linear(width, 3 * width), dense=nn.Linear(width, width)),
                    post_attention_layernorm=nn.LayerNorm(width, eps),
                    mlp=Group(dense_h_to_4h=nn.Linear(width, inner), dense_4h_to_h=nn.Linear(inner, width)),
                )
                for _ in range(seen["num_layers"])
            ),
        )
        proj = nn.Conv2d(seen["in_channels"], width, seen["patch_size"], seen["patch_size"])
        eva = Group(
            vit_model=Group(transformer=tower, mixins=Group(patch_embedding=Group(proj=proj))),
            linear_proj=Group(
                linear_proj=linear(width, hidden),
                norm1=nn.LayerNorm(hidden),
                dense_h_to_4h=linear(hidden, args["inner_hidden_size"]),
                gate_proj=linear(hidden, args["inner_hidden_size"]),
                dense_4h_to_h=linear(args["inner_hidden_size"], hidden),
            ),
        )
        eva.boi = nn.Parameter(torch.zeros(1, 1, hidden))
        eva.eoi = nn.Parameter(torch.zeros(1, 1, hidden))
        if self.two:
            eva.conv = nn.Conv2d(width, width, 2, 2)
        return eva

    def see(self, image):
        eva, seen = self.mixins.eva, self.args["eva_args"]
        tower, dim = eva.vit_model.transformer, seen["hidden_size"] // seen["num_attention_heads"]
        embedded = eva.vit_model.mixins.patch_embedding.proj(image).flatten(2).transpose(1, 2)
        token = tower.word_embeddings(torch.zeros(len(image), 1, dtype=torch.long))
        x = torch.cat([token, embedded], 1) + tower.position_embeddings.weight[None]
        for layer in tower.layers:
            q, k, v = (heads(part, dim) for part in layer.attention.query_key_value(x).chunk(3, -1))
            x = x + layer.input_layernorm(layer.attention.dense(attend(q, k, v, False)))
            x = x + layer.post_attention_layernorm(layer.mlp.dense_4h_to_h(F.gelu(layer.mlp.dense_h_to_4h(x))))
        x = x[:, 1:]
        if self.two:
            side = round(x.shape[1] ** 0.5)
            x = eva.conv(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        glu = eva.linear_proj
        x = F.gelu(glu.norm1(glu.linear_proj(x)))
        x = glu.dense_4h_to_h(F.silu(glu.gate_proj(x)) * glu.dense_h_to_4h(x))
        return torch.cat([eva.boi.expand(len(x), -1, -1), x, eva.eoi.expand(len(x), -1, -1)], 1)

    def forward(self, ids, positions, image, in_image, by_expert, seen=None):
        dim, parts = wide(self.args)
        rotary, mlp = self.mixins.rotary, self.mixins.mlp
        x = self.transformer.word_embeddings(ids)
        x = x.masked_scatter(in_image[..., None], self.see(image))
        for i, layer in enumerate(self.transformer.layers):
            k = str(i)
            y = layer.input_layernorm(x)
            fused = sorted_by(by_expert, y, rotary.vision_query_key_value_list[k], layer.attention.query_key_value)
            query, key, value = (heads(part, dim) for part in fused.split(parts, -1))
            y = attend(rotary.rotary_emb(query, positions), rotary.rotary_emb(key, positions), value, True, seen)
            x = x + sorted_by(by_expert, y, rotary.vision_dense_list[k], layer.attention.dense)
            y = layer.post_attention_layernorm(x)
            vision = F.silu(mlp.vision_gate_proj[k](y)) * mlp.vision_dense_h_to_4h_list[k](y)
            text = F.silu(mlp.gate_proj[i](y)) * layer.mlp.dense_h_to_4h(y)
            vision, text = mlp.vision_dense_4h_to_h_list[k](vision), layer.mlp.dense_4h_to_h(text)
            x = x + torch.where(by_expert[..., None], vision, text)
        return self.mixins.lm.lm_head(self.transformer.final_layernorm(x))


class HubChatGLM(nn.Module):
    """ChatGLM-6B: q, k, v per head; half of a head rotated by the place, half by that in the answer; norms behind."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        hidden, inner, eps = config["hidden_size"], config["inner_hidden_size"], config["layernorm_epsilon"]
        half = hidden // config["num_attention_heads"] // 2
        self.transformer = Group(
            word_embeddings=nn.Embedding(config["vocab_size"], hidden),
            layers=nn.ModuleList(
                Group(
                    input_layernorm=nn.LayerNorm(hidden, eps),
                    attention=Group(
                        query_key_value=nn.Linear(hidden, 3 * hidden),
                        dense=nn.Linear(hidden, hidden),
                        rotary_emb=Frequencies(half, 10000.0),
                    ),
                    post_attention_layernorm=nn.LayerNorm(hidden, eps),
                    mlp=Group(dense_h_to_4h=nn.Linear(hidden, inner), dense_4h_to_h=nn.Linear(inner, hidden)),
                )
                for _ in range(config["num_layers"])
            ),
            final_layernorm=nn.LayerNorm(hidden, eps),
        )
        self.lm_head = linear(hidden, config["vocab_size"])

    def forward(self, ids, positions, seen=None):
        """positions [batch, 2, length]"""
        dim = self.config["hidden_size"] // self.config["num_attention_heads"]
        scale = (2 * self.config["num_layers"]) ** 0.5
        x = self.transformer.word_embeddings(ids)
        for layer in self.transformer.layers:
            own, y = layer.attention, layer.input_layernorm(x)
            fused = own.query_key_value(y).unflatten(-1, (-1, 3 * dim)).transpose(1, 2)
            q, k, v = fused.split(dim, -1)
            q, k = (
                torch.cat([own.rotary_emb(part, positions[:, n]) for n, part in enumerate(t.chunk(2, -1))], -1) for t in (q, k)
            )
            x = scale * y + own.dense(attend(q, k, v, True, seen))
            y = layer.post_attention_layernorm(x)
            y_in = layer.mlp.dense_h_to_4h(y)
            # As the code on the hub spells it: F.gelu rounds otherwise.
            y_in = 0.5 * y_in * (1 + torch.tanh(0.7978845608028654 * y_in * (1 + 0.044715 * y_in * y_in)))
            x = scale * y + layer.mlp.dense_4h_to_h(y_in)
        return self.lm_head(self.transformer.final_layernorm(x))
