"""The tables of a pipeline file: their keys, defaults and limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from brokers.dispatch.dispatcher import LEASE_S
from brokers.errors import UsageError
from brokers.protocol.broker_url import parse_address
from brokers.protocol.messages import DEADLINE_LIMIT_MS, Priority
from brokers.protocol.topics import validate_name

LOCAL_SITE = "local"


def config_error(key: str, problem: str) -> PydanticCustomError:
    """An error at `key` for validators of several keys; `load_pipeline` reports it as `BadFile`."""
    return PydanticCustomError("config_error", "{key}: {problem}", {"key": key, "problem": problem})


def _validated_by(function: Callable[[str], object]) -> AfterValidator:
    """A validator that accepts the texts for which `function` raises no `UsageError`."""

    def validate(text: str) -> str:
        try:
            function(text)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return text

    return AfterValidator(validate)


def _name_of(kind: str) -> AfterValidator:
    return _validated_by(lambda name: validate_name(kind, name))


class ConfigTable(BaseModel):
    """Base class of the tables: unknown keys are errors, and values are not converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PipelineTable(ConfigTable):
    """`[pipeline]`: the network and where it is cut."""

    name: Annotated[str, _name_of("pipeline")]
    kind: Literal["inference", "training"] = "inference"
    model: str | None = None
    model_settings: dict[str, Any] = Field(default_factory=dict, description="arguments of the model's constructor")
    weights: str | None = None
    cuts: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), strict=False)
    labels: tuple[str, ...] = Field(default=(), strict=False, description="class names of a classifier")
    seed: int = 0
    threshold: float = Field(default=0.5, ge=0, le=1, description="minimum score of a detection")
    lease_s: float = Field(default=LEASE_S, gt=0, le=86_400, description="a request unanswered this long is sent again")
    nms: float = Field(
        default=0.45, ge=0, le=1, description="IoU above which the detection with the lower score is suppressed"
    )


class StageTable(ConfigTable):
    """`[[stage]]`: one part of the network, or an executor, and its workers."""

    name: Annotated[str, _name_of("stage")]
    workers: int = Field(default=1, ge=1, le=64)
    site: Annotated[str, _name_of("site")] = LOCAL_SITE
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int = Field(default=0, ge=0, description="compute threads of a worker; 0: an equal share of the cores")
    max_batch: int = Field(default=1, ge=1, le=1024)
    max_wait_ms: float = Field(default=0.0, ge=0, le=60_000)
    wire: Literal["float32", "float16", "bfloat16"] = "float32"
    executor: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class LinkTable(ConfigTable):
    """One of a site's `links`: a bridge from its broker to that of another site."""

    to: Annotated[str, _name_of("site")]
    delay_ms: float = Field(default=0.0, ge=0, le=10_000, description="one way; emulated by `sparse run`")
    rate_mbit: float | None = Field(default=None, gt=0, le=1_000_000, description="Mbit/s each way; emulated too")
    user: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.@-]{1,64}$",  # one word in a line of mosquitto.conf and of an access list
        description="user name of the bridge at the other broker",
    )
    password_file: str | None = Field(default=None, description="file with the password of `user`")

    @model_validator(mode="after")
    def _check_user(self) -> LinkTable:
        if self.password_file is not None and self.user is None:
            raise ValueError("password_file needs a user: expected user = 'NAME' beside it")
        return self

    @property
    def is_emulated(self) -> bool:
        """Whether `sparse run` emulates a delay or a rate for this link."""
        return bool(self.delay_ms or self.rate_mbit)


class SiteTable(ConfigTable):
    """`[[site]]`: a site and its broker; without `broker`, `sparse run` starts one."""

    name: Annotated[str, _name_of("site")]
    broker: Annotated[str, _validated_by(parse_address)] | None = None
    links: tuple[LinkTable, ...] = Field(default=(), strict=False, description="the bridges that its broker runs")
    cameras: tuple[Annotated[str, _name_of("source")], ...] = Field(
        default=(), strict=False, description="MQTT clients that may publish to its ingress topics"
    )


class SourceTable(ConfigTable):
    """`[source]`: the input of the pipeline."""

    kind: str = Field(
        default="ingress", description="video, images, camera, digits, cifar10, ingress, or package.module:Class"
    )
    name: Annotated[str, _name_of("source")] = "source"
    site: Annotated[str, _name_of("site")] = LOCAL_SITE
    path: str | None = None
    pattern: str | None = None
    device: int | str | None = None
    limit: int | None = Field(default=None, ge=1)
    loop: bool = False
    pace: Literal["max", "native"] = "max"
    encoding: Literal["jpeg", "raw"] = "jpeg"
    quality: int = Field(default=90, ge=1, le=100)
    keep: Literal["all", "latest"] | None = Field(
        default=None, description="which samples wait for a slot; default: latest for live inputs, else all"
    )
    window: int | None = Field(
        default=None, ge=1, le=1024, description="requests in flight; default: what keeps the workers busy"
    )
    deadline_ms: float | None = Field(default=None, gt=0, le=DEADLINE_LIMIT_MS)
    priority: Priority = Field(default="interactive", description="background: after all interactive requests")
    settings: dict[str, Any] = Field(default_factory=dict)


class TrainingTable(ConfigTable):
    """`[training]`: the data set, optimizer and schedule of a training pipeline."""

    batch: int = Field(default=64, ge=1, description="batch size: examples per optimizer step")
    micro_batches: int = Field(default=4, ge=1, le=256, description="micro-batches of a step")
    epochs: int = Field(default=10, ge=1)
    optimizer: str = Field(default="sgd", description="sgd, adam, adamw, or package.module:Class")
    lr: float = Field(default=0.05, gt=0, description="learning rate")
    settings: dict[str, Any] = Field(default_factory=dict, description="further arguments of the optimizer")
    lr_schedule: Literal["constant", "cosine", "step"] = "constant"
    lr_warmup: int = Field(default=0, ge=0, description="steps in which the learning rate rises to `lr`")
    lr_every: int = Field(default=30, ge=1, description="epochs after which `step` lowers the learning rate")
    lr_factor: float = Field(default=0.1, gt=0, le=1, description="factor by which `step` lowers it")
    loss: str = Field(default="cross_entropy", description="cross_entropy, mse, or package.module:function")
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    labels: Literal["travel", "stay"] = Field(
        default="travel", description="stay: sent to the last stage directly, which is at the site of the source"
    )
    shuffle: bool = True
    drop_last: bool = Field(default=False, description="leave out the last batch of an epoch if it is smaller")
    augment: bool = Field(default=False, description="images are shifted, and mirrored where that keeps their class")
    evaluate_every: int = Field(default=1, ge=0, description="epochs; 0: never")
    checkpoint_every: int = Field(default=50, ge=1, description="steps")
    checkpoints: str | None = Field(default=None, description="folder of the checkpoints")

    @model_validator(mode="after")
    def _check_batch(self) -> TrainingTable:
        if self.micro_batches > self.batch:
            raise config_error(
                "training.micro_batches", f"expected at most batch = {self.batch}, got {self.micro_batches}"
            )
        return self
