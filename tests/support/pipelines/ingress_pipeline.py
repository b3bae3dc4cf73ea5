"""A pipeline behind the ingress gateway, and the clients that a person would use with it."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import need
from tests.support.pipelines.processes import Machine, Running, Said, eventually


class Gateway:
    """`sparse run` of a file without a source of its own, and somebody who reads all results."""

    def __init__(self, box: Machine, path: Path, *words: str) -> None:
        need("iotcore")
        self._box, self.port = box, free_port()
        self.run = box.sparse("run", path, "--broker", "embedded", "--port", str(self.port), *words)
        eventually("the gateway", lambda: "Ctrl-C ends it" in self.said())
        self._reader = self.client("mosquitto_sub -V 5 -t 'sparse/local/results/#'")
        # MQTT does not say who else has subscribed: ask until the gateway and the reader are both there.
        eventually("an answer", self._greeted)

    @property
    def address(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def said(self) -> str:
        assert self.run.process.poll() is None, f"it has ended: {self.run.said()}"
        return self.run.said()

    def client(self, command: str) -> Running:
        """Start one of Mosquitto's clients as a page or a file has it, but for the port."""
        program, *words = shlex.split(command)
        return self._box.start(need(program), "-p", str(self.port), *words)

    def ask(self, source: str, reading: Any) -> dict[str, Any]:
        """The result of one reading."""
        return self.publish(f"mosquitto_pub -V 5 -t sparse/local/ingress/{source} -m '{json.dumps(reading)}'")

    def publish(self, command: str) -> dict[str, Any]:
        """The result of what this command publishes, once."""
        source = command.split("/ingress/")[1].split()[0]
        seen = len(self.results(source))
        assert self.client(command).end().status == 0
        return eventually(f"a result of {source}", lambda: self.results(source)[seen:])[0]

    def results(self, source: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self._reader.out().splitlines(keepends=True) if line.endswith("\n")]
        return [result for result in found if result["source"] == source]

    def end(self) -> Said:
        """Ctrl-C; nothing is left."""
        said = self.run.end(signal.SIGINT)
        assert said.status == 130, said.err
        self._reader.end(signal.SIGTERM)
        self._box.nothing_is_left(within_s=5)
        return said

    def _greeted(self) -> bool:
        self.client("mosquitto_pub -V 5 -t sparse/local/ingress/greeting -m '?'").end()
        return bool(self.results("greeting"))
