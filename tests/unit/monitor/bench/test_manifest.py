"""The manifest says what was run, on what and with what; it is read back as it was written, and holds no password."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from brokers.config.pipeline_file import load_pipeline
from monitor.bench.case import BenchCase, case_from_suite
from monitor.bench.environment import git_revision, hardware, versions
from monitor.bench.manifest import MANIFEST_FILE, Manifest, load_manifest, redact_passwords, suite_record
from monitor.bench.suite import SUITES_FOLDER, find_suites
from monitor.bench.sweep import cut_cases
from monitor.errors import BadManifest
from tests.support.environment.checkout import ROOT


def manifest(*cases: BenchCase) -> Manifest:
    return Manifest(
        command=("sparse", "bench", "detect"),
        mode="run",
        started_at="2026-01-02T03:04:05+00:00",
        warm_up=5,
        requests=30,
        repeats=2,
        versions=versions(),
        revision=git_revision(),
        hardware=hardware(),
        suites=tuple(suite_record(case, True, [f"{case.name}-1"]) for case in cases),
    )


def test_it_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    cases = [case_from_suite(suite, 30, 5) for suite in find_suites(["detect-hybrid-on-device", "train-device"])]
    written = manifest(*cases)
    (tmp_path / MANIFEST_FILE).write_text(written.to_json())
    found = load_manifest(tmp_path)
    assert found == written
    hybrid, device = found.suites
    assert hybrid.pipeline_text == (SUITES_FOLDER / "detect-hybrid-on-device.toml").read_text()
    assert hybrid.overrides == {"source.limit": 30, "source.loop": True}
    assert (hybrid.kind, hybrid.seed, hybrid.runs) == ("inference", 0, ("detect-hybrid-on-device-1",))
    links = [(link.site, link.to, link.delay_ms, link.rate_mbit, link.emulated) for link in hybrid.links]
    assert links == [("device", "cloudlet", 1.0, 200.0, True), ("cloudlet", "cloud", 8.0, 50.0, True)]
    assert (device.kind, device.links) == ("training", ())


def test_links_that_nothing_crosses_are_not_named() -> None:
    (split,) = find_suites([str(ROOT / "examples" / "split.toml")])
    cut, here, there = cut_cases(split, [8], {8: 346_112}, 30, 5)
    assert [len(suite_record(case, True, []).links) for case in (cut, here, there)] == [1, 0, 1]
    assert [suite_record(case, False, []).links[0].emulated for case in (cut, there)] == [False, False]
    assert here.sweep_point == {"sweep": "cut", "cut": None, "site": "device"}


def test_a_password_in_a_brokers_address_is_not_in_it(tmp_path: Path) -> None:
    path = tmp_path / "far.toml"
    path.write_text(
        '[pipeline]\nname = "far"\nmodel = "yolov3-tiny"\n[[stage]]\nname = "whole"\nsite = "far"\n'
        "[[site]]\nname = \"far\"\nbroker = 'mqtts://fog:hush@far.example:8884'\n"
        '[source]\nkind = "video"\npath = "street"\nsite = "far"\n'
    )
    text = suite_record(BenchCase("far", path, load_pipeline(path)), False, []).pipeline_text
    assert "hush" not in text
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
def test_a_password_is_left_out_wherever_it_stands(line: str) -> None:
    found = redact_passwords(line)
    assert not re.search("hu'?sh", found)
    assert ("@far" in found) == ("@far" in line)


def test_the_machine_and_the_versions_are_told() -> None:
    machine, found = hardware(), versions()
    assert machine["cpu"]
    assert machine["cores"] >= machine["usable_cores"] >= 1
    assert machine["memory_bytes"] > 1 << 28
    assert (machine["gpus"] is None) == (machine["gpus_missing"] is not None)
    assert {"sparse", "python", "torch", "numpy", "paho-mqtt", "mosquitto", "iotcore"} == set(found)
    assert found["python"] == sys.version.split()[0]
    assert found["torch"]


def test_the_revision_is_that_of_the_checkout_and_null_outside_of_one(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.touch()
    assert git_revision(program) is None

    def git(*words: str) -> str:
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert git_revision(program) is None  # not a part of it
    git("add", "program.py")
    git("commit", "-qm", "one")
    assert git_revision(program) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    program.write_text("changed")
    assert git_revision(program) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "Invalid JSON"), ("{}", "command: Field required"), ('{"format": 2}', "format: Input should be 1")],
)
def test_a_manifest_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    assert load_manifest(tmp_path) is None
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(BadManifest, match=said) as caught:
        load_manifest(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / MANIFEST_FILE}: no manifest of a benchmark: ")
