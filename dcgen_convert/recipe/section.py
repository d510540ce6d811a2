"""What every section of a recipe is: frozen, without unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: object) -> object:
        """`count: true` would be 1; as a text it is refused by its key, and is still true where true is meant."""
        if not isinstance(values, dict):
            return values
        return {key: str(value).lower() if isinstance(value, bool) else value for key, value in values.items()}
