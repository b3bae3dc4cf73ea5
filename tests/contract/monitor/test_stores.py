"""What every store of telemetry keeps: the same points, put into a SQLite file and a real InfluxDB, come back alike."""

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
from monitor.stores.base import StoreReader
from monitor.stores.influx.reader import InfluxReader
from monitor.stores.influx.store import InfluxStore
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

# How to write points and have a reader of them, once they are all there.
Keep = Callable[[list[TelemetryPoint]], StoreReader]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InfluxServer]:
    with start_influx(tmp_path_factory.mktemp("influx")) as found:
        yield found


@pytest.fixture(params=["sqlite", "influx"])
def keep(request: pytest.FixtureRequest, tmp_path: Path) -> Keep:
    """An empty store, and what reads it."""

    def into_sqlite(points: list[TelemetryPoint]) -> StoreReader:
        store = SqliteStore(tmp_path / "telemetry.sqlite")
        store.write(points)
        store.close()
        return SqliteReader(store.path)

    def into_influx(points: list[TelemetryPoint]) -> StoreReader:
        server: InfluxServer = request.getfixturevalue("server")
        server.query(f'DROP DATABASE "{BUCKET}"')
        server.query(f'CREATE DATABASE "{BUCKET}"')
        store = InfluxStore(server.target, tmp_path / "spool")
        store.write(points)
        eventually("all points to be taken", lambda: not store.waiting)
        store.close()
        assert store.dropped == 0
        return InfluxReader(server.target)

    return into_sqlite if request.param == "sqlite" else into_influx


def value(kind: str, number: int) -> FieldValue:
    values: dict[str, FieldValue] = {
        "float": number / 7,
        "int": number,
        "bool": bool(number % 2),
        "text": f"text {number}",
    }
    return values[kind]


def full_point(known: Measurement, number: int = 1, **tags: str) -> TelemetryPoint:
    """A point with every tag and every field."""
    everywhere = {tag: f"{tag} {number}" for tag in known.tags}
    fields = {field.name: value(field.type, number + place) for place, field in enumerate(known.fields)}
    return TelemetryPoint(known.name, NOW_NS + number, {**everywhere, **tags}, fields)


def request(number: int, **tags: str) -> TelemetryPoint:
    return full_point(MEASUREMENTS["request"], number, **tags)


@pytest.mark.parametrize("known", MEASUREMENTS.values(), ids=lambda known: known.name)
def test_every_measurement_comes_back_as_it_went_in(keep: Keep, known: Measurement) -> None:
    points = [full_point(known, number) for number in (3, 1, 2)]
    assert keep(points).points(known.name) == [points[1], points[2], points[0]]


def test_types_are_those_of_the_schema_whatever_python_had(keep: Keep) -> None:
    [found] = keep(
        [TelemetryPoint("node", NOW_NS, {"node": "n"}, {"cpu": 0, "load": 5.0, "memory_used_bytes": 2**53})]
    ).points("node")
    assert [(type(each), each) for each in found.fields.values()] == [
        (float, 0.0),
        (float, 5.0),
        (int, 2**53),
        (type(None), None),
    ]


def test_what_was_not_measured_is_none(keep: Keep) -> None:
    points = [
        TelemetryPoint("gpu", NOW_NS, {"node": "n"}, {"use": 0.5, "power_w": None}),
        full_point(MEASUREMENTS["gpu"]),
    ]
    first, second = keep(points).points("gpu")
    assert first.fields == {**dict.fromkeys(second.fields), "use": 0.5}
    assert first.tags == {"node": "n", "run": "", "gpu": "", "model": ""}
    assert second == points[1]


def test_a_field_that_nobody_ever_measured_is_none(keep: Keep) -> None:
    [found] = keep([TelemetryPoint("gpu", NOW_NS, {"node": "n"}, {"use": 0.5})]).points("gpu")
    assert found.fields == {**dict.fromkeys(field.name for field in MEASUREMENTS["gpu"].fields), "use": 0.5}


def test_a_measurement_without_points_is_empty(keep: Keep) -> None:
    reader = keep([request(1)])
    assert reader.points("step") == []
    assert reader.points("request", "of nobody") == []


def test_points_of_one_run_are_those_of_that_run(keep: Keep) -> None:
    reader = keep([request(1, run="one"), request(2, run="two"), request(3, run="one"), request(4, run="")])
    assert [point.time_ns - NOW_NS for point in reader.points("request", "one")] == [1, 3]
    assert [point.time_ns - NOW_NS for point in reader.points("request", "")] == [4]
    assert len(reader.points("request")) == 4


def test_runs_are_those_with_requests_or_steps_the_oldest_first(keep: Keep) -> None:
    step = MEASUREMENTS["step"]
    points = [
        request(3, run="b"),
        request(5, run="b"),
        full_point(step, 2, run="z"),
        full_point(step, 4, run="a"),
        request(6, run="z"),
    ]
    points.append(full_point(MEASUREMENTS["node"], 1, run="no run of anything"))
    assert keep(points).runs() == ["z", "b", "a"]


def test_nobody_has_run_where_there_is_nothing(keep: Keep) -> None:
    assert keep([full_point(MEASUREMENTS["node"])]).runs() == []


def as_kept(reader: StoreReader, text: str, *, tag: bool) -> str:
    """What no line of InfluxDB's can carry is another character there, as docs/telemetry.md says."""
    if isinstance(reader, SqliteReader):
        return text
    text = text.replace("\t", " ").replace("\n", " ")
    return text.replace("\\", "/") if tag else text


def test_awkward_names_and_texts_come_back(keep: Keep) -> None:
    dice = random.Random(1)
    texts = AWKWARD + ["".join(dice.choices("a \\,=\"'\n\té#", k=dice.randrange(1, 12))) for _ in range(500)]
    points = []
    for number, text in enumerate(texts):
        point = request(number, source=text, run=text)
        points.append(replace(point, fields={**point.fields, "error": text}))
    reader = keep(points)
    found = reader.points("request")
    assert [point.tags["source"] for point in found] == [as_kept(reader, text, tag=True) for text in texts]
    assert [point.fields["error"] for point in found] == [as_kept(reader, text, tag=False) for text in texts]
    for number, text in enumerate(AWKWARD):
        assert NOW_NS + number in [point.time_ns for point in reader.points("request", text)]


def test_a_run_of_many_points_comes_in_pieces_and_whole(keep: Keep) -> None:
    points = [
        TelemetryPoint("batch", NOW_NS + number, {"run": f"r{number % 2}"}, {"tasks": number})
        for number in range(25_000)
    ]
    reader = keep(points)
    assert [point.fields["tasks"] for point in reader.points("batch")] == list(range(25_000))
    assert [point.fields["tasks"] for point in reader.points("batch", "r1")] == list(range(1, 25_000, 2))


def test_two_points_of_one_moment_are_two(keep: Keep) -> None:
    reader = keep([TelemetryPoint("batch", NOW_NS, {"worker": "w"}, {"tasks": number}) for number in range(5)])
    found = reader.points("batch")
    assert [point.fields["tasks"] for point in found] == [0, 1, 2, 3, 4]
    assert all(0 <= point.time_ns - NOW_NS < 5 for point in found)


# What is not there ----------------------------------------------------------------------------------------------------


def test_a_reader_says_in_one_line_what_is_wrong(server: InfluxServer) -> None:
    right = server.target
    for target, problem in [
        (replace(right, token="wrong"), "the token is not accepted (401)"),
        (replace(right, bucket="nope"), "database not found: nope"),
        (replace(right, url="http://127.0.0.1:1"), "it cannot be reached: connection refused"),
    ]:
        with pytest.raises(BadStore) as caught:
            InfluxReader(target).points("request")
        assert str(caught.value) == f"telemetry in {target}: {problem}"
        assert target.token not in str(caught.value)


def test_a_file_that_is_no_telemetry_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    path.write_text("nothing of the kind, but long enough to be a page of something " * 100)
    for use in (
        lambda: SqliteReader(path).runs(),
        lambda: SqliteReader(path).points("node"),
        lambda: SqliteStore(path),
    ):
        with pytest.raises(BadStore) as caught:
            use()
        assert str(caught.value).startswith(f"telemetry in {path}: ")
        assert str(caught.value).endswith("file is not a database")
        assert "\n" not in str(caught.value)
