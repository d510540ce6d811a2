"""One function per verb. They speak on stderr (`quiet=True`: warnings only), never on stdout, and return a result.

Errors are subclasses of `DcgenError`: `message` says what and where, `hint` what to do next. A fault of this program,
or of a library in a way that we do not know, keeps its own class.

torch is imported only by what needs it, when it is called.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Unpack

from dcgen_convert.api import command
from dcgen_convert.api.order import Order, order, quantisation, require_folders, resolve
from dcgen_convert.api.results import (
    Adopted,
    Cleaned,
    Conversion,
    Inspection,
    Pictures,
    Plan,
    Quantised,
    Runs,
    Verdict,
)
from dcgen_convert.api.settings import JobSettings, Settings
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError, InternalError, explain
from dcgen_convert.core.limits import require as require_range
from dcgen_convert.core.limits import require_text
from dcgen_convert.core.track import require, tracking
from dcgen_convert.ranks import join, launch
from dcgen_convert.ranks.crew import SOLO, Crew
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.settings import leaves


@contextmanager
def explained() -> Iterator[None]:
    """Turn the known exceptions of libraries into `DcgenError`, as the command line does."""
    try:
        yield
    except Exception as exc:
        error = explain(exc)
        if error is exc or isinstance(error, InternalError):
            raise
        raise error from exc


@explained()
def plan(
    source: str | Path,
    *,
    gpu_memory: float | None = None,
    disk: float | None = None,
    measured: str | Path | None = None,
    **settings: Unpack[Settings],
) -> Plan:
    """What a conversion of ``source`` will cost, from configs alone: no weights, no GPU, no torch.

    Args:
        source: recipe, .yaml, catalogue name, folder, .safetensors, .gguf or hub id.
        gpu_memory: GiB per GPU that training must fit in; None: those of a card that is sold as 80 GB.
        disk: GB that are free on the machine that will convert; None: what is free here.
        measured: the file that `rehearse` has written on the machine that will convert. None: assumed rates.
        settings: see `api.settings.Settings`.

    Raises:
        RecipeError, InputError: settings or a source that cannot work.
        AccessError: the source is neither here nor reachable.
    """
    return plan_of(resolve(source, settings, measured), gpu_memory, disk, measured)


def plan_of(
    resolved: Resolved,
    gpu_memory: float | None = None,
    disk: float | None = None,
    measured: str | Path | None = None,
) -> Plan:
    """`plan` of a recipe that is resolved already."""
    from dcgen_convert.planning import plan as planning
    from dcgen_convert.planning import rehearsal

    if measured is not None:
        require_text("measured", str(measured))
    require_range(gpu_memory=gpu_memory, disk=disk)
    memory = planning.GPU_BYTES if gpu_memory is None else gpu_memory * 2**30
    free = shutil.disk_usage(Path.cwd()).free if disk is None else disk * 1e9
    found = None if measured is None else rehearsal.read(Path(measured), resolved.recipe)
    return Plan.of(planning.plan(resolved, memory, free, found))


@explained()
def convert(
    source: str | Path,
    *,
    output: str | Path | None = None,
    run_dir: str | Path | None = None,
    start: str | None = None,
    until: str | None = None,
    force: bool = False,
    quiet: bool = False,
    **settings: Unpack[JobSettings],
) -> Conversion:
    """Convert ``source`` and write a verified bundle. Stages that are done already, and still hold, are skipped.

    With ``gpus`` above 1 or a ``hostfile`` the command dcgen-convert does the work, in processes of its own.

    Args:
        source: recipe, .yaml, catalogue name, folder, .safetensors, .gguf or hub id.
        output: folder of the bundle. None: ./NAME-AE[-FORMAT].
        run_dir: folder of the run's artefacts and log. None: ./runs/NAME-AE[-FORMAT].
        start: run this stage and all after it again.
        until: stop after this stage.
        force: replace a bundle that is already in the output folder.
        quiet: only warnings on stderr.
        settings: see `api.settings.JobSettings`.

    Raises:
        RecipeError, InputError: settings or a source that cannot work, or an output folder that is taken.
        AccessError: a model is neither here nor reachable.
        ResourceError: too little disk, memory or GPUs.
        CheckFailed: the finished bundle differs from its manifest.
    """
    job = order(source, settings, output, run_dir)
    steps = {"start": start, "until": until, "force": force}
    if needs_ranks(job):
        folders = {"output": job.output, "run_dir": job.run_dir}
        values = {**settings, **folders, **steps, "yes": True, "quiet": quiet}
        return Conversion.of(command.run("convert", str(source), values))
    return carry_out(job, console_of(quiet, job.run_dir), start=start, until=until, force=force)


@explained()
def resume(  # noqa: PLR0913  every option of the verb by its name
    run_dir: str | Path,
    *,
    start: str | None = None,
    until: str | None = None,
    force: bool = False,
    gpus: int | None = None,
    hostfile: str | Path | None = None,
    track: Literal["tensorboard", "wandb"] | None = None,
    rank_timeout: float | None = None,
    restarts: int | None = None,
    check: bool | None = None,
    quiet: bool = False,
) -> Conversion:
    """Continue the run in folder ``run_dir``, on as many ranks as before unless told otherwise.

    Args:
        start: run this stage and all after it again.
        until: stop after this stage.
        force: replace a bundle that is already in the output folder.
        gpus, hostfile: the ranks, as in `convert`. None: those of the run's record.
        track, rank_timeout, restarts, check: as in `convert`.
        quiet: only warnings on stderr.

    Raises:
        InputError: no run folder, or a run of another version. What `convert` raises.
    """
    places = {"gpus": gpus, "hostfile": None if hostfile is None else str(hostfile)}
    watched = {"track": track, "rank_timeout": rank_timeout, "restarts": restarts, "check": check}
    steps = {"start": start, "until": until, "force": force}
    job = recorded(Path(run_dir).absolute())
    job = job.on(**places if any(places.values()) else {}, **{k: v for k, v in watched.items() if v is not None})
    if needs_ranks(job):
        return Conversion.of(command.run("resume", str(job.run_dir), {**places, **watched, **steps, "quiet": quiet}))
    return carry_out(job, console_of(quiet, job.run_dir), start=start, until=until, force=force)


def recorded(run_dir: Path) -> Order:
    """The order that the run in ``run_dir`` was started with."""
    from dcgen_convert import conversion

    resolved, output = conversion.recorded(run_dir)
    return Order(resolved, run_dir, output)


def carry_out(
    job: Order,
    console: Console,
    crew: Crew = SOLO,
    *,
    start: str | None = None,
    until: str | None = None,
    force: bool = False,
    consent: Callable[[str], bool] = lambda _: False,
) -> Conversion:
    """Do the conversion in this process. crew: the other ranks. consent: is asked before more than ten minutes of work
    are deleted. The rest: as in `convert`.
    """
    from dcgen_convert import conversion

    recipe = dict(leaves(job.resolved.recipe.model_dump(mode="json")))
    with tracking(console, job.resolved.machine.track, job.run_dir, recipe):
        done = conversion.convert(
            job.resolved,
            job.run_dir,
            job.output,
            console,
            crew=crew,
            start=start,
            until=until,
            force=force,
            consent=consent,
        )
    return Conversion.of(done)


def needs_ranks(job: Order) -> bool:
    """Whether the command must start several ranks. InputError in a process that is one of several itself."""
    require_alone()
    require(job.resolved.machine.track)
    return launch.wanted(job.resolved.machine)


def require_alone() -> None:
    """InputError in a process that is one of several ranks."""
    if join.world() > 1:
        raise InputError(
            "this Python process is one of several ranks, and the API starts the ranks by itself",
            "leave the launcher out and give gpus=N, or start the command dcgen-convert with the launcher",
        )


def console_of(quiet: bool, run_dir: Path | None = None) -> Console:
    """What the functions speak through: lines on stderr, and a log in the run folder."""
    return Console(log_file=run_dir and run_dir / join.log_name(0), quiet=quiet)


@explained()
def quantize(  # noqa: PLR0913  every option of the verb by its name
    source: str | Path,
    *,
    output: str | Path | None = None,
    format: Literal["nvfp4", "int4"] = "nvfp4",
    rank: int = 32,
    calibration: int | None = 64,
    prompts: str | Path | None = None,
    sources: str | Path | None = None,
    resolution: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    dense: str | None = None,
    container: Literal["diffusers", "nunchaku", "bfl"] = "diffusers",
    fuse_qkv: bool = False,
    base: str | None = None,
    loras: Sequence[str] = (),
    quiet: bool = False,
    console: Console | None = None,
) -> Quantised:
    """Quantise ``source`` to 4 bits with SVDQuant, without a conversion, and write a verified bundle.

    Args:
        source: catalogue name, folder, .safetensors, .gguf or hub id.
        output: folder of the bundle. None: ./NAME-FORMAT.
        rank: of the 16-bit branch, a multiple of 16.
        calibration: number of calibration pictures; None: use the weights alone.
        prompts: of these pictures, in any form that `convert` takes. None: the catalogue's, else built-in ones. Of a
            model that edits: as `evaluate` takes them.
        sources: folder of the pictures that a model which edits is given. None: ``prompts`` says them.
        resolution, steps, guidance: side in px and settings of these pictures. None: the catalogue's, else the
            pipeline's own.
        dense: regex of block linears that stay 16-bit. None: none beyond the family's.
        container: "nunchaku" adds the classic single file (FLUX.1); "bfl" is nvfp4 without the 16-bit branch, for
            widths that are no multiples of 128.
        fuse_qkv: quantise q, k and v as one layer, which shares smoothing and down projection.
        base, loras: as in `convert`.
        quiet: only warnings on stderr.
        console: where to speak instead.

    Raises:
        InputError: a source or a setting that cannot work, or an output folder that is not empty.
        AccessError, ResourceError, CheckFailed: as in `convert`.
    """
    from dcgen_convert.quantization import Drawing, Request, quantize_source
    from dcgen_convert.recipe.sources import short_name

    require_folders(output=output, prompts=prompts, sources=sources)
    require_range(resolution=resolution, steps=steps, guidance=guidance, seed=seed)
    section = quantisation(format, rank, calibration, dense, container, fuse_qkv)
    drawing = Drawing(
        calibration is None,
        None if prompts is None else str(prompts),
        resolution,
        steps,
        guidance,
        seed=seed,
        sources=None if sources is None else str(sources),
    )
    target = Path(output or f"{short_name(str(source))}-{section.format}").absolute()
    request = Request(str(source), target, section, drawing, base, loras)
    done = quantize_source(request, console or console_of(quiet))
    return Quantised(**{**done, "bundle": target})


@explained()
def adopt(  # noqa: PLR0913  every option of the verb by its name
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    ae: str | Path | None = None,
    resolution: int | None = None,
    shift: str | float | None = None,
    revision: str | None = None,
    quiet: bool = False,
    console: Console | None = None,
) -> Adopted:
    """Make a verified bundle of a model that the DC-Gen authors published. Nothing is trained.

    Args:
        source: folder, hub id (ORG/NAME), or folder in a repository (ORG/NAME/FOLDER).
        output: folder of the bundle.
        base: pipeline that gives the text encoders, tokenizers and scheduler which ``source`` lacks.
        ae: autoencoder that takes the place of the source's own: alias, folder or hub id.
        resolution: picture side in px. None: that of the authors' code for this autoencoder.
        shift: timestep shift: "flux2", "flux", "model" or a number. None: that of the authors' code.
        revision: of the source on the hub. None: the newest.
        quiet: only warnings on stderr.
        console: where to speak instead.

    Raises:
        InputError: a source that is not known, whose parts are missing or do not fit, or an output folder that is not
            empty.
        AccessError, ResourceError, CheckFailed: as in `convert`.
    """
    from dcgen_convert.bundle.adoption import adopt as adopting
    from dcgen_convert.bundle.authors_folder import Wish

    texts = {"base": base, "ae": ae, "shift": shift}
    named = {key: None if value is None else str(value) for key, value in texts.items()}
    wish = Wish(str(source), resolution=resolution, revision=revision, **named)
    target = Path(output).absolute()
    done = adopting(wish, target, console or console_of(quiet))
    return Adopted(**{**done, "bundle": target})


@explained()
def verify(
    bundle: str | Path,
    *,
    against: str | Path | None = None,
    signed_by: str | Path | None = None,
    issuer: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
    console: Console | None = None,
) -> Verdict:
    """Check hashes, structure and numbers of ``bundle``, then draw a picture in a fresh process.

    Args:
        against: also compare the tensors that must be untouched with this source (folder, catalogue name or hub id).
        signed_by: whose signature the bundle must have: a file with a public key, or the identity of a keyless
            signature. It is looked at before all else.
        issuer: who vouches for that identity. None: that of the forge, for a workflow on GitHub or GitLab.
        trust_remote_code: run the Python files that come with the bundle. Without it, code of others is a difference.
        quiet: only warnings on stderr.
        console: where to speak instead.

    Raises:
        CheckFailed: something differs; the message lists what and where.
        InputError: not a bundle; no public key, an identity without an issuer, or the extra `sign` is not installed.
        AccessError: sigstore cannot be reached, for the signature of an identity.
    """
    from dcgen_convert.bundle import verify as checking

    console = console or console_of(quiet)
    signer = None if signed_by is None else str(signed_by)
    found = checking.verify(
        Path(bundle), console, against, signed_by=signer, issuer=issuer, trust_remote_code=trust_remote_code
    )
    return Verdict(**{**found, "bundle": Path(bundle)})


@explained()
def sample(  # noqa: PLR0913  every option of the verb by its name
    bundle: str | Path,
    prompts: str | Sequence[str],
    *,
    output: str | Path = "samples",
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    count: int = 1,
    image: str | Path | Sequence[str | Path] = (),
    trust_remote_code: bool = False,
    quiet: bool = False,
    console: Console | None = None,
) -> Pictures:
    """Draw ``count`` pictures of every prompt with ``bundle`` into the folder ``output``: PNG files; videos as .mp4.

    A 4-bit bundle runs on any machine: where its kernels cannot run, its weights are dequantised.

    Args:
        prompts: one text or several.
        height, width: px. None: the bundle's own.
        steps, guidance: None: the bundle's own. A guidance of 1 disables classifier-free guidance.
        seed: of the first picture; picture i has ``seed`` + i.
        image: the picture that a model which edits is given with every prompt, or several, in their order.
        trust_remote_code: run the Python files that come with the bundle.
        quiet: only warnings on stderr.
        console: where to speak instead.

    Raises:
        InputError: nothing to draw, a size that does not fit, not a bundle; no picture to edit, or too many.
        CheckFailed: the bundle is unfinished, or a picture is not finite.
    """
    from dcgen_convert.bundle import sample as drawing

    require_folders(output=output)
    require_range(height=height, width=width, steps=steps, guidance=guidance, seed=seed, count=count)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    done = drawing.sample(
        Path(bundle),
        texts,
        Path(output),
        console or console_of(quiet),
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        seed=seed,
        count=count,
        images=[Path(one).expanduser() for one in ([image] if isinstance(image, str | Path) else image)],
        trust_remote_code=trust_remote_code,
    )
    return Pictures(**{**done, "images": [Path(image) for image in done["images"]]})


@explained()
def inspect(path: str | Path) -> Inspection:
    """What a checkpoint, folder or bundle is, from JSON files and headers alone: no weights, no torch.

    Raises:
        InputError: nothing there, a pickle, a damaged file.
    """
    from dcgen_convert.bundle import inspection

    facts = inspection.inspect(Path(path))
    return Inspection(Path(facts.pop("path")), facts.pop("kind"), facts.pop("family"), facts)


@explained()
def runs(folder: str | Path = "runs") -> Runs:
    """The run folders in ``folder``, with state, size and age. Nothing is changed.

    Raises:
        InputError: no such folder.
    """
    from dcgen_convert.stages.runs import runs_in

    return Runs(runs_in(Path(folder)))


@explained()
def clean(
    run_dir: str | Path,
    *,
    keep: Literal["resume", "bundle"] = "resume",
    delete: bool = False,
    quiet: bool = False,
    console: Console | None = None,
) -> Cleaned:
    """Say what the run folder ``run_dir`` holds and what still needs it, and remove what nothing needs.

    The bundle, and what an unfinished stage needs, are never removed; nor are the records that `report` reads.

    Args:
        keep: "resume": remove what no stage reads, such as the checkpoints of finished trainings. "bundle": also remove
            what all stages that read it have read.
        delete: remove it; else it is only said.
        quiet: only warnings on stderr.
        console: where to speak instead.

    Raises:
        InputError: no run folder, or a run of another version.
        ResourceError: a process works in it.
    """
    from dcgen_convert import conversion
    from dcgen_convert.core.journal import Run
    from dcgen_convert.stages import clean as cleaning

    resolved, output = conversion.recorded(Path(run_dir))
    run = Run(Path(run_dir), console or console_of(quiet), check=False)
    with run.locked():
        rows = cleaning.look(run, resolved.recipe, output, keep)
        document = cleaning.describe(rows)
        if delete:
            cleaning.remove(run, rows)
    return Cleaned(Path(run_dir), keep, **document, status="done" if delete else "planned")
