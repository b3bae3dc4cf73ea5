"""A camera and a reader of its results, which are clients of Mosquitto."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S


class MqttCamera:
    """Publishes pictures to the ingress of site `local` at a port of this machine, and queues their results.

    At a broker with access control it uses the identities `camera.SOURCE` and `viewer` of the folder `certs`.
    """

    def __init__(self, port: int, source: str = "door", certs: Path | None = None) -> None:
        self._port = port
        self._source = source
        self._certs = certs
        self._results: queue.Queue[dict[str, Any]] = queue.Queue()
        topic = f"sparse/local/results/{source}"
        options = [*self._options("viewer"), "-q", "1", "-t", topic, "-F", "%p", "-d"]
        command = ["stdbuf", "-oL", str(require_dependency("mosquitto_sub")), *options]  # prints lines at once
        self._reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._subscribed = threading.Event()
        self._reading = threading.Thread(target=self._read, name="results", daemon=True)
        self._reading.start()
        assert self._subscribed.wait(PROCESS_TIMEOUT_S)

    def _options(self, identity: str) -> list[str]:
        options = ["-h", "127.0.0.1", "-p", str(self._port), "-V", "5"]
        if self._certs is None:
            return options
        folder = self._certs / identity
        return [*options, "--cafile", f"{folder}/ca.crt", "--cert", f"{folder}/tls.crt", "--key", f"{folder}/tls.key"]

    def publish(self, image: Path) -> None:
        """Publish one picture; returns when the broker has acknowledged it."""
        topic = f"sparse/local/ingress/{self._source}"
        options = self._options(f"camera.{self._source}")
        command = [str(require_dependency("mosquitto_pub")), *options, "-q", "1", "-t", topic, "-f", str(image)]
        subprocess.run(command, check=True, timeout=PROCESS_TIMEOUT_S)

    def next_result(self, timeout_s: float = 60) -> dict[str, Any]:
        """The next result."""
        return self._results.get(timeout=timeout_s)

    def next_results(self, count: int, timeout_s: float = 150) -> list[dict[str, Any]]:
        """The next `count` results."""
        end_s = time.monotonic() + timeout_s
        results: list[dict[str, Any]] = []
        while len(results) < count:
            try:
                results.append(self._results.get(timeout=max(0.0, end_s - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"{len(results)} of {count} results in {timeout_s:g} s") from None
        return results

    def is_silent(self, for_s: float = 2.0) -> bool:
        """Whether no result arrives for a while."""
        try:
            self._results.get(timeout=for_s)
        except queue.Empty:
            return True
        return False

    def close(self) -> None:
        self._reader.terminate()
        self._reader.wait(timeout=PROCESS_TIMEOUT_S)
        self._reading.join(timeout=PROCESS_TIMEOUT_S)

    def _read(self) -> None:
        assert self._reader.stdout is not None
        for line in self._reader.stdout:  # payloads, and debug messages (-d)
            if line.startswith("Subscribed"):
                self._subscribed.set()
            elif line.startswith("{"):
                self._results.put(json.loads(line))
        self._reader.stdout.close()
