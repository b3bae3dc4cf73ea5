"""What a daemon keeps of its node: events, samples, presence and its own counts, on their way to the stores."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from brokers.telemetry.schema import TelemetryEvent
from monitor.daemon.event_parser import EventReader
from monitor.daemon.unix_listener import UnixListener
from monitor.errors import BadSocket, SocketTaken
from monitor.points.points import TelemetryPoint, event_to_points
from monitor.sensors.energy_per_sample import EnergyPerSample
from monitor.sensors.sampler import Sampler
from monitor.stores.batch_writer import BatchWriter

log = logging.getLogger(__name__)

SAMPLE_INTERVAL_S = 0.5
_STOP_S = 1.0


class TelemetryCollector:
    """Life: `start`, `stop`. What comes from any thread goes to all writers; `spans` takes events as they are.

    `deaf`: where the door cannot be opened it does without events, and says so.
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
        self._node, self._writers, self._spans = node, writers, span_writer
        self._spending, self._spending_guard = EnergyPerSample(node), threading.Lock()
        self._sampler = Sampler(node, run, sample_interval_s, self._sampled)
        self._reader = EventReader(listener, self._heard) if listener else None
        self._deaf = listener_optional

    def start(self) -> None:
        """Hear events, and sample; raises as `UnixListener.open`."""
        try:
            if self._reader:
                self._reader.start()
        except (SocketTaken, BadSocket) as error:
            if not self._deaf:
                raise
            log.warning("no events are heard: %s", error)
            self._reader = None
        for writer in self._writers:
            writer.start()
        if self._spans:
            self._spans.start()
        self._sampler.start()

    def add(self, points: Sequence[TelemetryPoint]) -> None:
        """Have points kept."""
        with self._spending_guard:
            self._spending.add(points)
            self.point_count += len(points)
        for writer in self._writers:
            writer.add(points)

    def stop(self, timeout_s: float) -> None:
        """Keep all that has come in so far, if the stores take it in time. May be called however far `start` came.

        What waits to be read is bounded and is read first, however long that takes on a busy machine.
        """
        self._sampler.stop(_STOP_S)
        if self._reader:
            self._reader.stop()
        self._sampled([self.monitor_point()])
        end_s = time.monotonic() + timeout_s
        writers = (*self._writers, *((self._spans,) if self._spans else ()))
        for writer in writers:  # all at once: one that hangs takes none of the others' time
            writer.drain(timeout_s)
        for writer in writers:
            writer.stop(max(0.0, end_s - time.monotonic()))

    @property
    def socket_path(self) -> Path | None:
        """Where events are heard, if they are."""
        return self._reader.listener.path if self._reader else None

    @property
    def store_names(self) -> list[str]:
        """The names of what points are kept in."""
        return [writer.name for writer in self._writers]

    @property
    def latest(self) -> Sequence[TelemetryPoint]:
        """The newest sample of the node."""
        return self._sampler.latest

    def monitor_point(self) -> TelemetryPoint:
        """The monitor's own counts, as of now."""
        reader = self._reader
        fields = {
            "events": reader.event_count if reader else 0,
            "bad_events": reader.bad_events if reader else 0,
            "dropped_events": reader.dropped if reader else 0,
            "points": self.point_count,
            "waiting_points": max((writer.waiting for writer in self._writers), default=0),
            "dropped_points": sum(writer.dropped for writer in self._writers),
            "dropped_spans": self._spans.dropped if self._spans else 0,
        }
        return TelemetryPoint("monitor", time.time_ns(), {"node": self._node, "run": self.run}, fields)

    def _sampled(self, points: Sequence[TelemetryPoint]) -> None:
        self.add(points)
        with self._spending_guard:
            spent = self._spending.pop_points(time.time_ns())
        self.add(spent)

    def _heard(self, events: Sequence[TelemetryEvent]) -> None:
        self._sampler.on_events(events)
        self.add([point for event in events for point in event_to_points(event, self._node, self.run)])
        if self._spans:
            self._spans.add(events)
