"""What each stage did for a request, and how long it took: the list that travels with it from stage to stage. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import cast

from brokers.errors import property_error

# The key under which hops travel in the metadata of a body; all keys that begin like this are ours.
HOPS_KEY = "sparse.hops"


@dataclass(frozen=True, slots=True)
class Hop:
    """What one stage did for one request, by its own monotonic clock (durations only: no clocks need agree)."""

    stage: str
    worker: str
    queue_ms: float = 0.0
    decode_ms: float = 0.0
    compute_ms: float = 0.0
    encode_ms: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    batch: int = 1

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.decode_ms + self.compute_ms + self.encode_ms


def hops_to_json(hops: tuple[Hop, ...]) -> str:
    """The form in which hops travel in the metadata of a body."""
    keys = Hop.__dataclass_fields__
    return json.dumps([{key: getattr(hop, key) for key in keys} for hop in hops], separators=(",", ":"))


def hops_from_json(text: str) -> tuple[Hop, ...]:
    """The inverse; fields that a later version may add are read over."""
    try:
        hops = json.loads(text)
    except (ValueError, RecursionError):
        hops = None
    if not isinstance(hops, list) or not all(_is_hop(hop) for hop in hops):
        raise property_error(HOPS_KEY, "must be a JSON list of hops as docs/protocol.md describes them")
    return tuple(Hop(**{key: hop[key] for key in Hop.__dataclass_fields__ if key in hop}) for hop in hops)


def _is_hop(hop: object) -> bool:
    def fits(key: str, value: object) -> bool:
        if key in ("stage", "worker"):
            return isinstance(value, str)
        kinds = (int, float) if key.endswith("_ms") else (int,)
        # What a float counts exactly: far more than any duration or size, and safe to add up.
        return type(value) in kinds and 0 <= cast(float, value) <= 1 << 53

    if not isinstance(hop, dict) or "stage" not in hop or "worker" not in hop:
        return False
    return all(fits(key, hop[key]) for key in Hop.__dataclass_fields__ if key in hop)
