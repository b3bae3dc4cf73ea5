"""The tables of a pipeline file, each by itself: its keys, their defaults, and what values they may have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from brokers.dispatch.worker_pool import LEASE_S
from brokers.errors import UsageError
from brokers.protocol.broker_url import parse_address
from brokers.protocol.messages import DEADLINE_LIMIT_MS, Priority
from brokers.protocol.topics import validate_name

LOCAL_SITE = "local"


def _name_of(what: str) -> AfterValidator:
    def check(name: str) -> str:
        try:
            return validate_name(what, name)
        except UsageError as error:
            raise ValueError(str(error)) from None

    return AfterValidator(check)


def _readable_address(text: str) -> str:
    try:
        parse_address(text)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return text


class ConfigTable(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PipelineTable(ConfigTable):
    """`[pipeline]`: the network and where it is cut."""

    name: Annotated[str, _name_of("pipeline")]
    kind: Literal["inference", "training"] = "inference"
    model: str | None = None
    model_settings: dict[str, Any] = Field(default_factory=dict, description="arguments of what builds the model")
    weights: str | None = None
    cuts: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), strict=False)
    labels: tuple[str, ...] = Field(default=(), strict=False, description="names of the classes of a classifier")
    seed: int = 0
    threshold: float = Field(default=0.5, ge=0, le=1, description="of a detection's score")
    lease_s: float = Field(
        default=LEASE_S, gt=0, le=86_400, description="a request of which nothing is heard for so long is sent again"
    )
    nms: float = Field(default=0.45, ge=0, le=1, description="overlap above which the weaker of two boxes goes")


class StageTable(ConfigTable):
    """`[[stage]]`: one part, and how it is served."""

    name: Annotated[str, _name_of("stage")]
    workers: int = Field(default=1, ge=1, le=64)
    site: Annotated[str, _name_of("site")] = LOCAL_SITE
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int = Field(default=0, ge=0, description="of a worker's compute; 0: what the machine has, shared out")
    max_batch: int = Field(default=1, ge=1, le=1024)
    max_wait_ms: float = Field(default=0.0, ge=0, le=60_000)
    wire: Literal["float32", "float16", "bfloat16"] = "float32"
    executor: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class LinkTable(ConfigTable):
    """One of a site's `links`: the bridge that its broker keeps to that of another site."""

    to: Annotated[str, _name_of("site")]
    delay_ms: float = Field(default=0.0, ge=0, le=10_000, description="one way; imposed by `sparse run`")
    rate_mbit: float | None = Field(default=None, gt=0, le=1_000_000, description="Mbit/s each way; as above")
    user: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.@-]{1,64}$",  # a word in the lines of mosquitto.conf and of an access list
        description="by which the bridge greets the other broker",
    )
    password_file: str | None = Field(default=None, description="what that broker knows the user by")

    @model_validator(mode="after")
    def _greets(self) -> LinkTable:
        if self.password_file is not None and self.user is None:
            raise ValueError("password_file: is of a user, and no user is named")
        return self

    @property
    def is_emulated(self) -> bool:
        """Whether it is slower than the machine that `sparse run` runs on."""
        return bool(self.delay_ms or self.rate_mbit)


class SiteTable(ConfigTable):
    """`[[site]]`: a place with its own broker; without an address one is started on this machine."""

    name: Annotated[str, _name_of("site")]
    broker: Annotated[str, AfterValidator(_readable_address)] | None = None
    links: tuple[LinkTable, ...] = Field(default=(), strict=False, description="bridges that its broker keeps")
    cameras: tuple[Annotated[str, _name_of("source")], ...] = Field(
        default=(), strict=False, description="MQTT clients that publish to its ingress, where doors are locked"
    )


class SourceTable(ConfigTable):
    """`[source]`: what feeds the pipeline, and how eagerly."""

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
        default=None, description="what waits for room; default: latest for what is live (camera, ingress), else all"
    )
    window: int | None = Field(
        default=None, ge=1, le=1024, description="requests in flight; default: as many as the workers that are up hold"
    )
    deadline_ms: float | None = Field(default=None, gt=0, le=DEADLINE_LIMIT_MS)
    priority: Priority = Field(default="interactive", description="background: after all that is interactive")
    settings: dict[str, Any] = Field(default_factory=dict)


class TrainingTable(ConfigTable):
    """`[training]`: how a network is trained."""

    batch: int = Field(default=64, ge=1, description="rows of a step")
    micro_batches: int = Field(default=4, ge=1, le=256, description="that a step is cut into")
    epochs: int = Field(default=10, ge=1)
    optimizer: str = Field(default="sgd", description="sgd, adam, adamw, or package.module:Class")
    lr: float = Field(default=0.05, gt=0, description="the learning rate")
    settings: dict[str, Any] = Field(default_factory=dict, description="further arguments of the optimizer")
    lr_schedule: Literal["constant", "cosine", "step"] = "constant"
    lr_warmup: int = Field(default=0, ge=0, description="steps in which the rate rises to `lr`")
    lr_every: int = Field(default=30, ge=1, description="epochs after which `step` lowers the rate")
    lr_factor: float = Field(default=0.1, gt=0, le=1, description="by which it does")
    loss: str = Field(default="cross_entropy", description="cross_entropy, mse, or package.module:function")
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    labels: Literal["travel", "stay"] = Field(
        default="travel", description="stay: they go to the last stage directly, which is at the source's own site"
    )
    shuffle: bool = True
    augment: bool = Field(default=False, description="pictures are shifted, and mirrored where that keeps their sense")
    evaluate_every: int = Field(default=1, ge=0, description="epochs; 0: never")
    checkpoint_every: int = Field(default=50, ge=1, description="steps")
    checkpoints: str | None = Field(default=None, description="their folder")

    @model_validator(mode="after")
    def _divides(self) -> TrainingTable:
        if self.micro_batches > self.batch:
            raise ValueError(f"micro_batches: a batch of {self.batch} rows makes no {self.micro_batches} micro-batches")
        return self
