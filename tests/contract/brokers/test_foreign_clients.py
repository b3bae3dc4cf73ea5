"""Clients that were written from docs/protocol.md alone, at a real worker, through Mosquitto."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.mqtt.client import MqttTransport
from brokers.mqtt.in_memory import MemoryBroker, MemoryTransport
from brokers.protocol.topics import results_topic
from brokers.protocol.transport import Transport
from brokers.server.local_broker import start_broker
from sources.client.offloader import Offloader
from sources.inference.inference_run import InferenceRun
from sources.inputs.sample import Sample
from sources.inputs.sample_buffer import SampleBuffer
from stages.executor import FunctionExecutor
from stages.worker.worker import InferenceWorker
from tests.contract.conftest import require_mosquitto
from tests.support.brokers.broker_kinds import DeliveryQueue, run_async
from tests.support.brokers.foreign_client import (
    ForeignClient,
    decode_tensor_body,
    encode_tensor_body,
    random_request_id,
)
from tests.support.environment.protocol_document import column_code_spans, tables

DOOR = "sparse/local/room/smooth/tasks"
UP = "sparse/local/room/smooth/up/+"
INBOX = "sparse/local/source/stranger/inbox"
ANSWERS = "answers/stranger"


def double(x: np.ndarray[Any, np.dtype[Any]]) -> dict[str, Any]:
    return {"x": 2 * x}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    require_mosquitto()
    with start_broker(kind="mosquitto") as broker:
        yield broker.address


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    file = tmp_path / "room.toml"
    file.write_text('[pipeline]\nname = "room"\n[[stage]]\nname = "smooth"\nexecutor = "m:f"\n', encoding="utf-8")
    return load_pipeline(file)


async def working(transport: Transport, pipeline: Pipeline, client: Callable[[], Awaitable[None]]) -> None:
    """Have a worker at work while a client runs."""
    worker = InferenceWorker(transport, pipeline, pipeline.stage[0], FunctionExecutor(double), "w1", "cpu")
    await worker.start()
    serving = asyncio.create_task(worker.run(), name="serve")
    try:
        await client()
    finally:
        await worker.drain()
        await serving
        await worker.stop()


def serve(address: str, pipeline: Pipeline, client: Callable[[], None]) -> None:
    run_async(working(MqttTransport(address), pipeline, lambda: asyncio.to_thread(client)))


# The front door -------------------------------------------------------------------------------------------------------


def test_any_client_offloads_a_task_with_one_message_and_reads_json(address: str, pipeline: Pipeline) -> None:
    def client() -> None:
        with ForeignClient(address, [(ANSWERS, 1)]) as me:
            me.publish(DOOR, b'{"x": [1, 2.5]}', correlation_data=b"42", response_topic=ANSWERS, qos=1)
            heard = me.receive()
            assert (heard.correlation_data, heard.content_type, heard.user_properties) == (
                b"42",
                "application/json",
                {},
            )
            found = json.loads(heard.payload)
            assert found["values"] == {"x": [2.0, 5.0]}
            assert found["pipeline"] == "room"
            assert found.keys() <= set(column_code_spans(tables("Results as JSON")[1]))
            [stage] = found["time"]["stages"]
            assert (stage["stage"], stage["worker"]) == ("smooth", "w1")
            assert stage["compute_ms"] >= 0

    serve(address, pipeline, client)


def test_any_client_may_send_tensors_and_leave_out_what_it_does_not_need(address: str, pipeline: Pipeline) -> None:
    def client() -> None:
        with ForeignClient(address, [(ANSWERS, 1)]) as me:
            me.publish(DOOR, encode_tensor_body("x", [1.0, -2.0]), response_topic=ANSWERS)
            heard = me.receive()
            assert heard.correlation_data == b""
            assert json.loads(heard.payload)["values"] == {"x": [2.0, -4.0]}

    serve(address, pipeline, client)


BROKEN = {
    "hello": (b"hello", "BadPayload"),
    "a JPEG that is none": (b"\xff\xd8\xff\xe0....", "BadPayload"),
    "a truncated body": (encode_tensor_body("x", [1.0])[:-1], "Truncated"),
    "trailing bytes": (encode_tensor_body("x", [1.0]) + b".", "TrailingBytes"),
    "an unknown dtype": (encode_tensor_body("x", [1.0]).replace(b"F32", b"F33"), "UnknownDtype"),
    "another tensor": (encode_tensor_body("y", [1.0]), "BadPayload"),
    "JSON that is no numbers": (b'{"x": "much"}', "BadPayload"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_worked_on_is_answered_and_the_worker_lives(address: str, pipeline: Pipeline, case: str) -> None:
    payload, error = BROKEN[case]

    def client() -> None:
        with ForeignClient(address, [(ANSWERS, 1)]) as me:
            me.publish(DOOR, payload, correlation_data=b"bad", response_topic=ANSWERS)
            heard = me.receive()
            failure = json.loads(heard.payload)
            assert (heard.correlation_data, heard.content_type) == (b"bad", "application/json")
            assert set(failure) == set(column_code_spans(tables("Failures, retries and deadlines")[0]))
            assert (failure["error"], failure["stage"], failure["worker"]) == (error, "smooth", "w1")
            assert failure["retry"] is False
            me.publish(DOOR, b'{"x": 1}', correlation_data=b"good", response_topic=ANSWERS)
            assert json.loads(me.receive().payload)["values"] == {"x": 2.0}

    serve(address, pipeline, client)


# The fast lane --------------------------------------------------------------------------------------------------------


def offload(me: ForeignClient, body: bytes, user: dict[str, str], chunk_bytes: int = 0) -> bytes:
    """Steps 1 to 4 of the page, for a client that has nothing in hand yet; the request id."""
    records: dict[str, tuple[float, str]] = {}
    while not records:
        heard = me.receive()
        if heard.topic.startswith(UP.removesuffix("+")) and heard.payload:
            record = json.loads(heard.payload)
            if record["version"] == "1" and record["state"] == "up" and record["capacity"] > 0:
                records[record["worker"]] = (record["load"]["task_ms"], record["worker"])
    worker = min(records.values())[1]
    request = random_request_id()
    pieces = [body[at : at + chunk_bytes] for at in range(0, len(body), chunk_bytes)] if chunk_bytes else [body]
    for number, piece in enumerate(pieces):
        place = {"chunk": f"{number * chunk_bytes}/{len(body)}", "message": "one"} if chunk_bytes else {}
        me.publish(
            f"sparse/local/room/smooth/in/{worker}",
            piece,
            user_properties={"sparse": "1", "kind": "task", **user, **place},
            correlation_data=request,
            response_topic=INBOX,
            content_type="application/x-safetensors",
        )
    return request


@pytest.mark.parametrize(("count", "chunk_bytes"), [(2, 0), (300_000, 524_288), (1_000, 7)])
def test_a_stranger_speaks_the_fast_lane(address: str, pipeline: Pipeline, count: int, chunk_bytes: int) -> None:
    values = [float(number % 1000) for number in range(count)]

    def client() -> None:
        with ForeignClient(address, [(INBOX, 0), (UP, 1)]) as me:
            request = offload(me, encode_tensor_body("x", values), {"attempt": "3", "source": "stranger"}, chunk_bytes)
            done = me.receive("control")
            assert (done.user_properties["verb"], done.user_properties["worker"], done.correlation_data) == (
                "done",
                "w1",
                request,
            )
            result = me.receive("result")
            assert result.correlation_data == request
            assert (result.user_properties["sparse"], result.user_properties["attempt"]) == ("1", "3")
            found, metadata = decode_tensor_body(result.payload)
            assert found == {"x": [2 * value for value in values]}
            [hop] = json.loads(metadata["sparse.hops"])
            assert list(hop) == column_code_spans(tables("safetensors")[2])
            assert (hop["stage"], hop["worker"], hop["bytes_in"], hop["bytes_out"]) == (
                "smooth",
                "w1",
                4 * count,
                4 * count,
            )

    serve(address, pipeline, client)


@pytest.mark.parametrize(
    ("user", "error"),
    [
        ({"sparse": "2"}, "VersionMismatch"),
        ({"kind": "poem"}, "BadProperty"),
        ({"attempt": "zero"}, "BadProperty"),
        ({"deadline-ms": "0.001"}, "DeadlinePassed"),
        ({"chunk": "10/100"}, "BadChunk"),
        ({"chunk": "0/100000000000"}, "TooLarge"),
    ],
    ids=str,
)
def test_a_stranger_that_errs_is_told_with_a_failure(
    address: str, pipeline: Pipeline, user: dict[str, str], error: str
) -> None:
    def client() -> None:
        with ForeignClient(address, [(INBOX, 0), (UP, 1)]) as me:
            request = offload(me, encode_tensor_body("x", [1.0]), user)
            failure = me.receive("failure")
            assert failure.correlation_data == request
            found = json.loads(failure.payload)
            assert (found["error"], found["request"], found["worker"]) == (error, request.hex(), "w1")
            assert found["retry"] is (error == "BadChunk")
            assert me.receive("control").correlation_data == request
            request = offload(me, encode_tensor_body("x", [1.0]), {})
            assert me.receive("result").correlation_data == request

    serve(address, pipeline, client)


def test_a_stranger_may_have_its_answer_elsewhere_and_in_json(address: str, pipeline: Pipeline) -> None:
    def client() -> None:
        with ForeignClient(address, [(INBOX, 0), (UP, 1), (ANSWERS, 0)]) as me:
            offload(me, encode_tensor_body("x", [1.0]), {"reply": ANSWERS, "accept": "json", "echo": "c0ffee"})
            assert me.receive("control").topic == INBOX
            heard = me.receive()
            while heard.topic != ANSWERS:
                heard = me.receive()
            assert (heard.correlation_data, heard.content_type) == (b"\xc0\xff\xee", "application/json")
            assert json.loads(heard.payload)["values"] == {"x": [2.0]}

    serve(address, pipeline, client)


def test_a_worker_is_seen_to_come_and_to_go(address: str, pipeline: Pipeline) -> None:
    with ForeignClient(address, [(UP, 1)]) as me:

        def client() -> None:
            record = json.loads(me.receive().payload)
            assert set(record) == set(column_code_spans(tables("Presence")[0]))
            assert (record["worker"], record["state"]) == ("w1", "up")

        serve(address, pipeline, client)
        states = []
        while (heard := me.receive()).payload:
            states.append(json.loads(heard.payload)["state"])
        assert states[-2:] == ["draining", "stopped"]
        assert me.is_silent()


# The results topic ----------------------------------------------------------------------------------------------------


def test_what_is_published_on_a_results_topic_has_the_fields_of_the_page(pipeline: Pipeline) -> None:
    documented = set(column_code_spans(tables("Results as JSON")[1]) + column_code_spans(tables("Results as JSON")[2]))

    async def client() -> None:
        intake, inbox = SampleBuffer("all"), DeliveryQueue()
        async with Offloader(pipeline, transport=MemoryTransport(hub)) as offloader:
            await offloader.channel.transport.subscribe(results_topic("local", "cam"), inbox)
            for index, text in enumerate([b'{"x": [1, 2]}', b'{"y": 1}']):
                intake.put_nowait(Sample("cam", index, text, "application/json"))
            intake.close()
            await InferenceRun(offloader, intake).run()
            good, bad = [json.loads(bytes((await inbox.next()).payload)) for _ in range(2)]
        good, bad = sorted([good, bad], key=lambda found: found["index"])
        assert good["values"] == {"x": [2.0, 4.0]}
        assert (good["source"], good["index"], good["attempts"], good["dropped"]) == ("cam", 0, 1, 0)
        assert good["time"]["network_ms"] >= 0
        assert (bad["error"], bad["stage"], bad["worker"]) == ("BadPayload", "smooth", "w1")
        assert good.keys() | bad.keys() <= documented
        # `redelivered` needs a broker that gives a sample twice: tests/pipeline/inference/test_ingress_complete.py.
        unseen = {"picture", "objects", "classes", "content_type", "bytes", "redelivered"}
        assert documented - unseen <= good.keys() | bad.keys()

    hub = MemoryBroker()
    run_async(working(MemoryTransport(hub), pipeline, client))
