"""Any MQTT client is a camera: a detector fed by mosquitto_pub, through both brokers, with pictures good and bad."""

from __future__ import annotations

import io
import json
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from PIL import Image

from brokers.errors import SparseError
from brokers.protocol.safetensors_codec import from_numpy, pack
from brokers.server.local_broker import BrokerKind
from stages.partition.weight_files import find_weights
from tests.pipeline.conftest import BROKER_KINDS
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import require_dependency, skip_or_fail
from tests.support.pipelines.pipeline_files import write_pipeline_file
from tests.support.pipelines.processes import (
    PROCESS_TIMEOUT_S,
    ProcessSandbox,
    RunningCommand,
    eventually,
    process_sandbox,
)

# The embedded broker speaks version 5 only; on Mosquitto the older one is tried, which has no properties.
# Reference of the original Darknet for this photograph, as in tests/unit/stages/models/test_yolo_postprocess.py:
# score, and corners in pixels.
DOG_SCORE = 0.564
DOG_BOX = np.array([129.1, 186.7, 369.3, 517.5])  # left, top, right, bottom
VERSIONS: dict[BrokerKind, str] = {"embedded": "5", "mosquitto": "311"}


@dataclass
class Door:
    """A detector in one stage that runs behind the gateway, and somebody who reads all its results."""

    sandbox: ProcessSandbox
    port: int
    version: str
    run: RunningCommand
    reader: RunningCommand

    @property
    def client(self) -> list[str]:
        return ["-p", str(self.port), "-V", self.version]

    def publish(self, source: str, payload: bytes) -> None:
        command = [
            str(require_dependency("mosquitto_pub")),
            *self.client,
            "-t",
            f"sparse/local/ingress/{source}",
            "-q",
            "1",
        ]
        command.append("-s" if payload else "-n")
        subprocess.run(command, input=payload, check=True, timeout=60)

    def results(self, source: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.reader.read_stdout().splitlines() if line.endswith("}")]
        return [result for result in found if result["source"] == source]

    def ask(self, source: str, payload: bytes) -> dict[str, Any]:
        """The result of one picture."""
        self.publish(source, payload)
        return eventually(f"the result of {source}", lambda: self.results(source))[0]


@pytest.fixture(scope="module", name="door", params=BROKER_KINDS)
def _door(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    kind: BrokerKind = request.param
    require_dependency({"embedded": "iotcore"}.get(kind, kind))
    try:
        find_weights("yolov3-tiny")
    except SparseError as problem:
        skip_or_fail(str(problem))
    folder = tmp_path_factory.mktemp("door")
    port = free_port()
    with process_sandbox(folder) as sandbox:
        stages = [{"name": "all", "max_batch": 2}]
        source = {"kind": "ingress"}
        path = write_pipeline_file(folder, stages, source, name="door", model="yolov3-tiny", weights="yolov3-tiny")
        out = folder / "out"
        run = sandbox.start_sparse("run", path, "--broker", kind, "--port", str(port), "--json", "--out", out)
        eventually("the gateway", lambda: f"sparse/local/ingress/NAME at mqtt://127.0.0.1:{port}" in run.read_stderr())
        eventually("its file", (out / "results.jsonl").exists)
        client = ["-p", str(port), "-V", VERSIONS[kind]]
        reader = sandbox.start(require_dependency("mosquitto_sub"), *client, "-t", "sparse/local/results/#")
        door = Door(sandbox, port, VERSIONS[kind], run, reader)
        _greet(door)
        yield door


def _greet(door: Door) -> None:
    """Publish until both the gateway and the reader are there: MQTT does not say who else has subscribed."""

    def greeted() -> bool:
        door.publish("greeting", b"?")
        return bool(door.results("greeting"))

    eventually("an answer", greeted)


def dog() -> bytes:
    """A photograph of a dog, a bicycle and a car, 768x576, that everybody's detector is shown."""
    return (require_dependency("darknet-files") / "data" / "dog.jpg").read_bytes()


def as_file(picture: Image.Image, kind: str) -> bytes:
    body = io.BytesIO()
    picture.save(body, kind)
    return body.getvalue()


def found_dog(result: dict[str, Any]) -> dict[str, Any]:
    (found,) = [item for item in result["objects"] if item["label"] == "dog"]
    assert found["score"] > 0.5
    return dict(found)


def corners(found: dict[str, Any]) -> list[float]:
    left, top, width, height = found["box"]
    return [left, top, left + width, top + height]


def overlap(one: Any, other: Any) -> float:
    """Intersection over union of two boxes, by their corners."""
    inner = np.array([*np.maximum(one[:2], other[:2]), *np.minimum(one[2:], other[2:])])

    def area(sandbox: Any) -> float:
        return float(max(0.0, sandbox[2] - sandbox[0]) * max(0.0, sandbox[3] - sandbox[1]))

    return area(inner) / (area(one) + area(other) - area(inner))


def test_a_jpeg_gives_labels_scores_and_boxes_in_its_pixels(door: Door) -> None:
    result = door.ask("front", dog())
    found = found_dog(result)
    assert found["score"] == pytest.approx(DOG_SCORE, abs=0.02)
    assert result["picture"] == {"width": 768, "height": 576}
    assert corners(found) == pytest.approx(DOG_BOX, abs=2)
    assert (result["source"], result["pipeline"]) == ("front", "door")
    assert len(bytes.fromhex(result["request"])) == 16
    assert result["age_ms"] >= result["latency_ms"] > 0
    (spent,) = result["time"]["stages"]
    assert (spent["stage"], spent["worker"]) == ("all", "all-1")
    assert spent["compute_ms"] > 0
    assert result["time"]["network_ms"] >= 0


def test_a_png_gives_the_same(door: Door) -> None:
    picture = Image.open(io.BytesIO(dog()))
    assert found_dog(door.ask("png", as_file(picture, "PNG")))["box"] == pytest.approx(
        found_dog(door.ask("jpeg", dog()))["box"], abs=0.2
    )


def test_pixels_in_safetensors_give_the_same(door: Door) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(dog())))
    body = b"".join(bytes(piece) for piece in pack({"picture": from_numpy(pixels)}, {}))
    assert found_dog(door.ask("pixels", body))["score"] == pytest.approx(DOG_SCORE, abs=0.02)


def test_twenty_megapixels_give_boxes_in_twenty_megapixels(door: Door) -> None:
    large = Image.open(io.BytesIO(dog())).resize((5472, 4104))
    result = door.ask("large", as_file(large, "JPEG"))
    assert result["picture"] == {"width": 5472, "height": 4104}
    assert overlap(corners(found_dog(result)), DOG_BOX * 5472 / 768) > 0.7


def test_one_pixel_is_a_picture_too(door: Door) -> None:
    result = door.ask("pixel", as_file(Image.new("RGB", (1, 1), "red"), "PNG"))
    assert result["picture"] == {"width": 1, "height": 1}
    assert isinstance(result["objects"], list)


LIE = b"".join(map(bytes, pack({"picture": from_numpy(np.zeros((2, 2, 3), np.uint8))}, {"picture": "wide"})))
HUGE = b'{"x":{"dtype":"F32","shape":[25000000000],"data_offsets":[0,100000000000]}}'
BAD: dict[str, tuple[bytes, str, str]] = {
    "none": (b"\xff\xd8\xff\xe0 no JPEG after all", "BadPayload", "image/jpeg"),
    "half": (b"", "BadPayload", "image/jpeg"),  # filled in by the test
    "bytes": (b"\x00\x01\x02\x03", "BadPayload", "expected JPEG, PNG, safetensors or JSON"),
    "empty": (b"", "BadPayload", "expected JPEG, PNG, safetensors or JSON"),
    "reading": (b'{"celsius": 21.5}', "BadPayload", "accepts pictures"),
    "claim": (len(HUGE).to_bytes(8, "little") + HUGE, "Truncated", "100000000000 bytes"),
    "liar": (LIE, "", ""),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_answered_once_and_the_worker_lives(door: Door, name: str) -> None:
    payload, error, reason = BAD[name]
    if name == "half":
        payload = dog()[:20_000]
    result = door.ask(name, payload)
    if error:
        assert result["error"] == error, result
        assert reason in result["reason"]
    else:
        assert result["picture"] == {"width": 2, "height": 2}  # what it says of itself is not believed
    assert found_dog(door.ask(f"after-{name}", dog()))
    assert len(door.results(name)) == 1


def test_counters_show_what_was_refused(door: Door) -> None:
    door.ask("counted-badly", b"\xff\xd8\xff\xe0 no JPEG")
    door.ask("counted-well", dog())
    seen = [json.loads(line) for line in door.reader.read_stdout().splitlines()]
    failed = sum("error" in result and result.get("stage") == "all" for result in seen)
    done = sum("objects" in result for result in seen) + failed
    assert failed >= 1

    def counted() -> bool:
        load = _load(door)
        return (load["done"], load["failed"]) == (done, failed)

    eventually("the counters", counted, timeout_s=20)


def test_the_record_of_a_detector_says_that_it_takes_pictures(door: Door) -> None:
    assert _worker(door)["formats"] == ["application/x-safetensors", "image/jpeg", "image/png"]


def _load(door: Door) -> dict[str, Any]:
    load: dict[str, Any] = _worker(door)["load"]
    return load


def _worker(door: Door) -> dict[str, Any]:
    said = door.sandbox.start_sparse("status", "--broker", f"mqtt://127.0.0.1:{door.port}", "--json").wait()
    (worker,) = said.json_output["workers"]
    found: dict[str, Any] = worker
    return found


# The front door: whole tasks from clients of version 5, with no gateway in between -----------------------------------


def test_a_foreign_client_gets_its_answer_at_its_response_topic(door: Door) -> None:
    echo, result = _request(door, dog(), b"my own id")
    assert echo == b"my own id"
    assert found_dog(result)["score"] == pytest.approx(DOG_SCORE, abs=0.02)
    assert result["pipeline"] == "door"
    assert [spent["stage"] for spent in result["time"]["stages"]] == ["all"]


def test_a_foreign_client_is_told_what_is_wrong(door: Door) -> None:
    echo, result = _request(door, b"no picture", b"another")
    assert echo == b"another"
    assert (result["error"], result["stage"], result["retry"]) == ("BadPayload", "all", False)
    assert "expected JPEG, PNG, safetensors or JSON" in result["reason"]


def test_a_task_without_a_response_topic_does_no_harm(door: Door) -> None:
    command = [
        str(require_dependency("mosquitto_pub")),
        "-p",
        str(door.port),
        "-V",
        "5",
        "-t",
        "sparse/local/door/all/tasks",
        "-s",
    ]
    subprocess.run(command, input=dog(), check=True, timeout=60)
    assert found_dog(door.ask("after-nobody", dog()))


def _request(door: Door, payload: bytes, own_id: bytes) -> tuple[bytes, dict[str, Any]]:
    """The answer to a task of a client that knows nothing of Sparse but a topic: Correlation Data, and the JSON."""
    answers: queue.Queue[mqtt.MQTTMessage] = queue.Queue()
    subscribed = threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.on_message = lambda _client, _data, message: answers.put(message)
    client.on_subscribe = lambda *_: subscribed.set()
    client.connect("127.0.0.1", door.port)
    client.loop_start()
    try:
        client.subscribe("answers/mine", qos=1)
        assert subscribed.wait(PROCESS_TIMEOUT_S)
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ResponseTopic, properties.CorrelationData = "answers/mine", own_id
        client.publish("sparse/local/door/all/tasks", payload, qos=1, properties=properties)
        answer = answers.get(timeout=PROCESS_TIMEOUT_S)
    finally:
        client.disconnect()
        client.loop_stop()
    told = vars(answer.properties)
    assert told["ContentType"] == "application/json"
    return told["CorrelationData"], json.loads(answer.payload)


def test_a_stopped_gateway_says_what_it_has_done(door: Door) -> None:
    """The last test of this file: it ends the run."""
    said = door.run.wait(signal.SIGINT)
    summary = said.json_output
    assert said.returncode == 130
    assert summary["requests"] == summary["results"] + summary["failed"]
    assert summary["lost"] == 0
    assert summary["failures"]["BadPayload"] >= 3
    results = (door.sandbox.folder / "out" / "results.jsonl").read_text().splitlines()
    assert len(results) == summary["requests"]
    door.reader.wait(signal.SIGTERM)
    door.sandbox.wait_until_nothing_left()
