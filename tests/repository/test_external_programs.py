"""A missing external program skips its tests on a user's machine and fails them in CI."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.environment import external_programs


def test_installed_program_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    python = Path(sys.executable)
    monkeypatch.setattr(external_programs, "SEARCH_PATH", str(python.parent))
    monkeypatch.setitem(external_programs.PROGRAMS, python.name, "")
    assert external_programs.require_dependency(python.name) == python


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_missing_program_fails_in_ci_and_skips_elsewhere(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setitem(external_programs.PROGRAMS, "no-such-program", "apt-get install it")
    with pytest.raises(outcome, match="no-such-program is missing: apt-get install it"):
        external_programs.require_dependency("no-such-program")


def test_unknown_program_raises_key_error() -> None:
    with pytest.raises(KeyError, match="mosquito"):
        external_programs.require_dependency("mosquito")
