"""The demo, examples/street.toml, on the frames that show people and cars: its summary, results and pictures."""

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
from brokers.server.mosquitto_conf import find_mosquitto
from sources.inputs.video import find_video
from stages.loading.weights_file import find_weights
from tests.support.environment.checkout import ROOT
from tests.support.environment.external_programs import require_broker, skip_or_fail
from tests.support.pipelines.processes import CommandResult, process_sandbox

# Of 250 frames: a car behind a person, then people with bicycles.
FRAMES = (*range(32, 44), *range(112, 124))
CAR_FRAMES = 12
WIDTH, HEIGHT = 640, 272
SUMMARY_KEYS = {
    *("pipeline", "broker", "requests", "results", "lost", "dropped", "retries", "elapsed_s", "throughput_per_s"),
    *("latency_ms", "stages", "outputs"),
}
STAGE_KEYS = {"workers", "tasks", "queue_ms", "decode_ms", "compute_ms", "encode_ms", "bytes_in", "bytes_out"}


@dataclass
class Demo:
    """The output of the run, its folder and its video."""

    result: CommandResult
    folder: Path
    video: Path

    @property
    def summary(self) -> dict[str, Any]:
        return self.result.json_output

    @property
    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", name="demo")
def _demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`sparse run` of examples/street.toml, on a few of its frames."""
    try:
        find_weights("yolov3-tiny")
        street = find_video("street", ROOT)
    except SparseError as error:
        skip_or_fail(str(error))
    if find_mosquitto() is None:
        require_broker("embedded")
    folder = tmp_path_factory.mktemp("demo")
    video = folder / "short.mp4"
    write_short_video(street, video)
    text = (ROOT / "examples" / "street.toml").read_text()
    assert 'path = "street"' in text
    path = folder / "street.toml"
    path.write_text(text.replace('path = "street"', 'path = "short.mp4"'))
    with process_sandbox(folder) as sandbox:
        result = sandbox.run_sparse("run", path, "--json", "--out", folder / "out")
        assert result.returncode == 0, result.stderr
        sandbox.assert_nothing_left()
    return Demo(result, folder / "out", video)


def write_short_video(street: Path, path: Path) -> None:
    with av.open(str(street)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream("mpeg4", rate=25, options={"qscale": "2"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index, frame in enumerate(source.decode(video=0)):
            if index in FRAMES:
                target.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
        target.mux(stream.encode(None))


def test_summary_is_the_only_line_of_standard_output(demo: Demo) -> None:
    assert demo.result.stdout.count("\n") == 1
    assert set(demo.summary) >= SUMMARY_KEYS
    assert "Traceback" not in demo.result.stderr
    written = json.loads((demo.folder / "summary.json").read_text())
    # The source, which writes the file, knows neither the kind of the broker nor the file of the monitor.
    files = {**written["files"], "telemetry": "telemetry.sqlite"}
    assert {**written, "broker": demo.summary["broker"], "files": files} == demo.summary


def test_numbers_of_the_summary_are_consistent(demo: Demo) -> None:
    summary = demo.summary
    assert summary["pipeline"] == "street"
    assert summary["broker"] in ("mosquitto", "embedded")
    assert summary["requests"] == summary["results"] == len(demo.results) == len(FRAMES)
    assert [summary[key] for key in ("lost", "dropped", "failed", "retries", "duplicates")] == [0] * 5
    assert summary["throughput_per_s"] == pytest.approx(summary["results"] / summary["elapsed_s"], rel=0.02)
    latency_ms = summary["latency_ms"]
    assert 0 < latency_ms["p50"] <= latency_ms["p95"] <= latency_ms["p99"] <= 1000 * summary["elapsed_s"]
    assert summary["outputs"] == str(demo.folder)
    stages = summary["stages"]
    assert list(stages) == ["head", "body", "tail"]
    for stage in stages.values():
        assert set(stage) == STAGE_KEYS
        assert (stage["workers"], stage["tasks"]) == (1, len(FRAMES))
        assert stage["compute_ms"] > 0
        assert min(stage.values()) >= 0
    assert stages["head"]["bytes_out"] == stages["body"]["bytes_in"] > 0
    assert stages["body"]["bytes_out"] == stages["tail"]["bytes_in"] > 0
    stages_ms = sum(stage[key] for stage in stages.values() for key in stage if key.endswith("_ms"))
    assert stages_ms <= latency_ms["p99"]


def test_results_have_the_order_of_the_video(demo: Demo) -> None:
    results = demo.results
    assert [result["index"] for result in results] == list(range(len(FRAMES)))
    assert {result["source"] for result in results} == {"street"}
    assert len({result["request"] for result in results}) == len(FRAMES)
    for result in results:
        assert [timing["stage"] for timing in result["time"]["stages"]] == ["head", "body", "tail"]
        assert result["picture"] == {"width": WIDTH, "height": HEIGHT}
        assert result["age_ms"] >= result["latency_ms"]


def test_people_and_cars_are_detected(demo: Demo) -> None:
    labels = [{item["label"] for item in result["objects"]} for result in demo.results]
    assert sum("car" in each for each in labels[:CAR_FRAMES]) >= 10, labels
    assert sum("person" in each for each in labels[CAR_FRAMES:]) >= 10, labels
    for item in (item for result in demo.results for item in result["objects"]):
        left, top, width, height = item["box"]
        assert width > 0
        assert height > 0
        # A box has the size of the object, which may extend beyond the picture.
        assert -0.1 * WIDTH <= left <= left + width <= 1.1 * WIDTH
        assert -0.1 * HEIGHT <= top <= top + height <= 1.1 * HEIGHT
        assert 0.5 <= item["score"] <= 1


def test_pictures_and_clip_can_be_decoded(demo: Demo) -> None:
    files = demo.summary["files"]
    frames = sorted((demo.folder / "frames").iterdir())
    assert [f"frames/{path.name}" for path in frames] == sorted(files["frames"])
    assert len(frames) >= 4
    for path in frames:
        with Image.open(path) as image:
            assert image.size[0] / image.size[1] == pytest.approx(WIDTH / HEIGHT, rel=0.01)
            image.load()
    with Image.open(demo.folder / files["sheet"]) as sheet:
        assert sheet.size[0] > WIDTH
    with av.open(str(demo.folder / files["clip"])) as clip:
        assert len(list(clip.decode(video=0))) == len(FRAMES)


def test_boxes_are_drawn_on_the_frames(demo: Demo) -> None:
    with av.open(str(demo.video)) as video:
        originals = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]
    for path in sorted((demo.folder / "frames").iterdir()):
        with Image.open(path) as annotated:
            index = int("".join(character for character in path.stem if character.isdigit()))
            original = np.asarray(originals[index].resize(annotated.size), np.int16)
            difference = np.abs(np.asarray(annotated.convert("RGB")) - original).max(axis=2)  # (H, W)
        changed = float((difference > 60).mean())
        assert 0.001 < changed < 0.4, path.name


def test_folder_has_no_other_files(demo: Demo) -> None:
    names = {path.name for path in demo.folder.iterdir()}
    files = demo.summary["files"]
    pictures = {"frames", files["sheet"], files["clip"]}
    assert names == {"results.jsonl", "summary.json", "logs", files["telemetry"], *pictures}
    assert [path.name for path in demo.folder.rglob(".*")] == []
