"""From what a detector's layers say to boxes in the picture, as Darknet's `detector test` does it.

1. A cell counts where its objectness is over the threshold; the rest is never looked at.
2. A class counts where objectness times its probability is over the threshold; one box can have several classes.
3. Of boxes of one class that overlap by more than `nms` (intersection over union), the best is kept.
4. Boxes are freed of the letterbox and scaled to the picture; they may reach past its edges, as in Darknet.

Two things are ours: boxes are ordered by score (then by their place in the output), and a box whose width or height is
not finite, which only an untrained network says, is left out.

Sources: Darknet's get_yolo_detections, correct_yolo_boxes, do_nms_sort and box_iou.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.errors import BadDetectorOutput
from stages.models.coco import COCO_LABELS
from stages.models.darknet_layers import Anchors
from stages.models.image_preprocess import letterbox_size
from stages.models.yolov3 import YOLOV3_ANCHORS, YOLOV3_TINY_ANCHORS

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]

SCORE_THRESHOLD = 0.5  # Darknet's -thresh
NMS_IOU_THRESHOLD = 0.45  # the constant in Darknet's test_detector


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What was found in one picture, best first."""

    boxes: Float32Array  # (N, 4): left, top, width, height, in pixels of the picture
    scores: Float32Array  # (N,)
    classes: IndexArray  # (N,)
    labels: tuple[str, ...]  # N of them

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
    """What a detector found in one picture.

    `outputs`: one (1, A, 5 + K, H, W) for each detection layer, as `models.darknet.Darknet` gives them, on any device.
    `network_size`, `picture_size`: (width, height) in pixels. `anchors`: left out, those of YOLOv3 for three outputs,
    those of YOLOv3-tiny for two. Raises `BadDetectorOutput` where shapes, anchors and labels do not fit together.
    """
    if anchors is None:
        anchors = YOLOV3_ANCHORS if len(outputs) == 3 else YOLOV3_TINY_ANCHORS
    _check(outputs, anchors, len(labels))
    found = [_candidates(o, a, network_size, threshold) for o, a in zip(outputs, anchors, strict=True)]
    parts = np.concatenate([parts for parts, _ in found])  # (N, 4): centre x, y, width, height, of the letterbox
    scores = np.concatenate([scores for _, scores in found])  # (N, K)
    boxes = _without_letterbox(parts, network_size, picture_size)  # (N, 4): the same in pixels of the picture
    finite = np.isfinite(boxes).all(axis=1)
    boxes, scores = boxes[finite], scores[finite]
    box, label = np.nonzero(scores > np.float32(threshold))
    kept = _best_of_overlapping(boxes, scores, box, label, nms)
    box, label = box[kept], label[kept]
    ranking = np.argsort(-scores[box, label], kind="stable")
    box, label = box[ranking], label[ranking]
    corners = boxes[box]
    corners[:, :2] -= corners[:, 2:] / 2
    return Detections(corners, scores[box, label], label, tuple(labels[i] for i in label.tolist()))


def _check(outputs: Sequence[Tensor], anchors: Sequence[Anchors], classes: int) -> None:
    expected = [f"(1, {len(layer)}, {5 + classes}, H, W)" for layer in anchors]
    fits = len(outputs) == len(anchors) and all(
        o.dim() == 5 and o.shape[:3] == (1, len(layer), 5 + classes) for o, layer in zip(outputs, anchors, strict=True)
    )
    if not fits:
        actual = ", ".join(str(tuple(output.shape)) for output in outputs)
        raise BadDetectorOutput(f"{len(anchors)} outputs of the shapes {', '.join(expected)}", actual or "none")


def _candidates(
    output: Tensor, anchors: Anchors, network_size: tuple[int, int], threshold: float
) -> tuple[Float64Array, Float32Array]:
    """Boxes (N, 4) in parts of the network's input, and scores (N, K), of the cells with an object in them.

    In Darknet's order: by row, column, anchor.
    """
    _, _, _, height, width = output.shape
    cells = output[0].permute(2, 3, 0, 1)  # (H, W, A, 5 + K), a view
    rows, columns, which = torch.nonzero(cells[..., 4] > threshold, as_tuple=True)
    found = cells[rows, columns, which].float().cpu().numpy()  # (N, 5 + K): only these leave the device
    sizes = np.asarray(anchors, np.float64)[which.cpu().numpy()] / network_size  # (N, 2)
    boxes = np.empty((len(found), 4), np.float64)
    boxes[:, 0] = (columns.cpu().numpy() + found[:, 0]) / width
    boxes[:, 1] = (rows.cpu().numpy() + found[:, 1]) / height
    with np.errstate(over="ignore"):
        boxes[:, 2:] = np.exp(found[:, 2:4].astype(np.float64)) * sizes
    return boxes, found[:, 4:5] * found[:, 5:]


def _without_letterbox(
    boxes: Float64Array, network_size: tuple[int, int], picture_size: tuple[int, int]
) -> Float32Array:
    """Boxes in parts of the letterbox -> in pixels of the picture; both (N, 4), with their centres."""
    outer = np.asarray(network_size, np.float64)
    inner = np.asarray(letterbox_size(*picture_size, *network_size), np.float64)
    picture = np.asarray(picture_size, np.float64)
    # The border is (outer - inner) / 2 here and was rounded down when the picture was pasted in: half a pixel apart
    # where it is odd. Darknet has it so.
    border = (outer - inner) / 2 / outer
    centres = (boxes[:, :2] - border) / (inner / outer) * picture
    sizes = boxes[:, 2:] * (outer / inner) * picture
    with np.errstate(over="ignore"):
        return np.concatenate((centres, sizes), axis=1).astype(np.float32)


def _best_of_overlapping(
    boxes: Float32Array, scores: Float32Array, box: IndexArray, label: IndexArray, nms: float
) -> IndexArray:
    """Of the pairs (box, label), the indices of those that no better box of their label overlaps."""
    kept: list[int] = []
    for one in np.unique(label):
        waiting = np.flatnonzero(label == one)
        waiting = waiting[np.argsort(-scores[box[waiting], one], kind="stable")]
        while len(waiting):
            best, waiting = waiting[0], waiting[1:]
            kept.append(int(best))
            if len(waiting):
                waiting = waiting[~(_overlap(boxes[box[best]], boxes[box[waiting]]) > nms)]
    return np.asarray(sorted(kept), np.int64)


def _overlap(one: Float32Array, others: Float32Array) -> Float32Array:
    """Intersection over union of a box (4,) with each of (N, 4); boxes have their centres."""
    low = np.maximum(one[:2] - one[2:] / 2, others[:, :2] - others[:, 2:] / 2)
    high = np.minimum(one[:2] + one[2:] / 2, others[:, :2] + others[:, 2:] / 2)
    sides = np.maximum(high - low, 0)  # (N, 2)
    # An untrained network's boxes can be too large for their area: that is then no number, and overlaps nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        shared = sides[:, 0] * sides[:, 1]
        overlap: Float32Array = shared / (one[2] * one[3] + others[:, 2] * others[:, 3] - shared)
    return overlap
