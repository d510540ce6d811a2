"""The recipe's schema: every setting of a conversion with its type, its unit, its default and what disables it.

Defaults live here and in `recipes/`, nowhere else. Unknown keys are errors. `dcgen_convert.recipe.loading.load` fills
these models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from dcgen_convert.recipe.kinds import (
    Amount,
    AmountOrZero,
    Batch,
    Count,
    CountOrZero,
    Expression,
    Fraction,
    GpuHours,
    LoraRank,
    Pictures,
    Seed,
    Share,
    Side,
    Text,
)
from dcgen_convert.recipe.pictures import Data, PhaseData
from dcgen_convert.recipe.section import Section
from dcgen_convert.recipe.watching import Evaluate, Watch


def _folder_name(name: str) -> str:
    """A name that is one folder, and stays where it is put."""
    if (
        name.strip() in ("", ".", "..")
        or not name.isprintable()
        or "/" in name
        or "\\" in name
        or len(name.encode()) > 150
    ):
        raise ValueError(f"name is {name[:60]!r}, which is no name of a folder; write a short one without / and \\")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]

# Layout settings: they decide how the work is done (memory, speed, what is tolerated, what is looked at on the way),
# and the result is the same but for the order of float sums. No fingerprint and no checkpoint holds them, so a change
# throws no work away. * is the number of a phase; the name of a section stands for all of its settings.
LAYOUT = (
    "budget",
    "data.share",
    "data.batch",
    "data.max_broken",
    "latents.batch",
    "latents.scale_tolerance",
    "adapt.checkpointing",
    "adapt.zero",
    "adapt.offload",
    "adapt.phases.*.micro_batch",
    "adapt.phases.*.share",
    "quantize.calibration.batch",
    "evaluate",
    "watch",
    "keep",
    "compile",
)


class Latents(Section):
    """The cache of paired latents and text embeddings."""

    batch: Batch = Field(default=8, description="pictures encoded at once")
    text: Literal["cache", "encode"] = Field(
        default="cache",
        description="cache: text embeddings are stored on disk; encode: they are computed in every step",
    )
    text_length: Count | None = Field(
        default=None, description="text tokens that prompts are padded to; null: the family's"
    )
    scale_tolerance: Amount = Field(
        default=0.10,
        description="how far the measured scale may lie from the autoencoder's scaling factor, as a fraction",
    )
    normalise: Literal["none", "channel"] = Field(
        default="none",
        description="channel: divide every latent channel by its RMS, inside the autoencoder's weights; none disables",
    )
    scale_override: Amount | None = Field(
        default=None, description="scaling factor to use instead of the autoencoder's; null disables"
    )


class AlignEmbedder(Section):
    """Stage 1: the new patch embedder (arXiv 2509.25180)."""

    method: Literal["ridge", "adamw", "none"] = Field(
        default="ridge", description="ridge: closed form; adamw: the paper's; none: Xavier start, no alignment"
    )
    target: Literal["pooled", "home"] | None = Field(
        default=None,
        description="what the embedder is fitted to. home: the base's tokens of the same picture at the size where it "
        "has as many tokens; pooled: its finer tokens at the size of the first phase; null: home where the base was "
        "trained on that size",
    )
    pooling: Literal["average", "bilinear"] | None = Field(
        default=None,
        description="for target pooled. average: average the base's finer tokens; bilinear: interpolate the new tokens "
        "to the base's grid; null: average",
    )
    ridge: AmountOrZero = Field(
        default=1e-6, description="ridge, relative to the mean of the Gram diagonal; 0 disables"
    )
    steps: CountOrZero = Field(default=20_000, description="steps (adamw only)")
    lr: Amount = Field(default=1e-4, description="learning rate (adamw only)")
    batch: Batch = Field(default=64, description="pictures per step")

    @model_validator(mode="after")
    def _home_pools_nothing(self) -> AlignEmbedder:
        if self.target == "home" and self.pooling is not None:
            raise ValueError(
                f"align_embedder.pooling is {self.pooling}, but target home takes the base's tokens one by one: leave "
                "out pooling"
            )
        return self


class AlignHead(Section):
    """Stage 2: start of the new output head, then joint training of embedder and head with the blocks frozen."""

    method: Literal["least-squares", "xavier", "zero"] = Field(
        default="least-squares", description="how the head starts; least-squares: closed form"
    )
    draws: Count = Field(
        default=8, description="most noise draws per picture for the least squares; it takes as few as it needs"
    )
    steps: CountOrZero = Field(
        default=0,
        description="steps with the blocks frozen; 0 disables; null: 0 where the start is a closed form, else 5,000",
    )
    lr: Amount = Field(default=1e-4, description="learning rate")
    batch: Batch = Field(default=512, description="global batch in pictures")
    warmup: CountOrZero = Field(default=1_000, description="warm-up steps; 0 disables")
    clip: AmountOrZero = Field(default=0.1, description="largest gradient norm; 0 disables")

    @model_validator(mode="before")
    @classmethod
    def _steps_follow_the_start(cls, values: object) -> object:
        """After a closed form the same steps do more in the phases."""
        if isinstance(values, dict) and values.get("steps") is None:
            closed = values.get("method", cls.model_fields["method"].default) == "least-squares"
            return {**values, "steps": 0 if closed else 5_000}
        return values


class Phase(Section):
    """One phase of stage 3. LoRA weights are merged at its end."""

    mode: Literal["lora", "full"] = Field(
        default="lora", description="lora: adapters + embedder + head; full: every weight"
    )
    resolution: Side = Field(description="picture side in px")
    steps: Count = Field(description="optimizer steps")
    rank: LoraRank = Field(default=256, description="LoRA rank")
    alpha: Amount | None = Field(default=None, description="LoRA alpha; null: equal to rank")
    lr: Amount = Field(default=1e-4, description="peak learning rate")
    warmup: CountOrZero = Field(default=1_000, description="warm-up steps; 0 disables")
    schedule: Literal["constant", "cosine"] = Field(default="constant", description="learning rate after the warm-up")
    batch: Batch = Field(default=256, description="global batch in pictures, whatever the number of GPUs")
    micro_batch: Batch | None = Field(
        default=None, description="pictures per GPU and pass; null: the largest even share that fits"
    )
    targets: Expression | None = Field(
        default=None,
        description="regex of the linears that get LoRA; null: the family's attention and feed-forward linears",
    )
    consistency: Fraction = Field(
        default=0.0,
        description="for few-step models: consistency distillation (arXiv 2303.01469). The teacher is the model from "
        "the start of the phase, the targets lie at this fraction of t; 0 disables, then adapt.objective is used",
    )
    data: PhaseData | None = Field(
        default=None, description="pictures of this phase alone; null: the recipe's, in section `data`"
    )
    share: Share | None = Field(
        default=None, description="share of a budget that the phase gets; null: what its steps cost as written"
    )

    @model_validator(mode="before")
    @classmethod
    def _data_of_its_own(cls, values: object) -> object:
        """A group that says nothing is no data of its own: `--set adapt.phases.0.data.path=null` takes them away."""
        data = values.get("data") if isinstance(values, dict) else None
        if isinstance(values, dict) and isinstance(data, dict) and all(value is None for value in data.values()):
            return {**values, "data": None} if data.keys() <= PhaseData.model_fields.keys() else values
        return values

    @model_validator(mode="before")
    @classmethod
    def _alpha_is_rank(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("alpha") is None:
            return {**values, "alpha": values.get("rank", cls.model_fields["rank"].default)}
        return values

    @model_validator(mode="after")
    def _teacher_is_at_hand(self) -> Phase:
        if self.consistency and self.mode == "full":
            raise ValueError(
                "consistency needs mode lora: with every weight trained, the frozen teacher would be a second model"
            )
        return self


class Adapt(Section):
    """Stage 3: LoRA phases, and what is common to all training."""

    objective: Literal["flow", "guidance-corrected"] = Field(
        default="flow", description="guidance-corrected for guidance-distilled bases (arXiv 2509.25180)"
    )
    null_branch: Literal["student", "teacher"] = Field(
        default="student",
        description="which model predicts for the null prompt in the corrected loss; teacher: the frozen one from the "
        "start of the phase",
    )
    guidance_range: tuple[AmountOrZero, AmountOrZero] = Field(
        default=(1.0, 14.0), description="guidance is drawn uniformly from [lo, hi]"
    )
    data_guidance: Amount = Field(
        default=1.0,
        description="guidance that the training pictures show already (g_d of the corrected loss); 1: none, the "
        "published loss",
    )
    shift: Literal["model", "flux2"] | Amount = Field(
        default="model",
        description="timestep shift: model (its scheduler), flux2 (sqrt(CHW/4096)), or a number; 1 disables",
    )
    weighting: Literal["none", "velocity", "bell"] = Field(
        default="none",
        description="weight of the squared error. velocity: for networks that predict epsilon, makes it the error of "
        "v, at most 25 times; bell: for objective flow, little at both ends of t, as the authors train Wan",
    )
    lora_start: Literal["gradient", "zero"] = Field(
        default="zero",
        description="where LoRA begins in the first phase. gradient: along the gradient of the loss over 4 batches "
        "(LoRA-GA, arXiv 2407.05000); zero: B is zero, as published. Later phases begin at zero",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="of the phases. adamw: as published; muon: the matrices of the blocks or of their LoRA take "
        "orthogonal steps, the rest trains with AdamW at the same rate",
    )
    text_drop: Fraction = Field(default=0.1, description="fraction of captions replaced by the null text; 0 disables")
    ema: Fraction = Field(default=0.999, description="decay of the moving average of the weights; 0 disables")
    clip: AmountOrZero = Field(default=0.1, description="largest gradient norm; 0 disables")
    checkpointing: bool = Field(
        default=True,
        description="compute activations a second time in the backward pass: less memory, about a third more time",
    )
    zero: Literal["auto", 0, 1, 2, 3] = Field(
        default=2, description="ZeRO stage; auto: the smallest that fits; 0 disables"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="what moves to host memory; none disables"
    )
    phases: tuple[Phase, ...] = Field(min_length=1, description="phases in order, usually rising resolutions")

    @model_validator(mode="after")
    def _ordered(self) -> Adapt:
        lo, hi = self.guidance_range
        if not 0 < lo <= hi:
            raise ValueError(f"guidance_range must be [lo, hi] with 0 < lo <= hi, not [{lo:g}, {hi:g}]")
        return self


class Calibration(Section):
    prompts: Pictures = Field(default=64, description="prompts that are drawn for calibration")
    steps: Count | None = Field(default=None, description="denoising steps per prompt; null: the bundle's steps")
    batch: Batch | None = Field(
        default=None, description="pictures drawn at once; ranks share the batches; null: data.batch"
    )


class Quantize(Section):
    format: Literal["none", "nvfp4", "int4"] = Field(
        default="none", description="4-bit format of the block linears; none disables"
    )
    rank: int = Field(
        default=32,
        ge=16,
        le=1024,
        multiple_of=16,
        description="rank of the 16-bit branch, a multiple of 16; the container bfl has no such branch",
    )
    calibration: Calibration = Field(default_factory=Calibration)
    dense: Expression | None = Field(
        default=None, description="regex of block linears that stay 16-bit; null: none beyond the family's"
    )
    container: Literal["diffusers", "nunchaku", "bfl"] = Field(
        default="diffusers",
        description="diffusers: a folder; nunchaku: the classic single file too (FLUX.1); bfl: a folder of nvfp4 "
        "without the 16-bit branch, for widths that are no multiples of 128",
    )
    fuse_qkv: bool = Field(
        default=False,
        description="quantise q, k and v as one layer with one smoothing; the nunchaku container always does",
    )

    @model_validator(mode="after")
    def _agreeing(self) -> Quantize:
        if self.fuse_qkv and self.container == "bfl":
            raise ValueError("fuse_qkv shares smoothing and down projection, and the container bfl has neither")
        return self


class Bundle(Section):
    layout: Literal["stock", "official"] = Field(
        default="stock", description="stock: stock pipeline class; official: the DC-Gen authors' class"
    )
    steps: Count = Field(default=20, description="denoising steps that the model card and verify use")
    guidance: AmountOrZero = Field(default=3.5, description="guidance that the model card and verify use")


class Budget(Section):
    """What the whole conversion may cost, every stage included. Under a budget, `data.count` and the `steps` of the
    phases are the most that is done; how many are done follows from the shares.
    """

    gpu_hours: GpuHours = Field(
        default=0.0,
        description="GPU-hours. Or a table: for models with at most so many image tokens at the last resolution, so "
        "many GPU-hours; more tokens have no budget. 0 disables: the recipe is carried out as written",
    )
    hours: AmountOrZero = Field(default=0.0, description="hours of wall-clock on the GPUs of the job; 0 disables")


class Recipe(Section):
    """One conversion, completely. `alpha` of each phase is filled (= rank) when the recipe leaves it out."""

    name: FolderName = Field(description="names the bundle and the run folder; left out: the name of the file")
    source: Text = Field(
        description="catalogue name, hub id, diffusers folder, .safetensors or .gguf of the base model"
    )
    base: Text | None = Field(
        default=None,
        description="pipeline with text encoders and autoencoder, for a source that is a transformer alone; null: "
        "the published one",
    )
    loras: tuple[Text, ...] = Field(
        default=(), description="LoRA files FILE[:scale], fused into the source first; empty: none"
    )
    ae: Text = Field(description="autoencoder: alias, hub id, folder, or FILE.safetensors:ALIAS")
    ae_channels: Count | None = Field(
        default=None, description="use the first K latent channels, for structured latents (DC-AE 1.5); null: all"
    )
    revision: Text | None = Field(
        default=None, description="git revision of the source on the hub; null: the catalogue's"
    )
    seed: Seed = Field(default=0, description="seed of every random draw")
    dtype: Literal["fp32", "bf16"] = Field(default="bf16", description="weights and activations in training")
    budget: Budget = Field(default_factory=Budget)
    data: Data = Field(default_factory=Data)
    latents: Latents = Field(default_factory=Latents)
    align_embedder: AlignEmbedder = Field(default_factory=AlignEmbedder)
    align_head: AlignHead = Field(default_factory=AlignHead)
    adapt: Adapt
    quantize: Quantize = Field(default_factory=Quantize)
    merge_lora: bool = Field(
        default=True, description="add the last LoRA to the weights; false: keep it in a file of its own"
    )
    bundle: Bundle = Field(default_factory=Bundle)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    watch: Watch = Field(default_factory=Watch)
    keep: Literal["all", "resume", "bundle"] = Field(
        default="all",
        description="what the run folder keeps while the stages go on. all: everything; resume: all that a later stage "
        "reads, but no checkpoints of finished trainings and no calibration; bundle: only what a stage that is not "
        "done yet must read",
    )
    compile: bool = Field(
        default=False,
        description="true: torch compiles the blocks of the network that draws and of the one that trains (not with "
        "ZeRO 3): the first step takes minutes, the others less, and results differ by the order of float sums",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for number in self.sets:
            self._require_pictures(self.data_key(number), self.data_of(number))
        given = [self.data.share or 0.0, *(phase.share or 0.0 for phase in self.adapt.phases)]
        if sum(given) > 1 + 1e-9:
            raise ValueError(f"the shares of data and of the phases add up to {sum(given):g}, more than the whole")
        if self.latents.normalise == "channel" and self.latents.scale_override:
            raise ValueError(
                "latents.normalise channel leaves no scaling factor to override: drop latents.scale_override"
            )
        if self.dtype == "bf16" and self.adapt.zero == 0:
            raise ValueError("adapt.zero 0 with dtype bf16 trains wrongly (its first Adam step is off): use 1, 2 or 3")
        if self.quantize.format != "none" and not self.merge_lora:
            raise ValueError("quantize needs merged weights: drop --no-merge-lora, or set quantize.format to none")
        if not self.merge_lora and self.adapt.phases[-1].mode == "full":
            raise ValueError(
                "merge_lora is false but the last phase trains every weight: there is no LoRA to keep apart"
            )
        return self

    def _require_pictures(self, name: str, data: Data) -> None:
        """ValueError for settings of pictures, called ``name``, that cannot be together."""
        if data.buckets and self.adapt.shift == "flux2":
            raise ValueError(
                f"adapt.shift flux2 is a shift per size, more than a scheduler's config holds for {name}.buckets: use "
                "model or a number"
            )

    # -- sets: the pictures of section `data` (set 0), and of a phase with data of its own (set n: of phase n) --

    def set_of(self, number: int) -> int:
        """The set of pictures that phase ``number`` (the first is 1) is trained on."""
        return number if self.adapt.phases[number - 1].data else 0

    @property
    def sets(self) -> tuple[int, ...]:
        """The sets that phases are trained on, in the order of their first use."""
        return tuple(dict.fromkeys(self.set_of(number) for number, _ in enumerate(self.adapt.phases, 1)))

    @property
    def aligned_set(self) -> int:
        """The set that embedder and head are aligned on: the one of the first phase."""
        return self.set_of(1)

    def starts_along_gradient(self, number: int) -> bool:
        """Whether phase ``number`` (the first is 1) begins its LoRA along the gradient of the loss."""
        return number == 1 and self.adapt.lora_start == "gradient" and self.adapt.phases[0].mode == "lora"

    def data_of(self, number: int) -> Data:
        """The settings of set ``number``."""
        own = self.adapt.phases[number - 1].data if number else None
        return own.over(self.data) if own else self.data

    def data_key(self, number: int) -> str:
        """Dotted key of the settings of set ``number``."""
        return f"adapt.phases.{number - 1}.data" if number else "data"

    def sides(self, number: int) -> list[int]:
        """Picture sides in px that set ``number`` is used at."""
        phases = enumerate(self.adapt.phases, 1)
        return sorted({phase.resolution for n, phase in phases if self.set_of(n) == number})


def result_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON values, without the settings of LAYOUT: what the result depends on."""
    return _without_layout(recipe.model_dump(mode="json"), ())


def layout_names(section: str) -> frozenset[str]:
    """Last parts of the names of the LAYOUT settings in ``section``: "adapt" -> {"zero", "micro_batch", ...}."""
    return frozenset(name.rpartition(".")[2] for name in LAYOUT if name.startswith(f"{section}."))


def _without_layout(value: Any, place: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_without_layout(item, (*place, "*")) for item in value]
    if not isinstance(value, dict):
        return value
    kept = [key for key in value if ".".join((*place, key)) not in LAYOUT]
    return {key: _without_layout(value[key], (*place, key)) for key in kept}
