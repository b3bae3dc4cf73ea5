"""Event rate: how many telemetry events a second `sparse monitor` stores without loss.

    python -m tests.bench.events

A monitor with a SQLite file, and processes that send `task_processed` events as `brokers.telemetry.client` does: JSON
lines, 256 in a datagram. The file at the end is counted: each event of each sender, once.

* target/s: the rate of all senders together; "max" is as fast as the socket accepts: a burst that waits in the
  monitor's memory;
* stored/s: from the first event to the exit of the monitor, when all events are in its file;
* cores: processor time of the monitor over the time of sending.
"""

from __future__ import annotations

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
from typing import Any

from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES
from monitor.stores.sqlite import TELEMETRY_FILE
from tests.bench.harness.output import make_parser, print_json, print_table
from tests.bench.harness.processes import WAIT_TIMEOUT_S, process_cpu_s, wait_until

REQUIRED_PER_S = 20_000
TARGET_PER_S = 22_000  # so that the required rate is reached even if a sender is late now and then
EVENTS_PER_DATAGRAM = 256  # as our client takes them from its queue
COLUMNS = {
    "senders": ("senders", ""),
    "target/s": ("target", ""),
    "sent/s": ("sent_per_s", ".0f"),
    f"of {REQUIRED_PER_S}/s": ("of_required", ".2f"),
    "sent": ("sent", ""),
    "stored": ("stored", ""),
    "lost": ("lost", ""),
    "stored/s": ("stored_per_s", ".0f"),
    "cores": ("cpu_cores", ".2f"),
}


@dataclass(frozen=True, slots=True)
class EventRateRow:
    """The result of one run."""

    senders: int
    target_per_s: int  # 0: as fast as the socket accepts
    sent_per_s: float
    sent: int
    stored: int
    stored_per_s: float
    cpu_cores: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "lost": self.sent - self.stored, "of_required": self.sent_per_s / REQUIRED_PER_S}


def send(path: str, sender: int, count: int, per_s: float, barrier: Barrier) -> None:
    """Send events at a rate, or as fast as possible; runs in a separate process."""
    lines = [
        b'{"event":"task_processed","time_ns":%d,"run":"bench","site":"local","pipeline":"street","stage":"body",'
        b'"worker":"w%d","request":"%032x","queue_ms":1.204,"decode_ms":0.187,"compute_ms":33.071,"encode_ms":0.412,'
        b'"bytes_in":346112,"bytes_out":1384448,"batch":1}\n' % (time.time_ns() + number, sender, number)
        for number in range(count)
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as monitor:
        monitor.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * DATAGRAM_LIMIT_BYTES)
        monitor.connect(path)
        barrier.wait()
        begin_s = time.monotonic()
        for first in range(0, count, EVENTS_PER_DATAGRAM):
            if per_s:
                time.sleep(max(0.0, begin_s + first / per_s - time.monotonic()))
            monitor.send(b"".join(lines[first : first + EVENTS_PER_DATAGRAM]))


def measure(senders: int, target_per_s: int, seconds: float) -> EventRateRow:
    """Run one monitor and so many senders that reach the target together."""
    count = int((target_per_s or 2 * REQUIRED_PER_S) * seconds / senders)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        path = Path(folder) / "events"
        file = Path(folder) / TELEMETRY_FILE
        command = ["monitor", "--socket", str(path), "--store", str(file), "--with-parent"]
        monitor = subprocess.Popen(
            [sys.executable, "-m", "brokers.cli", *command], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        begin_s = time.monotonic()
        try:
            wait_until(path.exists, "the socket of the monitor")
            spawn = multiprocessing.get_context("spawn")
            barrier = spawn.Barrier(senders + 1)
            processes = [
                spawn.Process(target=send, args=(str(path), number, count, target_per_s / senders, barrier))
                for number in range(senders)
            ]
            for process in processes:
                process.start()
            barrier.wait()
            begin_s = time.monotonic()
            begin_cpu_s = process_cpu_s(monitor.pid)
            for process in processes:
                process.join()
            send_s = time.monotonic() - begin_s
            cpu_s = process_cpu_s(monitor.pid) - begin_cpu_s
        finally:
            monitor.send_signal(signal.SIGTERM)
            monitor.wait(WAIT_TIMEOUT_S)
            store_s = time.monotonic() - begin_s
            if monitor.stdin:
                monitor.stdin.close()
        with closing(sqlite3.connect(file)) as store:
            (stored,) = store.execute("SELECT count(*) FROM (SELECT DISTINCT worker, request FROM task)").fetchone()
    sent = senders * count
    return EventRateRow(senders, target_per_s, sent / send_s, sent, stored, stored / store_s, cpu_s / send_s)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of sending, for each row (default 5)")
    options = parser.parse_args()
    rows = [measure(senders, target, options.seconds).to_json() for target in (TARGET_PER_S, 0) for senders in (1, 4)]
    title = f"Events of {options.seconds:g} s to a monitor with SQLite, {EVENTS_PER_DATAGRAM} in a datagram"
    print_table(title, COLUMNS, [{**row, "target": str(row["target_per_s"] or "max")} for row in rows])
    print_json(options, {"rows": rows})


if __name__ == "__main__":
    main()
