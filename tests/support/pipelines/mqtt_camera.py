"""A camera at the door and a reader of its results: Mosquitto's own clients, as somebody outside has them."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from tests.support.environment.external_programs import require_dependency


class MqttCamera:
    """Publishes pictures to the ingress of site `local` at a port of this machine, and keeps what is answered.

    With a folder of `sparse certs` it comes to a locked broker, as `camera.SOURCE` and as `viewer`.
    """

    def __init__(self, port: int, source: str = "door", certs: Path | None = None) -> None:
        self._port = port
        self._source = source
        self._certs = certs
        self._came: queue.Queue[dict[str, Any]] = queue.Queue()
        topic = f"sparse/local/results/{source}"
        command = [str(require_dependency("mosquitto_sub")), *self._line("viewer"), "-q", "1", "-t", topic, "-F", "%p"]
        self._reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._reading = threading.Thread(target=self._read, name="results", daemon=True)
        self._reading.start()
        time.sleep(0.5)  # until it has subscribed

    def _line(self, identity: str) -> list[str]:
        line = ["-h", "127.0.0.1", "-p", str(self._port), "-V", "5"]
        if self._certs is None:
            return line
        own = self._certs / identity
        return [*line, "--cafile", f"{own}/ca.crt", "--cert", f"{own}/tls.crt", "--key", f"{own}/tls.key"]

    def publish(self, image: Path) -> None:
        """Publish one picture; returns when the broker has it."""
        topic = f"sparse/local/ingress/{self._source}"
        line = self._line(f"camera.{self._source}")
        command = [str(require_dependency("mosquitto_pub")), *line, "-q", "1", "-t", topic, "-f", str(image)]
        subprocess.run(command, check=True, timeout=30)

    def next_result(self, timeout_s: float = 60) -> dict[str, Any]:
        """The next result."""
        return self._came.get(timeout=timeout_s)

    def next_results(self, count: int, timeout_s: float = 150) -> list[dict[str, Any]]:
        """So many results; fail when they do not come."""
        end_s = time.monotonic() + timeout_s
        found: list[dict[str, Any]] = []
        while len(found) < count:
            try:
                found.append(self._came.get(timeout=max(0.0, end_s - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"{len(found)} of {count} results came in {timeout_s:g} s") from None
        return found

    def is_silent(self, for_s: float = 2.0) -> bool:
        """Whether nothing more comes for a while."""
        try:
            self._came.get(timeout=for_s)
        except queue.Empty:
            return True
        return False

    def close(self) -> None:
        self._reader.terminate()
        self._reader.wait(timeout=10)
        self._reading.join(timeout=10)

    def _read(self) -> None:
        assert self._reader.stdout is not None
        for line in self._reader.stdout:
            self._came.put(json.loads(line))
        self._reader.stdout.close()
