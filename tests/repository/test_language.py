"""Plain technical English: phrases that hide the name of a thing are counted, and none is allowed.

A relative clause as the name of a thing ("what is there") is replaced by its noun, a metaphor by the standard term. The
names of functions and variables are checked as well, with a space for each underscore.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.environment.checkout import ROOT, repository_files

VERBS = "is|are|was|were|comes?|came|goes|went|stands|stood|has|had|remains|happens|happened"
PHRASES = re.compile(
    r"\b(?:"
    r"[Ww]hoever|[Ww]homever|[Ww]hatever|[Nn]obody|[Aa]nybody|[Ss]omebody|[Ee]verybody|anew"
    rf"|[Ww]hat (?:{VERBS})|[Ww]ho (?:is|was|comes?|came)|that there (?:is|are)"
    r"|(?:is|are|was|were) none|of (?:its|their) own"
    r"|[Tt]wins?|[Cc]rews?|[Ee]rrands?|[Ss]trangers?|[Vv]itals|[Pp]ulse|[Hh]eard|[Ff]arewells?"
    r"|[Ff]ront doors?|[Ll]ocked doors?"
    r")\b(?! not None)"
)
JINJA_CODE = re.compile(r"\{%.*?%\}|\{\{.*?\}\}")
CHECKED = {".py", ".md", ".toml", ".yaml", ".yml", ".jinja", ".css", ".js", ""}
# The changelog has the former names of metrics and fields.
EXEMPT = {Path(__file__), ROOT / "LICENSE", ROOT / "CHANGELOG.md"}


def phrases(text: str) -> list[tuple[int, str]]:
    """The forbidden phrases of a text, each with the number of its line."""
    lines = JINJA_CODE.sub("", text).replace("_", " ").splitlines()
    return [(number, match[0]) for number, line in enumerate(lines, start=1) for match in PHRASES.finditer(line)]


def test_no_forbidden_phrases() -> None:
    places: list[str] = []
    for path in repository_files():
        if path.suffix in CHECKED and path not in EXEMPT:
            matches = phrases(path.read_text(errors="ignore"))
            places += [f"{path.relative_to(ROOT)}:{number}: {phrase}" for number, phrase in matches]
    assert places == []


@pytest.mark.parametrize(
    "text",
    ["whoever reads it", "Nobody waits", "the value is none", "what is there", "test_what_comes_first", "its_farewell"],
)
def test_forbidden_phrases_are_found(text: str) -> None:
    assert [number for number, _ in phrases(f"\n{text}\n")] == [2]


def test_identifiers_and_plain_text_are_not_found() -> None:
    assert phrases("if value is None: return  # the crewless, somewhat pulsed somewhere") == []
