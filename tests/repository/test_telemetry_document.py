"""docs/telemetry.md agrees with the code: tables, settings, numbers."""

from __future__ import annotations

import re

from brokers.telemetry import client as event_client
from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES
from monitor.stores import batch_writer
from monitor.stores.influx import config as influx_target
from monitor.stores.influx.config import InfluxTarget
from monitor.stores.influx.spool import SPOOL_LIMIT_BYTES
from monitor.stores.influx.store import _BATCH_POINTS, INITIAL_BACKOFF_S, MAX_BACKOFF_S, MISCONFIGURED_RETRY_S
from monitor.stores.sqlite import TELEMETRY_FILE
from tests.support.monitor.telemetry_document import DOCUMENT_PATH, TABLE_WRITERS, update_tables

TEXT = DOCUMENT_PATH.read_text(encoding="utf-8")
PROSE = " ".join(TEXT.split())


def test_tables_agree_with_the_code() -> None:
    assert update_tables(TEXT) == TEXT, "run: python -m tests.support.monitor.telemetry_document"


def test_no_table_is_empty() -> None:
    for write_table in TABLE_WRITERS.values():
        assert write_table().count("\n| `") > 40


def test_settings_agree_with_the_code() -> None:
    defaults = dict(re.findall(r"^\| `(SPARSE_INFLUX_\w+)` \| ([^|]*) \|", TEXT, re.MULTILINE))
    names = {name for name in vars(influx_target).values() if isinstance(name, str) and name.startswith("SPARSE_")}
    assert set(defaults) == names
    target = InfluxTarget("http://db")
    assert (defaults[influx_target.ORG_VARIABLE], defaults[influx_target.BUCKET_VARIABLE]) == (
        f"`{target.org}`",
        f"`{target.bucket}`",
    )
    for name in (event_client.SOCKET_VARIABLE, event_client.RUN_VARIABLE, event_client._SOCKET_NAME):
        assert name in TEXT


def test_numbers_agree_with_the_code() -> None:
    assert f"at most {DATAGRAM_LIMIT_BYTES} bytes" in PROSE
    assert f"one file for each second or each {_BATCH_POINTS} points" in PROSE
    assert batch_writer._INTERVAL_S == 1.0
    assert f"The spool is bounded: {SPOOL_LIMIT_BYTES >> 20} MiB" in PROSE
    assert f"after {INITIAL_BACKOFF_S:g} s, 1 s, 2 s, up to {MAX_BACKOFF_S:g} s" in PROSE
    assert MISCONFIGURED_RETRY_S == 60.0
    assert "tries again every minute" in TEXT
    assert f"`{TELEMETRY_FILE}`" in TEXT


def test_documented_spool_duration_fits_its_size() -> None:
    [minutes] = re.findall(r"at about 40 to 60 bytes a point, which is 5000 points a second for (\d+) minutes", PROSE)
    assert int(minutes) == SPOOL_LIMIT_BYTES // 60 // 5000 // 60
