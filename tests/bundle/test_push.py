"""push against a small HTTP server that speaks the hub's upload protocol."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dcgen_convert.bundle.manifest import FILE
from dcgen_convert.bundle.push import push
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import AccessError, CheckFailed, InputError

TOKEN = "hf_test"


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, takes files inside the commit, and refuses whoever has the wrong token."""

    def do_GET(self):
        self._answer(404, {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(403, {"error": "no"})
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self._answer(200, {"url": f"{self.server.address}/me/out"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            return self._answer(
                200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = (line["value"] for line in lines if line["key"] == "file")
            self.server.files = {value["path"]: base64.b64decode(value["content"]) for value in files}
            return self._answer(
                200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.address}/me/out/commit/0"}
            )
        return self._answer(404, {})

    def _answer(self, status, document):
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        return None


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.requests, server.files = f"http://127.0.0.1:{server.server_port}", [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the suite runs offline; this hub is here
    yield server
    server.shutdown()
    server.server_close()


def test_everything_in_the_manifest_arrives_in_one_commit(own_bundle, hub):
    bundle = own_bundle("dit")
    (bundle / "notes.txt").write_text("private")
    assert push(bundle, "me/out", True, NULL, endpoint=hub.address).endswith("/me/out")
    listed = json.loads((bundle / FILE).read_text())["files"]
    assert hub.files == {name: (bundle / name).read_bytes() for name in [*listed, FILE]}
    assert hub.created["visibility"] == "private" and hub.created["name"] == "out"
    assert sum("/commit/" in path for path in hub.requests) == 1


def test_refusals_are_access_errors(bundles, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(AccessError, match="HTTP 403"):
        push(bundles("dit"), "me/out", False, NULL, endpoint=hub.address)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    with pytest.raises(AccessError, match="no hub token") as caught:
        push(bundles("dit"), "me/out", False, NULL, endpoint=hub.address)
    assert "HF_TOKEN" in caught.value.hint


def test_offline_mode_is_an_access_error(bundles, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AccessError, match="offline mode"):
        push(bundles("dit"), "me/out", False, NULL, endpoint=hub.address)
    assert hub.requests == []


def test_unfinished_bundles_and_bad_names_stay_here(own_bundle, hub):
    bundle = own_bundle("dit")
    with pytest.raises(InputError, match="no repository name"):
        push(bundle, "not a name", False, NULL, endpoint=hub.address)
    (bundle / "README.md").unlink()
    with pytest.raises(CheckFailed, match="lacks README.md"):
        push(bundle, "me/out", False, NULL, endpoint=hub.address)
    assert hub.requests == []
