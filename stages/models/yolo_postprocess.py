"""Detections from the outputs of a detector, as Darknet's `detector test` computes them.

1. Cells whose objectness is not over the threshold are discarded.
2. A box has each class whose objectness times class probability is over the threshold; it can have several.
3. Non-maximum suppression per class: of boxes that overlap by more than `nms` (IoU), the best is kept.
4. Boxes are mapped from the letterbox to the picture; as in Darknet they may extend beyond its edges.

Unlike Darknet, detections are sorted by score (then by their place in the output), and boxes whose width or height is
not finite, which only untrained networks produce, are discarded.

Letters in shapes: A anchors of one detection layer, K classes, H and W cells, N boxes, D detections (box, class).
Sources: Darknet's get_yolo_detections, correct_yolo_boxes, do_nms_sort and box_iou.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brokers.errors import UsageError
from stages.models.darknet import Anchors
from stages.models.image_preprocess import letterbox_size
from stages.models.yolov3 import COCO_LABELS, YOLOV3_ANCHORS, YOLOV3_TINY_ANCHORS

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]

SCORE_THRESHOLD = 0.5  # Darknet's -thresh
NMS_IOU_THRESHOLD = 0.45  # the constant in Darknet's test_detector


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """The detections in one picture, best first."""

    boxes: Float32Array  # (D, 4): left, top, width, height, in pixels of the picture
    scores: Float32Array  # (D,)
    classes: IndexArray  # (D,)
    labels: tuple[str, ...]  # D of them

    def __len__(self) -> int:
        return len(self.labels)


def postprocess_detections(
    outputs: Sequence[Tensor],
    network_size: tuple[int, int],
    picture_size: tuple[int, int],
    threshold: float = SCORE_THRESHOLD,
    nms: float = NMS_IOU_THRESHOLD,
    labels: Sequence[str] = COCO_LABELS,
    anchors: Sequence[Anchors] | None = None,
) -> Detections:
    """Return the detections in one picture.

    `outputs`: one (1, A, 5 + K, H, W) per detection layer, as `Darknet.forward` returns them, on any device.
    `network_size`, `picture_size`: (width, height) in pixels. `anchors`: by default those of YOLOv3 for three outputs,
    of YOLOv3-tiny for two. Raises `UsageError` "BadDetectorOutput" if shapes, anchors and labels do not match.
    """
    if anchors is None:
        anchors = YOLOV3_ANCHORS if len(outputs) == 3 else YOLOV3_TINY_ANCHORS
    _check_shapes(outputs, anchors, len(labels))
    candidates = [_candidates(o, a, network_size, threshold) for o, a in zip(outputs, anchors, strict=True)]
    boxes = np.concatenate([layer_boxes for layer_boxes, _ in candidates])  # (N, 4), of the network's input
    scores = np.concatenate([layer_scores for _, layer_scores in candidates])  # (N, K)
    boxes = _remove_letterbox(boxes, network_size, picture_size)  # (N, 4), in pixels of the picture
    finite = np.isfinite(boxes).all(axis=1)
    boxes = boxes[finite]
    scores = scores[finite]
    box, label = np.nonzero(scores > np.float32(threshold))  # (D,) each
    selected = _non_maximum_suppression(boxes[box], scores[box, label], label, nms)
    box = box[selected]
    label = label[selected]
    corners = boxes[box]
    corners[:, :2] -= corners[:, 2:] / 2
    return Detections(corners, scores[box, label], label, tuple(labels[i] for i in label.tolist()))


def _check_shapes(outputs: Sequence[Tensor], anchors: Sequence[Anchors], classes: int) -> None:
    if len(outputs) == len(anchors) and all(
        output.dim() == 5 and output.shape[:3] == (1, len(layer), 5 + classes)
        for output, layer in zip(outputs, anchors, strict=True)
    ):
        return
    expected = ", ".join(f"(1, {len(layer)}, {5 + classes}, H, W)" for layer in anchors)
    actual = ", ".join(str(tuple(output.shape)) for output in outputs)
    message = f"detections need outputs of the shapes {expected}; the network's are {actual or 'none'}"
    raise UsageError("BadDetectorOutput", message, expected=expected, actual=actual)


def _candidates(
    output: Tensor, anchors: Anchors, network_size: tuple[int, int], threshold: float
) -> tuple[Float64Array, Float32Array]:
    """Return boxes (N, 4) and scores (N, K) of the cells with an object, by row, column, anchor as in Darknet.

    Boxes are centre x, y, width, height as fractions of the network's input.
    """
    _, _, _, height, width = output.shape
    cells = output[0].permute(2, 3, 0, 1)  # (H, W, A, 5 + K), a view
    rows, columns, which = torch.nonzero(cells[..., 4] > threshold, as_tuple=True)
    selected = cells[rows, columns, which].float().cpu().numpy()  # (N, 5 + K): only these leave the device
    sizes = np.asarray(anchors, np.float64)[which.cpu().numpy()] / network_size  # (N, 2)
    boxes = np.empty((len(selected), 4), np.float64)
    boxes[:, 0] = (columns.cpu().numpy() + selected[:, 0]) / width
    boxes[:, 1] = (rows.cpu().numpy() + selected[:, 1]) / height
    with np.errstate(over="ignore"):
        boxes[:, 2:] = np.exp(selected[:, 2:4].astype(np.float64)) * sizes
    return boxes, selected[:, 4:5] * selected[:, 5:]


def _remove_letterbox(
    boxes: Float64Array, network_size: tuple[int, int], picture_size: tuple[int, int]
) -> Float32Array:
    """Convert boxes (N, 4), by their centres, from fractions of the letterbox to pixels of the picture."""
    outer = np.asarray(network_size, np.float64)
    inner = np.asarray(letterbox_size(*picture_size, *network_size), np.float64)
    picture = np.asarray(picture_size, np.float64)
    # Not rounded, as in Darknet, while `letterbox` rounds it down: they differ by half a pixel where it is odd.
    border = (outer - inner) / 2 / outer
    centres = (boxes[:, :2] - border) / (inner / outer) * picture
    sizes = boxes[:, 2:] * (outer / inner) * picture
    with np.errstate(over="ignore"):
        return np.concatenate((centres, sizes), axis=1).astype(np.float32)


def _non_maximum_suppression(boxes: Float32Array, scores: Float32Array, label: IndexArray, nms: float) -> IndexArray:
    """Return the indices of the detections that no better one of their class overlaps, best first.

    `boxes` (D, 4) by their centres; `scores` and `label` (D,). Not torchvision's `batched_nms`: it shifts classes apart
    by the largest coordinate, which erases small boxes beside a huge one, and its import takes 160 MB and seconds.
    """
    order = np.argsort(-scores, kind="stable")
    survives = np.zeros(len(order), bool)
    for one in np.unique(label):
        remaining = order[label[order] == one]
        while len(remaining):
            best, remaining = remaining[0], remaining[1:]
            survives[best] = True
            remaining = remaining[~(_iou(boxes[best], boxes[remaining]) > nms)]
    return order[survives[order]]


def _iou(one: Float32Array, others: Float32Array) -> Float32Array:
    """Return the intersection over union of a box (4,) with each of (D, 4), given by their centres."""
    low = np.maximum(one[:2] - one[2:] / 2, others[:, :2] - others[:, 2:] / 2)
    high = np.minimum(one[:2] + one[2:] / 2, others[:, :2] + others[:, 2:] / 2)
    sides = np.maximum(high - low, 0)  # (D, 2)
    # The area of an untrained network's box can overflow: its IoU is then NaN, which is over no threshold.
    with np.errstate(over="ignore", invalid="ignore"):
        intersection = sides[:, 0] * sides[:, 1]
        iou: Float32Array = intersection / (one[2] * one[3] + others[:, 2] * others[:, 3] - intersection)
    return iou
