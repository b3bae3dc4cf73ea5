"""The pictures of a run: whole files or none, the best frames, boxes in the right places."""

import fractions
import json
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
from PIL import Image

from brokers.process.image_decode import RgbImage, decode_picture
from sources.gallery import gallery as gallery_module
from sources.gallery.drawing import PALETTE, SheetCell, annotate, draw_contact_sheet, format_counts, label_colour
from sources.gallery.gallery import BestFrames, Gallery, write_clip
from sources.inference.run_folder import InferenceRunFolder
from sources.inputs.source import Sample
from tests.soak.harness.hostile_messages import png_bomb
from tests.support.brokers.broker_kinds import WAIT_S
from tests.support.environment.clips import image_bytes


def test_gallery_that_fails_leaves_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no encoder")

    monkeypatch.setattr(gallery_module, "write_clip", fail)
    folder = InferenceRunFolder(tmp_path, title="t", frames_per_s=1, pictures=True)
    folder.add(Sample("cam", 0, b"", "image/png", grey), make_result(0, 0.9))
    assert folder.finish({})["files"] == {"results": "results.jsonl"}
    assert (tmp_path / "summary.json").exists()
    assert caplog.messages == ["the pictures could not be written: RuntimeError: no encoder"]


def grey(width: int = 640, height: int = 272) -> RgbImage:
    return numpy.full((height, width, 3), 90, numpy.uint8)


def make_result(index: int, *scores: float, label: str = "car") -> dict[str, Any]:
    objects = [{"label": label, "score": score, "box": [100.0, 80.0, 200.0, 120.0]} for score in scores]
    return {"index": index, "objects": objects, "age_ms": 180.0}


def add_all(gallery: Gallery, results: list[dict[str, Any]], picture: RgbImage) -> None:
    for result in results:
        while not gallery.add(lambda: picture, result):
            time.sleep(0.005)


# The gallery ----------------------------------------------------------------------------------------------------------


def test_gallery_has_best_frames_contact_sheet_and_clip(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "run", fps=25, max_frames=3)
    add_all(gallery, [make_result(index, *([0.9] if index in (3, 12, 21) else [0.4])) for index in range(25)], grey())
    files = gallery.finish()
    assert files["frames"] == ["frames/000003.jpg", "frames/000012.jpg", "frames/000021.jpg"]
    for name in [*files["frames"], files["sheet"]]:
        with Image.open(tmp_path / "run" / name) as image:
            image.load()
            assert image.width >= 960
    with av.open(str(tmp_path / "run" / files["clip"])) as clip:
        stream = clip.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (640, 272)
        assert stream.average_rate == fractions.Fraction(25)
        assert len(list(clip.decode(stream))) == 25
    written = sorted(path.name for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert written == ["000003.jpg", "000012.jpg", "000021.jpg", "clip.mp4", "sheet.jpg"]


def test_gallery_without_frames_writes_nothing(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "run", fps=25)
    assert gallery.finish() == {"frames": []}
    assert not (tmp_path / "run").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "gallery"]


def test_nothing_is_written_before_finish(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, fps=25)
    add_all(gallery, [make_result(index, 0.5) for index in range(5)], grey())
    assert list(tmp_path.iterdir()) == []
    gallery.finish()


def test_broken_pictures_and_results_are_skipped_and_counted(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, fps=5)
    assert gallery.add(lambda: decode_picture(image_bytes()), make_result(0, 0.5))
    assert gallery.add(lambda: decode_picture(b"no picture"), make_result(1, 0.5))
    assert gallery.add(grey, {"index": 2, "objects": [{"label": "car", "score": 0.5, "box": "here"}]})
    assert gallery.add(lambda: decode_picture(png_bomb()), make_result(3, 0.5))
    assert gallery.add(lambda: decode_picture(image_bytes()), make_result(4, 0.5))
    assert gallery.finish()["frames"] == ["frames/000000.jpg", "frames/000004.jpg"]
    assert gallery.skipped == 3


def test_frames_of_several_sources_with_one_index_have_different_names(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, fps=5)
    for source in ("door", "gate"):
        assert gallery.add(grey, {**make_result(0, 0.5), "source": source})
    assert gallery.finish()["frames"] == ["frames/door-000000.jpg", "frames/gate-000000.jpg"]
    assert len(list((tmp_path / "frames").iterdir())) == 2


def test_any_source_name_becomes_a_valid_file_name(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, fps=5)
    sources = ["x" * 300, "x" * 299, "a b\0\u00e9", "..", ".hidden", "../up"]
    results = [{**make_result(0, 0.9 - number / 10), "source": source} for number, source in enumerate(sources)]
    add_all(gallery, results, grey())
    names = gallery.finish()["frames"]
    long_name = 64 * "x"
    expected = [f"{long_name}-000000", f"{long_name}-000000-2", "a_b__-000000", "000000", "hidden-000000", "_up-000000"]
    assert sorted(names) == sorted(f"frames/{name}.jpg" for name in expected)
    assert sorted(f"frames/{path.name}" for path in (tmp_path / "frames").iterdir()) == sorted(names)


def test_run_whose_pictures_cannot_be_written_keeps_its_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = InferenceRunFolder(tmp_path, title="street", frames_per_s=5, pictures=True)
    (tmp_path / "frames").write_text("in the way")
    folder.add(Sample("door", 0, b"", "image/jpeg", grey), make_result(0, 0.5))
    summary = folder.finish({"results": 1})
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["files"] == {"results": "results.jsonl"}
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("the pictures could not be written: ")


def test_add_skips_pictures_rather_than_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(Gallery, "_add", lambda *_: go_on.wait(WAIT_S))
    gallery = Gallery(tmp_path, fps=25)
    added = [gallery.add(grey, make_result(index)) for index in range(100)]
    assert gallery_module.QUEUE_SIZE <= sum(added) <= gallery_module.QUEUE_SIZE + 1
    assert gallery.skipped == 100 - sum(added)
    go_on.set()
    gallery.finish()


def test_clip_of_a_long_stream_is_thinned_out_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery_module, "MAX_CLIP_FRAMES", 4)
    gallery = Gallery(tmp_path, fps=25, max_frames=2)
    add_all(gallery, [make_result(index, 0.5) for index in range(25)], grey(64, 48))
    with av.open(str(tmp_path / gallery.finish()["clip"])) as clip:
        frames = len(list(clip.decode(video=0)))
    assert frames == 4  # every eighth of 25


def test_missing_encoder_costs_the_clip_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sources.gallery.gallery.ENCODERS", (("no-such-encoder", {}),))
    gallery = Gallery(tmp_path, fps=25)
    add_all(gallery, [make_result(0, 0.5)], grey())
    assert "clip" not in gallery.finish()
    assert "no-such-encoder" in caplog.text
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["000000.jpg", "sheet.jpg"]


@pytest.mark.parametrize(("width", "height"), [(10, 4000), (4000, 10), (1, 1), (2000, 3000)])
def test_pictures_of_any_shape_are_drawn_at_a_bounded_size(tmp_path: Path, width: int, height: int) -> None:
    gallery = Gallery(tmp_path, fps=5)
    add_all(gallery, [make_result(0, 0.5)], grey(width, height))
    files = gallery.finish()
    assert files["clip"]
    for name in [*files["frames"], files["sheet"]]:
        with Image.open(tmp_path / name) as image:
            assert image.width <= 1920
            assert image.height <= 1920 * 1.5


# Drawing --------------------------------------------------------------------------------------------------------------


def test_box_is_drawn_around_its_object_at_any_scale() -> None:
    for width in (640, 960):
        scale = width / 640
        drawn = numpy.asarray(annotate(grey(), make_result(0, 0.5), width)).astype(int)
        close = (abs(drawn - numpy.array(label_colour("car"))).max(axis=2) < 40).nonzero()
        below_label = close[0] > 85 * scale
        assert abs(close[1].min() - 100 * scale) <= 3
        assert abs(close[1][below_label].max() - 300 * scale) <= 3
        assert abs(close[0].max() - 200 * scale) <= 3


def test_annotate_leaves_its_input_unchanged() -> None:
    picture = grey()
    annotate(picture, make_result(0, 0.9), 640)
    assert (picture == 90).all()


@pytest.mark.parametrize(
    "box", [[-50, -50, 2000, 2000], [630, 260, 100, 100], [5000, 5000, 10, 10], [10, 10, 0, 0], [300, 100, -20, -20]]
)
def test_boxes_beyond_the_edge_or_without_area_can_be_drawn(box: list[float]) -> None:
    item = {"index": 0, "objects": [{"label": "a very long label indeed", "score": 0.5, "box": box}]}
    assert annotate(grey(), item, 640).size == (640, 272)


def test_picture_of_one_pixel_can_be_drawn() -> None:
    item = {"index": 0, "objects": [{"label": "dot", "score": 0.5, "box": [0, 0, 1, 1]}]}
    assert annotate(grey(1, 1), item, 640).size == (640, 640)


def test_bars_of_classes_are_proportional_to_scores() -> None:
    classes = [{"label": "tabby", "score": 0.8}, {"label": "lynx", "score": 0.2}]
    drawn = numpy.asarray(annotate(grey(), {"index": 0, "classes": classes}, 640)).astype(int)
    lengths = []
    for item in classes:
        is_bar = (abs(drawn - numpy.array(label_colour(str(item["label"])))).max(axis=2) < 10).any(axis=0)
        lengths.append(int(is_bar.sum()))
    assert lengths[0] == pytest.approx(4 * lengths[1], abs=6)


def test_colours_are_stable_and_differ_for_common_labels() -> None:
    assert label_colour("person") == PALETTE[0]
    labels = ("person", "bicycle", "car", "motorbike", "bus", "truck", "dog", "traffic light")
    assert len({label_colour(label) for label in labels}) == len(labels)


# Selection ------------------------------------------------------------------------------------------------------------


def test_best_frames_are_spread_over_the_stream() -> None:
    best: BestFrames[int] = BestFrames(4)
    for position in range(1000):
        score = 0.9 if position % 250 == 100 else 0.5 if 400 <= position < 420 else 0.1
        best.offer(score, lambda: position)  # noqa: B023 - called at once
    assert best.best() == [100, 350, 600, 850]


def test_frames_without_detections_are_a_last_resort() -> None:
    best: BestFrames[int] = BestFrames(2)
    for _ in range(10):
        best.offer(0.0, lambda: 0)
    assert len(best.best()) == 2
    best.offer(0.3, lambda: 1)
    assert best.best() == [1]


def test_number_of_candidates_is_bounded() -> None:
    best: BestFrames[int] = BestFrames(3)
    for position in range(500):
        best.offer(position % 7 + 1, lambda: 0)
        assert len(best._best) <= 4 * 3


def test_contact_sheet_fits_pictures_of_any_shape() -> None:
    assert format_counts(["car", "person", "car"]) == "2 car, 1 person"
    cells = [SheetCell(Image.new("RGB", size), "#1", "many " * 40) for size in ((480, 200), (100, 400), (2000, 20))]
    assert draw_contact_sheet(cells, "street", "3 pictures", {"car": 2}).width == 3 * 480 + 4 * 16


def test_clip_of_several_odd_sizes_has_one_even_size(tmp_path: Path) -> None:
    images = [Image.new("RGB", size) for size in ((641, 273), (640, 272), (200, 400))]
    write_clip(tmp_path / "a.mp4", images, fps=2)
    with av.open(str(tmp_path / "a.mp4")) as clip:
        assert {(frame.width, frame.height) for frame in clip.decode(video=0)} == {(640, 272)}
