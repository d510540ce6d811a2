"""The forward pass of FLUX.1 as a few formulas on tensors in its authors' names (black-forest-labs/flux, model.py).

It shares nothing with diffusers or with the package. B batch, N tokens of the picture, L of the text, H heads, D width.
"""

import torch
from torch.nn.functional import gelu, silu, softmax

Weights = dict[str, torch.Tensor]


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def embedded(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return linear(w, f"{name}.out_layer", silu(linear(w, f"{name}.in_layer", x)))


def waves(t: torch.Tensor) -> torch.Tensor:
    angles = 1000 * t[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], -1)


def norm(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def heads_of(w: Weights, name: str, qkv: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """(B, N, 3 D) -> q, k, v (B, H, N, D/H), the first two normalised."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scaled = [x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k)]
    return [scaled[0] * w[f"{name}.query_norm.scale"], scaled[1] * w[f"{name}.key_norm.scale"], v]


def turned(x: torch.Tensor, ids: torch.Tensor, axes: list[int]) -> torch.Tensor:
    angles = [ids[:, [i]] * 10000.0 ** (-torch.arange(0, size, 2) / size) for i, size in enumerate(axes)]
    angle, (a, b) = torch.cat(angles, -1), (x[..., 0::2], x[..., 1::2])
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, axes: list[int]) -> torch.Tensor:
    q, k = turned(q, ids, axes), turned(k, ids, axes)
    mixed = softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
    return mixed.transpose(1, 2).flatten(2)  # (B, N, D)


def forward(w, network, z, t, text, pooled, guidance):
    """v (B, c, h, w). network: from the metadata; z (B, c, h, w); t, guidance (B,); text (B, L, ·); pooled (B, ·)."""
    heads, axes = network["num_heads"], network["axes_dim"]
    (_, _, rows, columns), length = z.shape, text.shape[1]
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(rows * 1.0), torch.arange(columns * 1.0))
    ids = torch.cat([torch.zeros(length, 3), places])
    vec = embedded(w, "time_in", waves(t)) + embedded(w, "guidance_in", waves(guidance))
    vec = silu(vec + embedded(w, "vector_in", pooled))[:, None]
    streams = {"txt": linear(w, "txt_in", text), "img": linear(w, "img_in", z.flatten(2).transpose(1, 2))}
    block = 0
    while f"double_blocks.{block}.img_mod.lin.weight" in w:
        at = {side: f"double_blocks.{block}.{side}" for side in streams}
        mods = {side: linear(w, f"{at[side]}_mod.lin", vec).chunk(6, -1) for side in streams}
        parts = []
        for side, x in streams.items():
            shift, scale = mods[side][:2]
            qkv = linear(w, f"{at[side]}_attn.qkv", norm(x) * (1 + scale) + shift)
            parts.append(heads_of(w, f"{at[side]}_attn.norm", qkv, heads))
        mixed = attended(*(torch.cat(pair, 2) for pair in zip(*parts, strict=True)), ids, axes)
        for side, own in zip(streams, (mixed[:, :length], mixed[:, length:]), strict=True):
            _, _, gate, shift, scale, last = mods[side]
            x = streams[side] + gate * linear(w, f"{at[side]}_attn.proj", own)
            hidden = gelu(linear(w, f"{at[side]}_mlp.0", norm(x) * (1 + scale) + shift), approximate="tanh")
            streams[side] = x + last * linear(w, f"{at[side]}_mlp.2", hidden)
        block += 1
    x, block = torch.cat([streams["txt"], streams["img"]], 1), 0
    while (name := f"single_blocks.{block}") + ".modulation.lin.weight" in w:
        shift, scale, gate = linear(w, f"{name}.modulation.lin", vec).chunk(3, -1)
        both, width = linear(w, f"{name}.linear1", norm(x) * (1 + scale) + shift), x.shape[-1]
        mixed = attended(*heads_of(w, f"{name}.norm", both[..., : 3 * width], heads), ids, axes)
        hidden = torch.cat([mixed, gelu(both[..., 3 * width :], approximate="tanh")], -1)
        x, block = x + gate * linear(w, f"{name}.linear2", hidden), block + 1
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", vec).chunk(2, -1)
    tokens = linear(w, "final_layer.linear", norm(x[:, length:]) * (1 + scale) + shift)
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))
