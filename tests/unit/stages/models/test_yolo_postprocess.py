"""Detections are Darknet's: the same boxes, scores and classes from the same pixels, by the same rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from stages.errors import BadDetectorOutput
from stages.models.coco import COCO_LABELS
from stages.models.darknet_layers import Anchors, Darknet
from stages.models.darknet_weights import load_darknet_weights, save_darknet_weights
from stages.models.image_preprocess import decode_image, letterbox
from stages.models.yolo_postprocess import Detections, postprocess_detections
from stages.models.yolov3 import YOLOV3_TINY_ANCHORS, yolov3, yolov3_tiny
from tests.support.environment.darknet_reference import (
    DarknetLibrary,
    darknet_file,
    init_stable_weights,
    pretrained_weights,
    write_resized_cfg,
)
from tests.support.environment.external_programs import require_dependency

Picture = npt.NDArray[np.uint8]
Found = tuple[float, int, tuple[float, float, float, float]]
LABELS = ("cat", "dog")
ANCHORS = (((8.0, 8.0), (16.0, 16.0)),)


def silent() -> Tensor:
    """One detection layer of a 4x4 network of 32x32 pixels, two anchors, two classes, that sees nothing."""
    output = torch.zeros(1, 2, 7, 4, 4)
    output[:, :, :2] = 0.5
    return output


def say(output: Tensor, row: int, column: int, anchor: int, objectness: float, *classes: float) -> None:
    output[0, anchor, 4, row, column] = objectness
    output[0, anchor, 5:, row, column] = torch.tensor(classes)


def small(output: Tensor, **changes: float) -> Detections:
    return postprocess_detections([output], (32, 32), (32, 32), labels=LABELS, anchors=ANCHORS, **changes)


# What yolov3-tiny.cfg says, which the original reads; ours are those that the weights were trained with.
CFG_TINY_ANCHORS: tuple[Anchors, ...] = (YOLOV3_TINY_ANCHORS[0], ((10, 14), (23, 27), (37, 58)))


def as_found(detections: Detections) -> list[Found]:
    rows = zip(detections.scores.tolist(), detections.classes.tolist(), detections.boxes.tolist(), strict=True)
    return [(score, label, (box[0], box[1], box[2], box[3])) for score, label, box in rows]


def run(
    model: Darknet, picture: Picture, size: int, threshold: float, anchors: Sequence[Anchors] | None = None
) -> Detections:
    with torch.inference_mode():
        outputs = model(letterbox(picture, size, size))
    return postprocess_detections(
        outputs, (size, size), (picture.shape[1], picture.shape[0]), threshold, anchors=anchors
    )


def assert_same(ours: Sequence[Found], theirs: Sequence[Found]) -> None:
    """One to one: classes exactly, scores to 1e-3, boxes to 1e-3 or a twentieth of a pixel."""
    assert len(ours) == len(theirs)
    left = list(theirs)
    for score, label, box in ours:
        alike = [one for one in left if one[1] == label and abs(one[0] - score) < 1e-3]
        same = min(alike, key=lambda one: np.abs(np.subtract(one[2], box)).max(), default=left[0])
        assert label == same[1]
        assert score == pytest.approx(same[0], abs=1e-3)
        assert box == pytest.approx(same[2], rel=1e-3, abs=0.05)
        left.remove(same)


@pytest.fixture(scope="module")
def tiny() -> Darknet:
    model = yolov3_tiny().eval()
    load_darknet_weights(model, pretrained_weights("yolov3-tiny"))
    return model


# Rules ------------------------------------------------------------------------------------------------------------


def test_nothing_seen_is_no_detections() -> None:
    found = small(silent())
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
    assert [str(a.dtype) for a in (found.boxes, found.scores, found.classes)] == ["float32", "float32", "int64"]


def test_a_box_is_where_its_cell_offset_and_anchor_say() -> None:
    output = silent()
    say(output, 1, 2, 1, 0.8, 0.25, 0.75)
    output[0, 1, 0, 1, 2] = 0.25
    output[0, 1, 2, 1, 2] = np.log(0.5)
    found = small(output)
    # the centre is at (2 + 0.25, 1 + 0.5) cells of 8 pixels; half as wide as the anchor of 16
    np.testing.assert_allclose(found.boxes, [[18 - 4, 12 - 8, 8, 16]], rtol=1e-6)
    assert found.scores.tolist() == pytest.approx([0.6])
    assert (found.classes.tolist(), found.labels) == ([1], ("dog",))


def test_objectness_at_the_threshold_is_not_over_it() -> None:
    output = silent()
    say(output, 0, 0, 0, 0.5, 1.0, 0.0)
    assert len(small(output, threshold=0.5)) == 0
    assert len(small(output, threshold=0.49)) == 1


def test_objectness_alone_is_not_enough() -> None:
    output = silent()
    say(output, 0, 0, 0, 0.9, 0.5, 0.5)
    assert len(small(output)) == 0


def test_one_box_can_have_two_classes() -> None:
    output = silent()
    say(output, 0, 0, 0, 1.0, 0.7, 0.9)
    found = small(output)
    assert found.labels == ("dog", "cat")
    np.testing.assert_array_equal(found.boxes[0], found.boxes[1])


def test_of_overlapping_boxes_of_one_class_the_best_is_kept() -> None:
    output = silent()
    say(output, 1, 1, 1, 1.0, 0.8, 0.0)
    say(output, 1, 2, 1, 1.0, 0.9, 0.6)  # 8 of 16 pixels beside it: a third of their union
    assert small(output, nms=0.3).scores.tolist() == pytest.approx([0.9, 0.6])
    assert small(output, nms=0.34).scores.tolist() == pytest.approx([0.9, 0.8, 0.6])


def test_a_box_that_is_gone_takes_no_other_with_it() -> None:
    output = silent()
    for column, score in ((1, 0.9), (2, 0.8), (3, 0.7)):  # the outer two touch, and share nothing
        say(output, 1, column, 1, 1.0, score, 0.0)
    assert small(output, nms=0.3).scores.tolist() == pytest.approx([0.9, 0.7])


def test_equal_scores_keep_their_place_in_the_output() -> None:
    output = silent()
    for row, column in ((3, 0), (0, 3), (0, 0)):
        say(output, row, column, 0, 1.0, 0.75, 0.0)
    np.testing.assert_allclose(small(output).boxes[:, :2], [[0, 0], [24, 0], [0, 24]])


def test_boxes_are_freed_of_the_letterbox() -> None:
    output = silent()
    say(output, 1, 1, 0, 1.0, 1.0, 0.0)
    output[0, 0, :2, 1, 1] = 1.0  # the middle of the network's input
    found = postprocess_detections([output], (32, 32), (640, 320), labels=LABELS, anchors=ANCHORS)
    np.testing.assert_allclose(found.boxes, [[320 - 80, 160 - 80, 160, 160]], rtol=1e-6)
    found = postprocess_detections([output], (32, 32), (320, 640), labels=LABELS, anchors=ANCHORS)
    np.testing.assert_allclose(found.boxes, [[160 - 80, 320 - 80, 160, 160]], rtol=1e-6)


def test_what_an_untrained_network_says_never_becomes_an_infinite_box() -> None:
    output = silent()
    say(output, 0, 0, 0, 1.0, 0.9, 0.0)
    say(output, 0, 1, 0, 1.0, 0.8, 0.0)
    say(output, 0, 2, 0, float("nan"), 0.8, 0.0)
    output[0, 0, 2, 0, 0] = 1e4
    output[0, 0, 2:4, 0, 1] = 85.0  # finite, and its area is not
    found = small(output)
    assert found.scores.tolist() == pytest.approx([0.8])
    assert np.isfinite(found.boxes).all()


def test_a_threshold_of_nothing_still_ends_and_is_sorted() -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = [torch.rand(1, 3, 85, side, side, generator=generator) for side in (4, 8)]
    found = postprocess_detections(outputs, (128, 128), (640, 480), threshold=0.0)
    assert len(found) > 1000
    assert (np.diff(found.scores) <= 0).all()
    assert found.labels == tuple(COCO_LABELS[label] for label in found.classes)


@pytest.mark.parametrize("shape", [(2, 2, 7, 4, 4), (1, 3, 7, 4, 4), (1, 2, 85, 4, 4), (1, 14, 4, 4)])
def test_outputs_of_another_detector_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadDetectorOutput) as caught:
        small(torch.zeros(shape))
    assert "(1, 2, 7, H, W)" in str(caught.value)
    assert str(shape) in str(caught.value)


def test_a_missing_output_is_refused() -> None:
    with pytest.raises(BadDetectorOutput, match="2 outputs of the shapes"):
        postprocess_detections([torch.zeros(1, 3, 85, 13, 13)], (416, 416), (640, 480), anchors=YOLOV3_TINY_ANCHORS)


def test_classes_are_in_darknets_order() -> None:
    assert list(COCO_LABELS) == darknet_file("data/coco.names").read_text().splitlines()


# Against the original ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original_tiny() -> tuple[DarknetLibrary, int]:
    original = DarknetLibrary()
    return original, original.load_network(darknet_file("cfg/yolov3-tiny.cfg"), pretrained_weights("yolov3-tiny"))


@pytest.mark.parametrize("photograph", ["dog", "person", "kite", "horses"])
def test_photographs_give_what_the_original_finds(
    tiny: Darknet, original_tiny: tuple[DarknetLibrary, int], photograph: str
) -> None:
    original, network = original_tiny
    picture = decode_image(darknet_file(f"data/{photograph}.jpg").read_bytes())
    ours = as_found(run(tiny, picture, 416, 0.3, CFG_TINY_ANCHORS))
    assert len(ours) >= 3
    assert_same(ours, original.detect(network, picture, 0.3, 0.45))


@pytest.mark.parametrize(("photograph", "expected"), [
    ("dog", {"dog": 0.83, "car": 0.73, "truck": 0.58}),
    ("person", {"person": 0.98, "dog": 0.89, "sheep": 0.77}),
])  # fmt: skip
def test_stretched_photographs_give_the_scores_that_opencv_is_known_for(
    tiny: Darknet, photograph: str, expected: dict[str, float]
) -> None:
    # OpenCV's own example stretches the picture and does without a letterbox; the rest of the way is the same.
    require_dependency("cv2")
    import cv2

    picture = decode_image(darknet_file(f"data/{photograph}.jpg").read_bytes())
    stretched = cv2.dnn.blobFromImage(picture, 1 / 255, (416, 416))
    with torch.inference_mode():
        found = postprocess_detections(tiny(torch.from_numpy(stretched)), (416, 416), (416, 416), 0.4)
    best = {label: score for score, label in zip(found.scores[::-1].tolist(), found.labels[::-1], strict=True)}
    assert {label: best.get(label) for label in expected} == pytest.approx(expected, abs=0.01)


@pytest.fixture
def random_yolov3(tmp_path: Path) -> Iterator[tuple[Darknet, Path]]:
    model = yolov3()
    init_stable_weights(model, seed=8)
    path = tmp_path / "random.weights"
    save_darknet_weights(model, path)
    yield model, path
    path.unlink()  # 248 MB, which pytest would keep


def test_full_yolov3_gives_what_the_original_finds_with_the_weights_we_wrote(
    random_yolov3: tuple[Darknet, Path], tmp_path: Path
) -> None:
    model, weights = random_yolov3
    picture = decode_image(darknet_file("data/dog.jpg").read_bytes())
    original = DarknetLibrary()
    theirs = original.detect(
        original.load_network(write_resized_cfg("yolov3", 96, tmp_path), weights), picture, 0.6, 0.45
    )
    assert len(theirs) > 50  # of three sizes and many classes
    assert_same(as_found(run(model, picture, 96, 0.6)), theirs)


def test_the_two_layers_of_tiny_agree_on_the_size_of_what_both_see(tiny: Darknet) -> None:
    """The reason for our anchors: with those of the .cfg the second layer's boxes are half as large as the first's."""

    def agreement(anchors: Sequence[Anchors]) -> float:
        overlaps = []
        for photograph in ("dog", "person", "horses", "kite"):
            picture = decode_image(darknet_file(f"data/{photograph}.jpg").read_bytes())
            with torch.inference_mode():
                first, second = tiny(letterbox(picture, 416, 416))
            size = (picture.shape[1], picture.shape[0])
            large = postprocess_detections((first, torch.zeros_like(second)), (416, 416), size, 0.4, anchors=anchors)
            small = postprocess_detections((torch.zeros_like(first), second), (416, 416), size, 0.2, anchors=anchors)
            for box, label in zip(small.boxes, small.classes, strict=True):
                same = [
                    overlap(box, other) for other, kind in zip(large.boxes, large.classes, strict=True) if kind == label
                ]
                overlaps += [best for best in [max(same, default=0.0)] if best > 0.05]
        assert len(overlaps) >= 3
        return sum(overlaps) / len(overlaps)

    assert agreement(YOLOV3_TINY_ANCHORS) > agreement(CFG_TINY_ANCHORS) + 0.2


def overlap(one: Any, other: Any) -> float:
    """Intersection over union of two boxes of left, top, width and height."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    return float(shared / (one[2] * one[3] + other[2] * other[3] - shared))
