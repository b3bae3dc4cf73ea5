"""YOLOv3 and YOLOv3-tiny (Redmon and Farhadi, *YOLOv3: An Incremental Improvement*, 2018), layer by layer.

The tables hold the layers of yolov3.cfg and yolov3-tiny.cfg; a row's index is the layer's number there.
"""

from pathlib import Path

from stages.models.darknet import (
    Anchors,
    Convolutional,
    Darknet,
    LayerSpec,
    MaxPool,
    RouteLayer,
    Shortcut,
    Upsample,
    Yolo,
)

# The class names of COCO, in the order and spelling of Darknet's coco.names.
COCO_LABELS = tuple((Path(__file__).parent / "coco.names").read_text(encoding="utf-8").splitlines())

# Anchors of each detection layer, in the order of the network's outputs: large objects first.
YOLOV3_ANCHORS: tuple[Anchors, ...] = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
# The second layer has masks 1, 2, 3, with which the published weights were trained: with the 0, 1, 2 of the current
# yolov3-tiny.cfg its boxes have half their size, inside those of the first layer (measured in docs/detector.md).
YOLOV3_TINY_ANCHORS: tuple[Anchors, ...] = (
    ((81, 82), (135, 169), (344, 319)),
    ((23, 27), (37, 58), (81, 82)),
)


def _conv(filters: int, size: int, stride: int = 1) -> LayerSpec:
    return LayerSpec(Convolutional, filters=filters, size=size, stride=stride)


def _route(*sources: int) -> LayerSpec:
    return LayerSpec(RouteLayer, sources)


def _detection(anchors: Anchors, classes: int) -> list[LayerSpec]:
    filters = len(anchors) * (5 + classes)
    return [LayerSpec(Convolutional, filters=filters, linear=True), LayerSpec(Yolo, anchors=anchors)]


def _residuals(filters: int, count: int) -> list[LayerSpec]:
    """A convolution that halves height and width, then `count` residual blocks."""
    block = [_conv(filters // 2, 1), _conv(filters, 3), LayerSpec(Shortcut, (-1, -3))]
    return [_conv(filters, 3, stride=2), *block * count]


def _pyramid(filters: int) -> list[LayerSpec]:
    """The six convolutions before a detection: narrow and wide, three times."""
    return [_conv(filters, 1), _conv(2 * filters, 3)] * 3


def yolov3(classes: int = len(COCO_LABELS)) -> Darknet:
    """YOLOv3: 107 layers, detections at 82, 94 and 106; 61.9 million parameters for COCO's 80 classes."""
    return Darknet(yolov3_rows(classes), classes)


def yolov3_rows(classes: int) -> list[LayerSpec]:
    rows = [_conv(32, 3)]
    for filters, count in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        rows += _residuals(filters, count)
    rows += _pyramid(512)
    rows += _detection(YOLOV3_ANCHORS[0], classes)  # 81, 82
    rows += [_route(-4), _conv(256, 1), LayerSpec(Upsample, stride=2), _route(-1, 61)]
    rows += _pyramid(256)
    rows += _detection(YOLOV3_ANCHORS[1], classes)  # 93, 94
    rows += [_route(-4), _conv(128, 1), LayerSpec(Upsample, stride=2), _route(-1, 36)]
    rows += _pyramid(128)
    rows += _detection(YOLOV3_ANCHORS[2], classes)  # 105, 106
    return rows


def yolov3_tiny(classes: int = len(COCO_LABELS)) -> Darknet:
    """YOLOv3-tiny: 24 layers, detections at 16 and 23; 8.8 million parameters for COCO's 80 classes."""
    rows = []
    for filters in (16, 32, 64, 128, 256):
        rows += [_conv(filters, 3), LayerSpec(MaxPool, size=2, stride=2)]
    rows += [_conv(512, 3), LayerSpec(MaxPool, size=2, stride=1)]
    rows += [_conv(1024, 3), _conv(256, 1), _conv(512, 3)]
    rows += _detection(YOLOV3_TINY_ANCHORS[0], classes)  # 15, 16
    rows += [_route(-4), _conv(128, 1), LayerSpec(Upsample, stride=2), _route(-1, 8)]
    rows += [_conv(256, 3)]
    rows += _detection(YOLOV3_TINY_ANCHORS[1], classes)  # 22, 23
    return Darknet(rows, classes)
