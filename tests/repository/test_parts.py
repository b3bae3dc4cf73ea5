"""The tests' own promise: a part of the world that is missing never makes a build server green."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.environment import external_programs as parts


def test_a_part_that_is_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    python = Path(sys.executable)
    monkeypatch.setattr(parts, "SEARCH_PATH", str(python.parent))
    monkeypatch.setitem(parts.PROGRAMS, python.name, "nothing")
    assert parts.require_dependency(python.name) == python


@pytest.mark.parametrize(("ci", "ending"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_part_fails_a_build_server_and_skips_elsewhere(
    monkeypatch: pytest.MonkeyPatch, ci: str, ending: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setitem(parts.PROGRAMS, "no-such-program", "apt-get install it")
    with pytest.raises(ending, match="no-such-program is missing: apt-get install it"):
        parts.require_dependency("no-such-program")


def test_an_unknown_part_is_a_mistake_in_the_test() -> None:
    with pytest.raises(KeyError, match="mosquito"):
        parts.require_dependency("mosquito")
