"""A reader of InfluxDB's line protocol, by its published grammar: character by character, and strict.

It looks ahead where InfluxDB's own looks behind, and takes a backslash for itself where nothing special follows it.
"""

from __future__ import annotations

from monitor.points.points import Value

Read = tuple[str, dict[str, str], dict[str, Value], int]


def read_line(line: str) -> Read:
    """Measurement, tags, fields, time; raises `ValueError` for anything that is no line."""
    if "\n" in line:
        raise ValueError("more than one line")
    rest = Rest(line)
    measurement = rest.name(",= ")
    tags = {}
    while rest.take(","):
        key = rest.name(",= ")
        rest.must("=")
        tags[key] = rest.name(",= ")
        if not tags[key]:
            raise ValueError(f"an empty tag: {key}")
    rest.must(" ")
    fields: dict[str, Value] = {}
    while True:
        key = rest.name(",= ")
        rest.must("=")
        fields[key] = rest.value()
        if not rest.take(","):
            break
    rest.must(" ")
    return measurement, tags, fields, int(rest.left)


class Rest:
    """What of a line is not read yet."""

    def __init__(self, line: str) -> None:
        self.left = line

    def take(self, character: str) -> bool:
        found = self.left.startswith(character)
        if found:
            self.left = self.left[1:]
        return found

    def must(self, character: str) -> None:
        if not self.take(character):
            raise ValueError(f"expected {character!r} before {self.left!r}")

    def name(self, special: str) -> str:
        """Up to the next special character that no backslash precedes."""
        found = ""
        while self.left and self.left[0] not in special:
            if self.left[0] == "\\" and self.left[1:2] and self.left[1] in special:
                self.left = self.left[1:]
            found, self.left = found + self.left[0], self.left[1:]
        return found

    def value(self) -> Value:
        if self.take('"'):
            return self._text()
        end = min((place for mark in ", " if (place := self.left.find(mark)) >= 0), default=len(self.left))
        word, self.left = self.left[:end], self.left[end:]
        if word in ("true", "false"):
            return word == "true"
        return int(word[:-1]) if word.endswith("i") else float(word)

    def _text(self) -> str:
        found = ""
        while not self.take('"'):
            if not self.left:
                raise ValueError("a text without an end")
            if self.left[0] == "\\" and self.left[1:2] in ("\\", '"'):
                self.left = self.left[1:]
            found, self.left = found + self.left[0], self.left[1:]
        return found
