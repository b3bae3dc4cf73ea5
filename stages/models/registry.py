"""Networks by name, and what there is to know of each: how to build it, what it eats, what its outputs mean.

    yolov3, yolov3-tiny            our own; pictures in, detections out
    torchvision:NAME               a classifier of torchvision.models; pictures in, the five likeliest classes out
    package.module:factory         a user's: called with nothing, gives a module or a list of modules

A factory may have an attribute `input_shape`, one request's shape: it lets stages put requests into one batch.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from brokers.own_code import CannotLoad, load_named
from stages.errors import BadModel, UnknownModel
from stages.pictures import Picture

YOLO_SIDE = 416  # pixels: what yolov3-tiny.cfg asks for, and the smallest of the three sizes in the paper's tables
TORCHVISION = "torchvision:"
TOP = 5
DETECTIONS = "detections"
CLASSES = "classes"


@dataclass(frozen=True, slots=True)
class Finished:
    """A result as it goes to the source: tensors, and the metadata that says how to read them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


Size = tuple[int, int]  # (width, height) in pixels
Prepare = Callable[[Picture], Tensor]  # uint8 (H, W, 3) -> (1, 3, H_in, W_in)
Finish = Callable[[Mapping[str, Tensor], Size], Finished]  # named outputs of one picture, and the picture's size


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A network by name. Those that take pictures have `prepare` and `finish`."""

    name: str
    build: Callable[[], nn.Module]
    input_name: str = "input"  # what `stages.partition` calls the one input of a network
    input_shape: tuple[int, ...] | None = None  # of one request, (1, C, H, W) for pictures; None: not known
    prepare: Prepare | None = None
    finish: Finish | None = None

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(H, W) in pixels, for a network of pictures."""
        if self.input_shape is None or len(self.input_shape) != 4:
            return None
        return self.input_shape[2], self.input_shape[3]


def model_spec(name: str, *, threshold: float = 0.5, nms: float = 0.45, folder: str | None = None) -> ModelSpec:
    """The network of that name. `threshold` and `nms` are for detectors; `folder`, by default the current one, is
    searched for a user's module beside the installed packages.

    Raises `UnknownModel` with the nearest known names, `BadModel` for a factory that cannot be had.
    """
    if name in ("yolov3", "yolov3-tiny"):
        return _yolo(name, threshold, nms)
    if name.startswith(TORCHVISION):
        return _torchvision(name)
    if ":" in name:
        return _factory(name, folder or os.getcwd())
    raise _unknown(name)


def _yolo(name: str, threshold: float, nms: float) -> ModelSpec:
    from stages.models.yolov3 import yolov3, yolov3_tiny
    from stages.pictures import letterbox

    return ModelSpec(
        name,
        build=yolov3 if name == "yolov3" else yolov3_tiny,
        input_shape=(1, 3, YOLO_SIDE, YOLO_SIDE),
        prepare=partial(letterbox, width=YOLO_SIDE, height=YOLO_SIDE),
        finish=partial(_detections, threshold=threshold, nms=nms),
    )


def _detections(outputs: Mapping[str, Tensor], picture_size: Size, *, threshold: float, nms: float) -> Finished:
    from stages.detection import detect

    ordered = tuple(outputs[key] for key in sorted(outputs, key=int))
    found = detect(ordered, (YOLO_SIDE, YOLO_SIDE), picture_size, threshold, nms)
    tensors = {
        "boxes": torch.from_numpy(found.boxes),  # (N, 4)
        "scores": torch.from_numpy(found.scores),  # (N,)
        "classes": torch.from_numpy(found.classes),  # (N,)
    }
    return Finished(tensors, {"format": DETECTIONS, "labels": json.dumps(found.labels)})


def _torchvision(name: str) -> ModelSpec:
    from torchvision import models

    from stages.pictures import classify_input

    short = name.removeprefix(TORCHVISION)
    if short not in _classifiers():
        raise _unknown(name)
    trained = models.get_model_weights(short).DEFAULT
    preset = trained.transforms()
    (resize,), (crop,) = preset.resize_size, preset.crop_size
    prepare = partial(
        classify_input,
        resize=resize,
        crop=crop,
        mean=preset.mean,
        std=preset.std,
        interpolation=preset.interpolation.value,
    )
    # These two were trained with another normalisation, and undo the usual one themselves when they are told to.
    extra = {"transform_input": True, "init_weights": True} if short in ("googlenet", "inception_v3") else {}
    return ModelSpec(
        name,
        build=partial(models.get_model, short, weights=None, **extra),
        input_shape=(1, 3, crop, crop),
        prepare=prepare,
        finish=partial(_classes, labels=tuple(trained.meta["categories"])),
    )


def _classes(outputs: Mapping[str, Tensor], picture_size: Size, *, labels: tuple[str, ...]) -> Finished:
    chances = outputs["output"][0].float().softmax(dim=0).cpu()  # (K,)
    scores, classes = chances.topk(min(TOP, len(labels)))
    likeliest = [labels[index] for index in classes.tolist()]
    return Finished({"scores": scores, "classes": classes}, {"format": CLASSES, "labels": json.dumps(likeliest)})


def _factory(address: str, folder: str) -> ModelSpec:
    try:
        factory = load_named(address, folder)
    except CannotLoad as error:
        raise BadModel(address, error.problem) from error
    if not callable(factory):
        raise BadModel(address, f"expected a function that builds a module, found {type(factory).__name__}")
    shape = getattr(factory, "input_shape", None)
    return ModelSpec(address, partial(_made_by, factory, address), input_shape=None if shape is None else tuple(shape))


def _made_by(factory: Callable[[], object], address: str) -> nn.Module:
    made = factory()
    if isinstance(made, nn.Module):
        return made
    if isinstance(made, list | tuple) and made and all(isinstance(child, nn.Module) for child in made):
        return nn.Sequential(*made)
    raise BadModel(address, f"expected a module or a list of modules, it gave {type(made).__name__}")


def _classifiers() -> list[str]:
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def _unknown(name: str) -> UnknownModel:
    own = ["yolov3", "yolov3-tiny"]
    theirs = {TORCHVISION + short: short for short in _classifiers()}
    if TORCHVISION + name in theirs:
        near = [TORCHVISION + name]
    else:
        near = difflib.get_close_matches(name, [*own, *theirs], n=3)
        near += [TORCHVISION + short for short in difflib.get_close_matches(name, theirs.values(), n=3)]
    return UnknownModel(name, tuple(dict.fromkeys(near)), (*own, TORCHVISION + "NAME", "package.module:factory"))
