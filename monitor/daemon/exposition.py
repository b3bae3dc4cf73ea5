"""The text format of Prometheus, version 0.0.4: families of series, one series a line. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MetricType = Literal["counter", "gauge"]

# What a value of a label may not hold as it is.
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass(slots=True)
class MetricFamily:
    """The series of one name. No two may have the same labels: whoever reads it would refuse the whole page."""

    name: str
    kind: MetricType
    about: str  # one line
    _series: dict[str, float] = field(default_factory=dict)

    def add(self, value: float, labels: Mapping[str, str] | None = None) -> None:
        """One series; names of labels are ours, their values may be any text."""
        pairs = ",".join(f'{name}="{text.translate(_ESCAPES)}"' for name, text in (labels or {}).items())
        key = f"{{{pairs}}}" if pairs else ""
        assert key not in self._series, f"{self.name}{key} twice"
        self._series[key] = value

    def lines(self) -> Iterable[str]:
        """Nothing at all of a family without series."""
        if not self._series:
            return
        yield f"# HELP {self.name} {self.about}"
        yield f"# TYPE {self.name} {self.kind}"
        for labels, value in self._series.items():
            yield f"{self.name}{labels} {value!r}"


def render_exposition(families: Iterable[MetricFamily]) -> str:
    """The page, each line ended, as the format wants it."""
    return "".join(f"{line}\n" for family in families for line in family.lines())
