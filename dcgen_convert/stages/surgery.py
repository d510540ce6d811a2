"""Stage `surgery`: the source's transformer with the shapes that the new autoencoder asks for.

Only the embedder and the head are made anew, with zeros; their values come from the align stages. Every other tensor
keeps its bytes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.checkpoint import stream
from dcgen_convert.checkpoint.headers import Entry
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import copy_file, write_json
from dcgen_convert.core.journal import Stage
from dcgen_convert.data.images import NOUNS
from dcgen_convert.networks import autoencoders
from dcgen_convert.networks.models import TRANSFORMER
from dcgen_convert.networks.pipelines import require_parts
from dcgen_convert.stages.job import Job


def run(job: Job, stage: Stage) -> None:
    """Writes transformer/ and surgery.json (module names, old and new shapes)."""
    require_parts(job.source)
    for folder in (job.source.vae, job.ae.folder):  # both autoencoders must work before anything is drawn
        axes = autoencoders.load(folder).axes
        if axes != job.family.axes:
            wanted = NOUNS[job.family.axes]
            raise InputError(
                f"the autoencoder {folder} encodes {NOUNS[axes]}, and {job.family.name} models draw {wanted}",
                f"give an autoencoder of {wanted} with --ae",
            )
    config = job.converted_config
    replaced = new_shapes(job, config)
    if job.keeps_latents:
        job.console.say("surgery: SOURCE works on these latents already: its embedder and its head stay as they are")
        replaced = {}
    output = stage.folder / TRANSFORMER
    output.mkdir(exist_ok=True)
    files: dict[Path, dict[str, Entry]] = {}
    for name, entry in sorted(job.source.tensors.items()):
        files.setdefault(entry.file, {})[name] = entry
    with job.console.progress("surgery", len(files), "files") as bar:
        for file, entries in sorted(files.items()):
            if job.source.imported and not entries.keys() & replaced.keys():
                link(file, output / file.name)  # written and checked by stage import, in this run folder
            else:
                rewrite(output / file.name, entries, replaced)
            bar.advance(1)
    for index in job.source.transformer.glob("*.safetensors.index.json"):
        shutil.copyfile(index, output / index.name)
    write_json(output / "config.json", config)
    changed = {
        key: [job.source.config.get(key), value] for key, value in config.items() if job.source.config.get(key) != value
    }
    tensors = {name: [list(job.source.tensors[name].shape), list(shape)] for name, shape in replaced.items()}
    write_json(
        stage.folder / "surgery.json",
        {"config": changed, "replaced": tensors, "untouched": len(job.source.tensors) - len(replaced)},
    )
    stage.metrics.update(replaced=sorted(replaced), untouched=len(job.source.tensors) - len(replaced))
    job.console.say(
        f"surgery: new {', '.join(sorted(replaced)) or 'nothing'}; {stage.metrics['untouched']} tensors untouched; "
        f"config {changed}"
    )


def new_shapes(job: Job, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of the new modules. The model class itself tells them, on the meta device."""
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, job.family.model_class).from_config(config)
    parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    modules = (job.family.embedder, job.family.head)
    replaced = {name: shape for name, shape in parameters.items() if name.rpartition(".")[0] in modules}
    for name, shape in parameters.items():
        entry: Entry | None = job.source.tensors.get(name)
        if entry is None:
            raise InputError(
                f"{job.source.transformer} lacks {name}, which its config asks for", "is the checkpoint complete?"
            )
        if name not in replaced and entry.shape != shape:
            raise InputError(
                f"{name} is {entry.shape} in {job.source.transformer}, its config asks for {shape}",
                "is the config the right one?",
            )
    return replaced


def rewrite(output: Path, entries: dict[str, Entry], replaced: dict[str, tuple[int, ...]]) -> None:
    """Copy one safetensors file, with zeros for the ``replaced`` tensors; InputError for NaN or infinite weights."""
    items = {
        name: stream.Zeros(entry.dtype, replaced[name]) if name in replaced else stream.whole(name, entry)
        for name, entry in entries.items()
    }
    stream.write(output, items, {"format": "pt"})


def link(source: Path, output: Path) -> None:
    """Make ``output`` a hard link to ``source``, or a copy where the file system has no hard links.

    A link is safe: weight files are replaced, never written into.
    """
    output.unlink(missing_ok=True)
    try:
        os.link(source, output)
    except OSError:
        copy_file(source, output)
