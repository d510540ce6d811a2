"""The facts that a family of diffusion models states, and the arithmetic that follows from them.

Shapes: B batch, C latent channels, h w latent grid, p patch, N = (h/p)(w/p) tokens, D width, L text tokens. Latents of
videos have a third axis, T latent frames: where a shape below says h w, theirs is T h w, and N = T (h/p)(w/p).
All families use one flow convention: z_t = (1 - t) z_0 + t eps, v = eps - z_0, t in [0, 1] (arXiv 2509.25180).

A family is one file of facts. Functions import torch themselves: `plan` and `inspect` read the facts without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, Unpack

from dcgen_convert.core.errors import InputError
from dcgen_convert.families import quant_targets
from dcgen_convert.families.experts import Expert
from dcgen_convert.families.grid import STILL, Time
from dcgen_convert.families.quant_targets import QuantTargets
from dcgen_convert.families.references import REFERENCE as REFERENCE
from dcgen_convert.families.references import reference_keys as reference_keys
from dcgen_convert.families.references import references_of as references_of
from dcgen_convert.families.shifts import linear_mu, sampling_shift
from dcgen_convert.families.tensors import per_row

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

# Key of model_index.json: frames a second of the videos that a model draws, where they are not its family's. diffusers
# says nothing about keys that begin with an underscore.
FPS_KEY = "_frames_per_second"
MOST_FPS = 1000  # a larger number means a damaged file
TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "text_embed_dim", "cap_feat_dim", "text_hidden_dim")
Network = Any  # a diffusers ModelMixin. Its type does not say that it has a config and can be called.
Pipeline = Any  # a stock DiffusionPipeline
# Condition of a picture: keyword of forward() -> tensor, the batch is its first axis. Of an editing model it holds the
# clean latents of the references too: see `reference_keys` and `references_of`.
Text = dict[str, "Tensor"]
# Axes of a latent -> its axes, divided into tokens and their cells, and the order of the tokens, in einops notation.
_PATTERNS = {2: ("(h p1) (w p2)", "h w"), 3: ("(t p0) (h p1) (w p2)", "t h w")}
NULL = "null:"  # begins the keys of the empty prompt's condition, where it belongs to a row: see `picture_tokens`


class CallSettings(TypedDict):
    """What a stock pipeline is told for every picture. height, width: px. length: of the text, in tokens."""

    height: int
    width: int
    steps: int
    guidance: float
    length: int


class Family:
    """Facts of one family.

    A subclass sets the class attributes and writes the methods of the last section. It overrides another method only
    where the family differs from the rest.
    """

    name: ClassVar[str]
    axes: ClassVar[int] = 2  # of a latent's grid: 2 for pictures (h, w), 3 for videos (T, h, w)
    time: ClassVar[Time] = STILL  # of the autoencoder that published models of videos work on
    # Of a training video where the recipe states none: these, or the next number that makes whole latent frames. 0: it
    # draws pictures.
    default_frames: ClassVar[int] = 0
    fps: ClassVar[float] = 0  # frames a second of the videos that it draws; 0: it draws pictures
    model_class: ClassVar[str]  # diffusers class of the network
    component: ClassVar[str] = "transformer"  # name of the network in the stock pipeline, and of its folder
    further: ClassVar[tuple[str, ...]] = ()  # the same of further networks of this class: see `experts`
    expert_names: ClassVar[tuple[str, ...]] = ("",)  # of all its networks; empty: the only one
    experimental: ClassVar[str] = ""  # note for users who convert this family; empty: no note
    pipeline_class: ClassVar[str]  # stock diffusers pipeline
    other_pipelines: ClassVar[tuple[str, ...]] = ()  # more stock pipelines for the same network and task
    told_by_pipeline: ClassVar[bool] = False  # whether only the pipeline tells the network from another family's
    references: ClassVar[int] = 0  # most pictures that the model is given beside the text; a model that edits has some
    optional_references: ClassVar[bool] = False  # whether a model that edits draws from text alone too
    # Whether a reference is read in further channels of the picture's own tokens; else it has tokens of its own.
    reference_channels: ClassVar[bool] = False
    # Whether it reads a mask with a number for each frame of a latent frame, of which it has as many channels.
    mask_of_frames: ClassVar[bool] = False
    # Whether all prompts of a call of the stock pipeline get the same references: then each prompt has its own call.
    shared_references: ClassVar[bool] = False
    embedder: ClassVar[str]  # module that reads the latent; it is linear in the result of `tokens`
    head: ClassVar[str]  # module that writes the latent; it is linear in the result of `head_inputs`
    in_order: ClassVar[str]  # order of the numbers of one input patch, in einops notation
    out_order: ClassVar[str]  # order of the numbers of one output patch, in einops notation
    guidance: ClassVar[str]  # "embedded" (distilled into the network) | "cfg" | "none"
    # what the network predicts: "flow" (eps - z_0) | "reversed" (z_0 - eps, at the time 1 - t) | "epsilon"
    prediction: ClassVar[str] = "flow"
    unused: ClassVar[tuple[str, ...]] = ()  # tensors of published checkpoints that the network has no use for
    text_keys: ClassVar[tuple[str, ...]]  # keywords of forward() that carry the condition
    blocks: ClassVar[tuple[str, ...]]  # ModuleLists of repeated blocks, or single blocks, in forward order
    lora_targets: ClassVar[str]  # regex that matches whole module names, as PEFT's target_modules takes it
    awq_pattern: ClassVar[str] = r"(?!)"  # AdaLN and modulation linears inside the blocks
    unquantised: ClassVar[str] = ""  # ": " and why no linear of the family can be 4-bit; empty: some can
    dense_pattern: ClassVar[str] = r"(?!)"  # linears in blocks that the authors of the kernels keep in half precision
    # Autoencoder of the bundle. 0: stock AutoencoderDC. 1: the same, with more keys in its config for the pipeline.
    # 2: an adapter class inside the bundle. It undoes the p x p packing of the pipeline or of the transformer, and
    # accepts arguments that AutoencoderDC does not accept. 3: an autoencoder of videos, with its code in the bundle.
    bundle_tier: ClassVar[int] = 0
    any_shape: ClassVar[bool] = True  # whether the stock pipeline draws other shapes than squares at the size asked for
    # What the stock pipeline draws when it is told no size: so many cells of its `vae_scale_factor`, or so many px per
    # side. Both None: what the network's config says (sample_size), and that is the trained size in a bundle.
    default_cells: ClassVar[int | None] = None
    default_px: ClassVar[int | None] = None
    index_side: ClassVar[str] = ""  # key of model_index.json that holds this size in px, where there is one
    index_values: ClassVar[dict[str, Any]] = {}  # what a bundle's model_index.json says where the source's has the key
    default_width: ClassVar[int | None] = None  # px, where `default_px` is the height alone
    shape: ClassVar[tuple[int, int]] = (1, 1)  # height to width of what is usually drawn, where shapes are free
    guidance_argument: ClassVar[str] = "guidance_scale"  # the stock pipeline's names of arguments
    length_argument: ClassVar[str] = "max_sequence_length"  # of the text, in tokens; empty: it has none
    frames_argument: ClassVar[str] = "num_frames"
    fixed_arguments: ClassVar[Mapping[str, Any]] = {}  # what every call of the stock pipeline says beside
    one_prompt: ClassVar[bool] = False  # whether a call of the stock pipeline with guidance takes one prompt alone
    idle: ClassVar[tuple[str, ...]] = ()  # optional parts of the stock pipeline that `pipeline_call` leaves unused
    few_steps: ClassVar[bool] = False  # whether every model of the family was distilled to a few steps
    fixed_shift: ClassVar[bool] = False  # whether the network's time input depends on the shift of the stock scheduler
    official_layout: ClassVar[bool] = False  # whether the DC-Gen authors published a pipeline class
    comfyui: ClassVar[bool] = False  # whether bundles can be exported to ComfyUI; needs a key map of `checkpoint`
    nunchaku_container: ClassVar[bool] = False  # whether nunchaku's classic single file has a layout for the family
    single_file: ClassVar[bool] = False  # whether diffusers loads the network with `from_single_file`
    # layout of a single file -> prefixes of tensor names. Only files of this family and layout have all of them.
    layouts: ClassVar[dict[str, tuple[str, ...]]]
    recipe: ClassVar[str] = "image"  # shipped recipe for a source that has no recipe of its own
    default_steps: ClassVar[int]
    default_guidance: ClassVar[float]
    text_length: ClassVar[int] = 1  # text tokens to which training and the bundle's usage pad
    # Text tokens of each reference at most, where the text encoder sees it. Then every row has null conditions too.
    picture_tokens: ClassVar[int] = 0
    # Side in px of the square whose area the stock pipeline gives to every reference; None: it takes them as they are.
    reference_side: ClassVar[int | None] = None

    def note(self, references: int = 0) -> str:
        """Note for users who convert this family with at most ``references`` references in a row; empty: no note."""
        return self.experimental

    @property
    def fewest_references(self) -> int:
        """Pictures that the model must be given beside the text: 0 or 1."""
        return min(1, self.references) * (not self.optional_references)

    @property
    def pipelines(self) -> tuple[str, ...]:
        """Stock pipelines of the family's models."""
        return (self.pipeline_class, *self.other_pipelines)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a network with this config belongs to the family."""
        return config.get("_class_name") == self.model_class

    def belongs(self, index: Mapping[str, Any]) -> bool:
        """Whether a network that the family claims is its own in a pipeline with this model_index.json."""
        return not self.told_by_pipeline or index.get("_class_name") in self.pipelines

    def experts(self, index: Mapping[str, Any]) -> tuple[Expert, ...]:
        """The networks that a pipeline with this model_index.json draws with, in the order in which it uses them."""
        (name,) = self.expert_names
        return (Expert(name, self.component),)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of all its networks in the stock pipeline."""
        return (self.component, *self.further)

    def untold_side(self, cell: int, trained: int) -> int:
        """Side in px of the picture that the stock pipeline draws when it is told no size.

        Args:
            cell: px per side of a cell of the latent that the pipeline sees.
            trained: side in px that the bundle is made for.
        """
        return self.default_px or (self.default_cells * cell if self.default_cells else trained)

    # -- tokens ---------------------------------------------------------------------------------------------------

    def patch(self, config: dict[str, Any], channels: int) -> int:
        """Patch size p of a model with ``config`` on latents of ``channels`` channels: a token holds C p p numbers.

        This is not always the config's patch_size. A transformer that packs its own input reads, once converted,
        C / p^2 channels on a finer grid.
        """
        return math.isqrt(config["in_channels"] * (config.get("patch_size") or 1) ** 2 // channels)

    def inputs(self, z: Tensor, text: Text) -> Tensor:
        """What the embedder's tokens are made of: here z alone, (B, C, h, w).

        A family with `reference_channels` puts further channels behind those of z, from the reference in ``text``.
        """
        return z

    def window(self, patch: int) -> dict[str, int]:
        """Cells of one token along each axis of the latent, by their names in `in_order`: p0 (frames), p1, p2.

        A token of a video lies in one latent frame.
        """
        return {"p0": 1, "p1": patch, "p2": patch} if self.axes == 3 else {"p1": patch, "p2": patch}

    def frames_per_second(self, index: Mapping[str, Any]) -> float:
        """Frames a second of the videos that a model with this model_index.json draws; 0: it draws pictures.

        Raises:
            InputError: the index states no such number.
        """
        if not self.fps:
            return 0
        found = index.get(FPS_KEY, self.fps)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found <= MOST_FPS:
            raise InputError(f"model_index.json says {FPS_KEY} {found!r}", "a number of frames, such as 16")
        return found

    def grid(self, sides: Sequence[int], patch: int) -> tuple[int, ...]:
        """Tokens along each axis of a latent with these ``sides``, (h, w) or (T, h, w)."""
        return tuple(side // cells for side, cells in zip(sides, self.window(patch).values(), strict=True))

    def tokens(self, z: Tensor, patch: int) -> Tensor:
        """Inputs of the embedder, in which it is linear: (B, C, h, w) -> (B, N, K) with K = C p p.

        The K numbers have the order of the columns of the embedder's flattened weight.
        """
        from einops import rearrange

        cells, rows = _PATTERNS[self.axes]
        return rearrange(z, f"b c {cells} -> b ({rows}) ({self.in_order})", **self.window(patch))

    def untokens(self, tokens: Tensor, sides: Sequence[int], patch: int, order: str | None = None) -> Tensor:
        """Latent with these ``sides``, (h, w), from tokens: (B, N, C p p) -> (B, C, h, w).

        ``order`` None: the order of the head.
        """
        from einops import rearrange

        cells, rows = _PATTERNS[self.axes]
        counts = dict(zip(rows.split(), self.grid(sides, patch), strict=True))
        return rearrange(
            tokens, f"b ({rows}) ({order or self.out_order}) -> b c {cells}", **counts, **self.window(patch)
        )

    def position_term(self, model: Network, grid: tuple[int, ...]) -> Tensor | None:
        """Table of absolute positions that the model adds to the embedded tokens, (N, D). None: RoPE or no positions.

        ``grid`` counts the tokens along each axis.
        """
        return None

    def table_side(self, config: dict[str, Any]) -> int | None:
        """Tokens per side that the position table of the checkpoint covers; None: positions have no end."""
        return None

    def image_tokens(self, features: Any, count: int, text: Text) -> Tensor:
        """The ``count`` = N image tokens (B, N, D) in the output of a repeated block or in the input of the head.

        Here: blocks with two streams return (text, image), blocks with one stream hold the text before the image. A
        model that edits has two streams, and its references stand behind the image.
        """
        features = features[1] if isinstance(features, tuple) else features
        return features[:, :count] if self.references else features[:, -count:]

    def head_inputs(self, features: Any, count: int, text: Text) -> Tensor:
        """Inputs of the head, in which it is linear, from the features that it receives: (B, N, K) with K = D."""
        return self.image_tokens(features, count, text)

    def block_map(self, output: Any, grid: tuple[int, ...], text: Text) -> Tensor:
        """The image part of a block's output as a map (B, D, rows, columns). ``grid`` counts the image's tokens."""
        return self.image_tokens(output, math.prod(grid), text).unflatten(1, grid).movedim(-1, 1)

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of a model, in forward order."""
        from torch import nn

        parts = (model.get_submodule(name) for name in self.blocks)
        return [block for part in parts for block in (part if isinstance(part, nn.ModuleList) else [part])]

    @property
    def inside_blocks(self) -> re.Pattern[str]:
        """Matches the beginning of the name of every module that lies in a block."""
        return re.compile("|".join(rf"{re.escape(name)}\.(\d+\.)?" for name in self.blocks))

    def token_fraction(self, name: str, config: dict[str, Any]) -> float:
        """Fraction of the image's tokens on which the layer ``name`` runs."""
        return 1.0

    def expose(self, z: Tensor, config: dict[str, Any]) -> Tensor:
        """(B, C, h, w) -> (B, in_channels, q h, q w): the finer grid that a self-packing transformer reads.

        The q x q packing of the transformer gives the C channels back, in order. The bundle's adapter does the
        inverse, see `collect`.
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
        """Order of a packed token, in the words of the bundle's adapter."""
        return "c_last" if self.in_order.endswith("c") else "c_first"

    # -- the stock pipeline, its scheduler and its autoencoder ----------------------------------------------------

    def mu(self, tokens: int, scheduler: dict[str, Any]) -> float:
        """mu of a dynamic timestep shift for ``tokens`` image tokens, as the stock pipeline computes it."""
        return linear_mu(tokens, scheduler)

    def shift(self, tokens: int, scheduler: dict[str, Any]) -> float:
        """r in sigma' = r sigma / (1 + (r - 1) sigma), with which the bundle samples ``tokens`` image tokens."""
        if not scheduler.get("use_dynamic_shifting"):
            return sampling_shift(tokens, scheduler)
        mu = self.mu(tokens, scheduler)
        return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)

    def condition_length(self, length: int) -> int:
        """Text tokens of a condition whose prompts are padded to ``length``, with those of the references."""
        return length + self.references * self.picture_tokens

    def text_width(self, config: dict[str, Any]) -> int:
        """Numbers in the condition of one text token; the size of the text cache follows from it."""
        width = next((config[key] for key in TEXT_WIDTHS if config.get(key)), 0)
        return width * config.get("num_text_layers", 1)

    def pack(self, config: dict[str, Any]) -> int:
        """p of the bundle's adapter: the p x p packing of the stock pipeline or of the converted transformer."""
        return 2

    def only_side(self, config: dict[str, Any], cell: int) -> int | None:
        """Side in px of the only pictures that the stock pipeline can draw; None: it draws every size.

        Args:
            config: of the transformer, before or after conversion.
            cell: px per cell of the pipeline's latent grid: f of the autoencoder, f / p behind the bundle's adapter.
        """
        return None

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        """Pixels of the largest pictures that the model was trained to draw; None: not known.

        Here: what the config's sample_size says, in cells of an f8 autoencoder.
        """
        size = config.get("sample_size")
        return (8 * size) ** 2 if isinstance(size, int) else None

    def least_pixels(self, config: dict[str, Any]) -> int | None:
        """Pixels of the smallest pictures that the model was trained to draw; None: not known."""
        return None

    def grid_step(self, config: dict[str, Any]) -> int:
        """Both sides of a latent are multiples of this number and of the patch. A U-Net halves its grid repeatedly."""
        return 1

    def check_scheduler(self, scheduler: dict[str, Any]) -> None:
        """InputError for a scheduler config with other noise levels or another prediction than the family's."""

    def pipeline_of(self, index: dict[str, Any]) -> str:
        """Stock pipeline class that runs a folder with this model_index.json."""
        name = index.get("_class_name")
        return name if name in self.other_pipelines else self.pipeline_class

    def index_of_bundle(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """What a bundle's model_index.json says in another way than the source's, ``index``."""
        return {key: value for key, value in self.index_values.items() if key in index}

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Keys that the stock pipeline reads from the autoencoder's config and that an AutoencoderDC does not have.

        ``config`` is the config of the AutoencoderDC.
        """
        return {}

    def comfyui_network(self, config: dict[str, Any]) -> dict[str, Any]:
        """What ComfyUI's own network class is built with for a converted model with this config, where ComfyUI would
        make something else of the tensors. For families with `comfyui`.
        """
        raise TypeError(f"{type(self).__name__} states no comfyui_network")

    # -- one step in the common convention ------------------------------------------------------------------------

    def target(self, z0: Tensor, eps: Tensor) -> Tensor:
        """What the network learns to predict for (z_0, eps), same shape as z_0."""
        return {"flow": eps - z0, "reversed": z0 - eps, "epsilon": eps}[self.prediction]

    def velocity(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        """Velocity v = eps - z_0 at z_t, (B, C, h, w). From an epsilon prediction: v = (eps - z_t) / (1 - t)."""
        prediction = self.predict(model, z, t, text, guidance)
        if self.prediction != "epsilon":
            return prediction if self.prediction == "flow" else -prediction
        return (prediction - z) / per_row((1 - t).clamp_min(1e-4), z)

    def guided(self, v: Tensor, v_0: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance: velocities of the prompt and of the empty prompt, (B, C, h, w), put together."""
        return v_0 + guidance * (v - v_0)

    def noise_times(self) -> Tensor:
        """Noise level t of every step of the DDPM schedule of an epsilon family, (S,) float64."""
        raise TypeError(f"{type(self).__name__} has no DDPM schedule")

    # -- quantisation ---------------------------------------------------------------------------------------------

    def quant_targets(
        self, linears: dict[str, tuple[int, int]], dense: str | None = None, container: str = "diffusers"
    ) -> QuantTargets:
        """Sort the linears of the model's blocks into W4A4, W4A16 and dense.

        Args:
            linears: exact module path -> (out features N, in features K) of every nn.Linear of the model.
            dense: regex; the recipe keeps linears whose path it matches dense.
            container: one of `quant_targets.CONTAINERS`.
        """
        if self.unquantised:
            return QuantTargets([], [])
        inside = {path: shape for path, shape in linears.items() if self.inside_blocks.match(path)}
        places = quant_targets.sort(inside, self.awq_pattern, self.dense_pattern, dense, container)
        return QuantTargets(*places, self.blocks)

    # -- each family states these ---------------------------------------------------------------------------------

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        """Transformer config for an autoencoder (f = factor, c = channels) at patch 1.

        ``side`` is the side in px of the bundle's pictures. Raises InputError for a model that cannot be converted.
        """
        raise TypeError(f"{type(self).__name__} states no convert_config")

    def doubt(self, name: str, scheduler: Mapping[str, Any]) -> str | None:
        """A reason not to convert a source, from its name and the config of its scheduler; None: no reason.

        This is for variants that no config names. The tool only warns, because the signs may be wrong for a fine-tune.
        """
        return None

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        """The network's own prediction at z_t, (B, C, h, w). ``t`` and ``guidance`` are (B,)."""
        raise TypeError(f"{type(self).__name__} states no predict")

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        """Condition of each prompt, from the encoders of the stock pipeline, padded to ``length`` text tokens."""
        raise TypeError(f"{type(self).__name__} states no encode_text")

    def encode_seen(
        self, pipeline: Pipeline, prompts: list[str], length: int, pictures: Sequence[Sequence[Image]]
    ) -> Text:
        """As `encode_text`, with the references of each prompt; padded to `condition_length` of ``length``."""
        raise TypeError(f"{type(self).__name__} states no encode_seen")

    def pipeline_call(
        self, pipeline: Pipeline | None, prompts: list[str], **settings: Unpack[CallSettings]
    ) -> dict[str, Any]:
        """Keyword arguments for the stock pipeline to draw ``prompts``.

        ``pipeline`` may be None where no prompt has to be looked up in it.
        """
        length = {self.length_argument: settings["length"]} if self.length_argument else {}
        return {
            "prompt": prompts,
            "height": settings["height"],
            "width": settings["width"],
            "num_inference_steps": settings["steps"],
            self.guidance_argument: settings["guidance"],
            **length,
            **self.fixed_arguments,
        }

    def frames_call(self, frames: int) -> dict[str, Any]:
        """Keyword arguments that tell the stock pipeline of a family of videos how many frames to draw."""
        return {self.frames_argument: frames} if self.axes == 3 else {}

    def reference_video(self, pixels: Tensor, frames: int, first: int) -> Tensor:
        """What the autoencoder is given of a reference: (B, 3, H, W) -> (B, 3, frames, H, W).

        Args:
            first: frames in the first latent frame.
        """
        raise TypeError(f"{type(self).__name__} reads no references as videos")

    def reference_call(self, pixels: Sequence[Tensor]) -> dict[str, Any]:
        """Keyword arguments that give references to the stock pipeline, beside those of `pipeline_call`.

        Here: of one picture for each prompt. A family that takes several states how its pipeline is given them.

        Args:
            pixels: one (B, 3, H, W) in [-1, 1] for each reference, in their order; empty where the prompts have none.
        """
        if not self.fewest_references <= len(pixels) <= self.references:
            raise TypeError(f"{self.name} is given {self.references} pictures for each prompt, not {len(pixels)}")
        return {"image": (pixels[0] + 1) / 2} if pixels else {}
