"""What can be wrong with what a pipeline file says of its network, beside the name."""

from __future__ import annotations

from dataclasses import dataclass

from brokers.errors import UsageError


@dataclass(eq=False)
class BadModelSettings(UsageError):
    """Arguments that what builds a network does not take."""

    key = "pipeline.model_settings"

    name: str
    problem: str

    def __str__(self) -> str:
        return f"settings of model {self.name!r}: {self.problem}"


@dataclass(eq=False)
class LabelsDoNotFit(UsageError):
    """Names of classes for a network that has more or fewer, or of which it is not known that it has any."""

    key = "pipeline.labels"

    name: str
    expected: int | None
    actual: int

    def __str__(self) -> str:
        if self.expected is None:
            return f"model {self.name!r} takes no labels: they name the classes of vggN-small and torchvision:NAME"
        return f"{self.actual} labels for model {self.name!r}, expected {self.expected}, one for each of its outputs"
