"""The options that verbs share, and how they become settings. Each help line gives the unit, the default and what
disables it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from dcgen_convert.api import settings
from dcgen_convert.cli import completion

F = TypeVar("F", bound=Callable[..., Any])
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Filled(click.types.StringParamType):
    """A text that is not empty. `--hostfile "$HOSTS"` with a variable that is not set must not count as no option."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_filled(self, value, param, ctx), param, ctx)


class FilledPath(click.Path):
    """A path that is not empty, for the same reason: an empty one would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_filled(self, value, param, ctx), param, ctx)


class Folder(FilledPath):
    """A folder that is there."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        place = os.fspath(super().convert(value, param, ctx))
        if not os.path.exists(place):
            self.fail(f"there is no folder {place}", param, ctx)
        if not os.path.isdir(place):
            self.fail(f"{place} is a file, and a folder is needed", param, ctx)
        return place


class Whole(click.IntRange):
    """A whole number in a range."""

    name = "whole number"


class Number(click.FloatRange):
    """A number in a range."""

    name = "number"


def _filled(kind: click.ParamType, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    if isinstance(value, str) and not value.strip():
        kind.fail("it is empty", param, ctx)
    return value


PLACE = FilledPath()
FOLDER = Folder()
ANY_TEXT = click.STRING  # of the few options whose text may be empty


def option(*names: str, help: str, **settings: Any) -> Callable[[F], F]:
    """A click option. A text must not be empty, unless its type is ANY_TEXT."""
    if not any(key in settings for key in ("type", "is_flag")) and "/" not in "".join(names):
        settings["type"] = Filled()
    return click.option(*names, help=help, **settings)


def argument(name: str, **settings: Any) -> Callable[[F], F]:
    """A click argument that must not be empty."""
    return click.argument(name, **{"type": Filled(), **settings})


def stack(decorators: list[Callable[[F], F]]) -> Callable[[F], F]:
    """Several click options as one decorator, shown in the given order."""

    def apply(function: F) -> F:
        for decorate in reversed(decorators):
            function = decorate(function)
        return function

    return apply


SOURCE = argument("source", shell_complete=completion.sources)

FROM = option(
    "--from",
    "start",
    metavar="STAGE",
    help="Run STAGE and all after it again, and delete what they have made. Default: the first one that is not done.",
)
UNTIL = option("--until", metavar="STAGE", help="Stop after this stage. Default: verify, the last.")
FORCE = option("--force", is_flag=True, help="Replace a bundle that is already in the output folder. Default: off.")

TRUST = option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python files that come with BUNDLE. Use it only if you trust their author. Default: off, such "
    "files never run.",
)

AE = [
    option("--ae", metavar="NAME|PATH|REPO", shell_complete=completion.autoencoders,
           help="Autoencoder to convert to: alias, folder, hub id, FILE.safetensors:ALIAS, or "
           "FILE.pt:ALIAS:SHA256 (for videos). Default: the recipe's."),
    option("--ae-channels", metavar="K", type=Whole(min=1),
           help="Use the first K latent channels only (for the structured latents of DC-AE 1.5). Default: all."),
]  # fmt: skip

REVISION = option("--revision", metavar="REV", help="Git revision of the source on the hub. Default: the catalogue's.")
OFFLINE = option(
    "--offline",
    is_flag=True,
    help="Use local files and the cache only. Default: off (HF_HUB_OFFLINE is obeyed too).",
)
GPUS = option(
    "--gpus",
    metavar="N",
    type=Whole(min=1),
    help="Number of ranks to start on this host. Without GPUs they are CPU processes. Default: 1, or the ranks of a "
    "launcher.",
)

INPUTS = [
    option("--base", metavar="FOLDER|REPO",
           help="Pipeline with text encoders and autoencoder, for a SOURCE that is a transformer alone. Default: the "
           "published one."),
    option("--lora", "loras", multiple=True, metavar="FILE[:SCALE]",
           help="LoRA file to fuse into SOURCE first; repeatable. Default: none."),
]  # fmt: skip

RECIPE = [
    *AE,
    option("--recipe", metavar="FILE", shell_complete=completion.recipes,
           help="Recipe for a SOURCE that is a model. Default: the one of its family."),
    *INPUTS,
    option("--set", "sets", multiple=True, metavar="KEY=VALUE",
           help="One setting, e.g. lora.rank=64 or adapt.ema=0; repeatable. Default: none."),
    option("--quantize", type=click.Choice(["none", "nvfp4", "int4"]),
           help="4-bit format of the result. Default: the recipe's; none disables."),
    option("--merge-lora/--no-merge-lora", default=None,
           help="Add the LoRA to the weights, or keep it in a file of its own. Default: the recipe's."),
    option("--layout", type=click.Choice(["stock", "official"]),
           help="Pipeline class of the bundle. Default: stock (diffusers' own)."),
    option("--data", metavar="PATH[:COLUMN][=SHARE]", type=PLACE, multiple=True,
           help="Your pictures or videos: a folder with captions, a .jsonl, shards (.tar, .parquet) or "
           "hf://datasets/ORG/NAME; repeatable, with a share each. Default: the recipe's, mostly "
           "pictures that the base model draws."),
    option("--prompts", metavar="FILE[:COLUMN]", type=PLACE,
           help="Prompts of the pictures that are drawn: .txt with one per line, a column of a .jsonl, .csv, .tsv or "
           ".parquet, or hf://datasets/ORG/NAME:COLUMN. Default: the recipe's."),
    option("--resolution", metavar="PX", type=Whole(min=1),
           help="Picture side of the last phase in px. An earlier phase keeps its own unless that is larger. Default: "
           "the recipe's."),
    option("--dtype", type=click.Choice(["fp32", "bf16"]), help="Number type in training. Default: the recipe's."),
    option("--seed", metavar="N", type=Whole(min=0), help="Seed of every random draw. Default: the recipe's (0)."),
    option("--zero", type=click.Choice(["auto", "0", "1", "2", "3"]),
           help="ZeRO stage. Default: the recipe's; 0 disables, auto takes the smallest that fits."),
    option("--offload", type=click.Choice(["none", "optimizer", "all"]),
           help="What is kept in host memory. Default: the recipe's (none); none disables."),
    REVISION,
    option("--max-gpu-hours", metavar="H", type=Number(min=0),
           help="GPU-hours that all stages together may take. Steps and pictures follow from it. Default: the "
           "recipe's; 0 disables: the recipe as written."),
    option("--hours", metavar="H", type=Number(min=0),
           help="The same budget in hours of wall-clock, on the GPUs of the job. Default: the recipe's; 0 disables."),
]  # fmt: skip


class CountOrNone(click.ParamType):
    """A positive count, or the word none (None)."""

    name = "count"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or str(value).lower() == "none":
            return None
        if not str(value).isdigit() or int(str(value)) < 1:
            self.fail(f"{value!r} is neither a positive whole number nor none", param, ctx)
        return int(str(value))


class Rank(Whole):
    """A rank that the 4-bit kernels take."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        rank = super().convert(value, param, ctx)
        if rank % 16:
            self.fail(f"{rank} is not a multiple of 16", param, ctx)
        return rank


SOURCES = option(
    "--sources",
    metavar="FOLDER",
    type=PLACE,
    help="Pictures that a model which edits is given, the first one with the first instruction. Default: --prompts "
    "says them.",
)

QUANTIZE = [
    *INPUTS,
    option("--format", type=click.Choice(["nvfp4", "int4"]), default="nvfp4", show_default=True,
           help="4-bit format."),
    option("--rank", metavar="R", type=Rank(16, 1024), default=32, show_default=True,
           help="Rank of the 16-bit branch, a multiple of 16. The container bfl has no such branch."),
    option("--calibration", metavar="N|none", type=CountOrNone(), default="64", show_default=True,
           help="Number of calibration pictures; none: use the weights alone."),
    option("--prompts", metavar="FILE[:COLUMN]", type=PLACE,
           help="Prompts of the calibration pictures, as `convert` takes them. Default: the catalogue's, else built-in "
           "ones."),
    SOURCES,
    option("--resolution", metavar="PX", type=Whole(min=1),
           help="Side of the calibration pictures. Default: the catalogue's, else the pipeline's."),
    option("--steps", metavar="N", type=Whole(min=1),
           help="Denoising steps per picture. Default: the catalogue's, else the family's."),
    option("--guidance", metavar="G", type=Number(min=0),
           help="Guidance of the pictures. Default: the catalogue's, else the family's; 1 disables."),
    option("--seed", metavar="N", type=Whole(min=0), default=0, show_default=True, help="Seed of every random draw."),
    option("--dense", metavar="REGEX", help="Block linears that stay 16-bit. Default: none beyond the family's."),
    option("--container", type=click.Choice(["diffusers", "nunchaku", "bfl"]), default="diffusers",
           show_default=True,
           help="A diffusers folder; nunchaku adds the classic single file (FLUX.1); bfl is a folder of nvfp4 without "
           "the 16-bit branch, for widths that are no multiples of 128."),
    option("--fuse-qkv/--no-fuse-qkv", "fuse_qkv", default=False,
           help="Quantise q, k and v as one layer with one smoothing. Default: off; --container nunchaku always does."),
    option("-o", "--output", metavar="DIR", type=PLACE,
           help="Folder of the result. Default: ./NAME-FORMAT."),
]  # fmt: skip

ADOPT = [
    option("--base", metavar="FOLDER|REPO",
           help="Pipeline that gives the text encoders, tokenizers and scheduler which SOURCE lacks, e.g. flux-krea. "
           "Default: none."),
    option("--ae", metavar="NAME|PATH|REPO", shell_complete=completion.autoencoders,
           help="Autoencoder that takes the place of SOURCE's own: alias, folder or hub id. Default: SOURCE's own."),
    option("--resolution", metavar="PX", type=Whole(min=1),
           help="Picture side of the bundle in px. Default: that of the authors' code for its autoencoder: f32 1024, "
           "f64 4096."),
    option("--shift", metavar="RULE|R",
           help="Timestep shift: flux2 (sqrt(CHW/4096)), flux (the line of FLUX.1), model (its scheduler), or a "
           "number. Default: that of the authors' code: f32 flux2, f64 flux."),
    option("--revision", metavar="REV", help="Git revision of SOURCE on the hub. Default: the newest."),
]  # fmt: skip

EVALUATE = [
    option("--against", metavar="SOURCE", type=PLACE, shell_complete=completion.sources,
           help="Bundle or source to compare with. Default: the base that the manifest names, if it is on this "
           "machine."),
    option("--prompts", metavar="FILE|KIND",
           help="Prompts: FILE.txt, FILE:COLUMN of a table, hf://datasets/ORG/NAME:COLUMN, mjhq:FOLDER, builtin, "
           "tiny-world or tiny-videos; of a model that edits tiny-edits, or a table with source and caption in "
           "each row. Default: the kind in the bundle's recipe, else builtin."),
    SOURCES,
    option("-n", "--count", metavar="N", type=Whole(min=2), default=256, show_default=True,
           help="Prompts: pictures of each set."),
    option("--metrics", metavar="A,B",
           help="Measures by name, with commas between them. Default: all that can run with what is at hand."),
    option("--clip", metavar="PATH|REPO", help="CLIP model, for clip and cmmd. Default: off, unless it is at hand."),
    option("--dino", metavar="PATH|REPO", help="DINOv2 model. Default: off, unless it is at hand."),
    option("--pickscore", metavar="PATH|REPO", help="PickScore model. Default: off, unless it is at hand."),
    option("--inception", metavar="FILE", type=PLACE, help="Inception weights of the FID. Default: off."),
    option("--detector", metavar="PATH|REPO", help="Detector of objects. Default: off, unless it is at hand."),
    option("--reference", metavar="FOLDER", type=PLACE,
           help="Pictures to measure the distance to as well; mjhq:FOLDER: those of MJHQ-30K. Default: off."),
    option("--jpeg/--no-jpeg", default=None,
           help="Measure drawn pictures after JPEG, as the authors do. Default: --jpeg with reference pictures, else "
           "--no-jpeg."),
    option("--resolution", metavar="PX", type=Whole(min=1),
           help="Side of the pictures. Default: the bundle's."),
    option("--steps", metavar="N", type=Whole(min=1),
           help="Denoising steps of both models. Default: each model's own."),
    option("--guidance", metavar="G", type=Number(min=0),
           help="Guidance scale of both models. Default: each model's own; 1 disables CFG."),
    option("--seed", metavar="N", type=Whole(min=0), default=0, show_default=True, help="Seed of the first picture."),
    option("--min", metavar="NAME=V", multiple=True,
           help="Exit 1 when the figure NAME is below V; repeatable. Default: off."),
    option("--max", metavar="NAME=V", multiple=True,
           help="Exit 1 when the figure NAME is above V; repeatable. Default: off."),
    GPUS,
    option("--out", metavar="DIR", type=PLACE,
           help="Folder of the pictures, the log and evaluation.json. Default: BUNDLE-evaluation beside the bundle."),
    OFFLINE,
]  # fmt: skip

RANKS = [
    GPUS,
    option("--hostfile", metavar="F", type=PLACE,
           help="DeepSpeed hostfile of several hosts. Default: this host only."),
]  # fmt: skip

JOB = [
    option("--track", type=click.Choice(["tensorboard", "wandb"]),
           help="Send curves and grids of pictures there too. Default: off."),
    option("--rank-timeout", metavar="S", type=Number(min=0),
           help="Seconds without a sign of life, or without progress, after which a rank ends the job. It must be "
           "longer than any single piece of work, such as one step. Default: 120; 0 disables."),
    option("--restarts", metavar="N", type=Whole(min=0),
           help="How often the ranks start again by themselves after a crash. Default: 0, which disables."),
    option("--check/--no-check", default=None,
           help="Compare what the finished stages wrote with its hashes before it is used, at the speed of the disk; "
           "or only the sizes. Default: --check."),
]  # fmt: skip

MACHINE = [*RANKS, OFFLINE]

OUTPUT = [
    option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout. Default: off, a line of text."),
    option("--events", metavar="FILE", type=PLACE,
           help="Append progress to FILE, one JSON object per line. Default: off."),
    option("--log-file", metavar="FILE", type=PLACE,
           help="Append a log to FILE. Default: log.txt in the run folder; off for a verb without one."),
    option("-q", "--quiet", is_flag=True, help="Show only warnings and errors on stderr. Default: off."),
    option("-v", "--verbose", is_flag=True, help="Show details and tracebacks on stderr too. Default: off."),
]  # fmt: skip


def output_options(values: dict[str, Any]) -> dict[str, Any]:
    """Take the OUTPUT options out of a verb's arguments, named as `Session.begin` wants them."""
    return {
        "json": values.pop("as_json"),
        "events": values.pop("events"),
        "log_file": values.pop("log_file"),
        "quiet": values.pop("quiet"),
        "verbose": values.pop("verbose"),
    }


def job_options(values: dict[str, Any]) -> dict[str, Any]:
    """Take the JOB options that were given out of a verb's arguments, as fields of `Machine`."""
    given = {name: values.pop(name, None) for name in settings.JOB}
    return {name: value for name, value in given.items() if value is not None}


def recipe_options(values: dict[str, Any]) -> dict[str, Any]:
    """Take the RECIPE, MACHINE and JOB options out of a verb's arguments, as `api.settings.JobSettings`."""
    found = {name: values.pop(name) for name in settings.JobSettings.__annotations__ if name in values}
    if found["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported
    return found
