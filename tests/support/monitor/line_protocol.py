"""A reader of InfluxDB's line protocol, by its published grammar: character by character, and strict.

It looks ahead where InfluxDB's own looks behind, and takes a backslash for itself where nothing special follows it.
"""

from __future__ import annotations

from monitor.points.points import FieldValue

ParsedLine = tuple[str, dict[str, str], dict[str, FieldValue], int]


def parse_line(line: str) -> ParsedLine:
    """Measurement, tags, fields, time; raises `ValueError` for anything that is no line."""
    if "\n" in line:
        raise ValueError("more than one line")
    rest = LineScanner(line)
    measurement = rest.read_name(",= ")
    tags = {}
    while rest.accept(","):
        key = rest.read_name(",= ")
        rest.expect("=")
        tags[key] = rest.read_name(",= ")
        if not tags[key]:
            raise ValueError(f"an empty tag: {key}")
    rest.expect(" ")
    fields: dict[str, FieldValue] = {}
    while True:
        key = rest.read_name(",= ")
        rest.expect("=")
        fields[key] = rest.read_value()
        if not rest.accept(","):
            break
    rest.expect(" ")
    return measurement, tags, fields, int(rest.remaining)


class LineScanner:
    """What of a line is not read yet."""

    def __init__(self, line: str) -> None:
        self.remaining = line

    def accept(self, character: str) -> bool:
        found = self.remaining.startswith(character)
        if found:
            self.remaining = self.remaining[1:]
        return found

    def expect(self, character: str) -> None:
        if not self.accept(character):
            raise ValueError(f"expected {character!r} before {self.remaining!r}")

    def read_name(self, special: str) -> str:
        """Up to the next special character that no backslash precedes."""
        found = ""
        while self.remaining and self.remaining[0] not in special:
            if self.remaining[0] == "\\" and self.remaining[1:2] and self.remaining[1] in special:
                self.remaining = self.remaining[1:]
            found, self.remaining = found + self.remaining[0], self.remaining[1:]
        return found

    def read_value(self) -> FieldValue:
        if self.accept('"'):
            return self._text()
        end = min((place for mark in ", " if (place := self.remaining.find(mark)) >= 0), default=len(self.remaining))
        word, self.remaining = self.remaining[:end], self.remaining[end:]
        if word in ("true", "false"):
            return word == "true"
        return int(word[:-1]) if word.endswith("i") else float(word)

    def _text(self) -> str:
        found = ""
        while not self.accept('"'):
            if not self.remaining:
                raise ValueError("a text without an end")
            if self.remaining[0] == "\\" and self.remaining[1:2] in ("\\", '"'):
                self.remaining = self.remaining[1:]
            found, self.remaining = found + self.remaining[0], self.remaining[1:]
        return found
