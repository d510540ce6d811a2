"""The house: every arrow between rooms points down, and no modules import one another in a circle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .rooms import EXCEPTIONS, FLOORS, PACKAGE, arrows, circles, classes, floor, modules, room

MOST_ROOMS = 20  # 17 folders, and the files conversion.py, quantization.py and __init__.py


def test_every_room_stands_in_the_table():
    there = {room(name) for name in modules()}
    assert there == {name for rooms in FLOORS for name in rooms}
    assert len(there) <= MOST_ROOMS


def test_arrows_between_rooms_point_down():
    wrong = {
        f"{PACKAGE}.{arrow.source}:{arrow.line} imports {arrow.target}"
        for arrow in arrows()
        if arrow.rooms[0] != arrow.rooms[1]
        and floor(arrow.rooms[1]) <= floor(arrow.rooms[0])
        and (arrow.source, arrow.rooms[1]) not in EXCEPTIONS
    }
    assert not wrong


def test_exceptions_are_still_needed():
    used = {(arrow.source, arrow.rooms[1]) for arrow in arrows()}
    assert set(EXCEPTIONS) <= used


def test_no_import_circles():
    assert circles() == []


def test_no_class_name_stands_twice():
    assert {name: places for name, places in classes().items() if len(places) > 1} == {}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/code.md"])
def test_the_documentation_shows_the_same_order(page):
    text = (Path(__file__).resolve().parents[2] / page).read_text(encoding="utf-8")
    rows = text.partition("| rooms | what they do |")[2].partition("\n\n")[0].splitlines()
    shown = [tuple(re.findall(r"`(\w+)`", row.split("|")[1])) for row in rows if row.startswith("| `")]
    assert shown == [rooms for rooms in FLOORS if rooms != ("__init__",)]
