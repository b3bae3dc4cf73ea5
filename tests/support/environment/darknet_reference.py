"""Two other implementations of Darknet as references: the original C library, and OpenCV 4.

They are Debian's `darknet`, which contains the sample photographs, too, and `opencv-python-headless`. Without them a
test is skipped, and fails in CI.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from brokers.errors import SparseError
from stages.loading.weights_file import find_weights
from stages.models.darknet import NORM_MOMENTUM, Convolutional, Darknet
from stages.models.yolo_postprocess import Detections
from tests.support.environment.external_programs import require_dependency

FloatArray = npt.NDArray[np.float32]
LIBRARY_PATH = "/usr/lib/darknet/libdarknet.so"


def darknet_file(path: str) -> Path:
    """A file of Debian's `darknet`, below /usr/share/darknet."""
    return require_dependency("darknet-files") / path


def write_resized_cfg(name: str, size: int, folder: Path) -> Path:
    """Write the .cfg file of a network for a batch of one input of size x size into `folder`."""
    text = darknet_file(f"cfg/{name}.cfg").read_text()
    for key, number in (("width", size), ("height", size), ("batch", 1), ("subdivisions", 1)):
        text = re.sub(rf"^{key} *=.*$", f"{key}={number}", text, flags=re.MULTILINE)
    path = folder / f"{name}-{size}.cfg"
    path.write_text(text)
    return path


def pretrained_weights(name: str) -> Path:
    """The published weights of this name; skips the test if they cannot be downloaded, and fails it in CI."""
    try:
        return find_weights(name)
    except SparseError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


def init_stable_weights(model: Darknet, seed: int) -> None:
    """Initialize with seeded weights under which activations neither vanish nor explode.

    Leaves the model in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor | None, mean: float, deviation: float) -> None:
        assert tensor is not None
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation + mean)

    convolutions = [layer for layer in model.layers if isinstance(layer, Convolutional)]
    with torch.no_grad():
        for layer in convolutions:
            normal(layer.conv.weight, 0.0, layer.conv.weight[0].numel() ** -0.5)
            if layer.norm is None:
                normal(layer.conv.bias, 0.0, 0.5)
            else:
                normal(layer.norm.weight, 1.0, 0.1)
                normal(layer.norm.bias, 0.0, 0.3)
                layer.norm.momentum = 1.0
        model.train()(torch.rand(2, 3, 96, 96, generator=generator))
    for layer in convolutions:
        if layer.norm is not None:
            layer.norm.momentum = NORM_MOMENTUM
    model.eval()


def opencv_forward(cfg: Path, weights: Path, blob: FloatArray, layers: list[str]) -> list[FloatArray]:
    """The outputs of the named layers (`conv_15` is layer 15) in OpenCV: (1, C, H, W) each."""
    require_dependency("cv2")
    import cv2

    network = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    network.setInput(blob)
    return [np.asarray(output, np.float32) for output in network.forward(layers)]


ReferenceDetection = tuple[float, int, tuple[float, float, float, float]]  # score, class, (left, top, width, height)


def assert_same_detections(actual: Detections, expected: Sequence[ReferenceDetection]) -> None:
    """Compare one to one, in any order: classes exactly, scores to 1e-3, boxes to 1e-3 or a twentieth of a pixel."""
    assert len(actual) == len(expected)
    remaining = list(expected)
    for score, label, box in zip(actual.scores.tolist(), actual.classes.tolist(), actual.boxes.tolist(), strict=True):
        similar = [each for each in remaining if each[1] == label and abs(each[0] - score) < 1e-3]
        nearest = min(similar, key=lambda each: np.abs(np.subtract(each[2], box)).max(), default=remaining[0])
        assert label == nearest[1]
        assert score == pytest.approx(nearest[0], abs=1e-3)
        assert box == pytest.approx(nearest[2], rel=1e-3, abs=0.05)
        remaining.remove(nearest)


class _Box(ctypes.Structure):
    _fields_ = [("x", ctypes.c_float), ("y", ctypes.c_float), ("w", ctypes.c_float), ("h", ctypes.c_float)]


class _Detection(ctypes.Structure):
    _fields_ = [
        ("bbox", _Box),
        ("classes", ctypes.c_int),
        ("prob", ctypes.POINTER(ctypes.c_float)),
        ("mask", ctypes.POINTER(ctypes.c_float)),
        ("objectness", ctypes.c_float),
        ("sort_class", ctypes.c_int),
    ]


class _Image(ctypes.Structure):
    _fields_ = [("w", ctypes.c_int), ("h", ctypes.c_int), ("c", ctypes.c_int), ("data", ctypes.POINTER(ctypes.c_float))]


class DarknetLibrary:
    """The original C library. It exits at a malformed file, and frees no memory: for short tests only."""

    def __init__(self) -> None:
        require_dependency("darknet")
        self._library: Any = ctypes.CDLL(LIBRARY_PATH)
        # It is compiled with -ffast-math: loading it makes this process flush subnormal numbers to zero.
        torch.set_flush_denormal(False)
        self._library.letterbox_image.restype = _Image
        self._library.letterbox_image.argtypes = [_Image, ctypes.c_int, ctypes.c_int]
        self._library.load_network.restype = ctypes.c_void_p
        self._library.load_network.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
        self._library.network_predict_image.argtypes = [ctypes.c_void_p, _Image]
        self._library.get_network_boxes.restype = ctypes.POINTER(_Detection)
        self._library.get_network_boxes.argtypes = [
            ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_float, ctypes.c_float,
            ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_int),
        ]  # fmt: skip
        self._library.do_nms_sort.argtypes = [ctypes.POINTER(_Detection), ctypes.c_int, ctypes.c_int, ctypes.c_float]

    def letterbox(self, picture: npt.NDArray[np.uint8], width: int, height: int) -> FloatArray:
        """uint8 (H, W, 3) -> (3, height, width)"""
        image, _alive = _image(picture)
        boxed = self._library.letterbox_image(image, width, height)
        return np.ctypeslib.as_array(boxed.data, (3, height, width)).copy()

    def load_network(self, cfg: Path, weights: Path) -> int:
        """Load a network; returns its handle."""
        handle: int = self._library.load_network(str(cfg).encode(), str(weights).encode(), 0)
        return handle

    def detect(
        self, network: int, picture: npt.NDArray[np.uint8], threshold: float, nms: float
    ) -> list[ReferenceDetection]:
        """(score, class, (left, top, width, height) in pixels), best first, by the steps of `detector test`."""
        image, _alive = _image(picture)
        self._library.network_predict_image(network, image)
        count = ctypes.c_int(0)
        boxes = self._library.get_network_boxes(network, image.w, image.h, threshold, 0.5, None, 0, ctypes.byref(count))
        self._library.do_nms_sort(boxes, count.value, 80, nms)
        detections = []
        for each in boxes[: count.value]:
            box = (each.bbox.x - each.bbox.w / 2, each.bbox.y - each.bbox.h / 2, each.bbox.w, each.bbox.h)
            labels = [label for label in range(each.classes) if each.prob[label] > threshold]
            detections += [(each.prob[label], label, box) for label in labels]
        return sorted(detections, key=lambda detection: -detection[0])


def _image(picture: npt.NDArray[np.uint8]) -> tuple[_Image, FloatArray]:
    """Darknet's image of a picture, and the array that it points to, which the caller must keep."""
    planes = np.ascontiguousarray((picture / 255.0).astype(np.float32).transpose(2, 0, 1))
    height, width = picture.shape[:2]
    return _Image(width, height, 3, planes.ctypes.data_as(ctypes.POINTER(ctypes.c_float))), planes
