"""What plan says of the licences of the sources: known facts, and unknown where nothing is known."""

import pytest

from dcgen_convert.planning.licences import licences, lines
from dcgen_convert.recipe.loading import load

FLUX = "flux-1-dev-non-commercial-license"


@pytest.mark.parametrize(
    "source, licence, outputs, derived",
    [
        ("flux-krea", FLUX, "must not train", "non-commercial purposes only"),
        ("black-forest-labs/FLUX.1-dev", FLUX, "must not train", "non-commercial purposes only"),
        ("flux-schnell", "apache-2.0", "no limit", "used commercially"),
        ("dit-xl-256", "cc-by-nc-4.0", "does not name them", "non-commercial purposes only"),
        ("sd-1.5", "creativeml-openrail-m", "counts as derived", "limits of use passed on"),
        ("sana-1.6b", "unknown", None, None),
    ],
)
def test_the_terms_of_a_known_licence_are_named(source, licence, outputs, derived):
    rows = licences(load(source))
    assert [row["role"] for row in rows] == ["source", "autoencoder"]
    assert rows[0]["licence"] == licence and rows[1]["licence"] == "unknown"
    text = lines(rows)
    if outputs is None:
        assert "unknown here. Read https://huggingface.co/Efficient-Large-Model/" in text[0] and len(text) == 2
    else:
        assert outputs in rows[0]["outputs"] and derived in rows[0]["derived"]
        assert "no legal advice: read https://" in text[0] and rows[0]["derived"] in text[1] and len(text) == 3
    assert text[-1].endswith("Read " + rows[1]["page"])


def test_embedded_models_are_not_named():
    assert licences(load("tiny-flux")) == []


@pytest.mark.parametrize(
    "card, licence",
    [
        ("---\nlicense: mit\n---\n", "mit"),
        (f"---\nlicense: other\nlicense_name: {FLUX}\n---\n", FLUX),
        ("---\nlicense: other\n---\n", "other"),
        ("no card", "unknown"),
    ],
)
def test_a_folder_is_believed_about_its_own_licence(card, licence, tmp_path, weights):
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in (weights / "tiny-flux").iterdir():
        if path.name != "README.md":
            (folder / path.name).symlink_to(path)
    (folder / "README.md").write_text(card)
    (row,) = licences(load(str(folder), flags={"ae": "tiny-dc-ae-f32"}))
    assert row["licence"] == licence and row["page"] == f"the files of {folder}"
    assert (row["outputs"] is None) == (licence in ("other", "unknown"))
