"""An MQTT camera at the ingress that reads its own results, and a stage that returns the size of a frame."""

from __future__ import annotations

import io
import json
import queue
import time
from types import TracebackType
from typing import Any, Self

import numpy as np
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from PIL import Image

from brokers.protocol.messages import BinaryContent, Content
from stages.executor import TaskContext, TaskExecutor
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S

Tensors = dict[str, Any]


class FrameSizeExecutor(TaskExecutor):
    """Sleeps, then returns the number of bytes of an encoded frame."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def prepare(self, content: Content, task: TaskContext) -> Tensors:
        assert isinstance(content, BinaryContent)
        return {"bytes": np.array(len(content.data))}

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        time.sleep(self._seconds)
        return tensors


def jpeg_frame() -> bytes:
    """A JPEG of about 50 kB."""
    body = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (180, 240, 3), np.uint8)).save(body, "JPEG", quality=90)
    return body.getvalue()


class IngressCamera:
    """Publishes frames as source `name` of site `local`, and keeps its results with the times of both."""

    def __init__(self, port: int, name: str) -> None:
        self._topic = f"sparse/local/ingress/{name}"
        self.publish_times_s: list[float] = []
        self.results: list[dict[str, Any]] = []
        self._result_times_s: list[float] = []
        subscribed: queue.Queue[None] = queue.Queue()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_message = self._on_message
        self._client.on_subscribe = lambda *_: subscribed.put(None)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._client.subscribe(f"sparse/local/results/{name}", qos=1)
        subscribed.get(timeout=PROCESS_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def last_index(self) -> int:
        """The index of the newest result; -1 before the first."""
        return int(self.results[-1]["index"]) if self.results else -1

    def publish_frames(self, payload: bytes, count: int, every_s: float = 0.0) -> None:
        """Publish `count` frames, one every `every_s` seconds, and wait until the broker has acknowledged the last.

        A frame that is late does not delay the others.
        """
        begin_s = time.monotonic()
        for index in range(count):
            time.sleep(max(0.0, begin_s + index * every_s - time.monotonic()))
            self.publish_times_s.append(time.monotonic())
            publication = self._client.publish(self._topic, payload, qos=1)
        publication.wait_for_publish(PROCESS_TIMEOUT_S)

    def is_answered(self, payload: bytes) -> bool:
        """Publish one more frame; return whether there is a result of any."""
        self.publish_frames(payload, 1)
        return bool(self.results)

    def latencies_ms(self) -> list[float]:
        """The time from the publication of each frame to its result here."""
        return [
            1000 * (received_s - self.publish_times_s[result["index"]])
            for received_s, result in zip(self._result_times_s, self.results, strict=True)
        ]

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        self._result_times_s.append(time.monotonic())
        self.results.append(json.loads(message.payload))
