"""A pipeline behind the ingress gateway, and the clients that a person would use with it."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.processes import CommandResult, ProcessSandbox, RunningCommand, eventually


class IngressPipeline:
    """`sparse run` of a file without a source of its own, and somebody who reads all results."""

    def __init__(self, sandbox: ProcessSandbox, path: Path, *words: str) -> None:
        require_dependency("iotcore")
        self._box, self.port = sandbox, free_port()
        self.command = sandbox.start_sparse("run", path, "--broker", "embedded", "--port", str(self.port), *words)
        eventually("the gateway", lambda: "Ctrl-C" in self.read_stderr())
        self._reader = self.start_client("mosquitto_sub -V 5 -t 'sparse/local/results/#'")
        # MQTT does not say who else has subscribed: ask until the gateway and the reader are both there.
        eventually("an answer", self._greeted)

    @property
    def address(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def read_stderr(self) -> str:
        assert self.command.process.poll() is None, f"it has ended: {self.command.read_stderr()}"
        return self.command.read_stderr()

    def start_client(self, command_line: str) -> RunningCommand:
        """Start one of Mosquitto's clients as a page or a file has it, but for the port."""
        program, *words = shlex.split(command_line)
        return self._box.start(require_dependency(program), "-p", str(self.port), *words)

    def request(self, source: str, reading: Any) -> dict[str, Any]:
        """The result of one reading."""
        return self.publish_and_wait(f"mosquitto_pub -V 5 -t sparse/local/ingress/{source} -m '{json.dumps(reading)}'")

    def publish_and_wait(self, command_line: str) -> dict[str, Any]:
        """The result of what this command publishes, once."""
        source = command_line.split("/ingress/")[1].split()[0]
        seen = len(self.results(source))
        assert self.start_client(command_line).wait().returncode == 0
        return eventually(f"a result of {source}", lambda: self.results(source)[seen:])[0]

    def results(self, source: str) -> list[dict[str, Any]]:
        found = [
            json.loads(line) for line in self._reader.read_stdout().splitlines(keepends=True) if line.endswith("\n")
        ]
        return [result for result in found if result["source"] == source]

    def interrupt(self) -> CommandResult:
        """Ctrl-C; nothing is left."""
        said = self.command.wait(signal.SIGINT)
        assert said.returncode == 130, said.stderr
        self._reader.wait(signal.SIGTERM)
        self._box.wait_until_nothing_left()
        return said

    def _greeted(self) -> bool:
        self.start_client("mosquitto_pub -V 5 -t sparse/local/ingress/greeting -m '?'").wait()
        return bool(self.results("greeting"))
