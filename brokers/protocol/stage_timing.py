"""The time that each stage spent on a request: a list of hops that travels with the request."""

import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from brokers.errors import property_error

HOPS_KEY = "sparse.hops"  # the metadata key of the hops; keys that start with "sparse." are reserved
# The four durations of a task at one stage, in the order in which they happen.
STAGE_DURATIONS = ("queue_ms", "decode_ms", "compute_ms", "encode_ms")
# A float represents integers up to this exactly: more than any duration or size, and safe to add up.
_LIMIT = 1 << 53
_Duration = Annotated[float, Field(ge=0, le=_LIMIT)]
_Count = Annotated[int, Field(ge=0, le=_LIMIT)]


@dataclass(frozen=True, slots=True)
class Hop:
    """One stage's part of a request: durations by the worker's monotonic clock, so clocks need not be synchronised.

    `batch` is the number of requests that were computed together. The limits are checked when hops are parsed, not
    on construction.
    """

    stage: str
    worker: str
    queue_ms: _Duration = 0.0
    decode_ms: _Duration = 0.0
    compute_ms: _Duration = 0.0
    encode_ms: _Duration = 0.0
    bytes_in: _Count = 0
    bytes_out: _Count = 0
    batch: Annotated[int, Field(ge=1, le=_LIMIT)] = 1

    @property
    def total_ms(self) -> float:
        return sum(self.durations().values())

    def durations(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in STAGE_DURATIONS}


_HOPS = TypeAdapter(tuple[Hop, ...])


def hops_to_json(hops: tuple[Hop, ...]) -> str:
    names = Hop.__dataclass_fields__  # not dataclasses.asdict, which copies deeply and takes five times as long
    return json.dumps([{name: getattr(hop, name) for name in names} for hop in hops], separators=(",", ":"))


def hops_from_json(text: str) -> tuple[Hop, ...]:
    """Parse the metadata value, ignoring fields of later versions. Raises `WireError` ("BadProperty")."""
    try:
        return _HOPS.validate_json(text, strict=True)
    except (ValidationError, UnicodeEncodeError):
        raise property_error(HOPS_KEY, "must be a JSON list of hops as docs/protocol.md describes them") from None
