"""The stores of a monitor: a SQLite file if one is named, and InfluxDB if the environment names a server."""

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
    """A writer to each store, not started. Raises `BadStore` and `UsageError`.

    `for_run`: the spool for InfluxDB is beside the run's file, and a server that refuses the points is logged, since
    the file has all of them.
    """
    target = influx_target(environment)
    writers: list[BatchWriter[TelemetryPoint]] = []
    if file is not None:
        writers.append(BatchWriter(SqliteStore(file, limit_bytes), str(file)))
    if target is None:
        return writers
    from monitor.stores.influx.store import InfluxStore  # the client is slow to import

    folder = file.parent / "influx-spool" if for_run and file else spool_folder(environment)
    try:
        store = InfluxStore(target, folder)
        writers.append(BatchWriter(store, str(target)))
        store.check()
    except BadStore as error:
        if not for_run:
            for writer in writers:
                writer.stop(0.0)
            raise
        log.warning("%s", error)
    return writers
