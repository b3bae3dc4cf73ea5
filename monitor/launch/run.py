"""A run of a whole pipeline on this machine: its brokers, stages and source as child processes."""

from __future__ import annotations

import asyncio
import contextlib
import json as jsonlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from brokers.config.pipeline_file import BROKER_VARIABLE, Pipeline
from brokers.config.schema import StageTable
from brokers.errors import BadFile, SparseError
from brokers.mqtt.client import MqttTransport
from brokers.mqtt.client_identity import create_transport
from brokers.process.shutdown import EXIT_INTERRUPTED, exit_with_parent
from brokers.protocol.topics import all_presence_filter, ingress_topic, results_topic
from brokers.protocol.transport import Delivery
from monitor.errors import ProcessEnded, ProcessRefused
from monitor.launch.child_process import ChildProcess, kill_all, terminate_all
from monitor.launch.monitor_process import RunMonitor
from monitor.launch.sites import SiteBrokers
from monitor.launch.watch import create_live_view

_POLL_S = 0.05
# From the first Ctrl-C to the source's end: it waits for what is in flight, which may never come back.
SOURCE_DRAIN_TIMEOUT_S = 20.0
# A worker that was up and died is started again so often in a row; a crash at each start would go on for ever.
_RESTART_LIMIT = 20
# Of a run that trains, below its folder.
CHECKPOINTS_FOLDER = "checkpoints"


class PipelineRun:
    """The stages and the source of one pipeline as processes, and what is seen of them."""

    def __init__(
        self, pipeline: Pipeline, sites: SiteBrokers, folder: Path, pictures: bool, resume: bool, telemetry: bool = True
    ) -> None:
        self._pipeline, self._sites, self._folder = pipeline, sites, folder
        self._board, self._view = create_live_view(pipeline, sites.description)
        logs = folder / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadFile(str(folder), f"the results cannot be written: {error.strerror}") from None
        self.monitor = RunMonitor(pipeline, sites, folder, telemetry)
        self._stages = [
            self._worker(stage, number) for stage in pipeline.stage for number in range(1, stage.workers + 1)
        ]
        options = (*(() if pictures else ("--no-pictures",)), *(("--resume",) if resume else ()))
        arguments = ("source", pipeline.path, "--out", str(folder), "--json", *options)
        handed = {BROKER_VARIABLE: sites.address(pipeline.source.site), **self.monitor.environment}
        self._source = ChildProcess("source", arguments, logs / "source.log", capture_stdout=True, environment=handed)
        self._leaving = asyncio.Event()
        self._left_with = EXIT_INTERRUPTED  # the exit status once told to leave
        self._end_s = float("inf")  # when the source, told to end, is waited for no longer

    def _worker(self, stage: StageTable, number: int) -> ChildProcess:
        """One worker of a stage; the workers share the machine's threads, unless the file says otherwise."""
        workers = sum(each.workers for each in self._pipeline.stage)
        threads = stage.threads or max(1, (os.cpu_count() or 1) // workers)
        name = f"{stage.name}-{number}"
        own = self._pipeline.is_training and self._pipeline.training.checkpoints is None
        kept = ("--checkpoints", str(self._folder / CHECKPOINTS_FOLDER)) if own else ()
        return ChildProcess(
            f"stage {stage.name}",
            ("stage", self._pipeline.path, stage.name, "--worker", name, "--threads", str(threads), *kept),
            self._folder / "logs" / f"{name}.log",
            environment={BROKER_VARIABLE: self._sites.address(stage.site), **self.monitor.environment},
        )

    async def run(self, with_parent: bool = False) -> tuple[int, dict[str, Any] | None]:
        """Run it all; the exit status, and the source's summary if it came to one."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._leave, number)
        if with_parent:
            exit_with_parent(self._leaving)
        transport = create_transport(self._sites.source_broker.address)
        try:
            self.monitor.start()
            for child in self._stages:
                child.start()
            with self._view:
                await self._listen(transport)
                if await self._await_stages():
                    return self._left_with, None
                status, summary = await self._await_source()
        finally:
            await transport.close()
            await asyncio.to_thread(terminate_all, [self._source])
            await asyncio.to_thread(terminate_all, self._stages)
            await asyncio.to_thread(self.monitor.stop)
        return self._left_with if self._leaving.is_set() else status, summary

    def _leave(self, number: int) -> None:
        """The first Ctrl-C, or SIGTERM, ends the run in good order; at a second one nothing is waited for."""
        if self._leaving.is_set():
            kill_all([self._source, *self._stages])
            self.monitor.kill()
        else:  # a service that is told to end has not failed
            self._left_with = EXIT_INTERRUPTED if number == signal.SIGINT else 0
        self._leaving.set()

    async def _listen(self, transport: MqttTransport) -> None:
        await transport.connect()

        def birth(delivery: Delivery) -> None:
            now_s = time.monotonic()
            self._board.on_presence(delivery.topic, bytes(delivery.payload), now_s, retained=delivery.retain)

        def result(delivery: Delivery) -> None:
            self._board.on_result(bytes(delivery.payload), time.monotonic())

        await transport.subscribe(all_presence_filter(pipeline=self._pipeline.name), birth, qos=1)
        await transport.subscribe(results_topic(self._pipeline.source.site), result, qos=1)

    async def _await_stages(self) -> bool:
        """Wait until every stage has a worker; True when told to leave meanwhile."""
        wanted = {stage.name for stage in self._pipeline.stage}
        while not wanted <= self._board.stages_up():
            # A Ctrl-C that reaches the children as well must not be taken for their failure.
            if self._leaving.is_set() or any(child.exit_status == -signal.SIGINT for child in self._stages):
                return True
            for child in self._stages:
                if child.exit_status is not None:
                    raise _ended(child, child.exit_status)
            await self._keep_broker()
            self.monitor.supervise(self._view.print_line)
            self._view.update()
            await asyncio.sleep(_POLL_S)
        return False

    async def _await_source(self) -> tuple[int, dict[str, Any] | None]:
        """Start the source, keep the stages up, and wait for the source's end."""
        self._view.status = "running"
        if self._pipeline.source.kind == "ingress":
            topic = ingress_topic(self._pipeline.source.site, "NAME")
            self._view.print_line(
                f"publish pictures or readings to {topic} at {self._sites.source_broker.redacted_address}; Ctrl-C ends it"
            )
        self._source.start()
        answer = asyncio.create_task(asyncio.to_thread(self._source.stdout.read), name="source-output")
        while not answer.done() or self._source.exit_status is None:
            if self._leaving.is_set():
                self._end_source()
            else:
                self._keep_stages()
            await self._keep_broker()
            self.monitor.supervise(self._view.print_line)
            self._view.update()
            await asyncio.wait({answer}, timeout=_POLL_S)
        self._view.status = "done"
        summary = _summary_in(await answer)
        status = self._source.exit_status
        if summary is not None:
            return status, summary
        if self._leaving.is_set():  # it had not begun to listen to signals, or was asked twice
            return EXIT_INTERRUPTED, None
        raise _ended(self._source, status)

    def _end_source(self) -> None:
        """Ask the source to end what it holds, and to be done within some time."""
        if self._end_s == float("inf"):
            self._view.status, self._end_s = "ending", time.monotonic() + SOURCE_DRAIN_TIMEOUT_S
            self._source.terminate()
        elif time.monotonic() > self._end_s and self._source.exit_status is None:
            self._view.print_line(
                f"the source did not end within {SOURCE_DRAIN_TIMEOUT_S:g} s and was killed: there is no summary, "
                f"what came of it so far is in {self._folder}"
            )
            kill_all([self._source])
            self._source.process.wait()

    def _keep_stages(self) -> None:
        for child in self._stages:
            if child.exit_status is not None:
                if child.consecutive_starts > _RESTART_LIMIT or child.exit_status == ProcessRefused.STATUS:
                    raise _ended(child, child.exit_status)
                child.start()

    async def _keep_broker(self) -> None:
        """Start a broker of ours that died again; the others find it by themselves, it is where it was."""
        for site, broker in self._sites.exited:
            await asyncio.to_thread(broker.restart)
            where = f" of site {site}" if len(self._sites.brokers) > 1 else ""
            self._view.print_line(f"the {broker.label} broker{where} ended by itself, and was started again")
            self._view.broker_restarts = self._sites.restarts


def _summary_in(said: bytes) -> dict[str, Any] | None:
    """The source's summary, if it came to one; a source of the user's own may print whatever it likes before it."""
    for line in reversed(said.decode(errors="replace").splitlines()):
        with contextlib.suppress(ValueError, RecursionError):
            found = jsonlib.loads(line)
            if isinstance(found, dict) and "outputs" in found:
                return found
    return None


def _ended(child: ChildProcess, status: int) -> SparseError:
    """Why a process of the run ended, in its own words if the reason is a mistake of the user's."""
    said = child.last_log_line()
    if status == ProcessRefused.STATUS and said:
        return ProcessRefused(said)
    return ProcessEnded(child.name, status, said, str(child.log_file))
