"""Writes the parts of docs/ that follow from the code: python tools/docs_reference.py

They stand between `<!-- generated: NAME -->` and `<!-- end -->`. tests/docs says when one is stale.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import click

from dcgen_convert.api import order
from dcgen_convert.cli.app import cli
from dcgen_convert.core import errors
from dcgen_convert.evaluation import measures
from dcgen_convert.families import catalog, refused
from dcgen_convert.planning import plan as planning
from dcgen_convert.recipe import shelf
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages import depends

DOCS = Path(__file__).resolve().parent.parent / "docs"
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CASES = (  # autoencoder, resolution of the last phase and number of GPUs of flux-krea
    ("dc-ae-f32", 1024, 1),
    ("dc-ae-f64", 1024, 1),
    ("dc-ae-f64", 1024, 8),
    ("dc-ae-f64", 4096, 8),
)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; `|` inside a cell is escaped."""
    lines = [list(head), ["---"] * len(list(head)), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# -- recipe ---------------------------------------------------------------------------------------------------------


def recipe_keys() -> str:
    """One table per section of the schema."""
    schema = Recipe.model_json_schema()
    parts = []
    for title, prefix, section in sections(schema, schema["$defs"]):
        rows = [
            (
                f"`{prefix}{key}`",
                values(field),
                default(field, key in section.get("required", ())),
                field.get("description", ""),
                ", ".join(f"`{stage}`" for stage in depends.stages_of(f"{prefix}{key}")),
            )
            for key, field in section["properties"].items()
            if not nested(field)
        ]
        parts.append(
            f"### {title}\n\n{section.get('description', '')}\n\n"
            + table(("key", "values", "default", "meaning", "a change runs again"), rows)
        )
    return "\n\n".join(parts)


def sections(section: Mapping, known: Mapping, prefix: str = "") -> Iterator[tuple[str, str, Mapping]]:
    """(title, prefix of its keys, JSON schema) of a section and of those inside it."""
    yield f"`{prefix.removesuffix('.')}`" if prefix else "Top level", prefix, section
    for key, field in section["properties"].items():
        if name := nested(field):
            yield from sections(known[name], known, f"{prefix}{key}." + ("*." if field.get("type") == "array" else ""))


def nested(field: Mapping) -> str | None:
    """Name of the section that a field holds: once, as a list, or where it is not null."""
    within = [field, field.get("items"), *field.get("anyOf", ())]
    found = [part["$ref"].rpartition("/")[2] for part in within if isinstance(part, Mapping) and "$ref" in part]
    return found[0] if found else None


def values(field: Mapping) -> str:
    """What a field may hold: choices, or a type with its limits."""
    if "anyOf" in field:
        return ", ".join(values(choice) for choice in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{choice}`" for choice in field.get("enum", [field.get("const")]))
    kind = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "`true`, `false`",
        "null": "`null`",
        "array": "list",
        "object": "table",
    }
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_number(field[name])}" for name, sign in limits.items() if name in field]
    return " ".join([kind[field["type"]], " and ".join(bounds)]).strip()


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def default(field: Mapping, required: bool) -> str:
    if required:
        return "(required)"
    value = field.get("default")
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


# -- command line ---------------------------------------------------------------------------------------------------


def verbs() -> str:
    """Usage and options of every verb; what nearly all verbs take stands once, at the end."""
    found = [
        (path, command) for path, command in commands(cli, "dcgen-convert") if not isinstance(command, click.Group)
    ]
    # `inspect` has no options of its own.
    shared = {option.name: option for option in options_of(cli.commands["inspect"])}
    parts = [one_verb(path, command, shared) for path, command in found]
    context = click.Context(cli.commands["inspect"])
    return "\n\n".join([*parts, "### Options of every verb\n\n" + option_table(shared.values(), context)])


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """(words, command) of a group's commands, at any depth."""
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, f"{path} {name}")


def one_verb(path: str, command: click.Command, shared: Mapping[str, click.Option]) -> str:
    context = click.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    text = f"### {path.partition(' ')[2]}\n\n{' '.join((command.help or '').split())}\n\n    {usage}"
    own = [option for option in options_of(command) if option.name not in shared]
    return f"{text}\n\n{option_table(own, context)}" if own else text


def option_table(options: Iterable[click.Option], context: click.Context) -> str:
    rows = [
        (option_names(option), " ".join((option.help or "").split()) + shown_default(option, context))
        for option in options
    ]
    return table(("option", "meaning"), rows)


def options_of(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def option_names(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.is_flag:
        return names
    if isinstance(option.type, click.Choice):
        return f"{names} {'|'.join(option.type.choices)}"
    return f"{names} {option.metavar or 'N'}"


def shown_default(option: click.Option, context: click.Context) -> str:
    return f" Default: {option.get_default(context)}." if option.show_default else ""


# -- errors, catalogue, plan ------------------------------------------------------------------------------------------


def exit_codes() -> str:
    """One row per kind of error."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DcgenError)]
    rows = [
        (kind.exit_code, f"`{kind.code}`", " ".join(kind.__doc__.split()))
        for kind in kinds
        if kind is not errors.DcgenError
    ]
    return table(("exit code", "`code` in `--json`", "meaning"), sorted(rows))


def sources() -> str:
    rows = []
    for entry in catalog.SOURCES.values():
        latents = f"f{entry.vae_factor}c{entry.vae_channels}, patch {entry.patch}"
        rows.append((f"`{entry.name}`", where(entry.repo), latents, "yes" if entry.gated else "no", entry.licence))
    return table(("SOURCE", "hub id", "its latents", "gated", "licence, as declared when this table was written"), rows)


def where(repo: str | None) -> str:
    return f"`{repo}`" if repo else "in the package"


def refusals() -> str:
    rows = [
        (found.name, f"`{kind}`", f"{found.why[0].upper()}{found.why[1:]}.") for kind, found in refused.REFUSED.items()
    ]
    return table(("model", "known by", "why it cannot be converted"), rows)


def autoencoders() -> str:
    rows = [
        (
            f"`{entry.alias}`",
            "[a file](dc_ae_v.md#the-authors-weights)" if entry.given else where(entry.repo),
            entry.factor,
            entry.channels,
            entry.scaling_factor or "measured",
        )
        for entry in catalog.AUTOENCODERS.values()
    ]
    return table(("`--ae`", "hub id", "f", "c", "scaling factor"), rows)


def recipes() -> str:
    """Every shipped recipe with what its file says of itself."""
    rows = []
    for name in shelf.names():
        text = shelf.find(name).read_text(encoding="utf-8")
        about = [
            line.removeprefix("# ") for line in itertools.takewhile(lambda line: line[:1] == "#", text.splitlines())
        ]
        values = {key: value for _, raw in shelf.read(name) for key, value in raw.items()}
        rows.append((f"`{name}`", f"`{values['source']}`", f"`{values['ae']}`", " ".join(about)))
    return table(("recipe", "source", "autoencoder", "what it is"), rows)


def plans() -> str:
    """What `plan` says of FLUX.1 Krea."""
    rows = []
    for name, side, gpus in CASES:
        own = {"resolution": side, "data": "FOLDER"} if side > 1024 else {}
        found = planning.plan(order.resolve("flux-krea", {"ae": name, "gpus": gpus, "offline": True, **own}))
        tokens, time = found["tokens"][-1], found["time"]
        days = [f"{time[key] / 24:.1f}" for key in ("wall_hours", "wall_hours_low", "wall_hours_high")]
        rows.append(
            (f"{name}, {side} px, {gpus} x H100", f"{tokens['before']:,} to {tokens['after']:,}",
             f"{found['speedup']['value']:.1f} x", f"{found['disk']['peak'] / 1e12:.1f} TB", days[0],
             f"{days[1]} to {days[2]}", f"{time['price_usd']:,.0f} USD")
        )  # fmt: skip
    head = ("flux-krea to", "image tokens", "speed-up of a step", "disk", "days", "range", "price")
    return table(head, rows)


def large_plans() -> str:
    """What `plan` says of FLUX.1 Krea at 4096 px on eight GPUs: with the recipe as written, and with budgets."""
    rows = []
    for hours in (None, 120, 72):
        own = {"ae": "dc-ae-f64", "resolution": 4096, "quantize": "nvfp4", "data": "FOLDER_4K", "max_gpu_hours": hours}
        resolved = order.resolve("flux-krea", {**own, "gpus": 8, "offline": True})
        found, recipe = planning.plan(resolved), resolved.recipe
        time, phases = found["time"], recipe.adapt.phases
        counts = " and ".join(f"{recipe.data_of(recipe.set_of(n)).count:,}" for n in (1, 2))
        rows.append(
            ("as written" if hours is None else f"`--max-gpu-hours {hours}`", f"{counts}",
             f"{phases[0].steps:,} of {phases[0].batch}", f"{phases[1].steps:,} of {phases[1].batch}",
             f"{found['disk']['peak'] / 1e12:.1f} TB", f"{time['gpu_hours'] / 24:.1f}",
             f"{8 * time['wall_hours_low'] / 24:.1f} to {8 * time['wall_hours_high'] / 24:.1f}",
             f"{time['price_usd']:,.0f} USD")
        )  # fmt: skip
    head = ("", "pictures of 2048 and 4096 px", "steps at 2048 px", "steps at 4096 px", "disk", "H100-days", "range")
    return table((*head, "price"), rows)


def measure_table() -> str:
    """One row per measure of `evaluate`."""
    kinds = {"score": "each picture", "distance": "two sets of pictures"}
    rows = [
        (f"`{name}`", known.measure.label, kinds[known.measure.kind], known.measure.better, known.needs or "nothing")
        for name, known in measures.known().items()
    ]
    return table(("name", "what it says", "a number for", "better is", "needs"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "recipe": recipe_keys,
    "cli": verbs,
    "recipes": recipes,
    "errors": exit_codes,
    "sources": sources,
    "autoencoders": autoencoders,
    "refusals": refusals,
    "plan": plans,
    "plan_4k": large_plans,
    "measures": measure_table,
}


def renewed(text: str) -> str:
    """A page with its generated parts made anew."""
    return PART.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n\n{found[3]}", text)


def main() -> None:
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        if (after := renewed(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.name}: renewed")


if __name__ == "__main__":
    main()
