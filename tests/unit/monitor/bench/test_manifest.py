"""A manifest is read back as it was written, names the used links and the environment, and holds no password."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import UsageError
from monitor.bench.manifest import (
    MANIFEST_FILE,
    Manifest,
    git_revision,
    hardware,
    load_manifest,
    redact_passwords,
    suite_record,
    versions,
)
from monitor.bench.suite import SUITES_FOLDER, BenchCase, find_suites
from monitor.bench.sweep import cut_cases
from tests.support.environment.checkout import ROOT


def manifest_of(*cases: BenchCase) -> Manifest:
    return Manifest(
        command=("sparse", "bench", "detect"),
        mode="run",
        started_at="2026-01-02T03:04:05+00:00",
        warm_up=5,
        requests=30,
        repeats=2,
        versions={"python": "3.11.2", "iotcore": None},
        revision={"commit": "0123abc", "dirty": False},
        hardware={"cores": 2, "gpus": None},
        suites=tuple(suite_record(case, True, [f"{case.name}-1"]) for case in cases),
    )


def test_manifest_is_read_back_as_written(tmp_path: Path) -> None:
    cases = [suite.with_run_length(30, 5) for suite in find_suites(["detect-hybrid-on-device", "train-device"])]
    manifest = manifest_of(*cases)
    (tmp_path / MANIFEST_FILE).write_text(manifest.to_json())
    assert load_manifest(tmp_path) == manifest
    hybrid, device = manifest.suites
    assert hybrid.pipeline_text == (SUITES_FOLDER / "detect-hybrid-on-device.toml").read_text()
    assert hybrid.overrides == {"source.limit": 30, "source.loop": True}
    assert (hybrid.kind, hybrid.seed, hybrid.runs) == ("inference", 0, ("detect-hybrid-on-device-1",))
    links = [(link.site, link.to, link.delay_ms, link.rate_mbit, link.emulated) for link in hybrid.links]
    assert links == [("device", "cloudlet", 1.0, 200.0, True), ("cloudlet", "cloud", 8.0, 50.0, True)]
    assert (device.kind, device.links) == ("training", ())


def test_unused_links_are_left_out() -> None:
    (split,) = find_suites([str(ROOT / "examples" / "split.toml")])
    cut, at_device, at_cloud = cut_cases(split, [8], {8: 346_112}, 30, 5)
    assert [len(suite_record(case, True, []).links) for case in (cut, at_device, at_cloud)] == [1, 0, 1]
    assert [suite_record(case, False, []).links[0].emulated for case in (cut, at_cloud)] == [False, False]


def test_record_has_no_password_of_a_broker(tmp_path: Path) -> None:
    path = tmp_path / "far.toml"
    path.write_text(
        '[pipeline]\nname = "far"\nmodel = "yolov3-tiny"\n[[stage]]\nname = "whole"\nsite = "far"\n'
        "[[site]]\nname = \"far\"\nbroker = 'mqtts://fog:hush@far.example:8884'\n"
        '[source]\nkind = "video"\npath = "street"\nsite = "far"\n'
    )
    text = suite_record(BenchCase("far", path, load_pipeline(path)), False, []).pipeline_text
    assert "broker = 'mqtts://fog@far.example:8884'" in text


@pytest.mark.parametrize(
    "line",
    [
        '"broker" = "mqtt://me:hush@far"',
        """broker = "mqtt://me:hu'sh@far" """,
        "# was mqtt://me:hush@far",
        '# broker = "see below"',
        "links = [{ to = 'mqtt://:hush@far' }] # hu",
    ],
)
def test_passwords_are_redacted_everywhere(line: str) -> None:
    redacted = redact_passwords(line)
    assert not re.search("hu'?sh", redacted)
    assert ("@far" in redacted) == ("@far" in line)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "Invalid JSON"), ("{}", "command: Field required"), ('{"format": 2}', "format: Input should be 1")],
)
def test_invalid_manifest_raises_usage_error(tmp_path: Path, text: str, problem: str) -> None:
    assert load_manifest(tmp_path) is None
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(UsageError) as caught:
        load_manifest(tmp_path)
    assert (caught.value.code, caught.value.fields["path"]) == ("BadManifest", str(tmp_path / MANIFEST_FILE))
    assert caught.value.fields["problem"].startswith(problem)


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
