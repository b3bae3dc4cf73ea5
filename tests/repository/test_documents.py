"""Markdown files: lines of at most 120 characters, and links to files and headings that exist."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.environment.checkout import ROOT, repository_files

LINE_LENGTH = 120
LINK = re.compile(r"\]\((?!\w+:)([^()\s#]*)(?:#([^()\s]*))?\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def headings(path: Path) -> set[str]:
    """The anchors of a document: GitHub's, lower case with hyphens for spaces and without punctuation."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path) -> list[str]:
    """Relative links whose file or heading is missing."""
    broken = []
    for name, anchor in LINK.findall(CODE.sub("", path.read_text())):
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(target)):
            broken.append(f"{path.name}: {name}#{anchor}")
    return broken


def test_lines_of_documents_have_at_most_120_characters() -> None:
    too_long = [
        f"{path.relative_to(ROOT)}:{number}: {len(line)}"
        for path in repository_files("*.md")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if len(line) > LINE_LENGTH and not line.startswith("|")  # the row of a table cannot be wrapped
    ]
    assert too_long == []


def test_relative_links_of_documents_resolve() -> None:
    assert [link for path in repository_files("*.md") for link in broken_links(path)] == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three\n[a](page.md#one-two-three) [b](#four) [c](none.md) [d](https://e.org/f) `[g](h)`"
    )
    assert broken_links(page) == ["page.md: #four", "page.md: none.md#"]
