"""The demo, on the frames that show people and cars: what it says, what it leaves behind, what it finds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from brokers.errors import SparseError
from brokers.server.mosquitto_conf import find_mosquitto as find_mosquitto
from sources.inputs.video import find_video
from stages.partition.weight_files import find_weights
from tests.support.environment.checkout import ROOT
from tests.support.environment.external_programs import require_dependency, skip_or_fail
from tests.support.pipelines.processes import CommandResult, process_sandbox

# Of 250: a car that stands behind a person, then people with bicycles.
SHOWN = (*range(32, 44), *range(112, 124))
KEYS = {
    *("pipeline", "broker", "requests", "results", "lost", "dropped", "retries", "elapsed_s", "throughput_per_s"),
    *("latency_ms", "stages", "outputs"),
}
STAGE_KEYS = {"workers", "tasks", "queue_ms", "decode_ms", "compute_ms", "encode_ms", "bytes_in", "bytes_out"}


@dataclass
class Demo:
    """What a run said, and its folder."""

    said: CommandResult
    out: Path

    @property
    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", name="demo")
def _demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`sparse run` of examples/street.toml, on a few of its frames."""
    try:
        find_weights("yolov3-tiny")
        street = find_video("street", ROOT)
    except SparseError as problem:
        skip_or_fail(str(problem))
    if find_mosquitto() is None:
        require_dependency("iotcore")
    folder = tmp_path_factory.mktemp("demo")
    _cut(street, folder / "short.mp4")
    text = (ROOT / "examples" / "street.toml").read_text()
    assert 'path = "street"' in text
    path = folder / "street.toml"
    path.write_text(text.replace('path = "street"', 'path = "short.mp4"'))
    with process_sandbox(folder) as sandbox:
        said = sandbox.start_sparse("run", path, "--json", "--out", folder / "out").wait()
        assert said.returncode == 0, said.stderr
        sandbox.assert_nothing_left()
    return Demo(said, folder / "out")


def _cut(street: Path, short: Path) -> None:
    """Write the shown frames alone."""
    with av.open(str(street)) as source, av.open(str(short), "w") as target:
        stream = target.add_stream("mpeg4", rate=25, options={"qscale": "2"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 640, 272, "yuv420p"
        for index, frame in enumerate(source.decode(video=0)):
            if index in SHOWN:
                target.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
        target.mux(stream.encode(None))


def test_it_ends_with_one_line_of_json_and_says_nothing_else_there(demo: Demo) -> None:
    assert demo.said.stdout.count("\n") == 1
    assert set(demo.said.json_output) >= KEYS
    assert "Traceback" not in demo.said.stderr
    written = json.loads((demo.out / "summary.json").read_text())
    # The source wrote it, who knows neither whose the broker is nor who else writes into the folder.
    files = {**written["files"], "telemetry": "telemetry.sqlite"}
    assert {**written, "broker": demo.said.json_output["broker"], "files": files} == demo.said.json_output


def test_its_numbers_agree_with_one_another(demo: Demo) -> None:
    summary = demo.said.json_output
    assert summary["pipeline"] == "street"
    assert summary["broker"] in ("mosquitto", "embedded")
    assert summary["requests"] == summary["results"] == len(demo.results) == len(SHOWN)
    assert [summary[key] for key in ("lost", "dropped", "failed", "retries", "duplicates")] == [0] * 5
    assert summary["throughput_per_s"] == pytest.approx(summary["results"] / summary["elapsed_s"], rel=0.02)
    latency = summary["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= 1000 * summary["elapsed_s"]
    assert summary["outputs"] == str(demo.out)


def test_it_says_of_each_stage_what_it_did_and_where_the_time_went(demo: Demo) -> None:
    stages = demo.said.json_output["stages"]
    assert list(stages) == ["head", "body", "tail"]
    for stage in stages.values():
        assert set(stage) == STAGE_KEYS
        assert (stage["workers"], stage["tasks"]) == (1, len(SHOWN))
        assert stage["compute_ms"] > 0
        assert min(stage.values()) >= 0
    # What one stage sends is what the next one gets; 416 x 416 x 3 in, a few boxes out.
    assert stages["head"]["bytes_out"] == stages["body"]["bytes_in"] > 0
    assert stages["body"]["bytes_out"] == stages["tail"]["bytes_in"] > 0
    spent = sum(stage[key] for stage in stages.values() for key in stage if key.endswith("_ms"))
    assert spent <= demo.said.json_output["latency_ms"]["p99"]


def test_the_results_come_in_the_order_of_the_video(demo: Demo) -> None:
    results = demo.results
    assert [result["index"] for result in results] == list(range(len(SHOWN)))
    assert {result["source"] for result in results} == {"street"}
    assert len({result["request"] for result in results}) == len(SHOWN)
    for result in results:
        assert [spent["stage"] for spent in result["time"]["stages"]] == ["head", "body", "tail"]
        assert result["picture"] == {"width": 640, "height": 272}
        assert result["age_ms"] >= result["latency_ms"]


def test_people_and_cars_are_found_where_they_are(demo: Demo) -> None:
    found = [_labels(result) for result in demo.results]
    assert sum("car" in labels for labels in found[:12]) >= 10, found
    assert sum("person" in labels for labels in found[12:]) >= 10, found
    for result in demo.results:
        for item in result["objects"]:
            left, top, width, height = item["box"]
            assert width > 0
            assert height > 0
            # A sandbox says how large the thing is, which may be cut off by the edge of the picture.
            assert -64 <= left <= left + width <= 640 + 64
            assert -27 <= top <= top + height <= 272 + 27
            assert 0.5 <= item["score"] <= 1


def test_the_pictures_open(demo: Demo) -> None:
    files = demo.said.json_output["files"]
    frames = sorted((demo.out / "frames").iterdir())
    assert [f"frames/{path.name}" for path in frames] == sorted(files["frames"])
    assert len(frames) >= 4
    for path in frames:
        with Image.open(path) as picture:
            assert picture.size[0] / picture.size[1] == pytest.approx(640 / 272, rel=0.01)
            picture.load()
    with Image.open(demo.out / files["sheet"]) as sheet:
        assert sheet.size[0] > 640
    with av.open(str(demo.out / files["clip"])) as clip:
        assert len(list(clip.decode(video=0))) == len(SHOWN)


def test_boxes_are_drawn_where_something_was_found(demo: Demo) -> None:
    """A drawn frame differs from the filmed one, and most of it does not."""
    with av.open(str(demo.out.parent / "short.mp4")) as video:
        filmed = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]
    for path in sorted((demo.out / "frames").iterdir()):
        with Image.open(path) as drawn:
            index = int("".join(letter for letter in path.stem if letter.isdigit()))
            plain = np.asarray(filmed[index].resize(drawn.size), np.int16)
            difference = np.abs(np.asarray(drawn.convert("RGB")) - plain).max(axis=2)  # (H, W)
        changed = float((difference > 60).mean())
        assert 0.001 < changed < 0.4, path.name


def test_nothing_but_the_results_is_left_in_the_folder(demo: Demo) -> None:
    names = {path.name for path in demo.out.iterdir()}
    files = demo.said.json_output["files"]
    assert names == {
        "results.jsonl", "summary.json", "logs", "frames", files["sheet"], files["clip"], files["telemetry"]
    }  # fmt: skip
    assert [path.name for path in demo.out.rglob(".*")] == []


def _labels(result: dict[str, Any]) -> set[str]:
    return {item["label"] for item in result["objects"]}
