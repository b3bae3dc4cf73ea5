"""Models by name: how each is built, its input, and the meaning of its outputs.

    yolov3, yolov3-tiny            detectors of this package
    vgg11-small, ... vgg19-small   VGG for pictures of 32x32; the five most likely classes
    torchvision:NAME               a classifier of torchvision.models; the five most likely classes
    package.module:factory         the user's; called with the settings, it returns a module or a list of modules

A factory may have an attribute `input_shape`, the shape of one request's float32 input, or `example_inputs`: a tensor,
a dict of tensors by argument name, or a function without arguments that returns these. With these inputs the parts of
the network are compared with the whole.
"""

import difflib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from brokers.config.pipeline_file import Pipeline
from brokers.errors import UsageError
from brokers.process.image_decode import RgbImage
from brokers.process.import_string import CannotLoad, describe_exception, import_string

YOLO_INPUT_SIZE_PX = 416  # as in yolov3-tiny.cfg, and the smallest of the three sizes in the paper's tables
TORCHVISION_PREFIX = "torchvision:"
TOP_K = 5
DETECTIONS_FORMAT = "detections"
CLASSES_FORMAT = "classes"
YOLO_MODELS = ("yolov3", "yolov3-tiny")
SMALL_VGG_MODELS = ("vgg11-small", "vgg13-small", "vgg16-small", "vgg19-small")

ImageSize = tuple[int, int]  # (width, height) in pixels
ExampleInputs = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A result as it is sent to the source: tensors, and the metadata that describes them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model by name.

    `input_name`: the name of the one input of an unsplit model. `input_shape`: the shape of one request's input, such
    as (1, C, H, W); None if unknown. `example_inputs`: as a factory of the user declares them. `settings`, `folder`:
    the arguments of its factory, and where its module may be. Models of pictures also have

    * `preprocess`: a picture, uint8 (H, W, 3) -> the input, float32 (1, 3, H_in, W_in);
    * `postprocess`: the named outputs for one picture, and the size of that picture -> the result;
    * `normalise` (classifiers only): uint8 (B, 3, H, W) -> float32 of the same shape, with the numbers of `preprocess`.
    """

    name: str
    build: Callable[[], nn.Module]
    input_name: str = "input"
    input_shape: tuple[int, ...] | None = None
    example_inputs: ExampleInputs | Callable[[], ExampleInputs] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""
    preprocess: Callable[[RgbImage], Tensor] | None = None
    postprocess: Callable[[Mapping[str, Tensor], ImageSize], Prediction] | None = None
    normalise: Callable[[Tensor], Tensor] | None = None

    def make_example(self) -> Mapping[str, Tensor] | None:
        """Return inputs of one request by name; None if none are known. Raises `UsageError` "BadModel"."""
        declared = self.example_inputs
        if callable(declared):
            try:
                declared = declared()
            except Exception as error:
                raise _model_error(self.name, f"`example_inputs`: {describe_exception(error, self.folder)}") from error
        if isinstance(declared, Tensor):
            return {self.input_name: declared}
        if isinstance(declared, Mapping) and declared and all(isinstance(each, Tensor) for each in declared.values()):
            return declared
        if declared is not None:
            problem = f"`example_inputs` is a {type(declared).__name__}, expected a tensor or a dict of tensors"
            raise _model_error(self.name, problem)
        if self.input_shape is None:
            return None
        return {self.input_name: random_tensor(self.input_shape)}


def random_tensor(shape: Sequence[int]) -> Tensor:
    """Return normally distributed numbers, float32, the same ones for the same shape."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))


def get_model_spec(
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
    threshold: float = 0.5,
    nms: float = 0.45,
    folder: str | None = None,
) -> ModelSpec:
    """Return the model of this name.

    `settings` are arguments of its factory; `labels` the class names of a classifier; `threshold` and `nms` the score
    and IoU thresholds of a detector; `folder` (by default the current one) is searched for a user's module in addition
    to the installed packages.

    Raises `UsageError` "UnknownModel", "BadModel", "LabelsDoNotFit" or "BadModelSettings" (the last also in `build`).
    """
    arguments = dict(settings or {})
    if name in SMALL_VGG_MODELS:
        return _small_vgg(name, arguments, labels)
    if name.startswith(TORCHVISION_PREFIX):
        return _torchvision(name, arguments, labels)
    if name not in YOLO_MODELS and ":" not in name:
        raise _unknown_model_error(name)
    if labels:
        message = f"model {name!r} has no labels: only vggN-small and torchvision:NAME do"
        raise UsageError("LabelsDoNotFit", message, key="pipeline.labels", model=name)
    if name in YOLO_MODELS:
        return _yolo(name, arguments, threshold, nms)
    return _from_factory(name, arguments, folder or os.getcwd())


def pipeline_model_spec(pipeline: Pipeline) -> ModelSpec:
    """Return the model of a pipeline. Raises as `get_model_spec`."""
    table = pipeline.pipeline
    return get_model_spec(
        table.model or "",
        settings=table.model_settings,
        labels=() if pipeline.is_training else table.labels,  # results of training have no class names
        threshold=table.threshold,
        nms=table.nms,
        folder=str(pipeline.folder),
    )


def _yolo(name: str, settings: Mapping[str, Any], threshold: float, nms: float) -> ModelSpec:
    from stages.models.image_preprocess import letterbox
    from stages.models.yolov3 import yolov3, yolov3_tiny

    if settings:
        raise _settings_error(name, f"it has none, got {', '.join(settings)}")
    return ModelSpec(
        name,
        build=yolov3 if name == "yolov3" else yolov3_tiny,
        input_shape=(1, 3, YOLO_INPUT_SIZE_PX, YOLO_INPUT_SIZE_PX),
        preprocess=partial(letterbox, width=YOLO_INPUT_SIZE_PX, height=YOLO_INPUT_SIZE_PX),
        postprocess=partial(_postprocess_yolo, threshold=threshold, nms=nms),
    )


def _postprocess_yolo(
    outputs: Mapping[str, Tensor], picture_size: ImageSize, *, threshold: float, nms: float
) -> Prediction:
    from stages.models.yolo_postprocess import postprocess_detections

    ordered = tuple(outputs[key] for key in sorted(outputs, key=int))
    network_size = (YOLO_INPUT_SIZE_PX, YOLO_INPUT_SIZE_PX)
    detections = postprocess_detections(ordered, network_size, picture_size, threshold, nms)
    tensors = {
        "boxes": torch.from_numpy(detections.boxes),  # (N, 4)
        "scores": torch.from_numpy(detections.scores),  # (N,)
        "classes": torch.from_numpy(detections.classes),  # (N,)
    }
    return Prediction(tensors, {"format": DETECTIONS_FORMAT, "labels": json.dumps(detections.labels)})


def _small_vgg(name: str, settings: Mapping[str, Any], labels: Sequence[str]) -> ModelSpec:
    from stages.models.image_preprocess import normalise, resize_and_normalise
    from stages.models.vgg import DEFAULT_CLASS_COUNT, INPUT_SIZE_PX, MEAN, STD, SmallVgg

    factory = partial(SmallVgg, name)
    _check_settings(name, factory, settings)
    class_names = _class_names(name, settings, labels, tuple(map(str, range(DEFAULT_CLASS_COUNT))))
    scale = partial(normalise, mean=MEAN, std=STD)
    return ModelSpec(
        name,
        build=partial(_build, factory, name, settings),
        input_shape=(1, 3, INPUT_SIZE_PX, INPUT_SIZE_PX),
        settings=settings,
        preprocess=partial(resize_and_normalise, width=INPUT_SIZE_PX, height=INPUT_SIZE_PX, normalise=scale),
        postprocess=partial(_postprocess_classes, model=name, labels=class_names),
        normalise=scale,
    )


def _torchvision(name: str, settings: Mapping[str, Any], labels: Sequence[str]) -> ModelSpec:
    from torchvision import models

    from stages.models.image_preprocess import normalise, prepare_classifier_input

    short = name.removeprefix(TORCHVISION_PREFIX)
    if short not in models.list_models(module=models):
        raise _unknown_model_error(name)
    if "weights" in settings:
        raise _settings_error(name, "'weights' is not a setting, but a key of [pipeline]")
    trained = models.get_model_weights(short).DEFAULT
    preset = trained.transforms()
    (resize,), (crop,) = preset.resize_size, preset.crop_size
    preprocess = partial(
        prepare_classifier_input,
        resize=resize,
        crop=crop,
        mean=preset.mean,
        std=preset.std,
        interpolation=preset.interpolation.value,
    )
    # These two were trained with another normalisation; with `transform_input` they convert from the usual one.
    extra: dict[str, Any] = {}
    if short in ("googlenet", "inception_v3"):
        extra = {"transform_input": True, "init_weights": True}
    elif short.startswith("vit_"):  # they accept one size, by default 224, where vit_h_14 was trained on 518
        extra = {"image_size": crop}
    class_names = _class_names(name, settings, labels, tuple(trained.meta["categories"]))
    return ModelSpec(
        name,
        build=partial(_build, partial(models.get_model, short, weights=None, **extra), name, settings),
        input_shape=(1, 3, crop, crop),
        settings=settings,
        preprocess=preprocess,
        postprocess=partial(_postprocess_classes, model=name, labels=class_names),
        normalise=partial(normalise, mean=preset.mean, std=preset.std),
    )


def _from_factory(address: str, settings: Mapping[str, Any], folder: str) -> ModelSpec:
    try:
        factory = import_string(address, folder)
    except CannotLoad as error:
        raise _model_error(address, error.problem) from error
    if not callable(factory):
        raise _model_error(address, f"expected a function that returns a module, found {type(factory).__name__}")
    _check_settings(address, factory, settings)
    shape = getattr(factory, "input_shape", None)
    return ModelSpec(
        address,
        build=partial(_build, factory, address, settings, folder),
        input_shape=None if shape is None else tuple(shape),
        example_inputs=getattr(factory, "example_inputs", None),
        settings=settings,
        folder=folder,
    )


def _check_settings(name: str, factory: Callable[..., object], settings: Mapping[str, Any]) -> None:
    """Raise "BadModelSettings" if the factory's signature does not accept the settings."""
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        raise _settings_error(name, str(error)) from None
    except ValueError:  # some functions written in C have no signature
        pass


def _build(factory: Callable[..., object], name: str, settings: Mapping[str, Any], folder: str = "") -> nn.Module:
    try:
        built = factory(**settings)
    except (TypeError, ValueError) as error:
        if not settings:
            raise
        raise _settings_error(name, describe_exception(error, folder)) from error
    if isinstance(built, nn.Module):
        return built
    if isinstance(built, list | tuple) and built and all(isinstance(child, nn.Module) for child in built):
        return nn.Sequential(*built)
    raise _model_error(name, f"expected a module or a list of modules, the factory returned {type(built).__name__}")


def _class_names(
    name: str, settings: Mapping[str, Any], labels: Sequence[str], default: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the class names of a classifier: `labels`, else `default` if it has as many classes, else numbers."""
    count = settings.get("num_classes", len(default))
    if type(count) is not int or count < 1:
        raise _settings_error(name, f"'num_classes' is {count!r}, expected an integer above 0")
    if labels:
        _check_label_count(name, count, labels)
        return tuple(labels)
    return default if count == len(default) else tuple(map(str, range(count)))


def _check_label_count(name: str, classes: int, labels: Sequence[str]) -> None:
    if len(labels) != classes:
        message = f"{len(labels)} labels for model {name!r}, expected {classes}, one per class"
        raise UsageError(
            "LabelsDoNotFit", message, key="pipeline.labels", model=name, expected=classes, actual=len(labels)
        )


def _postprocess_classes(
    outputs: Mapping[str, Tensor], picture_size: ImageSize, *, model: str, labels: tuple[str, ...]
) -> Prediction:
    probabilities = outputs["output"][0].float().softmax(dim=0).cpu()  # (K,)
    _check_label_count(model, len(probabilities), labels)
    scores, classes = probabilities.topk(min(TOP_K, len(labels)))
    names = [labels[index] for index in classes.tolist()]
    return Prediction({"scores": scores, "classes": classes}, {"format": CLASSES_FORMAT, "labels": json.dumps(names)})


def _unknown_model_error(name: str) -> UsageError:
    from torchvision import models

    own = [*YOLO_MODELS, *SMALL_VGG_MODELS]
    spellings = {name: name for name in own}
    for short in models.list_models(module=models):
        spellings |= {short: TORCHVISION_PREFIX + short, TORCHVISION_PREFIX + short: TORCHVISION_PREFIX + short}
    nearest = [name] if name in spellings else difflib.get_close_matches(name, spellings, n=4)
    guesses = dict.fromkeys(spellings[spelling] for spelling in nearest)
    hint = f"did you mean {' or '.join(guesses)}? " if guesses else ""
    known = ", ".join([*own, TORCHVISION_PREFIX + "NAME", "package.module:factory"])
    return UsageError(
        "UnknownModel", f"unknown model {name!r}: {hint}Expected one of {known}", key="pipeline.model", model=name
    )


def _model_error(address: str, problem: str) -> UsageError:
    return UsageError("BadModel", f"model {address!r}: {problem}", key="pipeline.model", model=address)


def _settings_error(name: str, problem: str) -> UsageError:
    message = f"settings of model {name!r}: {problem}"
    return UsageError("BadModelSettings", message, key="pipeline.model_settings", model=name)
