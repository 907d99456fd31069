"""Typed reading of a config file's fields: what is missing, wrong or unsupported is an error that names the field."""

from __future__ import annotations

from typing import Any

from gatework.plugins.errors import GateworkError

REQUIRED: Any = object()


class Fields:
    """One JSON object of a config.

    where: its name in messages, such as "ffn_config." for a nested one.
    labels: names for messages, of fields that are called otherwise in the file.
    """

    def __init__(self, raw: dict[str, Any], where: str = "", labels: dict[str, str] | None = None) -> None:
        self.raw = raw
        self.where = where
        self.labels = labels or {}

    def __contains__(self, key: str) -> bool:
        return key in self.raw

    def nested(self, key: str) -> Fields:
        """The object under `key`; an empty one where it is missing or null."""
        value = self.raw.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, value, "an object")
        return Fields(value, f"{self.where}{key}.")

    def integer(self, key: str, default: Any = REQUIRED) -> Any:
        """An int; a missing or null field gives `default`."""
        value = self.raw.get(key)
        if value is None:
            return self.missing(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, value, "an integer")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A float; a missing or null field gives `default`."""
        value = self.raw.get(key)
        if value is None:
            return self.missing(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, value, "a number")
        try:
            return float(value)
        except OverflowError:
            raise self.error(key, value, "a number") from None

    def flag(self, key: str, default: bool) -> bool:
        """A bool; a missing or null field gives `default`."""
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids given as an int, a list of ints, null, or not at all."""
        value = self.raw.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(key, value, "a token id or a list of them")
        return tuple(ids)

    def refuse_unless(self, key: str, *allowed: Any) -> None:
        """Raise unless the field is missing, null or one of the `allowed` values."""
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            raise self.unsupported(key, f"{' or '.join(map(repr, allowed))}" if allowed else "nothing")

    def label(self, key: str) -> str:
        """The field's name in messages."""
        return self.where + self.labels.get(key, key)

    def missing(self, key: str, default: Any) -> Any:
        if default is REQUIRED:
            raise GateworkError(f"config has no {self.label(key)}", fix="check the checkpoint's config")
        return default

    def error(self, key: str, got: object, expected: str) -> GateworkError:
        """The field has a value that nothing can mean."""
        return GateworkError(f"config field {self.label(key)} is wrong", got=shown(got), expected=expected)

    def unsupported(self, key: str, expected: str) -> GateworkError:
        """The field asks for something that Gatework does not do."""
        got = shown(self.raw.get(key))
        return GateworkError(f"config field {self.label(key)} is not supported", got=got, expected=expected)


def shown(value: object) -> str:
    """A short repr for messages."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
