"""Damage of every kind that files meet: bytes, lines of text, and values anywhere in a JSON document."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# fmt: off
ODD_BYTES = (
    b"\xff" * 8, bytes(8), b"\x00" * 7 + b"\x80", b"\xef\xbb\xbf", b"\xe9", b"\x1b[2J", b"{", b'"', b"\n", b"- ",
)
# Values that turn up where a number, a name or a list is expected.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**70), 1e308, float("nan"), float("inf"), 0.5, "", "x", "null",
    "1", "../../x", "/etc/passwd", "\x1b[2J", "\ud800", "\u2028", "a" * 300, "tiny-flux", [], [[]], [1, -2, 9], {},
    {"a": {"b": []}}, [None], ["x", {}],
)
ODD_LINES = (
    "", " ", "\ufeff", "x" * 5000, "\x00", "\u2028", "a\u2028b", "-oProxyCommand=x slots=1", "host slots=9999999999999",
    "host slots=-1", "# only a comment", "{}", "[]", "null", '{"file": 1}', '{"file": "x.png"}',
    '{"file": "../../x", "caption": null}', "a: [1", "&a [*a]", "? ", "extends: tiny-flux", "extends: [1]",
    "name: ../../x", "key: !!python/object:os.system x", "\t- a",
)
# fmt: on
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252")
DEEP = "[" * 100_000


def damaged(chance: random.Random, content: bytes) -> bytes:
    """``content`` cut, flipped, repeated, grown or overwritten, mostly near its beginning."""
    found = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        span = min(len(found), chance.choice((8, 64, 4096, len(found) or 1)))
        at = chance.randrange(max(1, span))
        change = chance.choice(
            ("cut", "flip", "insert", "fill", "double", "empty" if not chance.randrange(9) else "flip")
        )
        if change == "cut":
            del found[at:]
        elif change == "flip" and at < len(found):
            found[at] ^= 1 << chance.randrange(8)
        elif change == "insert":
            found[at:at] = chance.choice((*ODD_BYTES, chance.randbytes(chance.randint(1, 9))))
        elif change == "fill":
            odd = chance.choice(ODD_BYTES)
            found[at : at + len(odd)] = odd
        elif change == "double":
            found[at:at] = found[at : at + chance.randrange(200)]
        elif change == "empty":
            found.clear()
    return bytes(found)


def damaged_lines(chance: random.Random, text: str) -> bytes:
    """Lines removed, doubled, swapped or replaced, in one of several encodings; or just damaged bytes."""
    lines = text.split("\n")
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(lines)) if lines else 0
        change = chance.choice(("remove", "double", "odd", "cut", "insert"))
        if change == "remove" and lines:
            del lines[at]
        elif change == "double" and lines:
            lines.insert(at, lines[at])
        elif change == "odd" and lines:
            lines[at] = chance.choice(ODD_LINES)
        elif change == "cut" and lines:
            lines[at] = lines[at][: chance.randrange(len(lines[at]) + 1)]
        else:
            lines.insert(at, chance.choice(ODD_LINES))
    content = "\n".join(lines).encode(
        chance.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252")), "replace"
    )
    return damaged(chance, content) if not chance.randrange(3) else content


def mutated(chance: random.Random, document: Any) -> Any:
    """``document`` with a few of its values replaced, removed, renamed or doubled, anywhere in the tree."""
    document = copy.deepcopy(document)
    for _ in range(chance.randint(1, 3)):
        node, parent, key = document, None, None
        while isinstance(node, (dict, list)) and node and (parent is None or chance.randrange(4)):
            parent = node
            key = chance.choice(sorted(node)) if isinstance(node, dict) else chance.randrange(len(node))
            node = node[key]
        if parent is None or not chance.randrange(40):
            return copy.deepcopy(chance.choice(ODD))
        change = chance.choice(("replace", "replace", "remove", "rename", "double"))
        if change == "replace":
            parent[key] = copy.deepcopy(chance.choice(ODD))
        elif change == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            name = chance.choice((f"{key}x", str(key)[:-1], "", "../../x", "a.b", "\x1b[2J", "flavour"))
            parent[name] = parent.pop(key) if change == "rename" else copy.deepcopy(parent[key])
    return document


def damaged_json(chance: random.Random, document: Any) -> bytes:
    """A document as JSON with odd values in it, sometimes with damaged bytes, seldom nested without end."""
    if not chance.randrange(50):
        return DEEP.encode()
    text = json.dumps(mutated(chance, document)).encode()
    return damaged(chance, text) if not chance.randrange(5) else text


def header_of(content: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def damaged_safetensors(chance: random.Random, content: bytes) -> bytes:
    """A safetensors file with a mutated header before the same tensors, or with damaged bytes."""
    if not chance.randrange(3):
        return damaged(chance, content)
    start = 8 + int.from_bytes(content[:8], "little")
    text = json.dumps(mutated(chance, header_of(content))).encode()
    return len(text).to_bytes(8, "little") + text + content[start:]
