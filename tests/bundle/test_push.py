"""push against a small HTTP server that speaks the hub's upload protocol."""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dcgen_convert import families
from dcgen_convert.api.signing import sign
from dcgen_convert.bundle.layout import add_metrics
from dcgen_convert.bundle.manifest import FILE
from dcgen_convert.bundle.push import push
from dcgen_convert.bundle.verify import verify
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import AccessError, CheckFailed, InputError
from dcgen_convert.core.files import read_json

TOKEN = "hf_test"


class Hub(BaseHTTPRequestHandler):
    """One repository, me/out: created, read, written and deleted. It refuses whoever has the wrong token.

    The server's attributes: files (path -> bytes), exists, private, faults (of the card), break_at (a path of a
    request that is answered 503), large (files that are uploaded apart) and stored (what has arrived of them).
    """

    def do_GET(self):
        hub = self.server
        if self.path.startswith("/api/models/me/out") and hub.exists:
            siblings = [{"rfilename": name} for name in hub.files]
            return self._answer(200, {"id": "me/out", "sha": "a" * 40, "private": hub.private, "siblings": siblings})
        return self._answer(404, {})

    def do_DELETE(self):
        self._body()
        self.server.exists = False
        return self._answer(200, {})

    def do_PUT(self):
        self.server.stored.append(self._body())
        return self._answer(200, {})

    def do_POST(self):
        body, hub = self._body(), self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(403, {"error": "no"})
        if hub.break_at and hub.break_at in self.path:
            return self._answer(hub.status, {"error": "no"})
        if self.path == "/api/repos/create":
            hub.created, hub.exists = json.loads(body), True
            hub.private = hub.created.get("visibility") == "private" or bool(hub.created.get("private"))
            return self._answer(200, {"url": f"{hub.address}/me/out"})
        if self.path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            return self._answer(400 if hub.faults else 200, {"errors": hub.faults, "warnings": []})
        if "/preupload/" in self.path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": self._mode(name), "shouldIgnore": False} for name in names]
            return self._answer(200, {"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = {"upload": {"href": f"{hub.address}/put/{objects[0]['oid']}", "header": {}}}
            return self._answer(200, {"objects": [{**entry, "actions": upload} for entry in objects]})
        if "/commit/" in self.path:
            return self._commit([json.loads(line) for line in body.splitlines()])
        return self._answer(404, {})

    def _commit(self, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.server.files[value["path"]]
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = value["oid"]
        commit = f"{self.server.address}/me/out/commit/0"
        return self._answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": commit})

    def _mode(self, name):
        return "lfs" if name in self.server.large else "regular"

    def _body(self):
        self.server.requests.append(self.path)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

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
    server.address = f"http://127.0.0.1:{server.server_port}"
    start = {"requests": [], "files": {}, "cards": [], "stored": [], "faults": [], "large": (), "break_at": ""}
    vars(server).update(start, exists=False, private=False, created=None, status=503)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the suite runs offline; this hub is here
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # this hub takes plain uploads
    yield server
    server.shutdown()
    server.server_close()


def commits(hub):
    return sum("/commit/" in path for path in hub.requests)


def test_everything_in_the_manifest_arrives_in_one_commit(own_bundle, hub):
    bundle = own_bundle("dit")
    (bundle / "notes.txt").write_text("private")
    assert push(bundle, "me/out", True, NULL, endpoint=hub.address).endswith("/me/out")
    listed = read_json(bundle / FILE)["files"]
    changed = {FILE, "README.md"}
    assert set(hub.files) == {*listed, FILE}
    assert {name: data for name, data in hub.files.items() if name not in changed} == {
        name: (bundle / name).read_bytes() for name in listed if name not in changed
    }
    assert hub.private and hub.created["name"] == "out" and commits(hub) == 1


def test_what_arrives_is_a_bundle_whose_card_names_the_repository(bundles, hub, tmp_path):
    push(bundles("dit"), "me/out", False, NULL, endpoint=hub.address)
    for name, data in hub.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert verify(tmp_path, NULL, probe=False)["ok"]
    assert 'DiffusionPipeline.from_pretrained("me/out"' in (tmp_path / "README.md").read_text()
    assert set(hub.cards) == {(tmp_path / "README.md").read_text()}


def test_an_older_upload_is_removed(bundles, hub):
    """Shards and their index would be loaded instead of the new weights."""
    old = ["transformer/diffusion_pytorch_model.safetensors.index.json", "transformer/x-00001-of-00002.safetensors"]
    hub.exists, hub.files = True, dict.fromkeys([*old, ".gitattributes", "README.md"], b"old")
    push(bundles("dit"), "me/out", False, NULL, endpoint=hub.address)
    assert set(hub.files) == {*read_json(bundles("dit") / FILE)["files"], FILE, ".gitattributes"}
    assert hub.files["README.md"] != b"old" and hub.created is None and commits(hub) == 1


def test_what_shall_be_private_is_not_published(bundles, hub):
    hub.exists = True
    with pytest.raises(InputError, match="exists and is public"):
        push(bundles("dit"), "me/out", True, NULL, endpoint=hub.address)
    assert commits(hub) == 0 and hub.files == {}
    hub.private = True
    push(bundles("dit"), "me/out", False, NULL, endpoint=hub.address)
    assert hub.private and FILE in hub.files


def cut_short(bundle):
    weights = bundle / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return "has 1000 bytes"


def flipped(bundle):
    weights = bundle / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 4
    weights.write_bytes(bytes(data))
    return "has another hash"


@pytest.mark.parametrize("damage", [cut_short, flipped])
def test_a_damaged_bundle_stays_here(own_bundle, hub, damage):
    bundle = own_bundle("dit")
    sentence = damage(bundle)
    with pytest.raises(CheckFailed, match=sentence):
        push(bundle, "me/out", False, NULL, endpoint=hub.address)
    assert hub.requests == []


def test_a_card_that_the_hub_refuses_creates_nothing(bundles, hub):
    hub.faults = [{"message": '"base_model" must be an id'}]
    with pytest.raises(InputError, match="must be an id"):
        push(bundles("dit"), "me/out", False, NULL, endpoint=hub.address)
    assert hub.created is None and not hub.exists


@pytest.mark.parametrize("status", [400, 409, 503])
def test_no_empty_repository_stays(bundles, hub, status):
    hub.break_at, hub.status = "/commit/", status
    with pytest.raises(AccessError):
        push(bundles("dit"), "me/out", False, NULL, endpoint=hub.address)
    assert hub.created and not hub.exists


def test_a_repository_with_arrived_weights_stays_and_the_same_call_goes_on(bundles, hub):
    weights = "transformer/diffusion_pytorch_model.safetensors"
    hub.large, hub.break_at = (weights,), "/commit/"
    with pytest.raises(AccessError) as caught:
        push(bundles("dit"), "me/out", False, NULL, endpoint=hub.address)
    assert "goes on" in caught.value.hint and hub.exists
    assert hub.stored == [(bundles("dit") / weights).read_bytes()]
    hub.break_at = ""
    push(bundles("dit"), "me/out", False, NULL, endpoint=hub.address)
    assert hub.files[weights] == read_json(bundles("dit") / FILE)["files"][weights]["sha256"]


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
    for name in ("not a name", "alone", "a/b/c", "../x"):
        with pytest.raises(InputError, match="no repository name"):
            push(bundle, name, False, NULL, endpoint=hub.address)
    (bundle / "README.md").unlink()
    with pytest.raises(CheckFailed, match="README.md is missing"):
        push(bundle, "me/out", False, NULL, endpoint=hub.address)
    assert hub.requests == []


@pytest.fixture
def signed_bundle(own_bundle, tmp_path):
    """`signed_bundle(repo)`: a bundle that was signed for a repository, and the public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    plain, public = serialization.NoEncryption(), serialization.PublicFormat.SubjectPublicKeyInfo
    pem = serialization.Encoding.PEM
    (tmp_path / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    (tmp_path / "key.pub").write_bytes(key.public_key().public_bytes(pem, public))

    def make(repo):
        bundle = own_bundle("dit")
        sign(bundle, key=tmp_path / "key.pem", repo=repo, quiet=True)
        return bundle, str(tmp_path / "key.pub")

    return make


def test_a_signed_bundle_arrives_as_it_was_signed(signed_bundle, hub, tmp_path, capsys):
    bundle, key = signed_bundle("me/out")
    push(bundle, "me/out", False, Console("human", stderr=sys.stdout), endpoint=hub.address)
    assert "does not name" not in capsys.readouterr().out
    for name, data in hub.files.items():
        assert data == (bundle / name).read_bytes()
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(data)
    assert verify(tmp_path / "got", NULL, signed_by=key, probe=False)["ok"]
    assert 'DiffusionPipeline.from_pretrained("me/out"' in (tmp_path / "got" / "README.md").read_text()


def test_a_signed_card_that_names_another_place_is_told(signed_bundle, hub, capsys):
    bundle, _ = signed_bundle(None)
    push(bundle, "me/out", False, Console("human", stderr=sys.stdout), endpoint=hub.address)
    told = " ".join(capsys.readouterr().out.split())
    assert "the card of the signed bundle does not name me/out: sign it with --repo me/out" in told
    assert hub.files["README.md"] == (bundle / "README.md").read_bytes()


def test_a_bundle_that_changed_since_it_was_signed_stays_here(signed_bundle, hub):
    bundle, _ = signed_bundle(None)
    add_metrics(bundle, families.get("dit"), "evaluate", {"clip": 0.5})
    with pytest.raises(CheckFailed, match=f"has changed since it was signed: README.md; {FILE}"):
        push(bundle, "me/out", False, NULL, endpoint=hub.address)
    assert not hub.exists
