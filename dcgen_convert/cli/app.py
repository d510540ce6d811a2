"""The command line: parse, call one function, render. No work here, and no heavy import: `--help` answers in < 0.5 s.

`convert` is the default verb: `dcgen-convert flux-krea --ae dc-ae-f64 --quantize nvfp4` is the product in one line.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any, Literal

import click
from click.shell_completion import CompletionItem

from dcgen_convert.cli import completion
from dcgen_convert.cli.options import (
    ADOPT,
    ANY_TEXT,
    CONTEXT,
    EVALUATE,
    FOLDER,
    FORCE,
    FROM,
    JOB,
    MACHINE,
    OUTPUT,
    PLACE,
    QUANTIZE,
    RANKS,
    RECIPE,
    SOURCE,
    TRUST,
    UNTIL,
    Number,
    Whole,
    argument,
    option,
    output_options,
    stack,
)
from dcgen_convert.cli.session import Session, drain, ignore_signals
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.version import __version__
from dcgen_convert.recipe import shelf


class DefaultVerb(click.Group):
    """A group whose first word may be a SOURCE instead of a verb: then `convert` is meant.

    The decision is taken in `parse_args`: `resolve_command` comes too late when an option comes first.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            if args[0].startswith("-") or _may_be_source(args[0]):
                args = ["convert", *args]
            elif not ctx.resilient_parsing:
                known = [*self.commands, *shelf.names(), *_source_names()]
                hits = difflib.get_close_matches(args[0], known, n=1, cutoff=0.5)
                raise InputError(
                    f"{args[0]!r} is neither a verb nor a source" + (f". Did you mean {hits[0]!r}?" if hits else ""),
                    "dcgen-convert --help lists the verbs, dcgen-convert recipes list the sources",
                )
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return super().shell_complete(ctx, incomplete) + completion.sources(ctx, None, incomplete)


def _source_names() -> list[str]:
    from dcgen_convert.families.catalog import SOURCES

    return list(SOURCES)


def _may_be_source(word: str) -> bool:
    """A known recipe or source, an existing path, a hub id, a .yaml or a .safetensors."""
    looks = (
        word.endswith((".yaml", ".yml", ".safetensors", ".gguf"))
        or word.count("/") == 1
        or word.startswith(("/", "./", "../", "~"))
    )
    return looks or word in shelf.names() or word in _source_names() or Path(word).exists()


@click.group(cls=DefaultVerb, context_settings=CONTEXT, no_args_is_help=True)
@click.version_option(__version__, prog_name="dcgen-convert", message="%(prog)s %(version)s")
def cli() -> None:
    """Convert a trained latent diffusion transformer to a deep-compression autoencoder, and ship a verified bundle.

    `convert` is the default verb:  dcgen-convert flux-krea --ae dc-ae-f64 --quantize nvfp4
    """


@cli.command(context_settings=CONTEXT, short_help="Convert a model and write a verified bundle.")
@SOURCE
@stack(RECIPE + MACHINE + JOB)
@option("-o", "--output", metavar="DIR", type=PLACE, help="Folder of the bundle. Default: ./NAME-AE[-FORMAT].")
@option(
    "--run-dir",
    metavar="DIR",
    type=PLACE,
    help="Folder of the run's artefacts. Default: ./runs/NAME-AE[-FORMAT].",
)
@FROM
@UNTIL
@FORCE
@option("--push-to", metavar="REPO", help="Upload the finished bundle to this hub repository. Default: off.")
@option("--private", is_flag=True, help="Make the repository of --push-to private. Default: public.")
@option("-y", "--yes", is_flag=True, help="Do not ask before a long job. Default: ask on a terminal.")
@option("--dry-run", is_flag=True, help="Only plan, as the verb plan does. Default: off.")
@stack(OUTPUT)
@click.pass_obj
def convert(session: Session, source: str, **values: Any) -> int:
    """Convert SOURCE (recipe, .yaml, catalogue name, folder, .safetensors, .gguf or hub id) and write a verified
    bundle."""
    from dcgen_convert.cli import verbs

    return verbs.convert(session, source, values)


@cli.command(context_settings=CONTEXT, short_help="Say what a conversion will cost.")
@SOURCE
@stack(RECIPE + MACHINE)
@option(
    "--gpu-memory",
    metavar="GIB",
    type=Number(min=0, min_open=True),
    help="GiB per GPU that training must fit in. Default: 79.1, those of a card sold as 80 GB.",
)
@option(
    "--disk",
    metavar="GB",
    type=Number(min=0, min_open=True),
    help="Free disk space, in GB, of the machine that will convert. Default: what is free here.",
)
@option(
    "--measured",
    metavar="FILE",
    type=PLACE,
    help="File that `rehearse` has written on the machine that will convert. Default: assumed rates.",
)
@stack(OUTPUT)
@click.pass_obj
def plan(session: Session, source: str, **values: Any) -> int:
    """Say what a conversion will cost: tokens, speed-up, memory, disk, downloads, hours; and where each setting comes
    from."""
    from dcgen_convert.cli import verbs

    return verbs.plan(session, source, values)


@cli.command(context_settings=CONTEXT, short_help="Run every stage at full size on a few pictures.")
@SOURCE
@stack(RECIPE + MACHINE + JOB)
@option(
    "--random",
    is_flag=True,
    help="Random weights of the right sizes in place of SOURCE, a catalogue name, and of the autoencoder: nothing is "
    "downloaded. Default: off.",
)
@option(
    "--pictures",
    metavar="N",
    type=Whole(min=2),
    help="Pictures to rehearse with. Default: 2, or as many as the run draws at once if that takes a minute at most.",
)
@option(
    "--steps",
    metavar="N",
    type=Whole(min=2),
    help="Drawing steps, and steps of each training. Default: 2, and more of a training whose steps are short.",
)
@option(
    "--run-dir",
    metavar="DIR",
    type=PLACE,
    help="Folder of the rehearsal; it takes rehearsal.json. Default: ./runs/NAME-AE[-FORMAT]-rehearsal.",
)
@stack(OUTPUT)
@click.pass_obj
def rehearse(session: Session, source: str, **values: Any) -> int:
    """Run every stage at full size on a few pictures, and say what the real run will take: seconds, memory, hours."""
    from dcgen_convert.cli import verbs

    return verbs.rehearse(session, source, values)


@cli.command(context_settings=CONTEXT, short_help="Quantise a model to 4 bits without a conversion.")
@SOURCE
@stack(QUANTIZE)
@stack(OUTPUT)
@click.pass_obj
def quantize(session: Session, source: str, **values: Any) -> int:
    """Quantise SOURCE to 4 bits with SVDQuant, without a conversion."""
    from dcgen_convert.cli import verbs

    return verbs.quantize(session, source, values)


@cli.command(context_settings=CONTEXT, short_help="Make a bundle of a model of the DC-Gen authors.")
@SOURCE
@option("-o", "--output", metavar="DIR", type=PLACE, required=True, help="Folder of the bundle.")
@stack(ADOPT)
@stack(OUTPUT)
@click.pass_obj
def adopt(session: Session, source: str, **values: Any) -> int:
    """Make a verified bundle of SOURCE, a folder or hub id of the DC-Gen authors (ORG/NAME or ORG/NAME/FOLDER).
    Nothing is trained."""
    from dcgen_convert.cli import verbs

    return verbs.adopt(session, source, values)


@cli.command(context_settings=CONTEXT, short_help="Continue a run.")
@argument("run", type=FOLDER)
@FROM
@UNTIL
@FORCE
@stack(RANKS + JOB)
@stack(OUTPUT)
@click.pass_obj
def resume(session: Session, run: str, **values: Any) -> int:
    """Continue the run in folder RUN, with as many ranks as before unless an option says otherwise."""
    from dcgen_convert.cli import verbs

    return verbs.resume(session, Path(run).absolute(), values)


@cli.command(context_settings=CONTEXT, short_help="Say what a file, a folder or a bundle is.")
@argument("path", type=PLACE)
@stack(OUTPUT)
@click.pass_obj
def inspect(session: Session, path: str, **values: Any) -> int:
    """Say what a checkpoint, folder or bundle is: family, sizes, autoencoder, LoRA, quantisation, licences, GPUs that
    run it."""
    console = session.begin(**output_options(values))
    from dcgen_convert.api import calls
    from dcgen_convert.bundle import inspection

    found = calls.inspect(path).document()
    console.result(found, inspection.render(found))
    return 0


@cli.command(context_settings=CONTEXT, short_help="Check a bundle, and draw a picture with it.")
@argument("bundle", type=FOLDER)
@option(
    "--against",
    metavar="SOURCE",
    type=PLACE,
    help="Also compare untouched tensors with this source. Default: off.",
)
@option(
    "--signed-by",
    metavar="FILE|IDENTITY",
    help="Public key whose signature BUNDLE must have; of a keyless signature an e-mail address, or the address of a "
    "CI workflow. Default: off.",
)
@option(
    "--issuer",
    metavar="URL",
    help="Who vouches for IDENTITY. Default: that of the forge, for a workflow on GitHub or GitLab.",
)
@TRUST
@stack(OUTPUT)
@click.pass_obj
def verify(session: Session, bundle: str, **values: Any) -> int:
    """Check hashes, structure and numbers of BUNDLE, then draw a picture in a fresh process. Exit 1 if something
    differs."""
    console = session.begin(**output_options(values))
    from dcgen_convert.api import calls

    found = calls.verify(bundle, **values, console=console)
    console.result(found.document(), bundle)
    return 0


@cli.command(context_settings=CONTEXT, short_help="Draw pictures or videos with a bundle.")
@argument("bundle", type=FOLDER)
@option(
    "-p",
    "--prompt",
    "prompts",
    multiple=True,
    required=True,
    metavar="PROMPT",
    type=ANY_TEXT,
    help="Text of a picture; repeatable. For a model that edits, an instruction.",
)
@option(
    "--image",
    multiple=True,
    metavar="FILE",
    type=PLACE,
    help="Picture to edit, for a model that edits; repeatable where it takes several. Default: none.",
)
@option(
    "-o",
    "--output",
    metavar="DIR",
    type=PLACE,
    default="samples",
    show_default=True,
    help="Folder of the pictures.",
)
@option("--height", metavar="PX", type=Whole(min=1), help="Height in px. Default: the bundle's size.")
@option("--width", metavar="PX", type=Whole(min=1), help="Width in px. Default: the bundle's size.")
@option("--steps", metavar="N", type=Whole(min=1), help="Denoising steps. Default: the bundle's.")
@option(
    "--guidance",
    metavar="G",
    type=Number(min=0),
    help="Guidance scale. Default: the bundle's; 1 disables CFG.",
)
@option("--seed", metavar="N", type=Whole(min=0), default=0, show_default=True, help="Seed of the first picture.")
@option("-n", "--count", metavar="N", type=Whole(min=1), default=1, show_default=True, help="Pictures per prompt.")
@TRUST
@stack(OUTPUT)
@click.pass_obj
def sample(session: Session, bundle: str, prompts: tuple[str, ...], output: str, **values: Any) -> int:
    """Draw pictures or videos with BUNDLE on any machine. Where its 4-bit kernels cannot run, its weights are
    dequantised."""
    console = session.begin(**output_options(values))
    from dcgen_convert.api import calls

    drawn = calls.sample(bundle, prompts, output=output, console=console, **values)
    console.result(drawn.document(), "\n".join(map(str, drawn.images)))
    return 0


@cli.command(context_settings=CONTEXT, short_help="Compare the pictures of a bundle with its base's.")
@argument("bundle", type=FOLDER)
@stack(EVALUATE)
@stack(OUTPUT)
@click.pass_obj
def evaluate(session: Session, bundle: str, **values: Any) -> int:
    """Judge BUNDLE by its pictures: beside its base, on the same prompts and seeds. Exit 1 if a gate is not passed."""
    from dcgen_convert.cli import verbs

    return verbs.evaluate(session, bundle, values)


@cli.command(context_settings=CONTEXT, short_help="Write an HTML report of a run.")
@argument("run", type=FOLDER)
@stack(OUTPUT)
@click.pass_obj
def report(session: Session, run: str, **values: Any) -> int:
    """Write an HTML report of the run in folder RUN: pictures, losses, gap of every block, metrics, times."""
    console = session.begin(**output_options(values))
    from dcgen_convert.evaluation.report import write_report

    path = write_report(Path(run))
    console.result({"schema": "dcgen.result/1", "status": "done", "report": str(path)}, str(path))
    return 0


@cli.command(context_settings=CONTEXT, short_help="List the run folders in a folder.")
@argument("folder", type=PLACE, default="runs")
@stack(OUTPUT)
@click.pass_obj
def runs(session: Session, folder: str, **values: Any) -> int:
    """List the run folders in FOLDER (default: ./runs) with state, size, age and the last stage that is done."""
    console = session.begin(**output_options(values))
    from dcgen_convert.api import calls
    from dcgen_convert.cli import verbs

    found = calls.runs(folder)
    console.result(found.document(), verbs.runs_text(found, folder))
    return 0


@cli.command(context_settings=CONTEXT, short_help="Remove what nothing needs from a run folder.")
@argument("run", type=FOLDER)
@option(
    "--keep",
    type=click.Choice(["resume", "bundle"]),
    default="resume",
    show_default=True,
    help="resume: all that a stage reads stays; bundle: only what a stage that is not done must read stays.",
)
@option("-y", "--yes", is_flag=True, help="Remove it. Default: ask on a terminal, else only show the table.")
@stack(OUTPUT)
@click.pass_obj
def clean(session: Session, run: str, keep: Literal["resume", "bundle"], yes: bool, **values: Any) -> int:
    """Say what the run folder RUN holds and what still needs it, and remove what nothing needs. The bundle always
    stays."""
    console = session.begin(**output_options(values))
    from dcgen_convert.cli import verbs

    return verbs.clean(console, run, keep, yes)


@cli.command(context_settings=CONTEXT, short_help="Upload a bundle to the hub.")
@argument("bundle", type=FOLDER)
@argument("repo")
@option("--private", is_flag=True, help="Make the repository private. Default: public.")
@stack(OUTPUT)
@click.pass_obj
def push(session: Session, bundle: str, repo: str, private: bool, **values: Any) -> int:
    """Upload BUNDLE with its model card to the hub repository REPO. It needs HF_TOKEN."""
    console = session.begin(**output_options(values))
    from dcgen_convert.bundle.push import push as upload

    url = upload(Path(bundle), repo, private, console)
    console.result({"schema": "dcgen.result/1", "status": "done", "repository": repo, "url": url}, str(url or repo))
    return 0


@cli.command(context_settings=CONTEXT, short_help="Say what this machine can do.")
@option(
    "--run-dir",
    metavar="DIR",
    type=PLACE,
    help="Also try whether DIR, which need not exist yet, can hold a run: locks, rename, fsync, links, file sizes, "
    "space. Default: off.",
)
@stack(OUTPUT)
@click.pass_obj
def doctor(session: Session, run_dir: str | None, **values: Any) -> int:
    """Say what this machine can do: GPUs, kernels, DeepSpeed ops, disk, hub access."""
    console = session.begin(**output_options(values))
    from dcgen_convert.cli import doctor as checks

    found = checks.examine(None if run_dir is None else Path(run_dir))
    console.result({"schema": "dcgen.doctor/1", "status": "done", "checks": found}, checks.render(found))
    return 0


@cli.command("completion", context_settings=CONTEXT, short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(completion.SHELLS))
def completion_script(shell: str) -> int:
    """Print the completion script of SHELL:  eval "$(dcgen-convert completion bash)"."""
    click.echo(completion.script(cli, shell))
    return 0


def _register() -> None:
    from dcgen_convert.cli.benchmark_verb import benchmark
    from dcgen_convert.cli.export_verb import export
    from dcgen_convert.cli.recipes_verb import recipes
    from dcgen_convert.cli.serve_verb import serve
    from dcgen_convert.cli.sign_verb import sign

    cli.add_command(benchmark)
    cli.add_command(export)
    cli.add_command(recipes)
    cli.add_command(serve)
    cli.add_command(sign)


_register()


def main(argv: list[str] | None = None) -> None:
    """Entry point: run the verb and leave with the right exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    session = Session(arguments)
    try:
        session.listen()
        code = _run(session, arguments)
    except BaseException as exc:  # noqa: BLE001  a second Ctrl-C while the first was being explained
        code = session.fail(exc)
    ignore_signals()
    session.leave(code)
    drain()
    sys.exit(code)


def _run(session: Session, arguments: list[str]) -> int:
    """The exit code of a verb, whatever happens in it."""
    try:
        code = cli.main(arguments, prog_name="dcgen-convert", standalone_mode=False, obj=session)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.ctx.get_help(), err=True)
        code = exc.exit_code
    except SystemExit as exc:
        # Without standalone mode click exits by itself only after EPIPE: the reader of the help has read enough. It has
        # then put a private class in stdout's place.
        code = 0 if "PacifyFlushWrapper" in type(sys.stdout).__name__ else session.fail(exc)
    except BaseException as exc:  # noqa: BLE001  every failure leaves through the one table
        code = session.fail(exc)
    return code if isinstance(code, int) else 0
