"""docs/protocol.md matches the code: its example byte by byte, its tables by name, its limits by number."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

import brokers.errors
import brokers.protocol.messages
import brokers.protocol.stage_timing
import stages.training.step_executor  # all subclasses of SparseError that a stage raises
from brokers.dispatch import channel, dispatcher, presence, worker_registry
from brokers.dispatch.presence import LatencyPercentiles, SourceLoad, SourceRecord, WorkerLoad, WorkerRecord
from brokers.errors import WireError
from brokers.mqtt.publish_packet import encode_publish_header, parse_publish_header
from brokers.protocol import chunking, codec, result_json, safetensors_codec, topics, training
from brokers.protocol.codec import PROTOCOL_VERSION, decode, encode
from brokers.protocol.messages import (
    BinaryContent,
    Failure,
    ReplyTo,
    Result,
    StepMessage,
    Task,
    TaskDone,
    TensorContent,
)
from brokers.protocol.safetensors_codec import from_numpy, to_numpy
from brokers.protocol.stage_timing import Hop
from brokers.protocol.topics import StageTopics
from brokers.protocol.traceparent import parse_traceparent, start_trace
from brokers.protocol.training import MicroBatch
from sources.client import pending_request
from stages.loading.network_digest import NETWORK_KEY
from stages.models import registry
from stages.training import step_queue
from stages.worker import model_executor, result_sender, task_queue
from stages.worker.worker_presence import CONFLICT_WATCH_S
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.channel_ends import INBOX_TOPIC, RecordingTransport, open_listening_channel
from tests.support.brokers.in_memory import MemoryBroker
from tests.support.environment.checkout import ROOT
from tests.support.environment.protocol_document import (
    TEXT,
    code_spans,
    column_code_spans,
    example_packet,
    section,
    tables,
)
from tests.support.errors import error_codes, raises_error

STAGE = StageTopics("{site}", "{pipeline}", "{stage}")

# The message of the example.
TASK = Task(
    request_id=bytes(range(16)),
    content=TensorContent({"x": from_numpy(np.array([1.0, -2.0], np.float32))}, {"unit": "C"}),
    reply_to=ReplyTo(topics.source_inbox_topic("local", "cam")),
    sender_inbox=topics.source_inbox_topic("local", "cam"),
    source="cam",
    deadline_ms=500.0,
)
TRACE = start_trace(TASK.request_id)
TASK_TOPIC = StageTopics("local", "room", "smooth").inbox("w1")


# The example ----------------------------------------------------------------------------------------------------------


def test_encoding_gives_the_bytes_of_the_example() -> None:
    encoded = encode(TASK)
    head = encode_publish_header(TASK_TOPIC, encoded.properties, encoded.nbytes)
    assert (head + b"".join(encoded.buffers)).hex(" ") == example_packet().hex(" ")
    assert f"whole PUBLISH packet, {len(example_packet())} bytes" in TEXT


def test_the_bytes_of_the_example_decode() -> None:
    data = memoryview(example_packet())
    head = parse_publish_header(data)
    assert head is not None
    assert (head.topic, head.qos, head.retain) == (TASK_TOPIC, 0, False)
    assert head.header_bytes + head.payload_bytes == len(data)
    assert decode(head.properties, data[head.header_bytes :]) == TASK
    assert to_numpy(TASK.content.tensors["x"]).tolist() == [1.0, -2.0]  # type: ignore[union-attr]


def test_notes_beside_the_bytes_are_right() -> None:
    lines = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+?) {2,}(\S.*)$", TEXT, re.MULTILINE)
    assert len(lines) > 40
    for _, digits, note in lines:
        data = bytes.fromhex(digits)
        if note.startswith('"'):
            assert data.decode() == note[1:-1]
        elif size := re.search(r"(\d+) byte", note):
            number = int(size[1])
            forms = (bytes([number]) if number < 128 else b"", number.to_bytes(2, "big"), number.to_bytes(8, "little"))
            as_length = bytes([number & 0x7F | 0x80, number >> 7])
            assert data in (*forms, as_length), note


# Names ----------------------------------------------------------------------------------------------------------------


def test_topics() -> None:
    table = tables("Topics")[0]
    assert column_code_spans(table) == [
        topics.ingress_topic("{site}", "{source}"),
        topics.results_topic("{site}", "{source}"),
        topics.source_inbox_topic("{site}", "{source}"),
        STAGE.shared_task_topic,
        STAGE.inbox("{worker}"),
        STAGE.presence("{worker}"),
        topics.source_presence_topic("{site}", "{pipeline}", "{source}"),
    ]
    assert code_spans(table[-1][2]) == [topics.all_presence_filter()]
    assert f"no stage `{topics.SOURCE_LEVEL}`" in section("Topics")
    [shared] = code_spans(table[3][2])
    assert shared.replace("...", STAGE.shared_task_topic) == STAGE.shared_task_filter
    for reserved in topics.RESERVED_PIPELINE_NAMES:
        assert f"`{reserved}`" in section("Topics")


def sent_user_properties() -> set[str]:
    """All user properties that our code sends: those of all kinds of messages, and those of chunking."""
    full = dataclasses.replace(
        TASK, reply_to=ReplyTo("elsewhere", "json", b"1"), attempt=2, priority="background", trace=TRACE
    )
    others = (
        TaskDone(request_id=TASK.request_id, worker="w"),
        StepMessage(request_id=TASK.request_id, verb="commit", term=1),
    )
    names = {name for each in (full, *others) for name, _ in encode(each).properties.user_properties}

    async def chunked() -> None:
        transport = RecordingTransport(MemoryBroker(max_packet_bytes=channel.HEADER_RESERVE_BYTES + 100))
        sender, _ = await open_listening_channel(transport)
        await sender.send(INBOX_TOPIC, full)
        names.update(name for _, properties, _ in transport.sent for name, _ in properties.user_properties)
        await sender.close()

    run_async(chunked())
    return names


def test_user_properties() -> None:
    assert set(column_code_spans(tables("Properties")[1])) == sent_user_properties()


@pytest.mark.parametrize("name", ["accept", "attempt", "deadline-ms", "echo", "source"])
def test_property_with_a_default_is_optional(name: str) -> None:
    [row] = [row for row in tables("Properties")[1] if code_spans(row[0]) == [name]]
    assert not row[4].startswith("none: required")
    properties = encode(dataclasses.replace(TASK, attempt=2)).properties
    shorter = dataclasses.replace(
        properties, user_properties=tuple(pair for pair in properties.user_properties if pair[0] != name)
    )
    task = decode(shorter, memoryview(b"".join(encode(TASK).buffers)))
    assert isinstance(task, Task)
    values = {
        "accept": task.reply_to.accept,
        "attempt": task.attempt,
        "deadline-ms": task.deadline_ms,
        "echo": task.reply_to.echo,
        "source": task.source,
    }
    defaults = {"accept": "safetensors", "attempt": 1, "deadline-ms": None, "echo": b"", "source": ""}
    assert values[name] == defaults[name]


@pytest.mark.parametrize(
    "message",
    [
        TASK,
        TaskDone(request_id=TASK.request_id, worker="w"),
        StepMessage(request_id=TASK.request_id, verb="commit", term=1),
    ],
    ids=["task", "control", "step"],
)
def test_required_property_cannot_be_left_out(message: Task | TaskDone | StepMessage) -> None:
    required = [code_spans(row[0])[0] for row in tables("Properties")[1] if row[4] == "none: required"]
    encoded = encode(message)
    for name in {name for name, _ in encoded.properties.user_properties} & set(required):
        shorter = tuple(pair for pair in encoded.properties.user_properties if pair[0] != name)
        with raises_error(WireError, "BadProperty", match="is missing"):
            decode(
                dataclasses.replace(encoded.properties, user_properties=shorter), memoryview(b"".join(encoded.buffers))
            )


def test_traceparent() -> None:
    text = dict(encode(dataclasses.replace(TASK, trace=TRACE)).properties.user_properties)["traceparent"]
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", text)
    assert f"{len(text)} characters in all" in " ".join(section("Traces").split())
    assert text.split("-")[1] == TASK.request_id.hex()  # a source's trace id is the request id
    broken = (text.upper(), f"00-{'0' * 32}-{'1' * 16}-01", text + "-", text[:-1], "ff" + text[2:])
    assert [parse_traceparent(each) for each in broken] == [None] * len(broken)
    assert parse_traceparent("01" + text[2:] + "-more") == TRACE


def test_kinds() -> None:
    assert column_code_spans(tables("Kinds of messages")[0]) == list(codec._DECODERS)


def test_content_types() -> None:
    [form] = re.findall(r"^\* \*\*Content Type\*\* (.*?)^\* ", section("Properties"), re.MULTILINE | re.DOTALL)
    constants = {"SAFETENSORS", "JPEG", "PNG", "JSON"}
    assert {name for name in code_spans(form) if "/" in name} == {
        *(getattr(brokers.protocol.messages, name) for name in constants),
        "image/jpg",
    }


def test_dtypes() -> None:
    cells = [cell for row in tables("safetensors")[0] for cell in row]
    documented = {code_spans(cell)[0]: int(bits) for cell, bits in pairwise(cells) if code_spans(cell)}
    assert documented == {name: bits for name, (bits, _, _) in safetensors_codec._DTYPES.items()}


def test_metadata_keys() -> None:
    table = tables("safetensors")[1]
    assert column_code_spans(table) == [
        brokers.protocol.stage_timing.HOPS_KEY,
        model_executor.PICTURE,
        NETWORK_KEY,
        "format",
        "labels",
    ]
    assert code_spans(table[3][2]) == [registry.DETECTIONS_FORMAT, registry.CLASSES_FORMAT]
    finished = registry._postprocess_classes({"output": torch.zeros(1, 2)}, (1, 1), model="", labels=("cat", "dog"))
    assert column_code_spans(table)[3:] == list(finished.metadata)


def test_hop_fields() -> None:
    assert column_code_spans(tables("safetensors")[2]) == list(Hop.__dataclass_fields__)


def test_worker_record_fields() -> None:
    record, load = tables("Presence")[:2]
    assert sorted(column_code_spans(record)) == sorted(WorkerRecord.model_fields)
    assert column_code_spans(load) == list(WorkerLoad.model_fields)
    [state] = [row[1] for row in record if row[0] == "`state`"]
    assert code_spans(state) == ["up", "standby", "draining", "stopped"]


def test_source_record_fields() -> None:
    record, load = tables("Sources")
    assert sorted(column_code_spans(record)) == sorted(SourceRecord.model_fields)
    assert column_code_spans(load) == list(SourceLoad.model_fields)
    [latency] = [row[1] for row in load if row[0] == "`latency_ms`"]
    assert code_spans(latency) == list(LatencyPercentiles.model_fields)


def test_conflict_watch_time() -> None:
    text = " ".join(section("Conflicting workers").split())
    assert f"watches the records of its stage for {CONFLICT_WATCH_S:g} s more" in text
    assert f"its `up_s` is {CONFLICT_WATCH_S:g} or more" in text


def test_failure_fields() -> None:
    failure = Failure(request_id=TASK.request_id, stage="s", worker="w", error="e", reason="r")
    assert set(column_code_spans(tables("Failures, retries and deadlines")[0])) == set(failure.as_dict())


def test_training_fields() -> None:
    assert column_code_spans(tables("A micro-batch")[0]) == list(MicroBatch.__dataclass_fields__)
    assert column_code_spans(tables("A micro-batch")[1]) == [training.LABELS_TENSOR, training.RNG_STATE_TENSOR]
    assert f"`{training.MICRO_BATCH_KEY}`" in section("A micro-batch")
    assert sorted(column_code_spans(tables("A step")[0])) == sorted(brokers.protocol.messages.STEP_VERBS)
    assert column_code_spans(tables("Terms")[0]) == list(training.TrainingStatus.model_fields)


def test_failure_codes_and_retry() -> None:
    codes = error_codes(brokers, stages)
    general = tables("Failures, retries and deadlines")[1]
    documented = {code: row[2] for row in general for code in code_spans(row[0])}
    training_codes = {
        code: retry for names, _, retry in tables("Failures of training")[0] for code in code_spans(names)
    }
    sent_by_workers = {"Busy", "Draining", "WorkerLost", "NoWorker", "DeadlinePassed"}  # not raised as errors there
    for code, retry in {**documented, **training_codes}.items():
        assert code in codes or code in sent_by_workers, code
        assert code in sent_by_workers or retry == str(codes[code]).lower(), code
    sources = [ROOT / "brokers/errors.py", *(ROOT / "brokers/protocol").glob("*.py")]
    raised = {code for path in sources for code in re.findall(r'WireError\(\s*"(\w+)"', path.read_text("utf-8"))}
    assert raised | {"TooLarge", "BadPayload"} <= documented.keys()


def test_result_fields() -> None:
    fields = column_code_spans(tables("Results as JSON")[0])
    scores = from_numpy(np.ones(1, np.float32))
    labelled = {"labels": '["dog"]'}
    results = [
        result_json.content_to_dict(
            TensorContent(
                {"scores": scores, "boxes": from_numpy(np.ones((1, 4)))}, {"format": "detections", **labelled}
            )
        ),
        result_json.content_to_dict(TensorContent({"scores": scores}, {"format": "classes", **labelled})),
        result_json.content_to_dict(TensorContent({"x": scores})),
        result_json.content_to_dict(BinaryContent("text/plain", b"")),
    ]
    assert [name for each in results for name in each] == fields
    assert set(results[0]["objects"][0]) == {"label", "score", "box"}
    hop_fields = set(result_json.timing_to_dict((Hop("a", "b"),))["stages"][0])
    [time] = [row[1] for row in tables("Results as JSON")[1] if row[0] == "`time`"]
    assert set(code_spans(time)) - {'{"stages": [...]}'} == hop_fields


# Numbers --------------------------------------------------------------------------------------------------------------

LIMITS = {
    "request id": brokers.protocol.messages.REQUEST_ID_BYTES,
    "name": int(re.findall(r",(\d+)\}", topics.NAME_PATTERN)[0]),
    "foreign Correlation Data": brokers.protocol.messages.ECHO_LIMIT_BYTES,
    "safetensors header": safetensors_codec.HEADER_LIMIT_BYTES,
    "dimensions of a tensor": 32,
    "chunk, as sent": chunking.CHUNK_BYTES,
    "reserve for the header of a PUBLISH, as sent": channel.HEADER_RESERVE_BYTES,
    "header of a chunk, as received": channel.CHUNK_HEADER_LIMIT_BYTES,
    "message": chunking.MESSAGE_LIMIT_BYTES,
    "unfinished messages of a receiver, together": chunking.TOTAL_LIMIT_BYTES,
    "unfinished messages of a receiver": chunking.MESSAGE_COUNT_LIMIT,
    "timeout of an unfinished message": chunking.CHUNK_TIMEOUT_S,
    "lease of a request": dispatcher.LEASE_S,
    "presence timeout": worker_registry.PRESENCE_TIMEOUT_S,
    "presence record": presence.RECORD_LIMIT_BYTES,
    "reasons in an object of counts": presence.REASON_LIMIT,
    "Response Topic": brokers.protocol.messages._TOPIC_BYTES,
    "levels of a Response Topic": brokers.protocol.messages._TOPIC_LEVELS,
    "wait for credit at the next stage": result_sender.CREDIT_TIMEOUT_S,
    "deadline": brokers.protocol.messages.DEADLINE_LIMIT_MS,
    "failures before the owner gives up": pending_request.RETRY_LIMIT,
    "queue of a worker": task_queue.QUEUE_LIMIT,
    "values of a tensor in JSON": result_json._VALUES_LIMIT,
    "micro-batches of a step": training.MICRO_BATCH_LIMIT,
    "steps in the queue of a worker": step_queue.STEPS_LIMIT,
}


def test_limits() -> None:
    assert {row[0]: float(row[1]) for row in tables("Limits")[0]} == LIMITS


def test_large_numbers_are_limits() -> None:
    large = {int(number) for number in re.findall(r"(?<![\w.])\d{5,}(?![\w.])", TEXT)}
    assert large <= {int(limit) for limit in LIMITS.values()}


def test_version() -> None:
    assert TEXT.startswith(f"# The protocol, version {PROTOCOL_VERSION}\n")
    assert f"This is version {PROTOCOL_VERSION}." in TEXT


def test_result_decodes() -> None:
    sent = Result(request_id=TASK.request_id, content=TASK.content, hops=(Hop("smooth", "w1"),))
    encoded = encode(sent)
    assert decode(encoded.properties, memoryview(b"".join(encoded.buffers))) == sent


def test_links_lead_to_headings() -> None:
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= anchors
