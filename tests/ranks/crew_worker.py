"""A program of several ranks with the real command line around it, and the means to start and watch them.

Each rank is `command` with the arguments crew RUN '{"rank0": "share", "member": "sleep"}'. Rank 0 shares one task whose
part on each rank is named: "count", "sleep" (interruptible), "nap" (6 s of short pieces), "load" and "compile" (12 s of
one piece), "collective" (gloo, waits in C++),
"wait-in-collective", "steps-then-N" (see `steps`), "fail" (InputError), "crash" (InternalError).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
from warm import WarmProcess, environment

LONG = 4.0  # seconds without progress that `start(stall=LONG)` tolerates
READY = "ready-{}"  # written by a rank when its part begins


def part(kind: str, run: Path, rank: int, bar) -> None:  # noqa: C901  one branch per kind of task
    (run / READY.format(rank)).touch()
    if kind == "count":
        bar.advance(5)
    elif kind == "sleep":
        time.sleep(120)
    elif kind == "nap":
        work(6)
    elif kind == "load":
        load(run / "weights")
    elif kind == "compile":
        compiler = "import time; end = time.monotonic() + 12\nwhile time.monotonic() < end: pass"
        subprocess.run([sys.executable, "-c", compiler], check=True)
    elif kind == "fail":
        from dcgen_convert.core.errors import InputError

        raise InputError("the picture cannot be read", "replace it")
    elif kind == "crash":
        raise ZeroDivisionError("a fault of this program")
    elif kind == "collective":
        import torch

        meet()
        while True:
            torch.distributed.barrier()
            time.sleep(0 if rank else 600)  # rank 0 is the one that keeps the others waiting
    elif kind == "wait-in-collective":
        import torch

        meet()
        for _ in range(1 if rank else 2):
            torch.distributed.barrier()
        work(120)
    elif kind.startswith("steps-then-"):
        steps(rank, int(kind.rpartition("-")[2]))


def load(file: Path) -> None:
    """Read 12 s long, 40 MiB/s."""
    file.write_bytes(bytes(4 << 20))
    for _ in range(120):
        file.read_bytes()
        time.sleep(0.1)


def work(seconds: float) -> None:
    """Many short pieces."""
    from dcgen_convert.core import pulse

    for _ in range(int(seconds / 0.1)):
        pulse.bump()
        time.sleep(0.1)


def meet() -> None:
    """The ranks' process group, as training makes it."""
    from dcgen_convert.train import distributed

    with distributed.launch_environment():
        distributed.join()


def steps(rank: int, guilty: int) -> None:
    """Steps in lockstep; then rank 0 has much to do while the others wait for it; then one rank hangs."""
    import torch

    from dcgen_convert.core import pulse

    meet()
    for _ in range(10):
        torch.distributed.barrier()
        pulse.bump()
        time.sleep(0.05)
    work(0 if rank else 2 * LONG)
    torch.distributed.barrier()
    if rank == guilty:
        hang()
    torch.distributed.barrier()


def hang() -> None:
    time.sleep(600)


def command() -> None:
    from dcgen_convert.cli import app
    from dcgen_convert.cli.options import OUTPUT, output_options, stack
    from dcgen_convert.ranks import link

    @app.cli.command("crew")
    @click.argument("run")
    @click.argument("parts")
    @stack(OUTPUT)
    @click.pass_obj
    def crew_verb(session, run: str, parts: str, **values) -> int:
        kinds, path = json.loads(parts), Path(run)
        console = session.begin(**output_options(values), run_dir=path)
        link.COMING = kinds.get("coming", link.COMING)
        crew = session.join(kinds.get("timeout", link.SILENCE))
        if crew.rank:
            return crew.serve(lambda document, task, arguments: part(arguments["kind"], path, crew.rank, crew))
        crew.introduce({})
        with console.progress("work", 5 * crew.world, "piece") as bar:
            if kinds.get("member"):
                with crew.share("part", bar, kind=kinds["member"]):
                    part(kinds["rank0"], path, 0, bar)
            else:
                part(kinds["rank0"], path, 0, bar)
        console.result({"done": bar.done}, f"done {bar.done}")
        return 0

    app.main(sys.argv[1:])


def start(run: Path, count: int, **parts: str | float) -> list[WarmProcess]:
    """``count`` ranks as srun starts them: nothing watches over them but they themselves."""
    from dcgen_convert.ranks.join import free_port

    run.mkdir(exist_ok=True)
    port = free_port()
    env = {key: value for key, value in environment().items() if not key.startswith(("SLURM_", "DCGEN_"))}
    started = []
    for rank in range(count):
        step = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": count, "SLURM_LOCALID": rank, "MASTER_PORT": port}
        place = {key: str(value) for key, value in step.items()} | {"SLURM_STEP_NODELIST": "localhost"}
        started.append(WarmProcess(command, ["crew", str(run), json.dumps(parts)], env | place))
    return started


def wait_ready(run: Path, started: list[WarmProcess], ranks, seconds: float = 480) -> None:
    """Wait until those ranks have begun their parts."""
    deadline = time.monotonic() + seconds
    while not all((run / READY.format(rank)).exists() for rank in ranks):
        assert all(process.poll() is None for process in started), [
            p.communicate() for p in started if p.poll() is not None
        ]
        assert time.monotonic() < deadline, "the ranks did not begin"
        time.sleep(0.02)


def finish(started: list[WarmProcess], seconds: float) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of every rank; AssertionError when one lives on after ``seconds``."""
    deadline, ended = time.monotonic() + seconds, []
    try:
        for process in started:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            ended.append((process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return ended
