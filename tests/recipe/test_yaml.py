"""Settings mean what they look like: YAML 1.2, one key once, bounded aliases, `extends` beside the recipe."""

import math

import pytest

from dcgen_convert.core import yaml_text
from dcgen_convert.core.errors import RecipeError
from dcgen_convert.recipe import loading


@pytest.mark.parametrize(
    "text, value",  # section 10.3.2 of YAML 1.2.2, and what YAML 1.1 made of it
    [
        ("010", 10),
        ("-08", -8),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("true", True),
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2001-01-01", "2001-01-01"),
        ("~", None),
        ("", None),
        ("~/data", "~/data"),
        ("[1, 14]", [1, 14]),
        ("{<<: {a: 1, b: 2}, a: 3}", {"a": 3, "b": 2}),
    ],
)
def test_scalars(text, value):
    found = yaml_text.parse(text, "x")
    assert found == value and type(found) is type(value)


def laughs(opening: str, closing: str) -> str:
    """Nine levels of nine aliases each, 9^9 values."""
    levels = [f"{chr(98 + i)}: &{chr(98 + i)} {opening}{','.join(['*' + chr(97 + i)] * 9)}{closing}" for i in range(8)]
    return "\n".join(["a: &a {x: 1}", *levels])


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb: {c: 1, c: 2}", r"f.yaml line 2 is not valid YAML: the key 'c' stands twice"),
        (laughs("[", "]"), "unfolds to more than"),
        (laughs("{<<: [", "]}"), "unfolds to more than"),
        ("a: &a [*a]", "unfolds to more than"),
        ("[" * 2000, "maximum recursion depth"),
        ("!!int abc", "no whole number"),
        ("9" * 5000, "no whole number"),
        ("!!timestamp 2001-99-99", "month"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: b: c", "mapping values are not allowed"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        yaml_text.parse(text, "f.yaml")
    assert caught.value.message.startswith("f.yaml") and len(caught.value.message) < 300


@pytest.mark.parametrize("setting", ["data.count=yes", "data.count=true", "data.count=1:30", "adapt.phases.0.lr=true"])
def test_a_word_is_no_number(setting):
    key, _, value = setting.partition("=")
    with pytest.raises(RecipeError, match=rf"{key} must be .*, not '{value}' \(from --set\)"):
        loading.load("tiny-flux", sets=[setting])


def test_settings_of_the_command_line_and_the_environment():
    found = loading.load(
        "tiny-flux", sets=["seed=010", "adapt.checkpointing=no"], env={"DCGEN_CONVERT_DATA__COUNT": "1e2"}
    )
    assert (found.recipe.seed, found.recipe.adapt.checkpointing, found.recipe.data.count) == (10, False, 100)
    with pytest.raises(RecipeError, match=r"env DCGEN_CONVERT_SEED is not valid YAML"):
        loading.load("tiny-flux", env={"DCGEN_CONVERT_SEED": "["})


def test_extends_names_a_file_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "recipes" / "base.yaml").write_text("extends: tiny-flux\nseed: 5\n")
    (tmp_path / "elsewhere" / "base.yaml").write_text("extends: tiny-flux\nseed: 6\n")
    mine = tmp_path / "recipes" / "mine.yaml"
    mine.write_text("extends: base.yaml\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert loading.load("../recipes/mine.yaml").recipe.seed == 5
    mine.write_text("extends: [a, b]\n")
    with pytest.raises(RecipeError, match="must be the name of one recipe"):
        loading.load(str(mine))
    mine.write_text("extends: gone.yaml\n")
    with pytest.raises(RecipeError, match=r"recipes/gone.yaml"):
        loading.load(str(mine))
