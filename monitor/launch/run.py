"""A run of a whole pipeline on this machine, with its stages, source and monitor as child processes."""

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from brokers.cli import EXIT_USAGE
from brokers.config.pipeline_file import BROKER_VARIABLE, Pipeline
from brokers.config.schema import StageTable
from brokers.errors import SparseError, UsageError
from brokers.mqtt.client import MqttTransport, create_transport
from brokers.process.files import check_writable
from brokers.process.shutdown import EXIT_INTERRUPTED, ShutdownEvent, exit_with_parent
from brokers.protocol.topics import all_presence_filter, ingress_topic, results_topic
from brokers.protocol.transport import Delivery
from monitor.errors import bad_folder
from monitor.launch.child_process import ChildProcess, kill_all, terminate_all
from monitor.launch.monitor_process import RunMonitor
from monitor.launch.sites import SiteBrokers
from monitor.presence.inference_stats import InferenceStats
from monitor.presence.presence_table import PresenceTable
from monitor.presence.training_stats import TrainingStats
from monitor.terminal.live import LiveView
from monitor.terminal.views import InferenceView, TrainingView

_POLL_S = 0.05
# How long the source may wait for its requests in flight after the first Ctrl-C.
SOURCE_DRAIN_TIMEOUT_S = 20.0
# The checkpoints of a training run, in its folder.
CHECKPOINTS_FOLDER = "checkpoints"


class PipelineRun:
    """One run of a pipeline; results, logs and telemetry go to `folder`.

    `run` is the whole lifecycle: start the workers, wait until every stage has one, run the source while restarting
    what crashes, drain on SIGINT or SIGTERM, and stop everything.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        sites: SiteBrokers,
        folder: Path,
        *,
        pictures: bool = True,
        resume: bool = False,
        telemetry: bool = True,
    ) -> None:
        logs = folder / "logs"
        try:
            check_writable(logs)
        except OSError as error:
            raise bad_folder(folder, f"results cannot be written there: {error.strerror}") from None
        self.monitor = RunMonitor(pipeline, sites, folder, telemetry)
        self._pipeline = pipeline
        self._sites = sites
        self._folder = folder
        self._presence, self._view = create_live_view(pipeline, sites.description)
        self._workers = [
            self._worker(stage, number) for stage in pipeline.stage for number in range(1, stage.workers + 1)
        ]
        options = [option for option, on in (("--no-pictures", not pictures), ("--resume", resume)) if on]
        self._source = ChildProcess(
            "source",
            ("source", pipeline.path, "--out", str(folder), "--json", *options),
            logs / "source.log",
            capture_stdout=True,
            environment={BROKER_VARIABLE: sites.source_broker.address, **self.monitor.environment},
        )
        self._shutdown = ShutdownEvent()
        self._drain_deadline_s: float | None = None

    def _worker(self, stage: StageTable, number: int) -> ChildProcess:
        """One worker of a stage; the workers share the machine's cores, unless the file sets their threads."""
        worker_count = sum(each.workers for each in self._pipeline.stage)
        threads = stage.threads or max(1, (os.cpu_count() or 1) // worker_count)
        name = f"{stage.name}-{number}"
        own_checkpoints = self._pipeline.is_training and self._pipeline.training.checkpoints is None
        options = ("--checkpoints", str(self._folder / CHECKPOINTS_FOLDER)) if own_checkpoints else ()
        return ChildProcess(
            f"stage {stage.name}",
            ("stage", self._pipeline.path, stage.name, "--worker", name, "--threads", str(threads), *options),
            self._folder / "logs" / f"{name}.log",
            environment={BROKER_VARIABLE: self._sites.address(stage.site), **self.monitor.environment},
        )

    async def run(self, *, with_parent: bool = False) -> tuple[int, dict[str, Any] | None]:
        """Run the pipeline to its end; returns the exit status and the source's summary, None where it has none.

        The first SIGINT or SIGTERM drains the run, a second one kills its processes. Raises `SparseError` where a
        process or broker fails in a way that a restart does not cure.
        """
        self._shutdown.install_signal_handlers(force=self._kill)
        if with_parent:
            exit_with_parent(self._shutdown)
        transport = create_transport(self._sites.source_broker.address)
        status: int = EXIT_INTERRUPTED
        summary = None
        try:
            with self._view:
                self.monitor.start()
                for worker in self._workers:
                    worker.start()
                await self._subscribe(transport)
                await self._wait_until_ready()
                if not self._shutdown.is_set():
                    status, summary = await self._run_source()
        finally:
            await transport.close()
            await asyncio.to_thread(self._stop)
        if self._shutdown.is_set():  # a service stopped on request has not failed
            status = EXIT_INTERRUPTED if self._shutdown.interrupted else 0
        return status, summary

    def _stop(self) -> None:
        """Stop the processes in the direction of the data, and last the monitor, which stores what they report."""
        terminate_all([self._source])
        terminate_all(self._workers)
        self.monitor.stop()

    def _kill(self) -> None:
        kill_all([self._source, *self._workers])
        self.monitor.kill()

    async def _subscribe(self, transport: MqttTransport) -> None:
        await transport.connect()

        def on_presence(delivery: Delivery) -> None:
            payload = bytes(delivery.payload)
            self._presence.on_presence(delivery.topic, payload, time.monotonic(), retained=delivery.retain)

        def on_result(delivery: Delivery) -> None:
            self._presence.on_result(bytes(delivery.payload), time.monotonic())

        await transport.subscribe(all_presence_filter(pipeline=self._pipeline.name), on_presence, qos=1)
        await transport.subscribe(results_topic(self._pipeline.source.site), on_result, qos=1)

    async def _wait_until_ready(self) -> None:
        """Wait until every stage has a worker and the monitor has started, or for a shutdown.

        Raises `SparseError` when a worker exits.
        """
        stages = {stage.name for stage in self._pipeline.stage}
        while (not stages <= self._presence.stages_up() or self.monitor.is_starting) and not self._shutdown.is_set():
            exited = [worker for worker in self._workers if worker.exit_status is not None]
            if any(worker.exit_status == -signal.SIGINT for worker in exited):
                self._shutdown.interrupted = True  # the Ctrl-C reached a worker as well, and sooner than us
                self._shutdown.set()
                return
            if exited:
                raise _exit_error(exited[0])
            await self._supervise()
            await asyncio.sleep(_POLL_S)

    async def _run_source(self) -> tuple[int, dict[str, Any] | None]:
        """Run the source to its end; returns its exit status and its summary."""
        self._view.status = "running"
        if self._pipeline.source.kind == "ingress":
            topic = ingress_topic(self._pipeline.source.site, "NAME")
            broker = self._sites.source_broker.redacted_address
            self._view.print_line(f"publish images or readings to {topic} at {broker}; stop with Ctrl-C")
        self._source.start()
        output = asyncio.create_task(asyncio.to_thread(self._source.stdout.read), name="source-output")
        while (status := self._source.exit_status) is None or not output.done():
            if self._shutdown.is_set():
                self._drain_source()
            else:
                self._restart_workers()
            await self._supervise()
            await asyncio.wait({output}, timeout=_POLL_S)
        self._view.status = "done"
        summary = _parse_summary(await output)
        if summary is None and not self._shutdown.is_set():
            raise _exit_error(self._source)
        return status, summary

    def _drain_source(self) -> None:
        """Ask the source to finish its requests in flight; kill it after a while."""
        now_s = time.monotonic()
        if self._drain_deadline_s is None:
            self._drain_deadline_s = now_s + SOURCE_DRAIN_TIMEOUT_S
            self._view.status = "ending"
            self._source.process.terminate()
        elif now_s > self._drain_deadline_s and self._source.exit_status is None:
            self._view.print_line(
                f"the source did not exit within {SOURCE_DRAIN_TIMEOUT_S:g} s and was killed: there is no summary; "
                f"the results so far are in {self._folder}"
            )
            kill_all([self._source])
            self._source.process.wait()

    def _restart_workers(self) -> None:
        for worker in self._workers:
            if worker.exit_status is not None:
                if not worker.may_restart:
                    raise _exit_error(worker)
                worker.start()

    async def _supervise(self) -> None:
        """Restart brokers and the monitor where they have exited, and redraw the view."""
        for site, broker in self._sites.exited:
            await asyncio.to_thread(broker.restart)  # at the same port, where its clients reconnect by themselves
            of_site = f" of site {site}" if len(self._sites.brokers) > 1 else ""
            self._view.print_line(f"the {broker.label} broker{of_site} exited and was restarted")
            self._view.broker_restarts = self._sites.restarts
        self.monitor.supervise(self._view.print_line)
        self._view.update()


def create_live_view(pipeline: Pipeline, broker: str) -> tuple[PresenceTable, LiveView]:
    """The statistics of a pipeline, by its kind, and their live view, which describes its brokers as `broker`."""
    if pipeline.is_training:
        training = TrainingStats(pipeline.name)
        return training, TrainingView(pipeline, broker, training)
    inference = InferenceStats(pipeline.name)
    return inference, InferenceView(pipeline, broker, inference)


def _parse_summary(output: bytes) -> dict[str, Any] | None:
    """The summary in a source's output, where it has one; a user's own source may print other lines before it."""
    for line in reversed(output.decode(errors="replace").splitlines()):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict) and "outputs" in value:
                return value
    return None


def _exit_error(child: ChildProcess) -> SparseError:
    """The error for a process that exited too early: its own message where the mistake is the user's."""
    status = child.exit_status or 0
    last_line = child.last_log_line()
    if status == EXIT_USAGE and last_line:
        return UsageError("ProcessRefused", last_line, process=child.name)
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return SparseError(
        "ProcessEnded",
        f"{child.name} ended with {how}: {last_line or 'no output'} (its log: {child.log_file})",
        process=child.name,
        status=status,
        log=str(child.log_file),
    )
