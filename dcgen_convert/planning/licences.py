"""What the licences of a conversion's sources say, before money is spent on it. Facts only where they are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint.licence import front_matter, licence_of
from dcgen_convert.data import hub, prompt_lists
from dcgen_convert.families import catalog
from dcgen_convert.families.licences import DECLARED, TERMS, UNKNOWN
from dcgen_convert.planning.costs import hub_cache
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.loading import Resolved

ADVICE = "a short reading, no legal advice"


def licences(resolved: Resolved) -> list[dict[str, Any]]:
    """Role, name, licence, terms (or None) and page of the source, of its base and of the autoencoder.

    A model that is embedded in this program is left out: it is under the program's own licence.
    """
    recipe, source = resolved.recipe, resolved.identity
    rows = [_model("source", source.name, source)]
    if source.is_alone and source.base is None and source.published is not None:
        rows.append(_model("base", source.published.repo, None, source.published.repo))
    elif source.base is not None:
        rows.append(_model("base", source.base, source.pipeline))
    found = catalog.AUTOENCODERS.get(recipe.ae)
    if found is None or not found.folder:
        rows.append(_model("autoencoder", recipe.ae, None, found.repo if found else recipe.ae))
    texts: dict[str, None] = {}
    for number in recipe.sets:
        data = recipe.data_of(number)
        if data.kind == "folder":
            from dcgen_convert.data import given  # it needs an imaging library

            texts |= dict.fromkeys(given.parse(path).where for path in data.paths)
        else:
            texts |= {prompt_lists.split(data.prompts)[0]: None}
    rows += [_data_set(text) for text in texts if hub.is_address(text)]
    return [row for row in rows if row]


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """One or two lines per source, for people."""
    shown = []
    for row in rows:
        where = row["url"] or row["page"]
        head = f"licence of the {row['role']} {row['name']}: {row['licence']}"
        if row["outputs"] is None:
            shown.append(f"{head}; what it says of drawn pictures and derived models is unknown here. Read {where}")
            continue
        shown += [
            f"{head} ({ADVICE}: read {where})",
            f"  pictures that it draws: {row['outputs']}; models made from it: {row['derived']}",
        ]
    return shown


def _model(role: str, name: str, identity: Identity | None, repo: str | None = None) -> dict[str, Any]:
    """One row; empty for an embedded model."""
    entry = identity.entry if identity else None
    if entry and entry.folder:
        return {}
    repo = repo or (identity.hub_id if identity else None)
    path = identity.path if identity else None
    folder = path if path is not None else Path(name).expanduser()
    licence = _stated(folder) if folder.is_dir() else _published(repo, entry.licence if entry else None)
    terms = TERMS.get(licence)
    return {
        "role": role,
        "name": name,
        "licence": licence,
        "outputs": terms.outputs if terms else None,
        "derived": terms.derived if terms else None,
        "url": terms.url if terms else None,
        "page": f"https://huggingface.co/{repo}" if repo and not folder.exists() else f"the files of {name}",
    }


def _data_set(address: str) -> dict[str, Any]:
    """A data set of the hub; its terms are on its page."""
    unknown = dict.fromkeys(("outputs", "derived", "url"))
    return {"role": "data set", "name": address, "licence": UNKNOWN, **unknown, "page": hub.parse(address).page}


def _stated(folder: Path) -> str:
    """The licence that a local folder states; "unknown" without one."""
    return _name(licence_of(folder))


def _name(fields: dict[str, Any]) -> str:
    """`license: other` is followed by a `license_name`."""
    stated = fields.get("license") or UNKNOWN
    return str(fields.get("license_name") or stated) if stated in ("other", UNKNOWN) else str(stated)


def _published(repo: str | None, stated: str | None) -> str:
    """What the hub's cache says of a repository, else what its authors declared when the tables were written."""
    found = UNKNOWN
    if repo and repo.count("/") == 1 and (hub_cache() / f"models--{repo.replace('/', '--')}").is_dir():
        from huggingface_hub import try_to_load_from_cache  # it takes a quarter of a second

        cached = try_to_load_from_cache(repo, "README.md", cache_dir=hub_cache())
        found = _name(front_matter(Path(cached))) if isinstance(cached, str) else UNKNOWN
    if found != UNKNOWN:
        return found
    known = stated if stated in TERMS else DECLARED.get(repo or "")
    return known or UNKNOWN
