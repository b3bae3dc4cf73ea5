"""User properties of a message, read: each is text, and what it may be stands in docs/protocol.md. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from brokers.errors import property_error

_DIGITS = re.compile(r"[0-9]+")
_MILLISECONDS = re.compile(r"[0-9]{1,13}(\.[0-9]{1,9})?")


def get_required(user: Mapping[str, str], name: str) -> str:
    if name not in user:
        raise property_error(name, "is missing")
    return user[name]


def get_int(user: Mapping[str, str], name: str, default: str | None = "1", max_digits: int = 9) -> int:
    text = get_required(user, name) if default is None else user.get(name, default)
    if len(text) > max_digits or not _DIGITS.fullmatch(text):
        raise property_error(name, f"must be a whole number of at most {max_digits} digits, is {text!r}")
    return int(text)


def get_milliseconds(user: Mapping[str, str], name: str) -> float | None:
    text = user.get(name)
    if text is None:
        return None
    if not _MILLISECONDS.fullmatch(text) or float(text) == 0:
        raise property_error(name, f"must be a positive decimal number, is {text!r}")
    return float(text)
