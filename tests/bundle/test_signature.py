"""sign and verify --signed-by: the command of model-signing itself agrees, and every change is said in one sentence."""

import base64
import json
import subprocess
import sys

import model_signing
import pytest
from conftest import run_cli
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dcgen_convert.api import signing
from dcgen_convert.api.calls import verify as verify_call
from dcgen_convert.bundle import signature
from dcgen_convert.bundle.manifest import FILE
from dcgen_convert.bundle.verify import verify
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import AccessError, CheckFailed, InputError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PEM = serialization.Encoding.PEM


def write_pair(folder, name, key, secret=None):
    """NAME.pem and NAME.pub."""
    hidden = serialization.BestAvailableEncryption(secret) if secret else serialization.NoEncryption()
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, hidden))
    (folder / f"{name}.pub").write_bytes(public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A folder with the pairs mine, other, locked (password: open) and rsa."""
    folder = tmp_path_factory.mktemp("keys")
    write_pair(folder, "mine", ec.generate_private_key(ec.SECP256R1()))
    write_pair(folder, "other", ec.generate_private_key(ec.SECP384R1()))
    write_pair(folder, "locked", ec.generate_private_key(ec.SECP521R1()), b"open")
    write_pair(folder, "rsa", rsa.generate_private_key(65537, 2048))
    return folder


@pytest.fixture
def signed(own_bundle, keys):
    bundle = own_bundle("dit")
    done = signing.sign(bundle, key=keys / "mine.pem", quiet=True)
    assert (
        done.signature == bundle / "model.sig"
        and done.files == len(json.loads((bundle / FILE).read_text())["files"]) + 1
    )
    return bundle


def refused(bundle, by, **options) -> str:
    with pytest.raises(CheckFailed) as caught:
        verify(bundle, NULL, signed_by=str(by), probe=False, **options)
    return caught.value.message


def reference(bundle, key) -> int:
    """The exit code of model-signing's own command."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", bundle, "--signature", bundle / "model.sig"]
    return subprocess.run([*map(str, command), "--public_key", str(key)], capture_output=True).returncode


def test_a_signed_bundle_passes_here_and_with_the_command_of_model_signing(signed, keys):
    found = verify(signed, NULL, signed_by=str(keys / "mine.pub"), probe=False)
    assert found["ok"] and found["checks"][0] == "signature" and found["signed_by"] == str(keys / "mine.pub")
    assert verify(signed, NULL, probe=False)["signed_by"] is None
    assert reference(signed, keys / "mine.pub") == 0 and reference(signed, keys / "other.pub") != 0


def flip(bundle):
    data = bytearray((bundle / WEIGHTS).read_bytes())
    data[-7] ^= 1
    (bundle / WEIGHTS).write_bytes(data)


CHANGES = {
    "flipped bit": (flip, f"{WEIGHTS} has changed"),
    "added file": (lambda bundle: (bundle / "vae" / "more.json").write_text("{}"), "vae/more.json was added"),
    "removed file": (lambda bundle: (bundle / "vae" / "config.json").unlink(), "vae/config.json is missing"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_exit_1_and_one_sentence(signed, keys, name):
    change, said = CHANGES[name]
    change(signed)
    done = run_cli("verify", str(signed), "--signed-by", str(keys / "mine.pub"), "--json", cwd=signed)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 1 and error["code"] == "check"
    assert error["message"] == f"{signed} is not what {keys / 'mine.pub'} has signed: {said}"
    assert reference(signed, keys / "mine.pub") == 1


def test_another_key_is_exit_1_and_one_sentence(signed, keys):
    done = run_cli("verify", str(signed), "--signed-by", str(keys / "other.pub"), cwd=signed)
    assert done.returncode == 1 and done.stdout == ""
    assert f"error: the signature of {signed} is not one of {keys / 'other.pub'}\n" in done.stderr.replace("\n ", " ")


def test_a_manifest_that_was_made_to_fit_is_no_help(signed, keys):
    """Whoever changes a file can change its hash in the manifest too; the signature covers the manifest."""
    (signed / "README.md").write_text("mine now")
    manifest = json.loads((signed / FILE).read_text())
    from dcgen_convert.bundle.manifest import file_table
    from dcgen_convert.core.files import sha256, write_json

    manifest["files"] |= file_table(signed, {"README.md": sha256(signed / "README.md")})
    write_json(signed / FILE, manifest)
    assert verify(signed, NULL, probe=False)["ok"]
    assert refused(signed, keys / "mine.pub").endswith(f"README.md has changed; {FILE} has changed")


def edit_payload(bundle, change):
    """What the signature lists, changed after the signing."""
    document = json.loads((bundle / "model.sig").read_text())
    payload = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
    change(payload["predicate"])
    document["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (bundle / "model.sig").write_text(json.dumps(document))


def test_a_forged_list_of_files_is_no_signature(signed, keys):
    edit_payload(signed, lambda predicate: predicate["resources"].pop())
    assert refused(signed, keys / "mine.pub") == f"the signature of {signed} is not one of {keys / 'mine.pub'}"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"dsseEnvelope": {"payload": "x"}}', "\0"])
def test_what_is_no_signature_is_said(signed, keys, content):
    (signed / "model.sig").write_text(content)
    assert str(signed / "model.sig") in refused(signed, keys / "mine.pub")


def test_a_bundle_without_signature_and_files_outside_it(own_bundle, keys):
    bundle = own_bundle("dit")
    assert refused(bundle, keys / "mine.pub") == f"{bundle} is not signed: it has no model.sig"
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=["model.sig", "vae"])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys / "mine.pem")
    config.set_hashing_config(hashing).sign(bundle, bundle / "model.sig")
    assert "leaves files out: vae/config.json; vae/diff" in refused(bundle, keys / "mine.pub")


def test_a_signature_over_other_hashes_is_not_compared(own_bundle, keys):
    bundle = own_bundle("dit")
    hashing = model_signing.hashing.Config().use_file_serialization(hashing_algorithm="blake3")
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys / "mine.pem")
    config.set_hashing_config(hashing.set_ignored_paths(paths=["model.sig"])).sign(bundle, bundle / "model.sig")
    assert "does not hold the SHA-256 of whole files" in refused(bundle, keys / "mine.pub")


def test_what_systems_leave_and_links_of_the_hub_cache_are_no_change(signed, keys, tmp_path):
    (signed / ".DS_Store").write_bytes(b"x")
    (signed / ".cache" / "huggingface").mkdir(parents=True)
    (signed / ".cache" / "huggingface" / "x.lock").write_bytes(b"")
    blob = (signed / WEIGHTS).rename(tmp_path / "blob")
    (signed / WEIGHTS).symlink_to(blob)
    assert verify(signed, NULL, signed_by=str(keys / "mine.pub"), probe=False)["ok"]


def test_an_encrypted_key_needs_its_password(own_bundle, keys, monkeypatch):
    bundle = own_bundle("dit")
    with pytest.raises(InputError, match="is no private key of an elliptic curve") as caught:
        signing.sign(bundle, key=keys / "locked.pem")
    assert "SIGNING_KEY_PASSWORD" in caught.value.hint
    monkeypatch.setenv("SIGNING_KEY_PASSWORD", "open")
    signing.sign(bundle, key=keys / "locked.pem", quiet=True)
    assert verify(bundle, NULL, signed_by=str(keys / "locked.pub"), probe=False)["ok"]


def test_keys_that_do_not_fit_are_refused(signed, keys):
    with pytest.raises(InputError, match="rsa.pem is no private key of an elliptic curve"):
        signing.sign(signed, key=keys / "rsa.pem")
    for name in ("rsa.pub", "mine.pem"):
        with pytest.raises(InputError, match=f"{name} is no public key of an elliptic curve"):
            verify_call(signed, signed_by=keys / name, quiet=True)
    with pytest.raises(InputError, match="there is no key file .*nothing.pub"):
        verify_call(signed, signed_by=keys / "nothing.pub", quiet=True)


def test_a_damaged_bundle_is_not_signed(own_bundle, keys):
    bundle = own_bundle("dit")
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(CheckFailed, match="so it was not signed: notes.txt is not in the manifest"):
        signing.sign(bundle, key=keys / "mine.pem", quiet=True)
    assert not (bundle / "model.sig").exists()


@pytest.mark.parametrize("package", ["model_signing", "OpenSSL"])
def test_without_the_extra_the_command_to_install_it_is_said(signed, keys, monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith("model_signing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for call in (lambda: signing.sign(signed), lambda: verify_call(signed, signed_by="x.pub", quiet=True)):
        with pytest.raises(InputError, match=f"signatures need the package {package}, which is not inst") as caught:
            call()
        assert caught.value.hint == "pip install 'dcgen-convert[sign]'"


def test_without_an_identity_nothing_is_asked_and_nobody_signs(signed, monkeypatch):
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE", "CIRCLECI", "SIGSTORE_ID_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sigstore.oidc.id.detect_credential", lambda audience: None)  # it asks the net for a cloud's
    with pytest.raises(AccessError, match="nobody is known here in whose name to sign"):
        signing.sign(signed)


def test_whose_word_an_identity_needs(signed, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "model_signing.verifying.Config.use_sigstore_verifier", lambda self, **given: asked.append(given) or self
    )
    workflow = "https://github.com/org/repo/.github/workflows/release.yml@refs/tags/v1"
    for identity, issuer in ((workflow, None), ("a@b.c", "https://accounts.google.com")):
        with pytest.raises(CheckFailed):  # a Config without a verifier
            verify(signed, NULL, signed_by=identity, issuer=issuer, probe=False)
    assert [one["oidc_issuer"] for one in asked] == [
        "https://token.actions.githubusercontent.com",
        "https://accounts.google.com",
    ]
    with pytest.raises(InputError, match="nobody is known to vouch for a@b.c"):
        verify(signed, NULL, signed_by="a@b.c", probe=False)


def test_signed_files_are_those_of_the_folder(signed):
    assert signature.require_current(signed, json.loads((signed / FILE).read_text()))
