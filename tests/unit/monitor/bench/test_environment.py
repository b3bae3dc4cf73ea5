"""The environment of a benchmark: hardware, versions and git revision."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from monitor.bench.environment import git_revision, hardware, versions


def test_hardware_and_versions_of_this_machine() -> None:
    machine, installed = hardware(), versions()
    assert machine["cpu"]
    assert machine["cores"] >= machine["usable_cores"] >= 1
    assert machine["memory_bytes"] > 1 << 28
    assert (machine["gpus"] is None) == (machine["gpus_missing"] is not None)
    assert {"sparse", "python", "torch", "numpy", "paho-mqtt", "mosquitto", "iotcore"} == set(installed)
    assert installed["python"] == sys.version.split()[0]
    assert installed["torch"]


def test_git_revision_of_a_tracked_file(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.touch()

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_revision(program) is None  # outside of a checkout
    git("init", "-q")
    assert git_revision(program) is None  # untracked
    git("add", "program.py")
    git("commit", "-qm", "one")
    assert git_revision(program) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    program.write_text("changed")
    assert git_revision(program) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
