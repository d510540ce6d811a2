"""Code that comes with a bundle or a source: it does not run without the user's word, and one sentence names it."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dcgen_convert.bundle import autoencoder_dc_adapter as adapter
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.loading import load
from dcgen_convert.bundle.sample import sample
from dcgen_convert.bundle.verify import verify
from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.components import copy_component
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import read_json, sha256, write_json

OWN_FILE = f"vae/{adapter.MODULE_NAME}.py"


class Forged:
    """A bundle that someone has changed, with a manifest that agrees, and the file that its code would leave behind."""

    def __init__(self, bundle: Path, marker: Path):
        self.bundle, self.marker = bundle, marker

    def add(self, name: str, code: str = "") -> None:
        """Code that writes the marker, before ``code``."""
        (self.bundle / name).write_text(f"open({str(self.marker)!r}, 'w').close()\n{code}")

    def edit(self, name: str, **changes) -> None:
        write_json(self.bundle / name, read_json(self.bundle / name) | changes)

    def seal(self) -> Path:
        """Write the manifest's hashes anew."""
        record = read_json(self.bundle / manifests.FILE)
        files = [path for path in self.bundle.rglob("*") if path.is_file() and path.name != manifests.FILE]
        record["files"] = {
            path.relative_to(self.bundle).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in files
        }
        write_json(self.bundle / manifests.FILE, record)
        return self.bundle


@pytest.fixture
def forged(own_bundle, tmp_path):
    return lambda name="flux": Forged(own_bundle(name), tmp_path / "marker")


def changed_adapter(forged: Forged) -> str:
    forged.add(OWN_FILE, Path(adapter.__file__).read_text())
    return f"{OWN_FILE} differs from every version"


def module_of_another_part(forged: Forged) -> str:
    forged.add("text_encoder/private.py", "from transformers import CLIPTextModel as Encoder\n")
    forged.edit("model_index.json", text_encoder=["private", "Encoder"])
    return "takes text_encoder from private.Encoder"


def module_without_a_file(forged: Forged) -> str:
    forged.edit("model_index.json", tokenizer=["my_module", "Class"])
    return "takes tokenizer from my_module.Class"


def pipeline_of_its_own(forged: Forged) -> str:
    forged.add("mine.py", "from diffusers import FluxPipeline as Mine\n")
    forged.edit("model_index.json", _class_name=["mine", "Mine"])
    return "takes the pipeline itself from"


def file_named_like_the_library(forged: Forged) -> str:
    forged.add("text_encoder/transformers.py", "from transformers import CLIPTextModel\n")
    return "text_encoder/transformers.py is code"


def auto_class(forged: Forged) -> str:
    forged.add("text_encoder/private.py", "from transformers import CLIPTextModel as Encoder\n")
    forged.edit("text_encoder/config.json", model_type="private", auto_map={"AutoModel": "private.Encoder"})
    forged.edit("model_index.json", text_encoder=["transformers", "AutoModel"])
    return "text_encoder/config.json names code under auto_map"


def auto_map_of_an_inner_model(forged: Forged) -> str:
    forged.edit("text_encoder/config.json", text_config={"auto_map": {"AutoModel": "private.Encoder"}})
    return "names code under text_config.auto_map"


def kernel_of_a_repository(forged: Forged) -> str:
    forged.edit("text_encoder/config.json", attn_implementation="somebody/attention")
    return "names code under attn_implementation"


def pipeline_as_a_part(forged: Forged) -> str:
    forged.edit("model_index.json", text_encoder=["diffusers", "FluxPipeline"])
    return "names the pipeline FluxPipeline as its part text_encoder"


FORGERIES = [
    changed_adapter,
    module_of_another_part,
    module_without_a_file,
    pipeline_of_its_own,
    file_named_like_the_library,
    auto_class,
    auto_map_of_an_inner_model,
    kernel_of_a_repository,
    pipeline_as_a_part,
]


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
def test_foreign_code_is_refused_and_does_not_run(forged, forge, tmp_path):
    case = forged()
    sentence, bundle = forge(case), case.seal()
    with pytest.raises(InputError, match="code that this program does not know") as refused:
        sample(bundle, ["a fox"], tmp_path / "pictures", NULL)
    assert sentence in refused.value.message and "--trust-remote-code" in refused.value.hint
    with pytest.raises(CheckFailed) as failed:
        verify(bundle, NULL)
    assert sentence in failed.value.message and failed.value.message.count(sentence) == 1
    assert not case.marker.exists()


@pytest.mark.parametrize("name", ["README.py", "tokenizer/helper.py", "vae/_speedups.so"])
def test_verify_names_code_that_nothing_calls(forged, name):
    case = forged("sana")
    case.add(name)
    with pytest.raises(CheckFailed, match="is code that this program has not written") as failed:
        verify(case.seal(), NULL)
    assert name in failed.value.message
    assert not case.marker.exists()


def test_an_auto_map_that_nothing_follows_is_no_code(forged):
    case = forged()
    case.edit("text_encoder/config.json", auto_map={"AutoModel": "private.Encoder"})
    assert load(case.seal(), runtime="auto")[0].text_encoder.__class__.__name__ == "CLIPTextModel"


@pytest.mark.parametrize(
    "forge", [changed_adapter, module_of_another_part, pipeline_of_its_own], ids=lambda f: f.__name__
)
def test_with_the_users_word_the_code_runs(forged, forge, tmp_path):
    case = forged()
    forge(case)
    bundle = case.seal()
    assert sample(bundle, ["a fox"], tmp_path / "pictures", NULL, steps=1, trust_remote_code=True)["images"]
    assert case.marker.exists()
    case.marker.unlink()
    document = verify(bundle, NULL, trust_remote_code=True)
    assert document["ok"] and "code" not in document["checks"]
    assert case.marker.exists()


def test_an_untouched_bundle_is_loaded_with_this_programs_class_alone(forged):
    case = forged()
    pipeline, _ = load(case.bundle)
    assert type(pipeline.vae) is adapter.AutoencoderDCAdapter
    (case.bundle / OWN_FILE).unlink()
    assert type(load(case.bundle)[0].vae) is adapter.AutoencoderDCAdapter


def test_the_table_knows_every_file_that_was_ever_written():
    """Who changes the adapter takes a new MODULE_NAME and adds a line; no line is taken away."""
    now = hashlib.sha256(Path(adapter.__file__).read_bytes()).hexdigest()
    assert now in trust.ADAPTERS[adapter.MODULE_NAME]
    assert (
        "155ea1f9545d982f2e5d0bf03bc34d6dd148dc440f6b0160d9241d26822ec705"
        in trust.ADAPTERS["autoencoder_dc_adapter_v1"]
    )
    assert (
        "3875d957b43d3f585b3fda60b8b1e3a85416641f17eed907fb07b23a96292a34"
        in trust.ADAPTERS["autoencoder_dc_adapter_v2"]
    )
    assert adapter.AutoencoderDCAdapter.__name__ == trust.ADAPTER_CLASS


def test_a_bundle_of_the_first_adapter_still_verifies(forged, monkeypatch):
    """Stands in for the file of the first version, whose hash alone is kept."""
    case, code = forged(), "# the first version\n"
    (case.bundle / OWN_FILE).unlink()
    (case.bundle / "vae" / "autoencoder_dc_adapter_v1.py").write_text(code)
    case.edit("model_index.json", vae=["autoencoder_dc_adapter_v1", "AutoencoderDCAdapter"])
    monkeypatch.setitem(trust.ADAPTERS, "autoencoder_dc_adapter_v1", (hashlib.sha256(code.encode()).hexdigest(),))
    bundle = case.seal()
    assert verify(bundle, NULL, probe=False)["ok"]
    assert type(load(bundle)[0].vae) is adapter.AutoencoderDCAdapter


@pytest.mark.parametrize("trusted", [False, True])
def test_pickles_are_never_loaded(forged, trusted):
    case = forged()
    (case.bundle / "text_encoder" / "model.safetensors").rename(case.bundle / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(InputError, match="is a pickle"):
        load(case.seal(), trust_remote_code=trusted)


def test_a_source_with_foreign_code_is_refused(parts, tmp_path):
    source = Path(shutil.copytree(parts("flux").source, tmp_path / "source"))
    index = read_json(source / "model_index.json")
    write_json(source / "model_index.json", index | {"text_encoder": ["private", "Encoder"]})
    with pytest.raises(InputError, match="takes text_encoder from private.Encoder"):
        load_source("x", str(source))


def test_code_is_not_copied_into_a_bundle(parts, tmp_path, capsys):
    folder = Path(shutil.copytree(parts("flux").source / "tokenizer", tmp_path / "tokenizer"))
    (folder / "tokenization_mine.py").write_text("")
    (folder / f"{adapter.MODULE_NAME}.py").write_bytes(Path(adapter.__file__).read_bytes())
    hashes = copy_component(folder, tmp_path / "copy", Console(), label="tokenizer")
    assert "tokenization_mine.py" not in hashes and not (tmp_path / "copy" / "tokenization_mine.py").exists()
    assert f"{adapter.MODULE_NAME}.py" in hashes
    assert "tokenizer: the bundle does not take the code tokenization_mine.py" in capsys.readouterr().err


def test_the_command_line_asks_for_the_flag(forged, tmp_path):
    case = forged()
    changed_adapter(case)
    bundle, codes = str(case.seal()), {}
    for verb, more in {"verify": (), "sample": ("-p", "a fox", "-o", str(tmp_path / "pictures"))}.items():
        call = [sys.executable, "-m", "dcgen_convert.cli", verb, bundle, *more, "--json"]
        done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
        codes[verb] = done.returncode
        assert "differs from every version" in json.loads(done.stdout)["error"]["message"]
    assert codes == {"verify": 1, "sample": 2}
    assert not case.marker.exists()
