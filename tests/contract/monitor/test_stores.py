"""The contract of all stores: points written to a SQLite file and to a real InfluxDB are read back unchanged."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from monitor.errors import BadStore
from monitor.points.points import FieldValue, TelemetryPoint
from monitor.points.schema import MEASUREMENTS, Measurement
from monitor.stores.influx.http import sanitize_tag, sanitize_text
from monitor.stores.influx.store import InfluxReader, InfluxStore
from monitor.stores.sqlite import SqliteReader, SqliteStore
from tests.support.monitor.influx_servers import BUCKET, InfluxServer, start_influx
from tests.support.pipelines.processes import eventually

NOW_NS = time.time_ns() // 1_000_000_000 * 1_000_000_000
AWKWARD = [
    "a b",
    "a,b",
    "a=b",
    '"',
    "'",
    "a\\ b",
    "ends in \\",
    "tab\tnew\nline",
    "ü",
    "日本",
    "#",
    "; DROP",
    "x" * 128,
]

# Writes points to an empty store and returns its reader.
Reader = SqliteReader | InfluxReader
WriteAll = Callable[[list[TelemetryPoint]], Reader]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InfluxServer]:
    with start_influx(tmp_path_factory.mktemp("influx")) as running:
        yield running


@pytest.fixture(params=["sqlite", "influx"])
def write_all(request: pytest.FixtureRequest, tmp_path: Path) -> WriteAll:
    def write_sqlite(points: list[TelemetryPoint]) -> Reader:
        store = SqliteStore(tmp_path / "telemetry.sqlite")
        store.write(points)
        store.close()
        return SqliteReader(store.path)

    def write_influx(points: list[TelemetryPoint]) -> Reader:
        server: InfluxServer = request.getfixturevalue("server")
        server.query(f'DROP DATABASE "{BUCKET}"')
        server.query(f'CREATE DATABASE "{BUCKET}"')
        store = InfluxStore(server.target, tmp_path / "spool")
        store.write(points)
        eventually("all points to be accepted", lambda: not store.waiting)
        store.close()
        assert store.dropped == 0
        return InfluxReader(server.target)

    return write_sqlite if request.param == "sqlite" else write_influx


def make_value(kind: str, number: int) -> FieldValue:
    values: dict[str, FieldValue] = {
        "float": number / 7,
        "int": number,
        "text": f"text {number}",
    }
    return values[kind]


def full_point(measurement: Measurement, number: int = 1, **tags: str) -> TelemetryPoint:
    """A point with every tag and every field."""
    all_tags = {tag: f"{tag} {number}" for tag in measurement.tags}
    fields = {field.name: make_value(field.type, number + place) for place, field in enumerate(measurement.fields)}
    return TelemetryPoint(measurement.name, NOW_NS + number, {**all_tags, **tags}, fields)


def request_point(number: int, **tags: str) -> TelemetryPoint:
    return full_point(MEASUREMENTS["request"], number, **tags)


def test_every_measurement_is_read_back_in_order_of_time(write_all: WriteAll) -> None:
    points = {
        measurement: [full_point(measurement, number) for number in (3, 1, 2)] for measurement in MEASUREMENTS.values()
    }
    reader = write_all([point for each in points.values() for point in each])
    for measurement, (third, first, second) in points.items():
        assert reader.points(measurement.name) == [first, second, third]


def test_values_have_the_types_of_the_schema(write_all: WriteAll) -> None:
    fields: dict[str, FieldValue] = {"cpu": 0, "load": 5.0, "memory_used_bytes": 2**53}
    [point] = write_all([TelemetryPoint("node", NOW_NS, {"node": "n"}, fields)]).points("node")
    assert [(type(value), value) for value in point.fields.values()] == [
        (float, 0.0),
        (float, 5.0),
        (int, 2**53),
        (type(None), None),
    ]


def test_missing_fields_are_null_and_missing_tags_empty(write_all: WriteAll) -> None:
    partial = TelemetryPoint("gpu", NOW_NS, {"node": "n"}, {"use": 0.5, "power_w": None})
    reader = write_all(
        [partial, full_point(MEASUREMENTS["gpu"]), replace(partial, measurement="batch", fields={"rows": 1})]
    )
    first, second = reader.points("gpu")
    assert first.fields == {**dict.fromkeys(second.fields), "use": 0.5}
    assert first.tags == {"node": "n", "run": "", "gpu": "", "model": ""}
    assert second == full_point(MEASUREMENTS["gpu"])
    [batch] = reader.points("batch")  # with a field that no point of the measurement has
    assert batch.fields == {"tasks": None, "rows": 1, "busy_ms": None}


def test_measurement_without_points_is_empty(write_all: WriteAll) -> None:
    reader = write_all([request_point(1)])
    assert reader.points("step") == []
    assert reader.points("request", "unknown run") == []


def test_points_are_selected_by_run(write_all: WriteAll) -> None:
    runs = ["one", "two", "one", ""]
    reader = write_all([request_point(number, run=run) for number, run in enumerate(runs, start=1)])
    assert [point.time_ns - NOW_NS for point in reader.points("request", "one")] == [1, 3]
    assert [point.time_ns - NOW_NS for point in reader.points("request", "")] == [4]
    assert len(reader.points("request")) == 4


def test_runs_have_requests_or_steps_and_are_sorted_by_age(write_all: WriteAll) -> None:
    step = MEASUREMENTS["step"]
    points = [request_point(3, run="b"), request_point(5, run="b"), request_point(6, run="z")]
    points += [full_point(step, 2, run="z"), full_point(step, 4, run="a")]
    points += [full_point(MEASUREMENTS["node"], 1, run="without requests")]
    assert write_all(points).runs() == ["z", "b", "a"]


def test_store_without_requests_has_no_runs(write_all: WriteAll) -> None:
    assert write_all([full_point(MEASUREMENTS["node"])]).runs() == []


def test_awkward_names_and_texts_are_read_back(write_all: WriteAll) -> None:
    dice = random.Random(1)
    texts = AWKWARD + ["".join(dice.choices("a \\,=\"'\n\té#", k=dice.randrange(1, 12))) for _ in range(500)]
    points = []
    for number, text in enumerate(texts):
        point = request_point(number, source=text, run=text)
        points.append(replace(point, fields={**point.fields, "error": text}))
    reader = write_all(points)
    stored = reader.points("request")
    unchanged = isinstance(reader, SqliteReader)  # the line protocol cannot carry all characters
    assert [point.tags["source"] for point in stored] == [text if unchanged else sanitize_tag(text) for text in texts]
    assert [point.fields["error"] for point in stored] == [text if unchanged else sanitize_text(text) for text in texts]
    for number, text in enumerate(AWKWARD):
        assert NOW_NS + number in [point.time_ns for point in reader.points("request", text)]


def test_many_points_are_read_in_chunks(write_all: WriteAll) -> None:
    count = 11_000  # more than a chunk of InfluxDB's answer, and several batches
    reader = write_all(
        [
            TelemetryPoint("batch", NOW_NS + number, {"run": f"r{number % 2}"}, {"tasks": number})
            for number in range(count)
        ]
    )
    assert [point.fields["tasks"] for point in reader.points("batch")] == list(range(count))
    assert [point.fields["tasks"] for point in reader.points("batch", "r1")] == list(range(1, count, 2))


def test_points_of_one_series_and_time_are_all_kept(write_all: WriteAll) -> None:
    points = [TelemetryPoint("batch", NOW_NS, {"worker": "w"}, {"tasks": number}) for number in range(5)]
    stored = write_all(points).points("batch")
    assert [point.fields["tasks"] for point in stored] == [0, 1, 2, 3, 4]
    assert all(0 <= point.time_ns - NOW_NS < 5 for point in stored)


# Stores that cannot be read -------------------------------------------------------------------------------------------


def test_unreadable_server_raises_bad_store(server: InfluxServer) -> None:
    correct = server.target
    for target, problem in [
        (replace(correct, token="wrong"), "the token is not accepted (401)"),
        (replace(correct, bucket="nope"), "database not found: nope"),
        (replace(correct, url="http://127.0.0.1:1"), "cannot be reached: connection refused"),
    ]:
        with pytest.raises(BadStore) as caught:
            InfluxReader(target).points("request")
        assert str(caught.value) == f"telemetry in {target}: {problem}"
        assert target.token not in str(caught.value)


def test_file_of_another_kind_raises_bad_store(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    path.write_text("not a database, but long enough for a page of one " * 100)
    uses: list[Callable[[], object]] = [
        lambda: SqliteReader(path).runs(),
        lambda: SqliteReader(path).points("node"),
        lambda: SqliteStore(path),
    ]
    for use in uses:
        with pytest.raises(BadStore) as caught:
            use()
        assert str(caught.value).startswith(f"telemetry in {path}: ")
        assert str(caught.value).endswith("file is not a database")
