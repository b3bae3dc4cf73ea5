"""docs/protocol.md is what the code does: its example byte by byte, its tables by name, its limits by number."""

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
import stages.errors
import stages.training.errors  # all subclasses of SparseError that a stage raises
from brokers.dispatch import channel as line
from brokers.dispatch import presence, worker_registry
from brokers.dispatch import worker_pool as dispatch
from brokers.dispatch.presence import LatencyPercentiles, SourceLoad, SourceRecord, WorkerLoad, WorkerRecord
from brokers.errors import WireError
from brokers.mqtt.in_memory import MemoryBroker
from brokers.mqtt.publish_packet import encode_publish_header, parse_publish_header
from brokers.protocol import chunking as chunks
from brokers.protocol import codec as wire
from brokers.protocol import result_json as results
from brokers.protocol import safetensors_codec as tensors
from brokers.protocol import topics, training
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
from sources.client import pending_request as flight
from stages.models import registry
from stages.training import step_queue as steps
from stages.worker import model_executor as inference
from stages.worker import result_sender as outlet
from stages.worker import task_queue as backlog
from stages.worker.duplicate_check import CONFLICT_WATCH_S
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.channel_ends import INBOX_TOPIC, RecordingTransport, open_listening_channel
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

# The example, as the page describes it in words.
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


def test_our_code_writes_exactly_the_bytes_of_the_example() -> None:
    encoded = encode(TASK)
    head = encode_publish_header(TASK_TOPIC, encoded.properties, encoded.nbytes)
    assert (head + b"".join(encoded.buffers)).hex(" ") == example_packet().hex(" ")
    assert f"whole PUBLISH packet, {len(example_packet())} bytes" in TEXT


def test_our_code_reads_the_bytes_of_the_example() -> None:
    data = memoryview(example_packet())
    head = parse_publish_header(data)
    assert head is not None
    assert (head.topic, head.qos, head.retain) == (TASK_TOPIC, 0, False)
    assert head.header_bytes + head.payload_bytes == len(data)
    found = decode(head.properties, data[head.header_bytes :])
    assert found == TASK
    assert to_numpy(TASK.content.tensors["x"]).tolist() == [1.0, -2.0]  # type: ignore[union-attr]


def test_the_notes_beside_the_bytes_are_true() -> None:
    lines = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+?) {2,}(\S.*)$", TEXT, re.MULTILINE)
    assert len(lines) > 40
    for _, digits, note in lines:
        data = bytes.fromhex(digits)
        if note.startswith('"'):
            assert data.decode() == note[1:-1]
        elif counted := re.search(r"(\d+) byte", note):
            number = int(counted[1])
            forms = (bytes([number]) if number < 128 else b"", number.to_bytes(2, "big"), number.to_bytes(8, "little"))
            as_length = bytes([number & 0x7F | 0x80, number >> 7])
            assert data in (*forms, as_length), note


# Names ----------------------------------------------------------------------------------------------------------------


def test_the_topics_are_those_of_the_code() -> None:
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
    """Every user property that our code ever sends: those of all kinds, and those of a chunk."""
    full = dataclasses.replace(
        TASK, reply_to=ReplyTo("elsewhere", "json", b"1"), attempt=2, priority="background", trace=TRACE
    )
    words = (
        TaskDone(request_id=TASK.request_id, worker="w"),
        StepMessage(request_id=TASK.request_id, verb="commit", term=1),
    )
    found = {name for each in (full, *words) for name, _ in encode(each).properties.user_properties}

    async def chunked() -> None:
        transport = RecordingTransport(MemoryBroker(max_packet_bytes=line.HEADER_RESERVE_BYTES + 100))
        sender, _ = await open_listening_channel(transport)
        await sender.send(INBOX_TOPIC, full)
        found.update(name for _, properties, _ in transport.sent for name, _ in properties.user_properties)
        await sender.close()

    run_async(chunked())
    return found


def test_the_user_properties_are_those_that_the_code_sends() -> None:
    assert set(column_code_spans(tables("Properties")[1])) == sent_user_properties()


@pytest.mark.parametrize("name", ["accept", "attempt", "deadline-ms", "echo", "source"])
def test_a_property_that_has_a_default_may_be_left_out(name: str) -> None:
    [row] = [row for row in tables("Properties")[1] if code_spans(row[0]) == [name]]
    assert not row[4].startswith("none: required")
    properties = encode(dataclasses.replace(TASK, attempt=2)).properties
    left = dataclasses.replace(
        properties, user_properties=tuple(pair for pair in properties.user_properties if pair[0] != name)
    )
    found = decode(left, memoryview(b"".join(encode(TASK).buffers)))
    assert isinstance(found, Task)
    said = {
        "accept": found.reply_to.accept,
        "attempt": found.attempt,
        "echo": found.reply_to.echo,
        "source": found.source,
    }
    defaults = {"accept": "safetensors", "attempt": 1, "echo": b"", "source": ""}
    assert {**defaults, **{key: said[key] for key in said if key == name}} == defaults


@pytest.mark.parametrize(
    "message",
    [
        TASK,
        TaskDone(request_id=TASK.request_id, worker="w"),
        StepMessage(request_id=TASK.request_id, verb="commit", term=1),
    ],
    ids=["task", "control", "step"],
)
def test_a_property_that_is_required_may_not_be_left_out(message: Task | TaskDone | StepMessage) -> None:
    required = [code_spans(row[0])[0] for row in tables("Properties")[1] if row[4] == "none: required"]
    encoded = encode(message)
    for name in {name for name, _ in encoded.properties.user_properties} & set(required):
        left = tuple(pair for pair in encoded.properties.user_properties if pair[0] != name)
        with raises_error(WireError, "BadProperty", match="is missing"):
            decode(dataclasses.replace(encoded.properties, user_properties=left), memoryview(b"".join(encoded.buffers)))


def test_a_trace_has_the_form_of_the_page() -> None:
    text = dict(encode(dataclasses.replace(TASK, trace=TRACE)).properties.user_properties)["traceparent"]
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", text)
    assert f"{len(text)} characters in all" in section("Traces")
    assert text.split("-")[1] == TASK.request_id.hex()  # a source's trace id is the request id
    broken = (text.upper(), f"00-{'0' * 32}-{'1' * 16}-01", text + "-", text[:-1], "ff" + text[2:])
    assert [parse_traceparent(each) for each in broken] == [None] * len(broken)
    assert parse_traceparent("01" + text[2:] + "-more") == TRACE


def test_the_kinds_are_those_of_the_code() -> None:
    assert column_code_spans(tables("Kinds of messages")[0]) == list(wire._DECODERS)


def test_the_content_types_are_those_of_the_code() -> None:
    [form] = [row[3] for row in tables("Properties")[0] if row[0] == "Content Type"]
    constants = {"SAFETENSORS", "JPEG", "PNG", "JSON"}
    assert {name for name in code_spans(form) if "/" in name} == {
        *(getattr(brokers.protocol.messages, name) for name in constants),
        "image/jpg",
    }


def test_the_dtypes_are_those_of_the_code() -> None:
    cells = [cell for row in tables("safetensors")[0] for cell in row]
    found = {code_spans(cell)[0]: int(bits) for cell, bits in pairwise(cells) if code_spans(cell)}
    assert found == {name: bits for name, (bits, _, _) in tensors._DTYPES.items()}


def test_the_metadata_keys_are_those_of_the_code() -> None:
    table = tables("safetensors")[1]
    assert column_code_spans(table) == [brokers.protocol.stage_timing.HOPS_KEY, inference.PICTURE, "format", "labels"]
    assert code_spans(table[2][2]) == [registry.DETECTIONS_FORMAT, registry.CLASSES_FORMAT]
    finished = registry._postprocess_classes({"output": torch.zeros(1, 2)}, (1, 1), model="", labels=("cat", "dog"))
    assert column_code_spans(table)[2:] == list(finished.metadata)


def test_the_fields_of_a_hop_are_those_of_the_code() -> None:
    assert column_code_spans(tables("safetensors")[2]) == list(Hop.__dataclass_fields__)


def test_the_presence_record_is_that_of_the_code() -> None:
    record, load = tables("Presence")[:2]
    assert sorted(column_code_spans(record)) == sorted(WorkerRecord.model_fields)
    assert column_code_spans(load) == list(WorkerLoad.model_fields)
    [state] = [row[1] for row in record if row[0] == "`state`"]
    assert code_spans(state) == ["up", "standby", "draining", "stopped"]


def test_the_record_of_a_source_is_that_of_the_code() -> None:
    record, load = tables("Sources")
    assert sorted(column_code_spans(record)) == sorted(SourceRecord.model_fields)
    assert column_code_spans(load) == list(SourceLoad.model_fields)
    [latency] = [row[1] for row in load if row[0] == "`latency_ms`"]
    assert code_spans(latency) == list(LatencyPercentiles.model_fields)


def test_the_time_on_probation_is_that_of_the_code() -> None:
    assert f"for {CONFLICT_WATCH_S:g} s\nmore" in section("Two that join at once")
    assert f"its `up_s` is {CONFLICT_WATCH_S:g} or more" in section("Two that join at once")


def test_the_fields_of_a_failure_are_those_of_the_code() -> None:
    failure = Failure(request_id=TASK.request_id, stage="s", worker="w", error="e", reason="r")
    assert set(column_code_spans(tables("Failures, retries and deadlines")[0])) == set(failure.as_dict())


def test_the_words_of_training_are_those_of_the_code() -> None:
    assert column_code_spans(tables("A micro-batch")[0]) == [
        "step",
        "term",
        "index",
        "count",
        "rows",
        "number",
        "seed",
        "mode",
    ]
    assert set(column_code_spans(tables("A micro-batch")[0])) == set(MicroBatch.__dataclass_fields__)
    assert column_code_spans(tables("A micro-batch")[1]) == [training.LABELS_TENSOR, training.RNG_STATE_TENSOR]
    assert f"`{training.MICRO_BATCH_KEY}`" in section("A micro-batch")
    assert sorted(column_code_spans(tables("A step")[0])) == sorted(brokers.protocol.messages.STEP_VERBS)
    assert column_code_spans(tables("Terms")[0]) == list(training.TrainingStatus.model_fields)


def test_failure_codes_and_retry_match_the_code() -> None:
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


def test_what_was_found_is_told_in_the_fields_of_the_page() -> None:
    fields = column_code_spans(tables("Results as JSON")[0])
    scores = from_numpy(np.ones(1, np.float32))
    labelled = {"labels": '["dog"]'}
    found = [
        results.content_to_dict(
            TensorContent(
                {"scores": scores, "boxes": from_numpy(np.ones((1, 4)))}, {"format": "detections", **labelled}
            )
        ),
        results.content_to_dict(TensorContent({"scores": scores}, {"format": "classes", **labelled})),
        results.content_to_dict(TensorContent({"x": scores})),
        results.content_to_dict(BinaryContent("text/plain", b"")),
    ]
    assert [name for each in found for name in each] == fields
    assert set(found[0]["objects"][0]) == {"label", "score", "box"}
    hop_fields = set(results.timing_to_dict((Hop("a", "b"),))["stages"][0])
    [time] = [row[1] for row in tables("Results as JSON")[1] if row[0] == "`time`"]
    assert set(code_spans(time)) - {'{"stages": [...]}'} == hop_fields


# Numbers --------------------------------------------------------------------------------------------------------------

LIMITS = {
    "request id": brokers.protocol.messages.REQUEST_ID_BYTES,
    "name": int(re.findall(r",(\d+)\}", topics.NAME_PATTERN)[0]),
    "foreign Correlation Data": brokers.protocol.messages.ECHO_LIMIT_BYTES,
    "safetensors header": tensors.HEADER_LIMIT_BYTES,
    "dimensions of a tensor": 32,
    "chunk, as sent": chunks.CHUNK_BYTES,
    "head of a PUBLISH beside its chunk": line.HEADER_RESERVE_BYTES,
    "head of a chunk, as received": line.CHUNK_HEADER_LIMIT_BYTES,
    "message": chunks.MESSAGE_LIMIT_BYTES,
    "unfinished messages of a receiver, together": chunks.TOTAL_LIMIT_BYTES,
    "unfinished messages of a receiver": chunks.MESSAGE_COUNT_LIMIT,
    "patience with a message whose chunks do not come": chunks.CHUNK_TIMEOUT_S,
    "a word from a worker about a request": dispatch.LEASE_S,
    "a record of a worker": worker_registry.PRESENCE_TIMEOUT_S,
    "a record, of a worker or a source": presence.RECORD_LIMIT_BYTES,
    "reasons in an object of counts": presence.REASON_LIMIT,
    "Response Topic": brokers.protocol.messages._TOPIC_BYTES,
    "levels of a Response Topic": brokers.protocol.messages._TOPIC_LEVELS,
    "room at the next stage": outlet.CREDIT_TIMEOUT_S,
    "deadline": brokers.protocol.messages.DEADLINE_LIMIT_MS,
    "attempts that fail before the owner gives up": flight.RETRY_LIMIT,
    "queue of a worker": backlog.QUEUE_LIMIT,
    "values spelled out in JSON": results._VALUES_LIMIT,
    "micro-batches of a step": training.MICRO_BATCH_LIMIT,
    "steps that wait at a worker": steps.STEPS_LIMIT,
}


def test_the_limits_are_those_of_the_code() -> None:
    assert {row[0]: float(row[1]) for row in tables("Limits")[0]} == LIMITS


def test_every_large_number_in_the_text_is_a_limit() -> None:
    large = {int(number) for number in re.findall(r"(?<![\w.])\d{5,}(?![\w.])", TEXT)}
    assert large <= {int(limit) for limit in LIMITS.values()}


def test_the_version_is_that_of_the_code() -> None:
    assert TEXT.startswith(f"# The protocol, version {PROTOCOL_VERSION}\n")
    assert f"This is version {PROTOCOL_VERSION}." in TEXT


def test_a_result_of_the_page_is_read() -> None:
    sent = Result(request_id=TASK.request_id, content=TASK.content, hops=(Hop("smooth", "w1"),))
    encoded = encode(sent)
    assert decode(encoded.properties, memoryview(b"".join(encoded.buffers))) == sent


def test_every_link_leads_to_a_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= anchors
