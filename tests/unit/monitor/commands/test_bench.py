"""`sparse bench` on the command line: mistakes are one line of text, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from brokers.cli import main
from brokers.config.pipeline_file import BROKER_VARIABLE
from monitor.bench.suite import SUITES_FOLDER
from tests.support.environment.checkout import ROOT

SPLIT = str(ROOT / "examples" / "split.toml")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "which suite?"),
        (("detect-clod",), "there is no suite 'detect-clod' (did you mean 'detect-cloud'?)"),
        (("gone.toml",), "gone.toml: no such file"),
        (("detect", "--requests", "0"), "--requests"),
        (("detect", "--repeats", "0"), "--repeats"),
        (("detect-cloud", "--requests", "20", "--warm-up", "20"), "a warm-up of 20 leaves none of 20 requests"),
        (("detect-cloud", "--source-only"), "no broker address for site 'device'"),
        (("sweep", SPLIT), "what shall vary?"),
        (("sweep", SPLIT, "--batch", "1", "--cuts", "8"), "what shall vary?"),
        (("sweep", SPLIT, "--cuts", "8,x"), "--cuts '8,x': expected whole numbers"),
        (("sweep", SPLIT, "--batch", "0"), "--batch '0': expected whole numbers from 1"),
        (("sweep", "detect-cloud", "--cuts", "8"), "one network in two stages, it has 3"),
        (("sweep", "detect", "--batch", "1"), "a sweep is of one pipeline: 'detect' names 6 suites"),
    ],
)
def test_mistake_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    text: str,
) -> None:
    monkeypatch.delenv(BROKER_VARIABLE, raising=False)
    assert main(["bench", *arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sparse: ")
    assert text in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below_a_file", [False, True])
def test_results_need_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], below_a_file: bool) -> None:
    (tmp_path / "mine").write_text("kept")
    out = tmp_path / "mine" / "bench" if below_a_file else tmp_path
    assert main(["bench", "detect-device", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sparse: {out}: results cannot be written there: ")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_packaged_suites_are_listed_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {path.stem} " in text for path in SUITES_FOLDER.glob("*.toml"))
    assert max(len(line) for line in text.splitlines()) <= 80
