"""What each transformer class is made of, from its config alone: every linear by name, and the parameters beside them.

Parameter counts, LoRA sizes and FLOPs are computed from this one list. A test compares it with the diffusers classes on
the meta device.

D is the width, N the number of image tokens, L the number of text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Layer:
    """One linear or convolution: y = W x (+ b).

    Attributes:
        inputs, outputs: number of features; a LoRA pair has the same.
        weights, bias: number of entries of W and of b.
        runs: what the layer is applied to: "image" (every image token), "text" (every text token), "both", or "once"
            (once per picture).
        convolution: whether it is an nn.Conv2d or nn.Conv3d; a 1 x 1 one does the work of a linear.
        token_fraction: fraction of the image tokens that the layer is applied to.
    """

    name: str
    inputs: int
    outputs: int
    weights: int
    bias: int
    runs: str
    convolution: bool = False
    token_fraction: float = 1.0


@dataclass(frozen=True)
class Structure:
    """A transformer, and the number of its attentions in one forward pass.

    An attention that is narrower than ``width``, or that sees fewer tokens, counts as a fraction of one.

    Attributes:
        loose: parameters that are in no layer.
        blocks: number of blocks.
        width: D.
        text_width: features of one token of the text embedding; 0 for class-conditional models.
        quadratic: softmax attentions over image and text tokens together.
        alone: softmax attentions over image tokens only.
        cross: attentions from image tokens to text tokens.
        linear: linear attentions, with heads of ``head_dim`` features.
    """

    layers: tuple[Layer, ...]
    loose: int
    blocks: int
    width: int
    text_width: int
    quadratic: float = 0
    alone: float = 0
    cross: float = 0
    linear: int = 0
    head_dim: int = 0

    @property
    def parameters(self) -> int:
        return self.loose + sum(layer.weights + layer.bias for layer in self.layers)


def linear(name: str, inputs: int, outputs: int, runs: str, bias: bool = True) -> Layer:
    return Layer(name, inputs, outputs, inputs * outputs, outputs if bias else 0, runs)


def pointwise(name: str, inputs: int, outputs: int, runs: str, bias: bool = True) -> Layer:
    """A 1 x 1 convolution, or one whose kernel is as large as its stride."""
    return replace(linear(name, inputs, outputs, runs, bias), convolution=True)


def _mlp(name: str, inputs: int, width: int, runs: str) -> Iterator[Layer]:
    """Two linears inputs -> width -> width, like the timestep and text embedders of diffusers."""
    yield linear(f"{name}.linear_1", inputs, width, runs)
    yield linear(f"{name}.linear_2", width, width, runs)


def flux(config: dict) -> Structure:
    """FluxTransformer2DModel (FLUX.1, DC-Gen FLUX)."""
    head = config["attention_head_dim"]
    d = config["num_attention_heads"] * head
    doubles, singles = config["num_layers"], config["num_single_layers"]
    layers = [
        linear("x_embedder", config["in_channels"], d, "image"),
        linear("context_embedder", config["joint_attention_dim"], d, "text"),
        *_mlp("time_text_embed.timestep_embedder", 256, d, "once"),
        *_mlp("time_text_embed.text_embedder", config["pooled_projection_dim"], d, "once"),
        *(_mlp("time_text_embed.guidance_embedder", 256, d, "once") if config["guidance_embeds"] else ()),
        linear("norm_out.linear", d, 2 * d, "once"),
        linear("proj_out", d, config.get("out_channels") or config["in_channels"], "image"),
    ]
    for i in range(doubles):
        at = f"transformer_blocks.{i}"
        layers += [linear(f"{at}.{norm}.linear", d, 6 * d, "once") for norm in ("norm1", "norm1_context")]
        layers += [linear(f"{at}.attn.{name}", d, d, "image") for name in ("to_q", "to_k", "to_v", "to_out.0")]
        text = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        layers += [linear(f"{at}.attn.{name}", d, d, "text") for name in text]
        for ff, runs in (("ff", "image"), ("ff_context", "text")):
            layers += [linear(f"{at}.{ff}.net.0.proj", d, 4 * d, runs), linear(f"{at}.{ff}.net.2", 4 * d, d, runs)]
    for i in range(singles):
        at = f"single_transformer_blocks.{i}"
        layers.append(linear(f"{at}.norm.linear", d, 3 * d, "once"))
        layers += [linear(f"{at}.attn.{name}", d, d, "both") for name in ("to_q", "to_k", "to_v")]
        layers += [linear(f"{at}.proj_mlp", d, 4 * d, "both"), linear(f"{at}.proj_out", 5 * d, d, "both")]
    norms = head * (4 * doubles + 2 * singles)  # q/k norms
    blocks = doubles + singles
    return Structure(tuple(layers), norms, blocks, d, config["joint_attention_dim"], quadratic=blocks)


def sana(config: dict) -> Structure:
    """SanaTransformer2DModel (SANA, SANA-1.5, SANA-Sprint)."""
    d = config["num_attention_heads"] * config["attention_head_dim"]
    cross = config["num_cross_attention_heads"] * config["cross_attention_head_dim"]
    hidden, patch = int(config["mlp_ratio"] * d), config["patch_size"]
    bias = config["attention_bias"]
    out = patch * patch * (config["out_channels"] or config["in_channels"])
    layers = [
        pointwise("patch_embed.proj", config["in_channels"] * patch * patch, d, "image"),
        linear("time_embed.linear", d, 6 * d, "once"),
        *_mlp("caption_projection", config["caption_channels"], d, "text"),
        linear("proj_out", d, out, "image"),
    ]
    embedders = (
        ("timestep_embedder", "guidance_embedder") if config.get("guidance_embeds") else ("emb.timestep_embedder",)
    )
    for name in embedders:
        layers += _mlp(f"time_embed.{name}", 256, d, "once")
    for i in range(config["num_layers"]):
        at = f"transformer_blocks.{i}"
        layers += [linear(f"{at}.attn1.{name}", d, d, "image", bias) for name in ("to_q", "to_k", "to_v")]
        layers.append(linear(f"{at}.attn1.to_out.0", d, d, "image"))
        layers.append(linear(f"{at}.attn2.to_q", d, cross, "image"))
        layers += [
            linear(f"{at}.attn2.{name}", config["cross_attention_dim"], cross, "text") for name in ("to_k", "to_v")
        ]
        layers.append(linear(f"{at}.attn2.to_out.0", cross, d, "image"))
        layers.append(pointwise(f"{at}.ff.conv_inverted", d, 2 * hidden, "image"))
        layers.append(Layer(f"{at}.ff.conv_depth", 2 * hidden, 2 * hidden, 9 * 2 * hidden, 2 * hidden, "image", True))
        layers.append(pointwise(f"{at}.ff.conv_point", hidden, d, "image", bias=False))
    blocks = config["num_layers"]
    affine = 2 * d * blocks if config.get("norm_elementwise_affine") else 0
    normed = 2 * (d + cross) * blocks if config.get("qk_norm") else 0  # SANA-1.5 and Sprint, both attentions
    loose = d + 2 * d + 6 * d * blocks + affine + normed  # caption norm, two scale-shift tables, norm2, q/k norms
    return Structure(
        tuple(layers),
        loose,
        blocks,
        d,
        config["caption_channels"],
        cross=blocks,
        linear=blocks,
        head_dim=config["attention_head_dim"],
    )


def dit(config: dict) -> Structure:
    """DiTTransformer2DModel (DiT-XL/2). diffusers keeps a timestep and a label embedder in every block."""
    d = config["num_attention_heads"] * config["attention_head_dim"]
    patch, blocks = config["patch_size"], config["num_layers"]
    bias = config["attention_bias"]
    out = patch * patch * (config["out_channels"] or config["in_channels"])
    layers = [
        pointwise("pos_embed.proj", config["in_channels"] * patch * patch, d, "image"),
        linear("proj_out_1", d, 2 * d, "once"),
        linear("proj_out_2", d, out, "image"),
    ]
    for i in range(blocks):
        at = f"transformer_blocks.{i}"
        layers += _mlp(f"{at}.norm1.emb.timestep_embedder", 256, d, "once")
        layers.append(linear(f"{at}.norm1.linear", d, 6 * d, "once"))
        layers += [linear(f"{at}.attn1.{name}", d, d, "image", bias) for name in ("to_q", "to_k", "to_v")]
        layers.append(linear(f"{at}.attn1.to_out.0", d, d, "image"))
        layers += [linear(f"{at}.ff.net.0.proj", d, 4 * d, "image"), linear(f"{at}.ff.net.2", 4 * d, d, "image")]
    labels = (config["num_embeds_ada_norm"] + 1) * d * blocks  # class embedding, null class included
    return Structure(tuple(layers), labels, blocks, d, 0, quadratic=blocks)
