"""The kinds of values that a recipe's settings have, each with its bounds (`core.limits`)."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from dcgen_convert.core import limits

UNUSABLE = "unusable"  # type of the errors below: their message goes on after the setting's name


def _usable(text: str) -> str:
    if fault := limits.fault_of(text):
        raise PydanticCustomError(UNUSABLE, "{fault}", {"fault": fault})
    return text


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        fault = f"is no regular expression: {error}"
        raise PydanticCustomError(UNUSABLE, "{fault}", {"fault": fault}) from error
    return text


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hours(value: object) -> object:
    table = value if isinstance(value, dict) else {"1": value}
    sizes, hours = [str(size) for size in table], list(table.values())
    right = all(_is_number(number) and 0 <= float(str(number)) <= limits.AMOUNT for number in hours)
    if not table or not right or not all(size.isdecimal() and int(size) for size in sizes):
        what = f"must be GPU-hours from 0 to {limits.AMOUNT:,.0f}, or a table of them such as {{256: 192}}"
        raise PydanticCustomError(UNUSABLE, "{fault}", {"fault": f"{what}, not {limits.shown(value)}"})
    return value


Count = Annotated[int, Field(ge=1, le=limits.COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=limits.COUNT)]
Pictures = Annotated[int, Field(ge=1, le=limits.PICTURES)]
PicturesOrZero = Annotated[int, Field(ge=0, le=limits.PICTURES)]
Batch = Annotated[int, Field(ge=1, le=limits.BATCH)]
Side = Annotated[int, Field(ge=1, le=limits.SIDE)]
LoraRank = Annotated[int, Field(ge=1, le=limits.LORA_RANK)]
Seed = Annotated[int, Field(ge=0, le=limits.SEED)]
Amount = Annotated[float, Field(ge=limits.SMALLEST, le=limits.AMOUNT)]
AmountOrZero = Annotated[float, Field(ge=0, le=limits.AMOUNT)]
GpuHours = Annotated[float | dict[int, float], BeforeValidator(_hours)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, AfterValidator(_usable)]
Expression = Annotated[Text, AfterValidator(_expression)]
