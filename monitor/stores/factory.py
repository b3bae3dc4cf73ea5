"""The stores that a daemon writes to: a SQLite file that is named, and InfluxDB where the environment names it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from monitor.errors import BadStore
from monitor.points.points import TelemetryPoint
from monitor.stores.batch_writer import BatchWriter
from monitor.stores.influx.config import influx_target, spool_folder
from monitor.stores.sqlite import SqliteStore

log = logging.getLogger(__name__)


def create_writers(
    file: Path | None, limit_bytes: int, environment: Mapping[str, str], *, for_run: bool = False
) -> list[BatchWriter[TelemetryPoint]]:
    """A writer to each store that is asked for, not started. Raises `BadStore` and `BadSetting`.

    `beside`: of a run, whose points wait for InfluxDB beside its file and not with the node's. A server that takes
    nothing is no end of it: its file has all of it.
    """
    found: list[BatchWriter[TelemetryPoint]] = []
    target = influx_target(environment)
    if file is not None:
        found.append(BatchWriter(SqliteStore(file, limit_bytes), str(file)))
    if target is None:
        return found
    # Only here: the client takes its time to import.
    from monitor.stores.influx.store import InfluxStore

    folder = file.parent / "influx-spool" if for_run and file else spool_folder(environment)
    try:
        store = InfluxStore(target, folder)
        found.append(BatchWriter(store, str(target)))
        store.check()
    except BadStore as error:
        if not for_run:
            for writer in found:
                writer.stop(0.0)
            raise
        log.warning("%s", error)
    return found
