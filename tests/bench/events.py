"""How many events a second a monitor takes without loss: `python -m tests.bench.events`.

A real `sparse monitor` with a SQLite file, and processes that send as `brokers.telemetry.client` does: lines of
`task_processed`, many in a datagram, a fixed number a second for some seconds. What counts is what is in the file at
the end: each event of each sender, once. "as fast as they go" is what the same senders reach when they only wait for
the socket: that is a burst, which waits in the monitor's memory. "kept /s" is up to the monitor's end, when all are in
its file; "cores" is its processor time, of all its threads, over the time of sending.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES
from monitor.stores.sqlite import TELEMETRY_FILE

REQUIRED_PER_S = 20_000
TARGET_PER_S = 22_000  # a sender that is late now and then still gives what is wanted
# What our client takes from its queue at a time.
EVENTS_PER_DATAGRAM = 256
PROCESS_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class EventRateRow:
    """What one run gave."""

    senders: int
    target_per_s: int  # 0: as fast as they go
    sent_per_s: float
    sent: int
    stored: int
    stored_per_s: float  # from the first that was sent to the monitor's end, when all are in its file
    cpu_cores: float  # cores

    @property
    def of_required(self) -> float:
        return self.sent_per_s / REQUIRED_PER_S


def send(path: str, sender: int, count: int, per_s: float, begin: Barrier) -> None:
    """Send events at a rate, or as fast as it goes; as a process of its own."""
    lines = [
        b'{"event":"task_processed","time_ns":%d,"run":"bench","site":"local","pipeline":"street","stage":"body",'
        b'"worker":"w%d","request":"%032x","queue_ms":1.204,"decode_ms":0.187,"compute_ms":33.071,"encode_ms":0.412,'
        b'"bytes_in":346112,"bytes_out":1384448,"batch":1}\n' % (time.time_ns() + number, sender, number)
        for number in range(count)
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * DATAGRAM_LIMIT_BYTES)
        line.connect(path)
        begin.wait()
        begin_s = time.monotonic()
        for first in range(0, count, EVENTS_PER_DATAGRAM):
            if per_s:
                time.sleep(max(0.0, begin_s + first / per_s - time.monotonic()))
            line.send(b"".join(lines[first : first + EVENTS_PER_DATAGRAM]))


def measure(senders: int, per_s: int, seconds: float) -> EventRateRow:
    """One daemon, so many senders that give so much together."""
    each = int((per_s or 2 * REQUIRED_PER_S) * seconds / senders)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        path, file = Path(folder) / "events", Path(folder) / TELEMETRY_FILE
        command = ["monitor", "--socket", str(path), "--store", str(file), "--with-parent"]
        daemon = subprocess.Popen(
            [sys.executable, "-m", "brokers.cli", *command], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        begin_s = time.monotonic()
        try:
            wait_for_socket(path)
            spawn = multiprocessing.get_context("spawn")
            begin = spawn.Barrier(senders + 1)
            processes = [
                spawn.Process(target=send, args=(str(path), number, each, per_s / senders, begin))
                for number in range(senders)
            ]
            for process in processes:
                process.start()
            begin.wait()
            begin_s, begin_cpu_s = time.monotonic(), process_cpu_s(daemon.pid)
            for process in processes:
                process.join()
            elapsed_s, used_s = time.monotonic() - begin_s, process_cpu_s(daemon.pid) - begin_cpu_s
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(PROCESS_TIMEOUT_S)
            kept_s = time.monotonic() - begin_s
            if daemon.stdin:
                daemon.stdin.close()
        with closing(sqlite3.connect(file)) as store:
            (kept,) = store.execute("SELECT count(*) FROM (SELECT DISTINCT worker, request FROM task)").fetchone()
    sent = senders * each
    return EventRateRow(senders, per_s, sent / elapsed_s, sent, kept, kept / kept_s, used_s / elapsed_s)


def wait_for_socket(path: Path) -> None:
    """Wait until a daemon listens."""
    end_s = time.monotonic() + PROCESS_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > end_s:
            raise TimeoutError(f"no monitor at {path}")
        time.sleep(0.02)


def process_cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(senders, per_s, options.seconds) for per_s in (TARGET_PER_S, 0) for senders in (1, 4)]
    if options.json:
        print(json.dumps([asdict(row) | {"of_wanted": row.of_required} for row in rows]))
        return
    table = Table(
        title=f"events of {options.seconds:g} s into a monitor with SQLite, {EVENTS_PER_DATAGRAM} in a datagram"
    )
    for column in ("senders", "asked", "sent /s", f"of {REQUIRED_PER_S}/s", "sent", "kept", "lost", "kept /s", "cores"):
        table.add_column(column, justify="right")
    for row in rows:
        asked = str(row.target_per_s) if row.target_per_s else "as fast as they go"
        lost = str(row.sent - row.stored)
        rates = (f"{row.sent_per_s:.0f}", f"{row.of_required:.2f}")
        table.add_row(
            str(row.senders),
            asked,
            *rates,
            str(row.sent),
            str(row.stored),
            lost,
            f"{row.stored_per_s:.0f}",
            f"{row.cpu_cores:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
