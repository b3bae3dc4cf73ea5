"""What a person looks at after a run: whole files or none, the best frames, boxes where they belong."""

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

from sources.gallery import gallery as album_module
from sources.gallery.annotate import PALETTE, annotate, label_colour
from sources.gallery.best_frames import BestFrames
from sources.gallery.clip import NoEncoder, write_clip
from sources.gallery.contact_sheet import SheetCell, draw_contact_sheet, format_counts
from sources.gallery.gallery import Gallery
from sources.inference.inference_run import SampleResult
from sources.inference.run_folder import InferenceRunFolder
from sources.inputs.sample import RgbImage, Sample, decode_image
from tests.soak.harness.hostile_messages import png_bomb
from tests.support.environment.clips import image_bytes


def grey(width: int = 640, height: int = 272) -> RgbImage:
    return numpy.full((height, width, 3), 90, numpy.uint8)


def result(index: int, *scores: float, label: str = "car") -> dict[str, Any]:
    objects = [{"label": label, "score": score, "box": [100.0, 80.0, 200.0, 120.0]} for score in scores]
    return {"index": index, "objects": objects, "age_ms": 180.0}


def add_all(album: Gallery, results: list[dict[str, Any]], picture: RgbImage) -> None:
    for item in results:
        while not album.add(picture, item):
            time.sleep(0.005)


# The album --------------------------------------------------------------------------------------------------------


def test_an_album_has_the_best_frames_a_sheet_and_a_clip_of_all(tmp_path: Path) -> None:
    album = Gallery(tmp_path / "run", fps=25, max_frames=3)
    add_all(album, [result(index, *([0.9] if index in (5, 20, 35) else [0.4])) for index in range(40)], grey())
    files = album.finish()
    assert files["frames"] == ["frames/000005.jpg", "frames/000020.jpg", "frames/000035.jpg"]
    for name in [*files["frames"], files["sheet"]]:
        with Image.open(tmp_path / "run" / name) as image:
            image.load()
            assert image.width >= 960
    with av.open(str(tmp_path / "run" / files["clip"])) as clip:
        stream = clip.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (640, 272)
        assert stream.average_rate == fractions.Fraction(25)
        assert len(list(clip.decode(stream))) == 40
    written = sorted(path.name for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert written == ["000005.jpg", "000020.jpg", "000035.jpg", "clip.mp4", "sheet.jpg"]


def test_an_album_without_a_frame_writes_nothing_and_ends_its_thread(tmp_path: Path) -> None:
    album = Gallery(tmp_path / "run", fps=25)
    assert album.finish() == {"frames": []}
    assert not (tmp_path / "run").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "album"]


def test_nothing_is_on_disk_before_the_end(tmp_path: Path) -> None:
    album = Gallery(tmp_path, fps=25)
    add_all(album, [result(index, 0.5) for index in range(5)], grey())
    assert list(tmp_path.iterdir()) == []
    album.finish()


def test_pictures_may_be_decoded_by_the_album_and_a_broken_one_is_counted(tmp_path: Path) -> None:
    album = Gallery(tmp_path, fps=5)
    assert album.add(lambda: decode_image(image_bytes()), result(0, 0.5))
    assert album.add(lambda: decode_image(b"no picture"), result(1, 0.5))
    assert album.add(grey(), {"index": 2, "objects": [{"label": "car", "score": 0.5, "box": "here"}]})
    assert album.finish()["frames"] == ["frames/000000.jpg"]
    assert album.skipped == 2


def test_pictures_of_several_sources_with_one_number_are_several_files(tmp_path: Path) -> None:
    album = Gallery(tmp_path, fps=5)
    for source in ("door", "gate"):
        assert album.add(grey(), {**result(0, 0.5), "source": source})
    assert album.finish()["frames"] == ["frames/door-000000.jpg", "frames/gate-000000.jpg"]
    assert len(list((tmp_path / "frames").iterdir())) == 2


def test_whatever_a_source_is_called_its_pictures_have_names_that_a_file_can_have(tmp_path: Path) -> None:
    album = Gallery(tmp_path, fps=5)
    sources = ["x" * 300, "x" * 299, "a b\0\u00e9", "..", ".hidden", "../up"]
    add_all(
        album, [{**result(0, 0.9 - number / 10), "source": source} for number, source in enumerate(sources)], grey()
    )
    names = album.finish()["frames"]
    assert sorted(names) == sorted(
        f"frames/{name}.jpg"
        for name in (
            f"{64 * 'x'}-000000",
            f"{64 * 'x'}-000000-2",
            "a_b__-000000",
            "000000",
            "hidden-000000",
            "_up-000000",
        )
    )
    assert sorted(f"frames/{path.name}" for path in (tmp_path / "frames").iterdir()) == sorted(names)


def test_a_run_whose_pictures_cannot_be_written_keeps_its_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = InferenceRunFolder(tmp_path, title="street", frames_per_s=5, pictures=True)
    (tmp_path / "frames").write_text("in the way")
    folder.add(SampleResult(Sample("door", 0, b"", "image/jpeg", grey), result(0, 0.5)))
    summary = folder.finish({"results": 1})
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["files"] == {"results": "results.jsonl"}
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("the pictures could not be written: ")


def test_a_stream_that_is_too_fast_is_never_held_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def slow(*_: object) -> None:
        go_on.wait(10)

    monkeypatch.setattr(Gallery, "_take", slow)
    album = Gallery(tmp_path, fps=25)
    started_s = time.monotonic()
    taken = [album.add(grey(64, 48), result(index)) for index in range(100)]
    assert time.monotonic() - started_s < 2
    assert album_module.QUEUE_SIZE <= sum(taken) <= album_module.QUEUE_SIZE + 1
    assert album.skipped == 100 - sum(taken)
    go_on.set()
    album.finish()


def test_a_long_stream_is_thinned_evenly_and_stays_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(album_module, "MAX_CLIP_FRAMES", 16)
    album = Gallery(tmp_path, fps=25, max_frames=2)
    add_all(album, [result(index, 0.5) for index in range(100)], grey(64, 48))
    with av.open(str(tmp_path / album.finish()["clip"])) as clip:
        frames = len(list(clip.decode(video=0)))
    assert frames == 13  # every eighth of 100


def test_a_run_without_an_encoder_still_has_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sources.gallery.clip.ENCODERS", (("no-such-encoder", {}),))
    album = Gallery(tmp_path, fps=25)
    add_all(album, [result(0, 0.5)], grey())
    files = album.finish()
    assert "clip" not in files
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["000000.jpg", "sheet.jpg"]


@pytest.mark.parametrize(("width", "height"), [(10, 4000), (4000, 10), (1, 1), (3000, 4500)])
def test_pictures_of_any_shape_come_into_the_album_at_a_sensible_size(tmp_path: Path, width: int, height: int) -> None:
    album = Gallery(tmp_path, fps=5)
    add_all(album, [result(0, 0.5)], grey(width, height))
    files = album.finish()
    assert files["clip"]
    for name in [*files["frames"], files["sheet"]]:
        with Image.open(tmp_path / name) as image:
            assert image.width <= 1920
            assert image.height <= 1920 * 1.5


# The drawing ------------------------------------------------------------------------------------------------------


def test_a_box_is_drawn_where_the_object_is_at_any_scale() -> None:
    for width in (640, 960):
        scale = width / 640
        drawn = numpy.asarray(annotate(grey(), result(0, 0.5), width)).astype(int)
        close = (abs(drawn - numpy.array(label_colour("car"))).max(axis=2) < 40).nonzero()
        below_label = close[0] > 85 * scale
        assert abs(close[1].min() - 100 * scale) <= 3
        assert abs(close[1][below_label].max() - 300 * scale) <= 3
        assert abs(close[0].max() - 200 * scale) <= 3


def test_the_picture_that_came_in_is_not_drawn_into() -> None:
    picture = grey()
    annotate(picture, result(0, 0.9), 640)
    assert (picture == 90).all()


@pytest.mark.parametrize(
    "box", [[-50, -50, 2000, 2000], [630, 260, 100, 100], [5000, 5000, 10, 10], [10, 10, 0, 0], [300, 100, -20, -20]]
)
def test_boxes_over_the_edge_or_without_area_are_drawn_inside(box: list[float]) -> None:
    item = {"index": 0, "objects": [{"label": "a very long label indeed", "score": 0.5, "box": box}]}
    assert annotate(grey(), item, 640).size == (640, 272)


def test_a_picture_of_one_pixel_can_be_drawn() -> None:
    item = {"index": 0, "objects": [{"label": "dot", "score": 0.5, "box": [0, 0, 1, 1]}]}
    assert annotate(grey(1, 1), item, 640).size == (640, 640)


def test_classes_are_drawn_as_bars_as_long_as_their_scores() -> None:
    classes = [{"label": "tabby", "score": 0.8}, {"label": "lynx", "score": 0.2}]
    drawn = numpy.asarray(annotate(grey(), {"index": 0, "classes": classes}, 640)).astype(int)
    lengths = []
    for item in classes:
        is_bar = (abs(drawn - numpy.array(label_colour(str(item["label"])))).max(axis=2) < 10).any(axis=0)
        lengths.append(int(is_bar.sum()))
    assert lengths[0] == pytest.approx(4 * lengths[1], abs=6)


def test_colours_are_the_same_in_every_process_and_differ_for_what_moves_in_a_street() -> None:
    assert label_colour("person") == PALETTE[0]
    labels = ("person", "bicycle", "car", "motorbike", "bus", "truck", "dog", "traffic light")
    assert len({label_colour(label) for label in labels}) == len(labels)


# What is shown ----------------------------------------------------------------------------------------------------


def test_highlights_are_the_best_and_spread_over_a_stream_of_unknown_length() -> None:
    highlights: BestFrames[int] = BestFrames(4)
    for position in range(1000):
        highlights.offer(0.9 if position % 250 == 100 else 0.5 if 400 <= position < 420 else 0.1, lambda: position)  # noqa: B023, called at once
    assert [kept.item for kept in highlights.best()] == [100, 350, 600, 850]


def test_highlights_without_a_find_are_shown_only_when_there_is_nothing_else() -> None:
    empty: BestFrames[int] = BestFrames(2)
    for _ in range(10):
        empty.offer(0.0, lambda: 0)
    assert len(empty.best()) == 2
    empty.offer(0.3, lambda: 1)
    assert [kept.item for kept in empty.best()] == [1]


def test_highlights_hold_a_bounded_number_of_items() -> None:
    highlights: BestFrames[int] = BestFrames(3)
    for position in range(500):
        highlights.offer(position % 7 + 1, lambda: 0)
        assert len(highlights._best) <= 4 * 3


def test_a_sheet_counts_what_was_found_and_fits_pictures_of_any_shape() -> None:
    assert format_counts(["car", "person", "car"]) == "2 car, 1 person"
    cells = [SheetCell(Image.new("RGB", size), "#1", "many " * 40) for size in ((480, 200), (100, 400), (2000, 20))]
    assert draw_contact_sheet(cells, "street", "3 pictures", {"car": 2}).width == 3 * 480 + 4 * 16


def test_a_clip_of_pictures_of_several_odd_sizes_has_one_even_size(tmp_path: Path) -> None:
    images = [Image.new("RGB", size) for size in ((641, 273), (640, 272), (200, 400))]
    write_clip(tmp_path / "a.mp4", images, fps=2)
    with av.open(str(tmp_path / "a.mp4")) as clip:
        assert {(frame.width, frame.height) for frame in clip.decode(video=0)} == {(640, 272)}


def test_a_missing_encoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sources.gallery.clip.ENCODERS", (("no-such-encoder", {}),))
    with pytest.raises(NoEncoder, match="no-such-encoder"):
        write_clip(tmp_path / "a.mp4", [], fps=2)


def test_a_picture_that_is_a_bomb_or_broken_in_any_way_is_left_out_and_the_next_one_is_not(tmp_path: Path) -> None:
    album = Gallery(tmp_path, fps=25)
    assert album.add(lambda: decode_image(png_bomb()), result(0, 0.5))
    assert album.add(lambda: decode_image(image_bytes()), result(1, 0.5))
    assert album.finish()["frames"] == ["frames/000001.jpg"]
    assert album.skipped == 1
