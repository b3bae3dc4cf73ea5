"""`sparse run` of a pipeline behind the ingress gateway, and Mosquitto's clients as its users."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

from brokers.server.local_broker import BrokerKind
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import require_broker, require_dependency
from tests.support.pipelines.processes import CommandResult, ProcessSandbox, RunningCommand, eventually

# The embedded broker supports version 5 only. Mosquitto is used with 3.1.1, which has no properties.
_PROTOCOL_VERSIONS: dict[BrokerKind, str] = {"embedded": "5", "mosquitto": "311"}


class IngressPipeline:
    """A running pipeline without a source, and a reader of all its results."""

    def __init__(self, sandbox: ProcessSandbox, path: Path, *options: str, kind: BrokerKind = "embedded") -> None:
        require_broker(kind)
        self._sandbox = sandbox
        self.port = free_port()
        self._client_options = ("-p", str(self.port), "-V", _PROTOCOL_VERSIONS[kind])
        self.command = sandbox.start_sparse("run", path, "--broker", kind, "--port", str(self.port), *options)
        eventually("the gateway", lambda: "Ctrl-C" in self.read_stderr())
        self._reader = self.start_client("mosquitto_sub -t 'sparse/local/results/#'")
        # MQTT does not tell who has subscribed: publish until the gateway and the reader both have.
        eventually("a result", self._has_greeted)

    @property
    def address(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def read_stderr(self) -> str:
        assert not self.command.has_exited, self.command.read_stderr()
        return self.command.read_stderr()

    def start_client(self, command_line: str) -> RunningCommand:
        """Start one of Mosquitto's clients with a command line of the documentation, at the port of this broker."""
        program, *arguments = shlex.split(command_line)
        return self._sandbox.start(require_dependency(program), *self._client_options, *arguments)

    def publish(self, source: str, payload: bytes) -> None:
        """Publish to the ingress topic of a source; returns when the broker has acknowledged it."""
        options = ["-t", f"sparse/local/ingress/{source}", "-q", "1", "-s" if payload else "-n"]
        command = [str(require_dependency("mosquitto_pub")), *self._client_options, *options]
        subprocess.run(command, input=payload, check=True, timeout=120)

    def request(self, source: str, payload: Any) -> dict[str, Any]:
        """Publish bytes, or a value as JSON, and return the next result of this source."""
        seen = len(self.results(source))
        self.publish(source, payload if isinstance(payload, bytes) else json.dumps(payload).encode())
        return self._next_result(source, seen)

    def run_and_wait(self, command_line: str) -> dict[str, Any]:
        """Run a command line that publishes to an ingress topic, and return the next result of its source."""
        source = command_line.split("/ingress/")[1].split()[0]
        seen = len(self.results(source))
        assert self.start_client(command_line).wait().returncode == 0
        return self._next_result(source, seen)

    def results(self, source: str = "") -> list[dict[str, Any]]:
        """The results so far, of all sources or of one."""
        lines = self._reader.read_stdout().splitlines(keepends=True)
        results = [json.loads(line) for line in lines if line.endswith("\n")]
        return [result for result in results if source in ("", result["source"])]

    def interrupt(self) -> CommandResult:
        """Stop the pipeline as Ctrl-C does, and assert that no process is left."""
        result = self.command.wait(signal.SIGINT)
        assert result.returncode == 130, result.stderr
        self._reader.wait(signal.SIGTERM)
        self._sandbox.wait_until_nothing_left()
        return result

    def _next_result(self, source: str, seen: int) -> dict[str, Any]:
        return eventually(f"a result of {source}", lambda: self.results(source)[seen:])[0]

    def _has_greeted(self) -> bool:
        self.publish("greeting", b"?")
        return bool(self.results("greeting"))
