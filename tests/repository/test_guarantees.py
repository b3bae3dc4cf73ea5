"""docs/guarantees.md names the tests of its promises: those tests exist."""

from __future__ import annotations

import re

from tests.support.environment.checkout import ROOT

PAGE = (ROOT / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[a-z_/]+\.py)::(test_\w+)`", PAGE)))


def test_guarantees_name_existing_tests() -> None:
    assert len(NAMED) >= 15
    missing = [
        f"{file}::{name}"
        for file, name in NAMED
        if not (ROOT / file).is_file() or not re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
    ]
    assert missing == []
