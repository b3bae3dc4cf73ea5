"""A reader of Prometheus' text format, version 0.0.4, that forgives nothing: what our own writer is held against."""

from __future__ import annotations

import re

SeriesValues = dict[tuple[str, frozenset[tuple[str, str]]], float]

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_ESCAPED = {"\\": "\\", '"': '"', "n": "\n"}


def parse_exposition(text: str) -> SeriesValues:
    """All series by name and labels; raises AssertionError where the page breaks the format."""
    assert text.endswith("\n")
    found: SeriesValues = {}
    kinds: dict[str, str] = {}
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            name = line.split(" ")[2]
            assert name not in kinds, f"{name} begins twice"
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert kind in ("counter", "gauge"), line
            assert name not in kinds, f"{name} begins twice"
            assert (kind == "counter") == name.endswith("_total"), line
            kinds[name] = kind
        else:
            assert not line.startswith("#"), line
            name, labels, value = _read_series(line)
            assert name == list(kinds)[-1], f"{name} stands among the series of {list(kinds)[-1]}"
            key = name, frozenset(labels.items())
            assert key not in found, f"{line} twice"
            found[key] = value
    return found


def _read_series(line: str) -> tuple[str, dict[str, str], float]:
    head = _NAME.match(line)
    assert head, line
    at, labels = head.end(), dict[str, str]()
    if line[at] == "{":
        at += 1
        while line[at] != "}":
            label = _LABEL.match(line, at)
            assert label, line
            assert line[label.end() : label.end() + 2] == '="', line
            at, text = _read_text(line, label.end() + 2)
            assert label[0] not in labels, line
            labels[label[0]] = text
            assert line[at] in ",}", line
            at += line[at] == ","
        at += 1
    assert line[at] == " ", line
    return head[0], labels, float(line[at + 1 :])


def _read_text(line: str, at: int) -> tuple[int, str]:
    """Where the text that begins here has ended, and what it says."""
    text = ""
    while line[at] != '"':
        if line[at] == "\\":
            at += 1
            text += _ESCAPED[line[at]]
        else:
            text += line[at]
        at += 1
    return at + 1, text


def select_series(series: SeriesValues, name: str, **labels: str) -> dict[frozenset[tuple[str, str]], float]:
    """The series of a name that have these labels among theirs."""
    wanted = set(labels.items())
    return {key: value for (known, key), value in series.items() if known == name and wanted <= key}


def series_value(series: SeriesValues, name: str, **labels: str) -> float:
    """The one series of a name that has these labels among its own."""
    (value,) = select_series(series, name, **labels).values()
    return value
