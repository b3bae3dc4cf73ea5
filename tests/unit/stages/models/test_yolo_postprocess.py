"""Detections follow Darknet's rules, and equal the original's on photographs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from brokers.errors import UsageError
from brokers.process.image_decode import RgbImage, decode_picture
from stages.models.darknet import Anchors, Darknet, darknet_state_dict
from stages.models.image_preprocess import letterbox
from stages.models.yolo_postprocess import Detections, postprocess_detections
from stages.models.yolov3 import COCO_LABELS, YOLOV3_TINY_ANCHORS, yolov3_tiny
from tests.support.environment.darknet_reference import (
    DarknetLibrary,
    assert_same_detections,
    darknet_file,
    pretrained_weights,
)
from tests.support.environment.external_programs import require_dependency
from tests.support.errors import raises_error

LABELS = ("cat", "dog")
ANCHORS = (((8.0, 8.0), (16.0, 16.0)),)
# Those of yolov3-tiny.cfg, which the original reads; ours are those that the weights were trained with.
CFG_TINY_ANCHORS: tuple[Anchors, ...] = (YOLOV3_TINY_ANCHORS[0], ((10, 14), (23, 27), (37, 58)))


def empty_output() -> Tensor:
    """One detection layer of a network of 32x32 pixels: 4x4 cells, two anchors, two classes, objectness 0."""
    output = torch.zeros(1, 2, 7, 4, 4)
    output[:, :, :2] = 0.5
    return output


def add_object(output: Tensor, row: int, column: int, anchor: int, objectness: float, *classes: float) -> None:
    output[0, anchor, 4, row, column] = objectness
    output[0, anchor, 5:, row, column] = torch.tensor(classes)


def postprocess(output: Tensor, picture_size: tuple[int, int] = (32, 32), **thresholds: float) -> Detections:
    return postprocess_detections([output], (32, 32), picture_size, labels=LABELS, anchors=ANCHORS, **thresholds)


# Rules --------------------------------------------------------------------------------------------------------------


def test_no_objects_make_empty_arrays_of_the_right_dtypes() -> None:
    result = postprocess(empty_output())
    assert len(result) == 0
    assert result.boxes.shape == (0, 4)
    assert [str(a.dtype) for a in (result.boxes, result.scores, result.classes)] == ["float32", "float32", "int64"]


def test_box_is_computed_from_cell_offset_and_anchor() -> None:
    output = empty_output()
    add_object(output, 1, 2, 1, 0.8, 0.25, 0.75)
    output[0, 1, 0, 1, 2] = 0.25
    output[0, 1, 2, 1, 2] = np.log(0.5)
    result = postprocess(output)
    # The centre is at (2 + 0.25, 1 + 0.5) cells of 8 pixels; half as wide as the anchor of 16.
    np.testing.assert_allclose(result.boxes, [[18 - 4, 12 - 8, 8, 16]], rtol=1e-6)
    assert result.scores.tolist() == pytest.approx([0.6])
    assert (result.classes.tolist(), result.labels) == ([1], ("dog",))


def test_objectness_must_exceed_the_threshold() -> None:
    output = empty_output()
    add_object(output, 0, 0, 0, 0.5, 1.0, 0.0)
    assert len(postprocess(output, threshold=0.5)) == 0
    assert len(postprocess(output, threshold=0.49)) == 1


def test_objectness_times_probability_must_exceed_the_threshold() -> None:
    output = empty_output()
    add_object(output, 0, 0, 0, 0.9, 0.5, 0.5)
    assert len(postprocess(output)) == 0


def test_one_box_can_have_two_classes() -> None:
    output = empty_output()
    add_object(output, 0, 0, 0, 1.0, 0.7, 0.9)
    result = postprocess(output)
    assert result.labels == ("dog", "cat")
    np.testing.assert_array_equal(result.boxes[0], result.boxes[1])


def test_best_of_overlapping_boxes_of_one_class_is_kept() -> None:
    output = empty_output()
    add_object(output, 1, 1, 1, 1.0, 0.8, 0.0)
    add_object(output, 1, 2, 1, 1.0, 0.9, 0.6)  # 8 of 16 pixels to the right: an IoU of 1/3
    assert postprocess(output, nms=0.3).scores.tolist() == pytest.approx([0.9, 0.6])
    assert postprocess(output, nms=0.34).scores.tolist() == pytest.approx([0.9, 0.8, 0.6])


def test_suppressed_box_suppresses_no_other() -> None:
    output = empty_output()
    for column, score in ((1, 0.9), (2, 0.8), (3, 0.7)):  # the first and the last do not overlap
        add_object(output, 1, column, 1, 1.0, score, 0.0)
    assert postprocess(output, nms=0.3).scores.tolist() == pytest.approx([0.9, 0.7])


def test_huge_box_of_another_class_does_not_change_suppression() -> None:
    output = empty_output()
    add_object(output, 1, 1, 1, 1.0, 0.0, 0.8)
    add_object(output, 1, 2, 1, 1.0, 0.0, 0.9)
    add_object(output, 0, 0, 0, 1.0, 0.7, 0.0)
    output[0, 0, 2:4, 0, 0] = 60.0
    assert postprocess(output, nms=0.3).scores.tolist() == pytest.approx([0.9, 0.7])


def test_equal_scores_keep_the_order_of_the_output() -> None:
    output = empty_output()
    for row, column in ((3, 0), (0, 3), (0, 0)):
        add_object(output, row, column, 0, 1.0, 0.75, 0.0)
    np.testing.assert_allclose(postprocess(output).boxes[:, :2], [[0, 0], [24, 0], [0, 24]])


def test_boxes_are_mapped_from_the_letterbox_to_the_picture() -> None:
    output = empty_output()
    add_object(output, 1, 1, 0, 1.0, 1.0, 0.0)
    output[0, 0, :2, 1, 1] = 1.0  # the middle of the network's input
    np.testing.assert_allclose(postprocess(output, (640, 320)).boxes, [[320 - 80, 160 - 80, 160, 160]], rtol=1e-6)
    np.testing.assert_allclose(postprocess(output, (320, 640)).boxes, [[160 - 80, 320 - 80, 160, 160]], rtol=1e-6)


def test_boxes_that_are_not_finite_are_discarded() -> None:
    output = empty_output()
    add_object(output, 0, 0, 0, 1.0, 0.9, 0.0)
    add_object(output, 0, 1, 0, 1.0, 0.8, 0.0)
    add_object(output, 0, 2, 0, float("nan"), 0.8, 0.0)
    output[0, 0, 2, 0, 0] = 1e4
    output[0, 0, 2:4, 0, 1] = 85.0  # a finite box whose area overflows
    result = postprocess(output)
    assert result.scores.tolist() == pytest.approx([0.8])
    assert np.isfinite(result.boxes).all()


def test_threshold_0_returns_thousands_sorted_by_score() -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = [torch.rand(1, 3, 85, side, side, generator=generator) for side in (4, 8)]
    result = postprocess_detections(outputs, (128, 128), (640, 480), threshold=0.0)
    assert len(result) > 1000
    assert (np.diff(result.scores) <= 0).all()
    assert result.labels == tuple(COCO_LABELS[label] for label in result.classes)


@pytest.mark.parametrize("shape", [(2, 2, 7, 4, 4), (1, 3, 7, 4, 4), (1, 2, 85, 4, 4), (1, 14, 4, 4)])
def test_outputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with raises_error(UsageError, "BadDetectorOutput") as caught:
        postprocess(torch.zeros(shape))
    assert caught.value.fields == {"expected": "(1, 2, 7, H, W)", "actual": str(shape)}


def test_missing_output_is_refused() -> None:
    with raises_error(UsageError, "BadDetectorOutput"):
        postprocess_detections([torch.zeros(1, 3, 85, 13, 13)], (416, 416), (640, 480), anchors=YOLOV3_TINY_ANCHORS)


def test_classes_are_in_darknets_order() -> None:
    assert list(COCO_LABELS) == darknet_file("data/coco.names").read_text().splitlines()


# Against the original -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Darknet:
    model = yolov3_tiny().eval()
    model.load_state_dict(darknet_state_dict(model, pretrained_weights("yolov3-tiny")))
    return model


@pytest.fixture(scope="module")
def original_tiny() -> tuple[DarknetLibrary, int]:
    original = DarknetLibrary()
    return original, original.load_network(darknet_file("cfg/yolov3-tiny.cfg"), pretrained_weights("yolov3-tiny"))


def photograph(name: str) -> RgbImage:
    return decode_picture(darknet_file(f"data/{name}.jpg").read_bytes())


def forward(model: Darknet, picture: RgbImage) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        outputs: tuple[Tensor, ...] = model(letterbox(picture, 416, 416))
    return outputs


@pytest.mark.parametrize("name", ["dog", "kite"])
def test_detections_in_photographs_equal_darknets(
    tiny: Darknet, original_tiny: tuple[DarknetLibrary, int], name: str
) -> None:
    original, network = original_tiny
    picture = photograph(name)
    size = (picture.shape[1], picture.shape[0])
    result = postprocess_detections(forward(tiny, picture), (416, 416), size, 0.3, anchors=CFG_TINY_ANCHORS)
    assert len(result) >= 3
    assert_same_detections(result, original.detect(network, picture, 0.3, 0.45))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dog", {"dog": 0.83, "car": 0.73, "truck": 0.58}), ("person", {"person": 0.98, "dog": 0.89, "sheep": 0.77})],
)
def test_scores_of_stretched_photographs_equal_opencvs_example(
    tiny: Darknet, name: str, expected: dict[str, float]
) -> None:
    # OpenCV's own example stretches the picture, without a letterbox; all other steps are the same.
    require_dependency("cv2")
    import cv2

    stretched = cv2.dnn.blobFromImage(photograph(name), 1 / 255, (416, 416))
    with torch.inference_mode():
        result = postprocess_detections(tiny(torch.from_numpy(stretched)), (416, 416), (416, 416), 0.4)
    best = {label: score for score, label in zip(result.scores[::-1].tolist(), result.labels[::-1], strict=True)}
    assert {label: best.get(label) for label in expected} == pytest.approx(expected, abs=0.01)


def test_both_layers_of_tiny_agree_on_box_sizes_with_our_anchors_only(tiny: Darknet) -> None:
    """The reason for our anchors: with those of the .cfg the second layer's boxes are half as large as the first's."""

    def agreement(anchors: Sequence[Anchors]) -> float:
        """The mean IoU of the second layer's boxes with the first layer's of the same class."""
        overlaps = []
        for name in ("dog", "person", "horses", "kite"):
            picture = photograph(name)
            first, second = forward(tiny, picture)
            size = (picture.shape[1], picture.shape[0])
            large = postprocess_detections((first, torch.zeros_like(second)), (416, 416), size, 0.4, anchors=anchors)
            small = postprocess_detections((torch.zeros_like(first), second), (416, 416), size, 0.2, anchors=anchors)
            for box, label in zip(small.boxes, small.classes, strict=True):
                same_class = large.boxes[large.classes == label]
                overlaps += [
                    best for best in [max((iou(box, other) for other in same_class), default=0.0)] if best > 0.05
                ]
        assert len(overlaps) >= 3
        return sum(overlaps) / len(overlaps)

    assert agreement(YOLOV3_TINY_ANCHORS) > agreement(CFG_TINY_ANCHORS) + 0.2


def iou(one: Any, other: Any) -> float:
    """Intersection over union of two boxes (left, top, width, height)."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    intersection = max(0.0, width) * max(0.0, height)
    return float(intersection / (one[2] * one[3] + other[2] * other[3] - intersection))
