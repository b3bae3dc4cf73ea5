"""Collects the telemetry of a node for the stores: events, samples, presence, and the monitor's own counts."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from brokers.telemetry.schema import TelemetryEvent
from monitor.daemon.event_socket import EventReader, UnixListener
from monitor.errors import SocketUnavailable
from monitor.points.points import TelemetryPoint, event_to_points
from monitor.sensors.all import SAMPLE_INTERVAL_S, Sampler
from monitor.sensors.counters import additive_energy_j
from monitor.stores.batch_writer import BatchWriter

log = logging.getLogger(__name__)

_SAMPLER_STOP_S = 1.0
_SAMPLES_LIMIT = 1 << 53  # stores hold 64 bits; rows are numbers that any sender can make up


class TelemetryCollector:
    """Passes all points to all writers, from any thread; `span_writer` gets the events themselves.

    Lifecycle: `start`, `stop`. `listener_optional`: if the socket cannot be opened, log it and go on without events.
    """

    def __init__(
        self,
        node: str,
        run: str,
        writers: Sequence[BatchWriter[TelemetryPoint]] = (),
        *,
        listener: UnixListener | None = None,
        listener_optional: bool = False,
        sample_interval_s: float = SAMPLE_INTERVAL_S,
        span_writer: BatchWriter[TelemetryEvent] | None = None,
    ) -> None:
        self.run = run
        self.point_count = 0
        self._node = node
        self._writers = writers
        self._span_writer = span_writer
        self._mutex = threading.Lock()  # guards `point_count` and the next
        self._energy_per_sample = EnergyPerSample(node)
        self._sampler = Sampler(node, run, self._add_with_energy, sample_interval_s)
        self._events = EventReader(listener, self._on_events) if listener else None
        self._listener_optional = listener_optional

    def start(self) -> None:
        """Receive events and sample the node. Raises `SocketUnavailable`."""
        try:
            if self._events:
                self._events.start()
        except SocketUnavailable as error:
            if not self._listener_optional:
                raise
            log.warning("no events are received: %s", error)
            self._events = None
        for writer in self._all_writers:
            writer.start()
        self._sampler.start()

    def add(self, points: Sequence[TelemetryPoint]) -> None:
        """Pass points to the stores."""
        with self._mutex:
            self._energy_per_sample.add(points)
            self.point_count += len(points)
        for writer in self._writers:
            writer.add(points)

    def stop(self, timeout_s: float) -> None:
        """Store all that was received, as far as the stores accept it in time. May be called after a failed `start`.

        The event buffer is bounded and is always read to its end, however long that takes on a busy machine.
        """
        self._sampler.stop(_SAMPLER_STOP_S)
        if self._events:
            self._events.stop()
        self._add_with_energy([self.monitor_point()])
        end_s = time.monotonic() + timeout_s
        for writer in self._all_writers:  # all drain at the same time: one that hangs does not delay the others
            writer.drain(timeout_s)
        for writer in self._all_writers:
            writer.stop(max(0.0, end_s - time.monotonic()))

    @property
    def socket_path(self) -> Path | None:
        """The socket on which events are received, if any."""
        return self._events.listener.path if self._events else None

    @property
    def store_names(self) -> list[str]:
        """The names of the stores of points."""
        return [writer.name for writer in self._writers]

    @property
    def latest(self) -> Sequence[TelemetryPoint]:
        """The newest sample of the node."""
        return self._sampler.latest

    def monitor_point(self) -> TelemetryPoint:
        """The monitor's own counts now."""
        events = self._events
        fields = {
            "events": events.event_count if events else 0,
            "bad_events": events.bad_events if events else 0,
            "dropped_events": events.listener.dropped if events else 0,
            "points": self.point_count,
            "waiting_points": max((writer.waiting for writer in self._writers), default=0),
            "dropped_points": sum(writer.dropped for writer in self._writers),
            "dropped_spans": self._span_writer.dropped if self._span_writer else 0,
        }
        return TelemetryPoint("monitor", time.time_ns(), {"node": self._node, "run": self.run}, fields)

    @property
    def _all_writers(self) -> list[BatchWriter[TelemetryPoint] | BatchWriter[TelemetryEvent]]:
        return [*self._writers, *([self._span_writer] if self._span_writer else [])]

    def _add_with_energy(self, points: Sequence[TelemetryPoint]) -> None:
        self.add(points)
        with self._mutex:
            energy = self._energy_per_sample.pop_points(time.time_ns())
        self.add(energy)

    def _on_events(self, events: Sequence[TelemetryEvent]) -> None:
        self._sampler.on_events(events)
        self.add([point for event in events for point in event_to_points(event, self._node, self.run)])
        if self._span_writer:
            self._span_writer.add(events)


class EnergyPerSample:
    """The energy of a node and the samples processed in the same time, by run, as points of the measurement `energy`.

    They share a measurement because InfluxQL cannot divide one measurement by another.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._samples: Counter[str] = Counter()
        self._energy_j: dict[str, float] = {}

    def add(self, points: Iterable[TelemetryPoint]) -> None:
        """Count requests with a result, rows of steps, and energy of GPUs and additive rails; ignore other points."""
        for point in points:
            run = point.tags["run"]
            if point.measurement == "request" and not point.fields["error"]:
                self._samples[run] += 1
            elif point.measurement == "step":
                self._samples[run] = min(self._samples[run] + int(point.fields["rows"] or 0), _SAMPLES_LIMIT)
            elif (energy_j := additive_energy_j(point)) is not None:
                self._energy_j[run] = self._energy_j.get(run, 0.0) + energy_j

    def pop_points(self, time_ns: int) -> list[TelemetryPoint]:
        """A point with the totals since the last call for each run that has any."""
        points = []
        for run in sorted({*self._samples, *self._energy_j}):
            fields = {"energy_j": self._energy_j.get(run), "samples": self._samples[run]}
            points.append(TelemetryPoint("energy", time_ns, {"node": self._node, "run": run}, fields))
        self._samples.clear()
        self._energy_j.clear()
        return points
