"""A camera that is an MQTT client and no more, somebody who reads its results, and a stage that glances at frames."""

from __future__ import annotations

import io
import json
import queue
import time
from types import TracebackType
from typing import Any

import numpy as np
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from PIL import Image

from brokers.protocol.messages import BinaryContent, Content
from stages.executor import TaskContext, TaskExecutor
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S

Tensors = dict[str, Any]


class FrameSizeExecutor(TaskExecutor):
    """Takes a frame as the bytes it came as, sleeps over it, and says how many they were."""

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
    """Publishes frames under one name and hears of their results; its clock is the only one."""

    def __init__(self, port: int, name: str) -> None:
        self._topic = f"sparse/local/ingress/{name}"
        self.publish_times_s: list[float] = []
        self.results: list[tuple[float, dict[str, Any]]] = []
        self._heard: queue.Queue[None] = queue.Queue()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_message = self._on_message
        self._client.on_subscribe = lambda *_: self._heard.put(None)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._client.subscribe(f"sparse/local/results/{name}", qos=1)
        self._heard.get(timeout=PROCESS_TIMEOUT_S)

    def __enter__(self) -> IngressCamera:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(self, payload: bytes) -> IngressCamera:
        self.publish_times_s.append(time.monotonic())
        self._client.publish(self._topic, payload)
        return self

    def publish_frames(self, payload: bytes, every_s: float, count: int) -> None:
        """Publish `count` frames, one every `every_s` seconds; one that is late makes no other late."""
        begin_s = time.monotonic()
        for index in range(count):
            time.sleep(max(0.0, begin_s + index * every_s - time.monotonic()))
            self.publish(payload)

    def latencies_ms(self) -> list[float]:
        """How old each frame was, from the moment it was published, when its result arrived here."""
        return [1000 * (came_s - self.publish_times_s[result["index"]]) for came_s, result in self.results]

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        self.results.append((time.monotonic(), json.loads(message.payload)))
