"""The page of `serve`, with gradio (extra `serve`): for one machine, and without a request to any other.

It listens on the loopback interface only. A browser may load nothing from elsewhere (Content-Security-Policy), and the
names of other hosts are refused, so that no page of a stranger can reach it. gradio's telemetry is off.
"""

from __future__ import annotations

import atexit
import errno
import html
import os
import shutil
import socket
import tempfile
import threading
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL.Image import Image

from dcgen_convert.core import errors, limits
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.data import videos
from dcgen_convert.judging.halves import Fields, Half, Outcome, Size

FOLDER = "GRADIO_TEMP_DIR"
HOST = "127.0.0.1"
NAMES = [HOST, "localhost"]  # as which a browser may know it
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # gradio's page holds scripts and styles
EXACT = 2**53 - 1  # the largest number up to which JavaScript knows all whole ones
DAY = 86_400  # seconds that pictures are kept while the page runs; they all go when it ends
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # those of the machine


@cache
def library() -> ModuleType:
    """gradio, with its telemetry off, and a folder for its pictures that ends with the process.

    Raises:
        InputError: the extra `serve` is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ[FOLDER] = folder = tempfile.mkdtemp(prefix="dcgen-serve-")  # else one that all users share
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        import gradio
    except ImportError as error:
        raise InputError(
            f"the page needs the package {error.name}, which is not installed", "pip install 'dcgen-convert[serve]'"
        ) from error
    return gradio


def listening(port: int) -> socket.socket:
    """A socket of the loopback interface at ``port``; 0: at a free one.

    Raises:
        ResourceError: the port is taken, or may not be used.
    """
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        line.bind((HOST, port))
        line.listen()
    except OSError as error:
        line.close()
        taken = (
            "is taken by another program" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        )
        raise ResourceError(f"port {port} of {HOST} {taken}", "--port 0 takes a free one") from error
    return line


class Page:
    """The page of a bundle, and of its base where there is one.

    Args:
        told: text above the fields. sizes: (width, height) in px, the first one is shown at the start.
        steps, guidance: shown at the start.
    """

    def __init__(
        self,
        converted: Half,
        base: Half | None,
        *,
        told: str,
        sizes: Sequence[Size],
        steps: int,
        guidance: float,
        console: Console,
    ) -> None:
        self.converted, self.base, self.console = converted, base, console
        self.sizes = {f"{width} x {height}": (width, height) for width, height in sizes}
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self._blocks = self._build(library(), told, steps, guidance)

    def start(self, line: socket.socket) -> str:
        """Answer at a listening socket, in a thread of its own; returns the address."""
        import fastapi
        import uvicorn
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        gradio, port = library(), line.getsockname()[1]
        app = fastapi.FastAPI(openapi_url=None)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=NAMES)

        @app.middleware("http")
        async def policy(request: Any, call_next: Any) -> Any:
            answer = await call_next(request)
            answer.headers["Content-Security-Policy"] = POLICY
            return answer

        gradio.mount_gradio_app(
            app,
            self._blocks,
            path="/",
            server_name=HOST,
            server_port=port,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            allowed_paths=[os.environ[FOLDER]],  # where `_shown` writes videos
            theme=gradio.themes.Default(**FONTS),
        )
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [line]}, name="page", daemon=True)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.05)
            if not self._thread.is_alive():
                raise ResourceError("the page could not start", "run the command again with -v")
        return f"http://{HOST}:{port}/"

    def wait(self) -> None:
        """Until somebody closes the page, or Ctrl-C."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(1)

    def close(self) -> None:
        """End the page, and remove its pictures."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(5)
            self._server.force_exit = True
            self._thread.join()

    def _build(self, gradio: ModuleType, told: str, steps: int, guidance: float) -> Any:
        family, first = self.converted.family, next(iter(self.sizes))
        with gradio.Blocks(title=self.converted.name, analytics_enabled=False, delete_cache=(DAY, DAY)) as blocks:
            gradio.Markdown(told)
            with gradio.Row():
                with gradio.Column(scale=3):
                    moving = family.axes == 3
                    text = "instruction" if family.fewest_references and not moving else "prompt"
                    given = "first frame" if moving else "picture to edit"
                    prompt = gradio.Textbox(label=text, lines=3, elem_id="prompt")
                    several = "multiple" if family.references > 1 else "single"
                    files = gradio.File(
                        label="pictures to edit" if family.references > 1 else given,
                        file_count=several,
                        file_types=["image"],
                        visible=bool(family.references),
                        elem_id="files",
                    )
                with gradio.Column(scale=2):
                    with gradio.Row():
                        size = gradio.Dropdown(list(self.sizes), value=first, label="size in px, width x height")
                        seed = gradio.Number(0, label="seed", precision=0, minimum=0, maximum=EXACT, elem_id="seed")
                    with gradio.Row():
                        many = gradio.Number(steps, label="steps", precision=0, minimum=1, elem_id="steps")
                        scale = gradio.Number(guidance, label="guidance", minimum=0, elem_id="guidance")
                    both = gradio.Checkbox(
                        self.base is not None, label="draw with the base too", visible=self.base is not None
                    )
                    button = gradio.Button("Draw", variant="primary", elem_id="draw")
            with gradio.Row():
                shown = [self._column(gradio, half) for half in (self.converted, self.base) if half]
            outputs = [part for column in shown for part in column]
            button.click(
                self._draw,
                inputs=[prompt, size, seed, many, scale, files, both],
                outputs=outputs,
                api_name="draw",
                show_progress_on=[picture for picture, _ in shown],
                concurrency_limit=1,
            )
        return blocks

    def _column(self, gradio: ModuleType, half: Half) -> tuple[Any, Any]:
        """Where the picture of one model and its time stand."""
        side = "converted" if half is self.converted else "base"
        with gradio.Column():
            common = {"label": f"{side}: {half.name}", "interactive": False, "elem_id": side}
            if half.family.axes == 3:
                picture = gradio.Video(**common, format="mp4", buttons=["download"], loop=True, autoplay=True)
            else:  # without the button that uploads to a hub
                picture = gradio.Image(**common, format="png", buttons=["download", "fullscreen"])
            return picture, gradio.Markdown(elem_id=f"{side}-time")

    def _draw(
        self,
        prompt: str,
        size: str,
        seed: float,
        steps: float,
        guidance: float,
        files: str | list[str] | None,
        both: bool,
    ) -> Iterator[Any]:
        """The pictures with their times, one model after the other; what is not drawn yet is empty."""
        given = [files] if isinstance(files, str) else files or []
        halves = [self.converted, *([self.base] if self.base else [])]
        shown: list[Any] = [None, ""] * len(halves)
        with self._explained():
            limits.require(seed=seed, steps=steps, guidance=guidance)
            wanted = Fields(prompt, self.sizes[size], int(seed), int(steps), guidance, [Path(one) for one in given])
            for number, half in enumerate(halves):
                if half is self.converted or both:
                    drawn = half.draw(wanted)
                    shown[2 * number : 2 * number + 2] = _shown(drawn), told_of(drawn, wanted)
                    yield tuple(shown)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Show what went wrong as one sentence, on the page and in the terminal."""
        try:
            yield
        except Exception as exc:
            error = errors.explain(exc)
            self.console.error(error.message, error.hint)
            self.console.traceback(traceback.format_exc())
            sentence = html.escape(error.message, quote=False)  # the hint is about options of the command line
            raise library().Error(sentence, duration=None, print_exception=False) from exc


def _shown(drawn: Outcome) -> Any:
    """The picture; of a video the name of an .mp4, which goes when the page ends."""
    if isinstance(drawn.picture, Image):
        return drawn.picture
    file = Path(os.environ[FOLDER], f"{uuid.uuid4().hex}.mp4")
    videos.write_mp4(drawn.picture, file, drawn.fps)
    return str(file)


def told_of(drawn: Outcome, wanted: Fields) -> str:
    """How a picture was drawn, and how long it took."""
    width, height = drawn.size
    steps = f"{wanted.steps} step" + "s" * (wanted.steps != 1)
    return f"{width} x {height} px, {steps}, seed {wanted.seed}: {drawn.seconds:.2f} s"
