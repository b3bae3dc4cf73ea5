"""Networks by name, and what there is to know of each: how to build it, what it eats, what its outputs mean.

    yolov3, yolov3-tiny            our own; pictures in, detections out
    vgg11-small, ... vgg19-small   VGG for 32x32; pictures in, the five likeliest classes out
    torchvision:NAME               a classifier of torchvision.models; the same
    package.module:factory         a user's: called with the settings, gives a module or a list of modules

A factory may have an attribute `input_shape`, one request's shape: it lets stages put requests into one batch.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from brokers.process.import_string import CannotLoad, describe_exception, import_string
from stages.errors import BadModel, UnknownModel
from stages.models.errors import BadModelSettings, LabelsDoNotFit
from stages.models.image_preprocess import RgbImage

YOLO_INPUT_SIZE_PX = (
    416  # pixels: what yolov3-tiny.cfg asks for, and the smallest of the three sizes in the paper's tables
)
TORCHVISION_PREFIX = "torchvision:"
TOP_K = 5
DETECTIONS_FORMAT = "detections"
CLASSES_FORMAT = "classes"
YOLO_MODELS = ("yolov3", "yolov3-tiny")
SMALL_VGG_MODELS = ("vgg11-small", "vgg13-small", "vgg16-small", "vgg19-small")


@dataclass(frozen=True, slots=True)
class Prediction:
    """A result as it goes to the source: tensors, and the metadata that says how to read them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


ImageSize = tuple[int, int]  # (width, height) in pixels
PreprocessFunction = Callable[[RgbImage], Tensor]  # uint8 (H, W, 3) -> (1, 3, H_in, W_in)
NormaliseFunction = Callable[
    [Tensor], Tensor
]  # uint8 (B, 3, H, W) -> float32 (B, 3, H, W), the numbers `prepare` gives
PostprocessFunction = Callable[
    [Mapping[str, Tensor], ImageSize], Prediction
]  # named outputs of one picture, and the picture's size


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A network by name. Those that take pictures have `prepare` and `finish`; classifiers have `normalise` too."""

    name: str
    build: Callable[[], nn.Module]
    input_name: str = "input"  # what `stages.partition.partition` calls the one input of a network
    input_shape: tuple[int, ...] | None = None  # of one request, (1, C, H, W) for pictures; None: not known
    preprocess: PreprocessFunction | None = None
    postprocess: PostprocessFunction | None = None
    normalise: NormaliseFunction | None = None

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(H, W) in pixels, for a network of pictures."""
        if self.input_shape is None or len(self.input_shape) != 4:
            return None
        return self.input_shape[2], self.input_shape[3]


def get_model_spec(
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
    threshold: float = 0.5,
    nms: float = 0.45,
    folder: str | None = None,
) -> ModelSpec:
    """The network of that name. `settings` are arguments of what builds it; `labels` the names of a classifier's
    classes; `threshold` and `nms` are for detectors; `folder`, by default the current one, is searched for a user's
    module beside the installed packages.

    Raises `UnknownModel` with the nearest known names, `BadModel` for a factory that cannot be had, `BadModelSettings`
    (here, or as the network is built), `LabelsDoNotFit`.
    """
    given = dict(settings or {})
    if name in SMALL_VGG_MODELS:
        return _small_vgg(name, given, labels)
    if name.startswith(TORCHVISION_PREFIX):
        return _torchvision(name, given, labels)
    if name not in YOLO_MODELS and ":" not in name:
        raise _unknown(name)
    if labels:
        raise LabelsDoNotFit(name, None, len(labels))
    return _yolo(name, given, threshold, nms) if name in YOLO_MODELS else _factory(name, given, folder or os.getcwd())


def _yolo(name: str, settings: Mapping[str, Any], threshold: float, nms: float) -> ModelSpec:
    from stages.models.image_preprocess import letterbox
    from stages.models.yolov3 import yolov3, yolov3_tiny

    if settings:
        raise BadModelSettings(name, f"it takes none, got {', '.join(settings)}")
    return ModelSpec(
        name,
        build=yolov3 if name == "yolov3" else yolov3_tiny,
        input_shape=(1, 3, YOLO_INPUT_SIZE_PX, YOLO_INPUT_SIZE_PX),
        preprocess=partial(letterbox, width=YOLO_INPUT_SIZE_PX, height=YOLO_INPUT_SIZE_PX),
        postprocess=partial(_detections, threshold=threshold, nms=nms),
    )


def _detections(outputs: Mapping[str, Tensor], picture_size: ImageSize, *, threshold: float, nms: float) -> Prediction:
    from stages.models.yolo_postprocess import postprocess_detections

    ordered = tuple(outputs[key] for key in sorted(outputs, key=int))
    found = postprocess_detections(ordered, (YOLO_INPUT_SIZE_PX, YOLO_INPUT_SIZE_PX), picture_size, threshold, nms)
    tensors = {
        "boxes": torch.from_numpy(found.boxes),  # (N, 4)
        "scores": torch.from_numpy(found.scores),  # (N,)
        "classes": torch.from_numpy(found.classes),  # (N,)
    }
    return Prediction(tensors, {"format": DETECTIONS_FORMAT, "labels": json.dumps(found.labels)})


def _small_vgg(name: str, settings: Mapping[str, Any], labels: Sequence[str]) -> ModelSpec:
    from stages.models.image_preprocess import normalise, resize_and_normalise
    from stages.models.vgg import DEFAULT_CLASS_COUNT as USUAL
    from stages.models.vgg import INPUT_SIZE_PX, MEAN, STD, small_vgg

    _check_call(name, partial(small_vgg, name), settings)
    names = _labels(name, settings, labels, tuple(map(str, range(USUAL))))
    scale = partial(normalise, mean=MEAN, std=STD)
    return ModelSpec(
        name,
        build=_building(partial(small_vgg, name), name, settings),
        input_shape=(1, 3, INPUT_SIZE_PX, INPUT_SIZE_PX),
        preprocess=partial(resize_and_normalise, width=INPUT_SIZE_PX, height=INPUT_SIZE_PX, normalise=scale),
        postprocess=partial(_postprocess_classes, model=name, labels=names),
        normalise=scale,
    )


def _torchvision(name: str, settings: Mapping[str, Any], labels: Sequence[str]) -> ModelSpec:
    from torchvision import models

    from stages.models.image_preprocess import normalise, prepare_classifier_input

    short = name.removeprefix(TORCHVISION_PREFIX)
    if short not in _classifiers():
        raise _unknown(name)
    if "weights" in settings:
        raise BadModelSettings(name, "'weights' is a key of [pipeline] itself")
    trained = models.get_model_weights(short).DEFAULT
    preset = trained.transforms()
    (resize,), (crop,) = preset.resize_size, preset.crop_size
    prepare = partial(
        prepare_classifier_input,
        resize=resize,
        crop=crop,
        mean=preset.mean,
        std=preset.std,
        interpolation=preset.interpolation.value,
    )
    # These two were trained with another normalisation, and undo the usual one themselves when they are told to.
    extra = {"transform_input": True, "init_weights": True} if short in ("googlenet", "inception_v3") else {}
    names = _labels(name, settings, labels, tuple(trained.meta["categories"]))
    return ModelSpec(
        name,
        build=_building(partial(models.get_model, short, weights=None, **extra), name, settings),
        input_shape=(1, 3, crop, crop),
        preprocess=prepare,
        postprocess=partial(_postprocess_classes, model=name, labels=names),
        normalise=partial(normalise, mean=preset.mean, std=preset.std),
    )


def _labels(name: str, settings: Mapping[str, Any], labels: Sequence[str], usual: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a classifier's classes: those given, else its own, else their numbers."""
    count = settings.get("num_classes", len(usual))
    if type(count) is not int or count < 1:
        raise BadModelSettings(name, f"'num_classes' is {count!r}, expected a whole number above 0")
    if labels and len(labels) != count:
        raise LabelsDoNotFit(name, count, len(labels))
    if labels:
        return tuple(labels)
    return usual if count == len(usual) else tuple(map(str, range(count)))


def _check_call(name: str, builder: Callable[..., object], settings: Mapping[str, Any]) -> None:
    """Whether a builder can be called with the settings, as far as its signature says."""
    try:
        inspect.signature(builder).bind(**settings)
    except TypeError as error:
        raise BadModelSettings(name, str(error)) from None
    except ValueError:  # some of what is written in C has no signature
        pass


def _building(
    builder: Callable[..., object], name: str, settings: Mapping[str, Any], folder: str = ""
) -> Callable[[], nn.Module]:
    """What builds the network, and says of an argument that does not fit that it is one of the settings."""

    def build() -> nn.Module:
        try:
            made = builder(**settings)
        except (TypeError, ValueError) as error:
            if not settings:
                raise
            raise BadModelSettings(name, describe_exception(error, folder)) from error
        return _one_module(made, name)

    return build


def _postprocess_classes(
    outputs: Mapping[str, Tensor], picture_size: ImageSize, *, model: str, labels: tuple[str, ...]
) -> Prediction:
    chances = outputs["output"][0].float().softmax(dim=0).cpu()  # (K,)
    if len(chances) != len(labels):
        raise LabelsDoNotFit(model, len(chances), len(labels))
    scores, classes = chances.topk(min(TOP_K, len(labels)))
    likeliest = [labels[index] for index in classes.tolist()]
    return Prediction(
        {"scores": scores, "classes": classes}, {"format": CLASSES_FORMAT, "labels": json.dumps(likeliest)}
    )


def _factory(address: str, settings: Mapping[str, Any], folder: str) -> ModelSpec:
    try:
        factory = import_string(address, folder)
    except CannotLoad as error:
        raise BadModel(address, error.problem) from error
    if not callable(factory):
        raise BadModel(address, f"expected a function that builds a module, found {type(factory).__name__}")
    _check_call(address, factory, settings)
    shape = getattr(factory, "input_shape", None)
    build = _building(factory, address, settings, folder)
    return ModelSpec(address, build, input_shape=None if shape is None else tuple(shape))


def _one_module(made: object, address: str) -> nn.Module:
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
    own = [*YOLO_MODELS, *SMALL_VGG_MODELS]
    theirs = {TORCHVISION_PREFIX + short: short for short in _classifiers()}
    if TORCHVISION_PREFIX + name in theirs:
        near = [TORCHVISION_PREFIX + name]
    else:
        near = difflib.get_close_matches(name, [*own, *theirs], n=3)
        near += [TORCHVISION_PREFIX + short for short in difflib.get_close_matches(name, theirs.values(), n=3)]
    return UnknownModel(name, tuple(dict.fromkeys(near)), (*own, TORCHVISION_PREFIX + "NAME", "package.module:factory"))
