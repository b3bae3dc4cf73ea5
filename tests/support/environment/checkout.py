"""This checkout as data: where it is, which packages it has, which files git would commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("brokers", "stages", "sources", "monitor")


def repository_files(pattern: str = "*") -> list[Path]:
    """All files that are tracked, or would be by `git add .`: a new file keeps the rules before its first commit."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", pattern],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [ROOT / name for name in sorted(set(listed.split("\0"))) if name and (ROOT / name).is_file()]
