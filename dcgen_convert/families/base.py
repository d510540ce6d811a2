"""What a family of diffusion models has to state, and the arithmetic that follows from the statement.

Shapes: B batch, C latent channels, h w latent grid, p patch, N = (h/p)(w/p) tokens, D width, L text tokens.
Flow convention everywhere: z_t = (1 - t) z_0 + t eps, v = eps - z_0, t in [0, 1] (arXiv 2509.25180).

A family is one file of facts. torch is imported inside functions so that `plan` and `inspect` can read the facts
without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "text_embed_dim", "cap_feat_dim", "text_hidden_dim")
Text = dict[str, "Tensor"]  # forward() keyword -> tensor whose first axis is the batch
ON_PURPOSE = "kept dense"  # how the reason of a block linear that nobody wanted to quantise begins


@dataclass(frozen=True)
class QuantTargets:
    """Linear modules by exact path: ``svdq`` W4A4, ``awq`` W4A16; ``skipped`` says why a block linear stays dense.

    blocks: the family's ModuleLists of repeated blocks, whether or not a block of them is quantised.
    """

    svdq: list[str]
    awq: list[str]
    skipped: dict[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    @property
    def impossible(self) -> dict[str, str]:
        """What the formats cannot hold: path -> why. The rest of `skipped` stays dense on purpose."""
        return {path: reason for path, reason in self.skipped.items() if not reason.startswith(ON_PURPOSE)}


def by_kind(reasons: dict[str, str]) -> dict[str, str]:
    """`QuantTargets.skipped` or a part of it for people: layers that differ in a block's number only are one line."""
    counts: dict[tuple[str, str], int] = {}
    for path, reason in reasons.items():
        kind = re.sub(r"\.\d+\.", ".*.", path, count=1), reason
        counts[kind] = counts.get(kind, 0) + 1
    return {f"{pattern} ({count})": reason for (pattern, reason), count in counts.items()}


class Family:
    """Facts of one family. Subclasses fill the class attributes and state the methods at the end where theirs
    differ.
    """

    name: ClassVar[str]
    model_class: ClassVar[str]  # diffusers class of the network
    component: ClassVar[str] = "transformer"  # what the stock pipeline calls it, and its folder
    experimental: ClassVar[str] = ""  # what to tell a user who converts with it; empty: nothing
    pipeline_class: ClassVar[str]  # stock diffusers pipeline
    other_pipelines: ClassVar[tuple[str, ...]] = ()  # further stock pipelines of the same transformer and task
    embedder: ClassVar[str]  # module that reads the latent: linear in what `tokens` makes of it
    head: ClassVar[str]  # module that writes the latent: linear in what `head_inputs` makes of its features
    in_order: ClassVar[str]  # order inside one input patch, einops
    out_order: ClassVar[str]  # order inside one output patch, einops
    guidance: ClassVar[str]  # "embedded" (distilled into the network) | "cfg" | "none"
    # what the network predicts: "flow" (eps - z_0) | "reversed" (z_0 - eps, at the time 1 - t) | "epsilon"
    prediction: ClassVar[str] = "flow"
    text_keys: ClassVar[tuple[str, ...]]  # forward() keywords that carry the condition
    blocks: ClassVar[tuple[str, ...]]  # ModuleLists of repeated blocks, or single blocks, in forward order
    lora_targets: ClassVar[str]  # regex over full module names, as PEFT's target_modules takes it
    awq_pattern: ClassVar[str] = r"(?!)"  # AdaLN / modulation linears inside the blocks
    # 0: stock AutoencoderDC; 1: the same with keys in its config that the pipeline asks for; 2: in-bundle adapter that
    # undoes the p x p packing of the pipeline, or of a transformer that packs for itself, and takes what AutoencoderDC
    # does not
    bundle_tier: ClassVar[int] = 0
    any_shape: ClassVar[bool] = (
        True  # whether the stock pipeline draws pictures that are no squares, at the size asked for
    )
    few_steps: ClassVar[bool] = False  # whether every model of the family was distilled to a few steps
    fixed_shift: ClassVar[bool] = False  # whether the network's time input leans on the shift of the stock scheduler
    official_layout: ClassVar[bool] = False  # whether the DC-Gen authors published a pipeline class
    nunchaku_container: ClassVar[bool] = False  # whether nunchaku's classic single file has a layout for the family
    # layout of a single file -> prefixes of tensor names that only this family has together
    layouts: ClassVar[dict[str, tuple[str, ...]]]
    recipe: ClassVar[str] = "image"  # shipped recipe of a source that has none of its own
    default_steps: ClassVar[int]
    default_guidance: ClassVar[float]
    text_length: ClassVar[int] = 1  # text tokens that training and the bundle's usage pad to

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a network with this config is of the family."""
        return config.get("_class_name") == self.model_class

    # -- tokens ---------------------------------------------------------------------------------------------------

    def patch(self, config: dict[str, Any], channels: int) -> int:
        """Patch size p of a model with ``config`` on latents of ``channels`` channels: a token holds C p p numbers.

        A transformer that packs a latent grid for itself reads C / p^2 channels of a finer grid once it is converted,
        so its own patch_size is not the answer.
        """
        return math.isqrt(config["in_channels"] * (config.get("patch_size") or 1) ** 2 // channels)

    def tokens(self, z: Tensor, patch: int) -> Tensor:
        """(B, C, h, w) -> (B, N, K): what the embedder is linear in, in the order of its flattened weight columns; K
        = C p p.
        """
        from einops import rearrange

        return rearrange(z, f"b c (h p1) (w p2) -> b (h w) ({self.in_order})", p1=patch, p2=patch)

    def untokens(self, tokens: Tensor, height: int, width: int, patch: int, order: str | None = None) -> Tensor:
        """(B, N, C p p) -> (B, C, height, width) latent; ``order`` defaults to the head's."""
        from einops import rearrange

        return rearrange(
            tokens,
            f"b (h w) ({order or self.out_order}) -> b c (h p1) (w p2)",
            h=height // patch,
            w=width // patch,
            p1=patch,
            p2=patch,
        )

    def position_term(self, model: nn.Module, height: int, width: int) -> Tensor | None:
        """Absolute position table that the model adds to the embedded tokens, (N, D); None with RoPE or no
        positions.
        """
        return None

    def table_side(self, config: dict[str, Any]) -> int | None:
        """Tokens per side at which a position table of the checkpoint ends; None where positions go on."""
        return None

    def image_tokens(self, features: Any, count: int, text: Text) -> Tensor:
        """The ``count`` = N image tokens (B, N, D) in what a repeated block returns or the head is given.

        Blocks of two streams return (text, image); one stream holds the text first.
        """
        features = features[1] if isinstance(features, tuple) else features
        return features[:, -count:]

    def head_inputs(self, features: Any, count: int, text: Text) -> Tensor:
        """(B, N, K): what the head is linear in, from the features that it is given; K = D."""
        return self.image_tokens(features, count, text)

    def block_map(self, output: Any, grid: tuple[int, int], text: Text) -> Tensor:
        """Image part of what a block returns as a map (B, D, rows, columns); ``grid`` is that of the image's tokens."""
        return self.image_tokens(output, grid[0] * grid[1], text).unflatten(1, grid).movedim(-1, 1)

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of a model, in forward order."""
        from torch import nn

        parts = (model.get_submodule(name) for name in self.blocks)
        return [block for part in parts for block in (part if isinstance(part, nn.ModuleList) else [part])]

    @property
    def inside_blocks(self) -> re.Pattern[str]:
        """Matches the beginning of the names of what lies in a block."""
        return re.compile("|".join(rf"{re.escape(name)}\.(\d+\.)?" for name in self.blocks))

    def share(self, name: str, config: dict[str, Any]) -> float:
        """Fraction of the image's tokens that a layer runs on."""
        return 1.0

    def expose(self, z: Tensor, config: dict[str, Any]) -> Tensor:
        """(B, C, h, w) -> (B, in_channels, q h, q w): the finer grid on which a self-packing transformer works.

        Its q x q packing gives the C channels back, in order: the inverse of what the bundle's adapter collects.
        """
        from einops import rearrange

        q = math.isqrt(z.shape[1] // config["in_channels"])
        return rearrange(z, f"b ({self.in_order}) h w -> b c (h p1) (w p2)", p1=q, p2=q)

    def collect(self, fine: Tensor, channels: int) -> Tensor:
        """Undo `expose`: (B, C / q^2, q h, q w) -> (B, channels, h, w)."""
        from einops import rearrange

        q = math.isqrt(channels // fine.shape[1])
        return rearrange(fine, f"b c (h p1) (w p2) -> b ({self.in_order}) h w", p1=q, p2=q)

    @property
    def adapter_order(self) -> str:
        """Order of a packed token in the adapter's words."""
        return "c_last" if self.in_order.endswith("c") else "c_first"

    def mu(self, tokens: int, scheduler: dict[str, Any]) -> float:
        """mu of a dynamic timestep shift at ``tokens`` image tokens, as the stock pipeline computes it."""
        return linear_mu(tokens, scheduler)

    def shift(self, tokens: int, scheduler: dict[str, Any]) -> float:
        """r of sigma' = r sigma / (1 + (r - 1) sigma) that the bundle samples with at ``tokens`` image tokens."""
        if not scheduler.get("use_dynamic_shifting"):
            return sampling_shift(tokens, scheduler)
        mu = self.mu(tokens, scheduler)
        return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)

    def text_width(self, config: dict[str, Any]) -> int:
        """Numbers in the condition of one text token, for the size of its cache."""
        width = next((config[key] for key in TEXT_WIDTHS if config.get(key)), 0)
        return width * config.get("num_text_layers", 1)

    def pack(self, config: dict[str, Any]) -> int:
        """p of the bundle's adapter: the patch that the stock pipeline packs, or a converted transformer with
        ``config``.
        """
        return 2

    def only_side(self, config: dict[str, Any], cell: int) -> int | None:
        """Side in px of the pictures that the stock pipeline draws whatever size is asked for; None: it draws what is
        asked.

        Args:
            config: of the transformer, before or after conversion.
            cell: px per cell of the pipeline's latent grid: f of the autoencoder, f / p behind the bundle's adapter.
        """
        return None

    def grid_step(self, config: dict[str, Any]) -> int:
        """What both sides of a latent must be a multiple of, besides the patch: a U-Net halves its grid."""
        return 1

    def check_scheduler(self, scheduler: dict[str, Any]) -> None:
        """InputError for a scheduler config whose noise levels or prediction are not those of this family."""

    def pipeline_of(self, index: dict[str, Any]) -> str:
        """Stock pipeline class that runs a folder with this model_index.json."""
        name = index.get("_class_name")
        return name if name in self.other_pipelines else self.pipeline_class

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Keys that the stock pipeline reads from the autoencoder's config and an AutoencoderDC ``config`` lacks."""
        return {}

    # -- one step in the common convention ------------------------------------------------------------------------

    def target(self, z0: Tensor, eps: Tensor) -> Tensor:
        """What the network is trained to predict for (z_0, eps), same shape as z_0."""
        return {"flow": eps - z0, "reversed": z0 - eps, "epsilon": eps}[self.prediction]

    def velocity(self, model: nn.Module, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        """Velocity v = eps - z_0 at z_t, (B, C, h, w). From an epsilon prediction: v = (eps - z_t) / (1 - t)."""
        prediction = self.predict(model, z, t, text, guidance)
        if self.prediction != "epsilon":
            return prediction if self.prediction == "flow" else -prediction
        return (prediction - z) / (1 - t).clamp_min(1e-4)[:, None, None, None]

    def noise_times(self) -> Tensor:
        """Noise level t of every step of an epsilon family's DDPM schedule, (S,) float64."""
        raise TypeError(f"{type(self).__name__} has no DDPM schedule")

    # -- quantisation ---------------------------------------------------------------------------------------------

    def quant_targets(self, linears: dict[str, tuple[int, int]], dense: str | None = None) -> QuantTargets:
        """Split the model's linears into W4A4, W4A16 and dense.

        Args:
            linears: exact module path -> (out features N, in features K) of every nn.Linear of the model.
            dense: regex of paths that the recipe keeps dense.
        """
        svdq, awq, skipped = [], [], {}
        for path, (n, k) in linears.items():
            if not self.inside_blocks.match(path):
                continue
            if dense and re.fullmatch(dense, path):
                skipped[path] = f"{ON_PURPOSE} by the recipe"
            elif re.fullmatch(self.awq_pattern, path):
                if k % 64 or n % 128:
                    skipped[path] = f"W4A16 needs in % 64 = 0 and out % 128 = 0, it has {k} -> {n}"
                else:
                    awq.append(path)
            elif re.fullmatch(self.dense_pattern, path):
                skipped[path] = f"{ON_PURPOSE} by the family"
            elif n % 128 or k % 128:
                skipped[path] = f"the 4-bit format needs multiples of 128, it has {k} -> {n}"
            else:
                svdq.append(path)
        return QuantTargets(svdq, awq, skipped, self.blocks)

    dense_pattern: ClassVar[str] = r"(?!)"  # block linears that the kernels' authors keep in half precision

    # -- to be stated by each family ------------------------------------------------------------------------------

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        """Transformer config for an autoencoder (f = factor, c = channels) at patch 1; ``side`` is the bundle's px
        size.
        """
        raise TypeError(f"{type(self).__name__} states no convert_config")

    def doubt(self, name: str, scheduler: Mapping[str, Any]) -> str | None:
        """What speaks against converting a source, by its name and its scheduler's config; None when nothing does.

        For variants that no config names: the user is warned, as a fine-tune may look like one and be none.
        """
        return None

    def predict(self, model: nn.Module, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        """The network's native prediction at z_t, (B, C, h, w); t and guidance are (B,)."""
        raise TypeError(f"{type(self).__name__} states no predict")

    def encode_text(self, pipeline: Any, prompts: list[str], length: int) -> Text:
        """Condition of each prompt with the stock pipeline's own encoders, padded to ``length`` text tokens."""
        raise TypeError(f"{type(self).__name__} states no encode_text")

    def pipeline_call(
        self, pipeline: Any, prompts: list[str], *, height: int, width: int, steps: int, guidance: float, length: int
    ) -> dict:
        """Keyword arguments with which the stock pipeline draws ``prompts``; these are what most pipelines call
        them.
        """
        return dict(
            prompt=prompts,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=length,
        )


def padded(rows: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Text features (L_i, D) of several prompts as (B, length, D), zeros behind each, and their mask (B, length) of
    0 / 1.
    """
    import torch

    embeds = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    mask = torch.zeros(len(rows), length, dtype=torch.long, device=embeds.device)
    for i, row in enumerate(rows):
        embeds[i, : len(row)], mask[i, : len(row)] = row, 1
    return embeds, mask


def token_ids(rows: int, columns: int, like: Tensor) -> Tensor:
    """FLUX's position ids (0, row, column) of an image's tokens, (N, 3), in ``like``'s dtype and on its device."""
    import torch

    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
    return ids.to(like)


def added_positions(embed: nn.Module, channels: int, height: int, width: int) -> Tensor:
    """What a diffusers patch embedder adds to its projection of a latent on ``height`` x ``width`` tokens, (N, D)."""
    z = embed.proj.weight.new_zeros(1, channels, height * embed.patch_size, width * embed.patch_size)
    tokens = embed(z)[0]
    return tokens if embed.proj.bias is None else tokens - embed.proj.bias


def linear_mu(tokens: int, scheduler: dict[str, Any]) -> float:
    """FLUX's mu, linear in the token count, from the scheduler's own config (diffusers `calculate_shift`)."""
    n0, n1 = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    m0, m1 = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return m0 + (m1 - m0) * (tokens - n0) / (n1 - n0)


def sampling_shift(tokens: int, scheduler: dict[str, Any]) -> float:
    """r of sigma' = r sigma / (1 + (r - 1) sigma) that a FlowMatchEuler config applies at ``tokens`` image tokens."""
    if scheduler.get("use_dynamic_shifting"):
        return math.exp(linear_mu(tokens, scheduler))
    return float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0)  # DPM-Solver calls it flow_shift
