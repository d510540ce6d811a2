"""The model card of a bundle: pictures, the exact lines that run it, what it cannot do, what was measured, its origin.

Words that come from elsewhere (names, licences, captions) are escaped: they cannot format the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from dcgen_convert.bundle import lineage, measured
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.markdown import block, code, one_line, plain, table
from dcgen_convert.checkpoint.licence import FIELDS
from dcgen_convert.checkpoint.shards import STEM
from dcgen_convert.checkpoint.trust import LTX_CLASS, VIDEO_CLASS
from dcgen_convert.families.base import Family
from dcgen_convert.families.grid import tile_sizes
from dcgen_convert.families.pixel_memory import FRAME_WHOLE, TILED
from dcgen_convert.svdquant.forms import BFL, NUNCHAKU_LITE

PICTURES = "pictures.png"  # in the bundle: the grid that the card shows
AUTHORS = "https://github.com/dc-ai-projects/DC-Gen"
LOADING = ("from diffusers.utils import load_image",)  # for the picture that an editing model is given
EXPORTING = ("from diffusers.utils import export_to_video",)  # for what a model of videos draws
BFL_CONFIG = "BFLQuantizationConfig"  # diffusers' class for the form `bfl`
PACKAGES = ("diffusers", "transformers", "torch", "dcgen-convert")  # whose versions the card names


@dataclass(frozen=True)
class Card:
    """What the card is written from.

    manifest: from `manifest.build`. Nothing that differs between two equal runs (times, hardware) goes into the card.
    layout: "stock", "official" or "source". lora: whether the bundle keeps its LoRA apart.
    title: heading, usually the bundle's name. place: what the code lines load, a folder or a hub repository.
    """

    manifest: Mapping[str, Any]
    family: Family
    layout: str
    lora: bool
    title: str
    place: str

    @property
    def converted(self) -> bool:
        """Whether the model works in another latent space than its base."""
        return self.layout != "source"

    @property
    def adapted(self) -> bool:
        """Whether the bundle has the in-bundle adapter."""
        return self.layout == "stock" and self.family.bundle_tier == 2

    @property
    def carries_code(self) -> bool:
        """Whether the bundle holds the code of its autoencoder."""
        return self.layout == "stock" and self.family.bundle_tier >= 2

    @property
    def frames(self) -> int | None:
        """Frames of a video as the bundle draws it; None where it draws pictures."""
        found: int | None = self.manifest["defaults"].get("frames")
        return found

    @property
    def time(self) -> int:
        """Frames of a video per latent frame."""
        return int(self.manifest["autoencoder"].get("frames", 4))

    @property
    def code(self) -> str:
        """The class of its own that a bundle of videos carries for its autoencoder."""
        return str(self.manifest["autoencoder"].get("code", VIDEO_CLASS))

    @property
    def adopted(self) -> Mapping[str, Any]:
        """What is known of a model that the DC-Gen authors converted; empty for every other one."""
        return self.manifest.get("adopted", {})

    @property
    def references(self) -> int:
        """Most references that a row of the conversion's pictures had."""
        found = self.manifest.get("conversion", self.manifest).get("metrics", {})
        return max((stage.get("references", 0) for stage in found.values() if isinstance(stage, Mapping)), default=0)

    @property
    def trained(self) -> Mapping[str, Any]:
        """The recipe of the conversion."""
        return self.manifest.get("conversion", self.manifest)["recipe"]

    @property
    def quantise(self) -> Mapping[str, Any]:
        """The recipe's section."""
        return self.manifest["recipe"].get("quantize", {})

    @property
    def format(self) -> str:
        """The 4-bit format, or "none"."""
        return str(self.quantise.get("format", "none"))

    @property
    def plain(self) -> bool:
        """Whether its 4-bit linears are plain NVFP4, without smoothing and branch."""
        return self.format != "none" and self.quantise.get("container") == BFL

    @property
    def factor(self) -> int:
        """px per side of a latent cell."""
        return int(self.manifest["autoencoder"]["factor"])


def render(
    manifest: Mapping[str, Any],
    *,
    family: Family,
    layout: str = "stock",
    lora: bool = False,
    title: str,
    place: str | None = None,
) -> str:
    """README.md of a bundle. The arguments are those of `Card`; place None: the folder ``title``."""
    layout = manifest.get("conversion", {}).get("layout", layout)  # a bundle that was quantised later
    card = Card(manifest, family, layout, lora, title, place or title)
    parts = [
        _front_matter(card),
        f"# {plain(title)}",
        _summary(card),
        *([f"Note: {note}."] if (note := family.note(card.references)) else []),
        *_pictures(card),
        "## Use",
        _usage(card),
        "## Limits",
        _limits(card),
    ]
    if figures := measured.rows(manifest):
        parts += ["## Measured", table(figures)]
    if card.adopted:
        parts += ["## Adopted", _adopted(card)]
    parts += ["## Made from", _sources(manifest), "## Licence", _licence(manifest), "## Recipe", _recipe(manifest)]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> str:
    manifest, family = card.manifest, card.family
    base = manifest["licence"].get("base", {})
    header: dict[str, Any] = {key: base[key] for key in FIELDS if key in base and base[key] != "unknown"}
    # The hub takes the ids of repositories only. The autoencoder is not what the model was made of.
    bases = [manifest["sources"].get(role) for role in ("base", "base of the source")]
    if models := [repo for record in bases if record for repo in lineage.repositories(record)]:
        header["base_model"] = models
        if card.format != "none" or not card.adopted:  # an adopted model has the weights of the one that it names
            relation = "quantized" if card.format != "none" else "adapter" if card.lora else "finetune"
            header["base_model_relation"] = relation
    if "encoder_hidden_states" in family.text_keys:
        header["pipeline_tag"] = "text-to-video" if card.frames else "text-to-image"
    kind = [] if card.format == "none" else [card.format if card.plain else "svdquant"]
    tags = ["dcgen-convert", *(["dc-ae"] if card.converted else []), family.name]
    header |= {"library_name": "diffusers", "tags": [*tags, *kind]}
    return f"---\n{_yaml(header | _results(card))}---"


def _results(card: Card) -> dict[str, Any]:
    """What `evaluate` measured, as the hub reads it; nothing where it was not run."""
    found = measured.results(card.manifest)
    if not found:
        return {}
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    text = "encoder_hidden_states" in card.family.text_keys
    task = "text-to-image" if text else "unconditional-image-generation"
    return {
        "model-index": eval_results_to_model_index(
            one_line(card.title), [EvalResult(task_type=task, **result) for result in found]
        )
    }


def _summary(card: Card) -> str:
    ae, sources = card.manifest["autoencoder"], card.manifest["sources"]
    record = sources.get("base of the source", sources["base"])
    base = code(record.get("repo") or lineage.last_name(str(record["name"])))
    if card.adopted:
        text = (
            f"{base}, which the DC-Gen authors converted to a deep-compression autoencoder (f{ae['factor']}, "
            f"{ae['channels']} channels, one token per {ae['factor']} x {ae['factor']} px; arXiv 2509.25180), as a "
            "bundle for the stock pipeline."
        )
    elif card.converted:
        text = (
            f"{base} converted to the deep-compression autoencoder {code(lineage.last_name(str(ae['name'])))} "
            f"(f{ae['factor']}, {ae['channels']} channels, one token per {ae['factor']} x {ae['factor']} px"
            f"{f' of {card.time} frames' if card.frames else ''}) "
            "with the DC-Gen method (arXiv 2509.25180)."
        )
    else:
        text = f"{base} in its own latent space; all but the transformer's block linears is as it was."
    if card.plain:
        text += (
            f" Its block linears are W4A4 {card.format.upper()} in blocks of 16, rounded with GPTQ (arXiv 2210.17323), "
            f"in the format `{BFL}` of diffusers. Convolutions are 16-bit."
        )
    elif card.format != "none":
        text += (
            f" Its block linears are SVDQuant W4A4 {card.format.upper()} (arXiv 2411.05007), in the "
            f"`{NUNCHAKU_LITE}` format of diffusers."
        )
    return text


def _pictures(card: Card) -> list[str]:
    """The grid, with what its columns and rows show."""
    shown = card.manifest.get("pictures")
    if not shown:
        return []
    prompts = "\n".join(f"{number}. {plain(prompt)}" for number, prompt in enumerate(shown["prompts"], 1))
    models = ", ".join(plain(column) for column in shown["columns"])
    if card.frames:
        title = "Frames of videos of the base model and of this one"
        told = f"For each prompt, from above: {models}, with the same seed; no video was chosen. Prompts:"
    else:
        title = "Pictures of the base model and of this one"
        told = f"Columns: {models}. The same prompt and seed in each row; no picture was chosen. Rows:"
    return [f"![{title}]({PICTURES})", f"{told}\n\n{prompts}"]


def _usage(card: Card) -> str:
    text = [_versions(card), block("\n".join(_lines(card)), "python")]
    if card.adapted:
        text.append(
            "The flag runs `vae/autoencoder_dc_adapter_v*.py` of this repository: about two hundred lines that show "
            "the deep latent to the stock pipeline in the shape that it packs. "
            f'The pipeline, the {card.family.component} and the scheduler are stock. With `device_map="balanced"` give '
            "`from_pretrained` the autoencoder too (`vae=`), loaded by `AutoModel.from_pretrained` from the folder "
            "`vae`."
        )
    elif card.carries_code and card.code == LTX_CLASS:
        text.append(
            "The flag runs `vae/autoencoder_ltx2_v*.py` of this repository: a subclass of diffusers' "
            "`AutoencoderKLLTX2Video`, whose config states what the pipeline reads. All else is stock. diffusers warns "
            "that it expected another class: that is a remark only."
        )
    elif card.carries_code:
        text.append(
            "The flag runs `vae/autoencoder_dc_video_v*.py` of this repository: the autoencoder, which diffusers does "
            "not have. The pipeline, the transformer and the scheduler are stock. diffusers warns that it expected "
            "another class: that is a remark only."
        )
    if card.family.further:
        text.append(
            f"The pipeline draws with {' and then with '.join(f'`{name}`' for name in card.family.components)}. "
            "`boundary_ratio` in `model_index.json` is the noise level at which it goes from one to the other."
        )
    if card.frames and card.code == VIDEO_CLASS:
        text.append(
            f"Frames above {FRAME_WHOLE:,} px need less memory in tiles: `pipe.vae.enable_tiling()` before the call."
        )
    elif not card.frames and card.converted and card.layout != "official":
        tile, stride = tile_sizes(card.factor)
        text.append(
            f"Pictures above {TILED} px need less memory in tiles: "
            f"`pipe.vae.enable_tiling({tile}, {tile}, {stride}, {stride})` before the call."
        )
    if card.plain:
        text.append(
            "A Blackwell GPU (compute capability 10.0 and above) multiplies in 4 bits where `flashinfer-python` is "
            "installed. Elsewhere diffusers multiplies the weights out in each call: that saves memory and no time."
        )
    elif card.format == "nvfp4":
        text.append(
            "The NVFP4 kernels need an RTX 50 / RTX PRO Blackwell GPU, `pip install kernels` and "
            "`DIFFUSERS_TRUST_REMOTE_KERNELS=true`. "
            "`dcgen-convert sample` draws on any machine, from dequantised weights."
        )
    if card.quantise.get("container") == "nunchaku":
        text.append(
            "`nunchaku.safetensors` is the same 4-bit transformer in nunchaku's classic container, "
            "for `NunchakuFluxTransformer2dModel.from_pretrained`."
        )
    return "\n\n".join(text)


def _versions(card: Card) -> str:
    found = card.manifest["versions"]
    made = ", ".join(f"{package} {found[package]}" for package in PACKAGES if found.get(package))
    pictures = " torchvision" if card.family.picture_tokens else ""  # its processor is read with it alone
    return (
        f'`pip install -U "diffusers>=0.42" "transformers>=5.8" accelerate{pictures}`. Older versions of diffusers '
        f"ignore `dtype=` and cannot read 4-bit bundles. Made with {made}."
    )


def _lines(card: Card) -> list[str]:
    """The code that draws a picture with the bundle."""
    kind = f"DCGen_{card.family.pipeline_class}" if card.layout == "official" else "DiffusionPipeline"
    place, trust = one_line(card.place), ", trust_remote_code=True" if card.carries_code else ""
    helpers = [*(EXPORTING if card.frames else ()), *(LOADING if card.family.fewest_references else ())]
    own = [BFL_CONFIG, card.family.model_class] if card.plain else []
    lines = ["import torch", f"from diffusers import {', '.join(sorted([kind, *own]))}", *helpers, ""]
    if card.layout == "official":
        lines = [
            f"# The class is part of the DC-Gen authors' code: git clone {AUTHORS}",
            f"# and import {kind} from the module of that code which defines it.",
            "import torch",
            *([f"from diffusers import {', '.join(own)}"] if own else []),
            "",
        ]
    if place == one_line(card.title):
        lines.append("# The name of the folder: run it beside the folder, or give the path.")
    if card.plain:
        lines += _network_lines(card, place)
    given = f", {card.family.component}={card.family.component}" if card.plain else ""
    lines.append(f'pipe = {kind}.from_pretrained({_quoted(place)}{given}, dtype=torch.bfloat16{trust}).to("cuda")')
    if card.lora:
        lines.append(f"pipe.load_lora_weights({_quoted(place)})")
    defaults = card.manifest["defaults"]
    if card.family.fewest_references:
        lines.append(f'picture = load_image("picture.png").resize(({defaults["width"]}, {defaults["height"]}))')
    call = f"pipe({_arguments(defaults, card.family)})"
    if card.frames:
        fps = manifests.fps_of(card.manifest, card.family)
        return [*lines, f"video = {call}.frames[0]", f'export_to_video(video, "video.mp4", fps={fps:g})']
    return [*lines, f"image = {call}.images[0]"]


def _network_lines(card: Card, place: str) -> list[str]:
    """The code that loads a plain 4-bit network: `from_pretrained` of diffusers 0.42 cannot."""
    name = card.family.component
    root = place if place == one_line(card.title) else f"https://huggingface.co/{place}/blob/main"
    return [
        f"{name} = {card.family.model_class}.from_single_file(",
        f"    {_quoted(f'{root}/{name}/{STEM}.safetensors')},",
        f'    config={_quoted(place)}, subfolder="{name}",',
        f"    quantization_config={BFL_CONFIG}(), dtype=torch.bfloat16,",
        ")",
    ]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _arguments(defaults: Mapping[str, Any], family: Family) -> str:
    """The family's own call of the stock pipeline, as source code."""
    size = {key: defaults[key] for key in ("height", "width", "steps", "guidance")}
    prompt = "207" if "class_labels" in family.text_keys else "a red fox in the snow"
    prompt = "make it a red fox in the snow" if family.fewest_references else prompt
    call = family.pipeline_call(None, [prompt], **size, length=defaults["text_length"])
    call |= family.frames_call(defaults.get("frames", 1))
    if "prompt" in call:
        call["prompt"] = prompt
    given = ["image=picture"] if family.fewest_references else []
    # by name: FLUX.2's first argument is an image
    return ", ".join([*given, *(f"{key}={value!r}" for key, value in call.items())])


def _limits(card: Card) -> str:
    if not card.converted:
        lines = ["It was not tried on every GPU that its 4-bit format has kernels for."]
        if card.quantise.get("container") == "nunchaku":
            lines.append(
                "ComfyUI: `nunchaku.safetensors` has the metadata that the FLUX loader of ComfyUI-nunchaku reads, and "
                "works with ComfyUI's latent format for FLUX (16 channels) only. It was not tried there."
            )
        return "\n".join(f"- {line}" for line in lines)
    f, defaults = card.factor, card.manifest["defaults"]
    phases = (card.trained.get("adapt") or {}).get("phases") or []
    sides = sorted({phase["resolution"] for phase in phases} or {defaults["height"]})
    buckets = (card.trained.get("data") or {}).get("buckets")
    what = f"videos of {defaults['frames']} frames" if card.frames else "pictures"
    shapes = f"{what} of several shapes with the area of these squares" if buckets else "squares"
    trained = f"Trained at {', '.join(f'{side} x {side}' for side in sides)} px ({shapes})."
    if card.frames and not buckets:
        trained += f" The videos had {defaults['frames']} frames."
    for number, phase in enumerate(phases):
        if phase.get("data"):
            trained += f" Phase {number + 1} had pictures of its own (`adapt.phases.{number}.data` in the manifest)."
    if card.adopted:
        side = card.adopted["side"]
        trained = f"Meant for {side} x {side} px. At which sizes it was trained is not known here."
    lines = [
        f"{trained} Other sizes were not tested.",
        f"Height and width must be multiples of {f} px. Some stock pipelines check less and then draw a smaller "
        "picture than they were asked for, without a word.",
        f"Inpainting: put the edges of a mask on multiples of {f} px, the side of a token. A token that is half inside "
        "of a mask mixes both pictures and blurs.",
        "LoRAs of the base model: those of its blocks fit. The keys of the embedder and the head "
        f"({code(card.family.embedder)}, {code(card.family.head)}) have other sizes here, and must be deleted from the "
        "file first.",
        _comfyui(card),
    ]
    if card.references and not card.family.fewest_references:
        lines.insert(
            1, f"Trained with up to {card.references} pictures beside the text too: give them as `image=[...]`."
        )
    if card.frames:
        lines[2:3] = [
            f"The number of frames is one more than a multiple of {card.time}. The stock pipeline changes another "
            "number to such a one, and says so."
        ]
    lines[1:1] = _untold(card)
    return "\n".join(f"- {line}" for line in lines)


def _comfyui(card: Card) -> str:
    """What it takes to draw with the bundle in ComfyUI."""
    if card.family.comfyui and not card.lora and card.format == "none":
        return (
            "ComfyUI draws with it after `dcgen-convert export BUNDLE --to comfyui`, with the nodes that dcgen-convert "
            "brings along (`integrations/comfyui`)."
        )
    return "ComfyUI cannot draw with this bundle: it has no latent format and no decoder for it."


def _adopted(card: Card) -> str:
    """What is known of an adopted model, and what is not."""
    facts = card.adopted
    named = code(facts["pipeline"]) if facts["pipeline"] else "no pipeline class"
    lines = [
        f"The folder names {named}. Nothing was trained: every weight has the bytes of the folder.",
        f"Latents are multiplied by {facts['scaling_factor']:g}, as the config of the autoencoder says.",
        f"Size and timestep shift: {facts['side']} px, {plain(facts['shift'])} (r = {facts['r']:.4g}), from "
        f"{plain(facts['origin'])}. The folder itself does not state them. Other sizes may need another shift.",
        "Not known here: the training data, the recipe, and how good the pictures are.",
        *(f"Not taken over: {plain(note)}." for note in facts["left_out"]),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _untold(card: Card) -> list[str]:
    """What the stock pipeline does with sizes that it is not told, or does not like."""
    if card.layout == "official":
        return []
    trained, across = (int(card.manifest["defaults"][key]) for key in ("height", "width"))
    side = card.family.untold_side(card.factor // (2 if card.adapted else 1), trained)
    width = card.family.default_width or side
    lines = []
    if (side, width) != (trained, across):
        lines.append(
            f"Give height and width in each call, as above. Without them the stock pipeline draws {side} x {width} px, "
            "whatever the model was trained at."
        )
    if own := card.family.reference_side:
        lines.append(f"The stock pipeline gives every reference the area of {own} x {own} px, whatever it draws.")
    if "use_resolution_binning" in _arguments(card.manifest["defaults"], card.family):
        lines.append(
            "Give `use_resolution_binning=False`, as above. Without it the stock pipeline draws the nearest size of a "
            "table of its own, and scales the picture to the size that was asked for, without a word."
        )
    return lines


def _sources(manifest: Mapping[str, Any]) -> str:
    lines = [line for role, record in sorted(manifest["sources"].items()) for line in _source(role, record)]
    return "\n".join([*lines, "", "Hashes of every file, all figures, versions and seeds: `dcgen_manifest.json`."])


def _source(role: str, record: Mapping[str, Any]) -> list[str]:
    repo = lineage.repositories({key: value for key, value in record.items() if key != "base"})
    where = (
        f"[{plain(repo[0])}](https://huggingface.co/{repo[0]})"
        if repo
        else code(lineage.last_name(str(record["name"])))
    )
    revision = f", revision {code(record['revision'])}" if record.get("revision") else ""
    fused = [f"  - LoRA fused: {code(lora['file'])}, strength {lora['scale']}" for lora in record.get("loras", ())]
    rest = _source("completed by", record["base"]) if isinstance(record.get("base"), Mapping) else []
    return [f"- {role}: {where}{revision}", *fused, *rest]


def _licence(manifest: Mapping[str, Any]) -> str:
    lines = []
    for role, stated in sorted(manifest["licence"].items()):
        name = " ".join(plain(stated[key]) for key in FIELDS if key in stated)
        files = f" (files: {', '.join(map(plain, stated['files']))})" if stated.get("files") else ""
        lines.append(f"- {role}: {name}{files}")
    unknown = any(stated.get("license") == "unknown" for stated in manifest["licence"].values())
    note = "Inherited from the sources." + (
        " Where it says unknown, the source states no licence: ask its authors before use." if unknown else ""
    )
    return "\n".join([*lines, "", note])


def _recipe(manifest: Mapping[str, Any]) -> str:
    recipe = lineage.without_places(dict(manifest["recipe"]))
    return block(_yaml(recipe), "yaml")


def _yaml(document: Mapping[str, Any]) -> str:
    """``document`` as YAML, with an escape for each character that would not be seen."""
    text = str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    seen = all(char.isprintable() for char in text.replace("\n", ""))
    return text if seen else str(yaml.safe_dump(document, sort_keys=False))
