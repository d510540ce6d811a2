"""A headless Chromium that a test drives through its debugging pipe: no driver, no package.

Messages of the Chrome DevTools Protocol are JSON that end with a zero byte: file descriptor 3 takes them, 4 gives them.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab.

    Args:
        profile: an empty folder.

    Attributes:
        requests: addresses of all that the page has asked for, also of what was refused.
    """

    def __init__(self, profile: Path):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--window-size=1280,1000"]

        def pipes() -> None:
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)]  # neither is 3 nor 4
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        arguments = [PROGRAM, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(arguments, preexec_fn=pipes, close_fds=False, **silent)
        os.close(to_read)
        os.close(to_write)
        self._count, self._rest, self._session = 0, b"", None
        self.requests: list[str] = []
        tab = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        self._ask("Network.enable")
        self._ask("Page.enable")

    def open(self, address: str) -> None:
        self._ask("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 300) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.2)
        raise AssertionError(f"not true in {seconds} s: {script}; the page says {self.run('document.body.innerText')}")

    def write(self, selector: str, text: str) -> None:
        """Type a text into a field, in place of what stands there."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.until(f"{field} !== null")
        self.run(f"{field}.focus(), {field}.select()")
        self._ask("Input.insertText", text=text)

    def give(self, selector: str, *files: Path) -> None:
        """Choose files in a file field."""
        root = self._ask("DOM.getDocument")["root"]["nodeId"]
        node = self._ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._ask("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def bytes_of(self, address: str) -> bytes:
        """What the page gets from an address."""
        script = """fetch(%s).then(answer => answer.arrayBuffer()).then(data => {
            let text = ""; for (const byte of new Uint8Array(data)) text += String.fromCharCode(byte); return btoa(text)
        })"""
        return base64.b64decode(self.run(script % json.dumps(address)))

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one call."""
        self._count += 1
        call = {"id": self._count, "method": method, "params": parameters}
        message = call | ({"sessionId": self._session} if self._session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
