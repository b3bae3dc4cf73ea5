"""A pipeline of real processes, and an attacker that publishes hostile messages to each topic that they read."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import psutil

from brokers.dispatch.presence import WorkerRecord
from brokers.errors import SparseError
from brokers.mqtt.client import MqttTransport
from brokers.protocol.messages import JSON, PNG, Content
from brokers.protocol.topics import all_presence_filter
from brokers.protocol.transport import Delivery, Properties
from brokers.server.local_broker import BrokerKind, LocalBroker, start_broker
from stages.executor import Node, TaskContext, TaskExecutor, Tensors
from tests.soak.harness.hostile_messages import (
    HostileMessage,
    MessageMutator,
    forged_worker_record,
    generated_messages,
    small_image,
)
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S, ProcessSandbox, RunningCommand, eventually

PIPELINE_TOPIC = "sparse/local/test"
PIXELS_TOPIC = "sparse/local/pixels/pixels"
VICTIM_INBOX = "sparse/local/source/victim/inbox"
PRESENCE_TOPICS = {
    f"{PIPELINE_TOPIC}/double/up/double-1",
    f"{PIPELINE_TOPIC}/last/up/last-1",
    f"{PIXELS_TOPIC}/up/pixels-1",
}
# Messages to one topic before a probe: far below the 1000 that a broker queues for one reader, so none is dropped.
BURST_SIZE = 50
_PROBE_RETRY_S = 5.0


class PixelCountExecutor(TaskExecutor):
    """Returns the number of pixels of a picture."""

    def start(self, node: Node) -> None:
        import brokers.process.image_decode  # noqa: F401 - before the first task, since importing it takes long

    def prepare(self, content: Content, task: TaskContext) -> Tensors:
        from brokers.process.image_decode import decode_picture

        return {"picture": decode_picture(bytes(getattr(content, "data", b"")))}

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        return {"pixels": tensors["picture"].size // 3}


@dataclass
class AttackedPipeline:
    """`sparse run` of two stages behind the ingress, and one worker of another pipeline that decodes pictures."""

    broker: LocalBroker
    path: Path
    run_command: RunningCommand
    worker_command: RunningCommand
    sandbox: ProcessSandbox

    @property
    def address(self) -> str:
        return self.broker.address

    def processes(self) -> dict[str, psutil.Process]:
        """Its processes by name, without those that have exited."""
        arguments = {"run": ("run",), "source": ("source",), "double": ("stage", "double"), "last": ("stage", "last")}
        processes = {name: self.sandbox.find_process(*each, str(self.path)) for name, each in arguments.items()}
        processes["pixels"] = self.sandbox.find_process("stage", "pixels")
        return {name: process for name, process in processes.items() if process}

    def read_logs(self) -> dict[str, str]:
        """The log of each process so far."""
        logs = {path.stem: path.read_text() for path in (self.sandbox.folder / "out" / "logs").glob("*.log")}
        return {"run": self.run_command.read_stderr(), "pixels": self.worker_command.read_stderr(), **logs}


@contextmanager
def start_attacked_pipeline(sandbox: ProcessSandbox, kind: BrokerKind) -> Iterator[AttackedPipeline]:
    require_dependency({"embedded": "iotcore"}.get(kind, kind))
    path = write_pipeline_file(sandbox.folder, [stage_table("double", "double"), stage_table("last", "add_one")])
    pixels_path = write_pipeline_file(
        sandbox.folder,
        [{"name": "pixels", "executor": "tests.soak.harness.hostile_clients:PixelCountExecutor"}],
        name="pixels",
    )
    with start_broker(kind=kind) as broker:
        options = ("--broker", broker.address)
        worker = sandbox.start_sparse("stage", pixels_path, "pixels", *options, "--worker", "pixels-1")
        run = sandbox.start_sparse("run", path, *options, "--out", sandbox.folder / "out")
        eventually("the ingress gateway", lambda: "Ctrl-C" in run.read_stderr())
        wait_for_workers(broker.address, lambda workers: set(workers) >= PRESENCE_TOPICS)
        yield AttackedPipeline(broker, path, run, worker, sandbox)


@dataclass
class Attacker:
    """Publishes hostile messages at QoS 0. Probes after each round of bursts keep it at the speed of its target."""

    target: AttackedPipeline
    seed: int
    sent: Counter[str] = field(default_factory=Counter)  # messages by kind of topic
    worker_records: dict[str, WorkerRecord] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        self._mutator = MessageMutator(self.seed, generated_messages(300))
        self._probe_events: dict[str, asyncio.Event] = {}
        self._probe_numbers = itertools.count()
        self._source_inboxes = {VICTIM_INBOX}
        self._victim_requests: deque[bytes] = deque(maxlen=8)  # ids of requests in flight
        self._transport = MqttTransport(self.target.address, client_id="attacker")
        await self._transport.connect()
        await self._transport.subscribe("attacker/probe/+", self._on_probe_result)
        await self._transport.subscribe("sparse/local/results/+", self._on_probe_result)
        await self._transport.subscribe(all_presence_filter(), self._on_presence, qos=1)
        await self._transport.subscribe(f"{PIPELINE_TOPIC}/double/in/+", self._on_task)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.close()

    def _on_probe_result(self, delivery: Delivery) -> None:
        if event := self._probe_events.get(delivery.topic):
            event.set()

    def _on_presence(self, delivery: Delivery) -> None:
        if delivery.topic in PRESENCE_TOPICS and delivery.payload:
            try:
                record = WorkerRecord.from_bytes(bytes(delivery.payload))
            except SparseError:
                return
            if record.fingerprint != "forged":
                self.worker_records[delivery.topic] = record

    def _on_task(self, delivery: Delivery) -> None:
        """Learn the inboxes of sources, and the ids of requests of the victim: only those are abused."""
        address = delivery.properties.response_topic
        if address == VICTIM_INBOX:
            self._victim_requests.append(delivery.properties.correlation_data)
        elif address.startswith("sparse/local/source/"):
            self._source_inboxes.add(address)

    @property
    def rejected_count(self) -> int:
        """Messages that the workers have counted as malformed or failed."""
        return sum(record.load.malformed + record.load.failed for record in self.worker_records.values())

    async def publish(self, topic: str, message: HostileMessage) -> None:
        await self._transport.publish(topic, message.payload, message.properties, retain=message.retain)

    # Rounds of bursts ---------------------------------------------------------------------------------------------

    async def attack(self) -> None:
        """Publish one burst to each topic of the pipeline; return when every reader has answered a probe."""
        rng = self._mutator.rng
        for kind, topics in self._targets().items():
            for topic in topics:
                for _ in range(BURST_SIZE):
                    message = self._next_message(kind)
                    reads_victim = topic in (VICTIM_INBOX, f"{PIPELINE_TOPIC}/double/in/double-1")
                    if reads_victim and self._victim_requests and rng.random() < 0.5:
                        request = rng.choice(self._victim_requests)
                        message = replace(message, properties=replace(message.properties, correlation_data=request))
                    await self.publish(topic.replace("#", str(rng.randrange(10_000))), message)
                    self.sent[kind] += 1
        await self.probe()

    def _next_message(self, kind: str) -> HostileMessage:
        """A message for a topic of this kind: mostly a mutation of a message that is valid there."""
        message = self._mutator.next_message(self._response_topics())
        if kind == "presence" and self._mutator.rng.random() < 0.6:
            # Not the state "up": a client that may forge it draws tasks to itself, which access lists must prevent.
            states = {"state": self._mutator.rng.choice(("draining", "stopped"))}
            worker = f"fake-{self._mutator.rng.randrange(10_000)}"
            payload = forged_worker_record(
                worker, "double", node="n" * self._mutator.rng.choice((1, 10, 10_000)), **states
            )
            return HostileMessage(Properties(), payload)
        return message

    def _targets(self) -> dict[str, list[str]]:
        """Topics by kind; each "#" is replaced by a number."""
        return {
            "tasks": [f"{PIPELINE_TOPIC}/double/tasks", f"{PIPELINE_TOPIC}/last/tasks", f"{PIXELS_TOPIC}/tasks"],
            "inbox": [
                f"{PIPELINE_TOPIC}/double/in/double-1",
                f"{PIPELINE_TOPIC}/last/in/last-1",
                f"{PIXELS_TOPIC}/in/pixels-1",
                f"{PIPELINE_TOPIC}/last/in/x",
            ],
            "source": sorted(self._source_inboxes),
            "presence": [
                f"{PIPELINE_TOPIC}/double/up/fake-#",
                f"{PIPELINE_TOPIC}/last/up/fake-#",
                f"{PIXELS_TOPIC}/up/#",
                "sparse/local/other/x/up/#",
            ],
            "ingress": ["sparse/local/ingress/camera", f"sparse/local/ingress/{'s' * 200}#"],
            "results": ["sparse/local/results/#"],
        }

    def _response_topics(self) -> list[str]:
        """Topics of the pipeline itself, to which answers could do harm."""
        return [
            f"{PIPELINE_TOPIC}/double/tasks",
            f"{PIPELINE_TOPIC}/last/in/last-1",
            f"{PIPELINE_TOPIC}/double/in/double-1",
            "sparse/local/results/r",
        ]

    # Probes -------------------------------------------------------------------------------------------------------

    async def probe(self) -> None:
        """Return once every reader has processed all earlier messages: it has answered a valid one sent after them."""
        numbers = b'{"values": 1}'
        picture = small_image("PNG")
        tasks = [
            (f"{PIPELINE_TOPIC}/double/in/double-1", numbers, JSON),
            (f"{PIPELINE_TOPIC}/last/in/last-1", numbers, JSON),
            (f"{PIPELINE_TOPIC}/double/tasks", numbers, JSON),
            (f"{PIPELINE_TOPIC}/last/tasks", numbers, JSON),
            (f"{PIXELS_TOPIC}/in/pixels-1", picture, PNG),
            (f"{PIXELS_TOPIC}/tasks", picture, PNG),
        ]
        probes = [
            self._probe(topic, payload, content_type, f"attacker/probe/{next(self._probe_numbers)}")
            for topic, payload, content_type in tasks
        ]
        probes.append(self._probe("sparse/local/ingress/probe", numbers, JSON, "sparse/local/results/probe"))
        await asyncio.gather(*probes)

    async def _probe(self, topic: str, payload: bytes, content_type: str, result_topic: str) -> None:
        event = self._probe_events[result_topic] = asyncio.Event()
        response_topic = result_topic if result_topic.startswith("attacker") else ""
        properties = Properties(content_type, response_topic=response_topic)
        try:
            async with asyncio.timeout(PROCESS_TIMEOUT_S):
                while not event.is_set():
                    await self._transport.publish(topic, payload, properties)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_PROBE_RETRY_S):
                            await event.wait()
        except TimeoutError:
            raise AssertionError(f"no answer to a probe at {topic}: {json.dumps(self.sent)}") from None
        finally:
            del self._probe_events[result_topic]
