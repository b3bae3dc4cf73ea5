"""A town of real processes, and an attacker who may publish whatever it likes to each topic that they read."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

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
VICTIM_INBOX = "sparse/local/source/victim/inbox"
LOOK_STAGE_TOPIC = "sparse/local/look/look"
PRESENCE_TOPICS = {
    f"{PIPELINE_TOPIC}/double/up/double-1",
    f"{PIPELINE_TOPIC}/last/up/last-1",
    f"{LOOK_STAGE_TOPIC}/up/look-1",
}
# Of one topic before a probe: what a broker holds for one reader (1000 messages) is never exceeded, nothing is dropped.
BURST_SIZE = 50
_PROBE_AGAIN_S = 5.0


class PixelCountExecutor(TaskExecutor):
    """Says how many pixels a picture has."""

    def start(self, node: Node) -> None:
        import brokers.process.image_decode  # noqa: F401 - before the first task, since it takes a moment

    def prepare(self, content: Content, task: TaskContext) -> Tensors:
        from brokers.process.image_decode import decode_picture

        return {"picture": decode_picture(bytes(getattr(content, "data", b"")))}

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        return {"pixels": tensors["picture"].size // 3}


@dataclass
class AttackedPipeline:
    """`sparse run` of two stages behind the ingress, and one worker that looks at pictures."""

    broker: LocalBroker
    path: Path
    run_command: RunningCommand
    worker_command: RunningCommand
    sandbox: ProcessSandbox

    @property
    def address(self) -> str:
        return self.broker.address

    def processes(self) -> dict[str, psutil.Process]:
        """All of it, by name; those that have ended are missing."""
        words = {"run": ("run",), "source": ("source",), "double": ("stage", "double"), "last": ("stage", "last")}
        found = {name: self.sandbox.find_process(*each, str(self.path)) for name, each in words.items()}
        found["look"] = self.sandbox.find_process("stage", "look")
        return {name: process for name, process in found.items() if process}

    def read_logs(self) -> dict[str, str]:
        """What each process has written to its log so far."""
        logs = {path.stem: path.read_text() for path in (self.sandbox.folder / "out" / "logs").glob("*.log")}
        return {"run": self.run_command.read_stderr(), "look": self.worker_command.read_stderr(), **logs}


@contextmanager
def start_attacked_pipeline(sandbox: ProcessSandbox, kind: BrokerKind) -> Iterator[AttackedPipeline]:
    require_dependency({"embedded": "iotcore"}.get(kind, kind))
    path = write_pipeline_file(sandbox.folder, [stage_table("double", "double"), stage_table("last", "add_one")])
    look = write_pipeline_file(
        sandbox.folder,
        [{"name": "look", "executor": "tests.soak.harness.hostile_clients:PixelCountExecutor"}],
        name="look",
    )
    with start_broker(kind=kind) as broker:
        words = ("--broker", broker.address)
        looker = sandbox.start_sparse("stage", look, "look", *words, "--worker", "look-1")
        run = sandbox.start_sparse("run", path, *words, "--out", sandbox.folder / "out")
        found = AttackedPipeline(broker, path, run, looker, sandbox)
        eventually("the gateway", lambda: "Ctrl-C" in run.read_stderr())
        wait_for_workers(broker.address, lambda workers: set(workers) >= PRESENCE_TOPICS)
        yield found


@dataclass
class Attacker:
    """Publishes at quality of service 0, as fast as what it attacks can take it: probes print_line."""

    target: AttackedPipeline
    seed: int
    sent: Counter[str] = field(default_factory=Counter)
    worker_records: dict[str, WorkerRecord] = field(default_factory=dict)

    async def __aenter__(self) -> Attacker:
        self._mutator = MessageMutator(self.seed, generated_messages(300))
        self._answers: dict[str, asyncio.Event] = {}
        self._numbers = itertools.count()
        self._inboxes = {VICTIM_INBOX}
        self._flying: deque[bytes] = deque(maxlen=8)
        self._transport = MqttTransport(self.target.address, client_id="attacker")
        await self._transport.connect()
        await self._transport.subscribe("attacker/probe/+", self._answered)
        await self._transport.subscribe("sparse/local/results/+", self._answered)
        await self._transport.subscribe(all_presence_filter(), self._born, qos=1)
        await self._transport.subscribe(f"{PIPELINE_TOPIC}/double/in/+", self._overheard)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.close()

    def _answered(self, delivery: Delivery) -> None:
        if event := self._answers.get(delivery.topic):
            event.set()

    def _born(self, delivery: Delivery) -> None:
        if delivery.topic in PRESENCE_TOPICS and delivery.payload:
            try:
                found = WorkerRecord.from_bytes(bytes(delivery.payload))
            except SparseError:
                return
            if found.fingerprint != "forged":
                self.worker_records[delivery.topic] = found

    @property
    def rejected_count(self) -> int:
        """Messages that workers say they have refused, or failed at."""
        return sum(each.load.malformed + each.load.failed for each in self.worker_records.values())

    async def publish(self, topic: str, message: HostileMessage) -> None:
        await self._transport.publish(topic, message.payload, message.properties, retain=message.retain)

    # One after the other ------------------------------------------------------------------------------------------

    def _overheard(self, delivery: Delivery) -> None:
        """A request is on its way: its identifier is known now. Only those of the victim are made use of."""
        address = delivery.properties.response_topic
        if address == VICTIM_INBOX:
            self._flying.append(delivery.properties.correlation_data)
        elif address.startswith("sparse/local/source/"):
            self._inboxes.add(address)

    async def attack(self) -> None:
        """One burst to each topic that the system reads; return when all that answer have answered a probe."""
        chance = self._mutator.rng
        for kind, topic in self._targets():
            for _ in range(BURST_SIZE):
                message = self._message(kind)
                if (
                    topic in (VICTIM_INBOX, f"{PIPELINE_TOPIC}/double/in/double-1")
                    and self._flying
                    and chance.random() < 0.5
                ):
                    properties = replace(message.properties, correlation_data=chance.choice(self._flying))
                    message = replace(message, properties=properties)
                await self.publish(topic.replace("#", str(chance.randrange(10_000))), message)
                self.sent[kind] += 1
        await self.probe()

    def _message(self, kind: str) -> HostileMessage:
        """What goes to a topic of this kind: mostly what is read there, wrong in some way."""
        message = self._mutator.next_message(self._addresses())
        if kind == "presence" and self._mutator.rng.random() < 0.6:
            # Not "up": whoever may forge that draws work to itself, which is another test.
            states = {"state": self._mutator.rng.choice(("draining", "stopped"))}
            worker = f"ghost-{self._mutator.rng.randrange(10_000)}"
            payload = forged_worker_record(
                worker, "double", node="n" * self._mutator.rng.choice((1, 10, 10_000)), **states
            )
            return HostileMessage(Properties(), payload)
        return message

    def _targets(self) -> list[tuple[str, str]]:
        """Kinds of topics, and topics; in each place of a # comes a number."""
        doors = (f"{PIPELINE_TOPIC}/double/tasks", f"{PIPELINE_TOPIC}/last/tasks", f"{LOOK_STAGE_TOPIC}/tasks")
        workers = (
            f"{PIPELINE_TOPIC}/double/in/double-1",
            f"{PIPELINE_TOPIC}/last/in/last-1",
            f"{LOOK_STAGE_TOPIC}/in/look-1",
            f"{PIPELINE_TOPIC}/last/in/x",
        )
        ghosts = (
            f"{PIPELINE_TOPIC}/double/up/ghost-#",
            f"{PIPELINE_TOPIC}/last/up/ghost-#",
            f"{LOOK_STAGE_TOPIC}/up/#",
            "sparse/local/other/x/up/#",
        )
        cameras = ("sparse/local/ingress/camera", f"sparse/local/ingress/{'s' * 200}#")
        kinds: dict[str, Sequence[str]] = {
            "door": doors,
            "inbox": workers,
            "source": sorted(self._inboxes),
            "presence": ghosts,
            "ingress": cameras,
        }
        kinds["results"] = ("sparse/local/results/#",)
        return [(kind, topic) for kind, topics in kinds.items() for topic in topics]

    def _addresses(self) -> list[str]:
        """Where answers could do harm: the system's own topics."""
        return [
            f"{PIPELINE_TOPIC}/double/tasks",
            f"{PIPELINE_TOPIC}/last/in/last-1",
            f"{PIPELINE_TOPIC}/double/in/double-1",
            "sparse/local/results/r",
        ]

    # Probes -------------------------------------------------------------------------------------------------------

    async def probe(self) -> None:
        """Return when everything that was sent before has been taken: a message behind it is answered."""
        numbers, sight = b'{"values": 1}', small_image("PNG")
        doors = [
            (f"{PIPELINE_TOPIC}/double/in/double-1", numbers, JSON),
            (f"{PIPELINE_TOPIC}/last/in/last-1", numbers, JSON),
        ]
        doors += [(f"{PIPELINE_TOPIC}/double/tasks", numbers, JSON), (f"{PIPELINE_TOPIC}/last/tasks", numbers, JSON)]
        doors += [(f"{LOOK_STAGE_TOPIC}/in/look-1", sight, PNG), (f"{LOOK_STAGE_TOPIC}/tasks", sight, PNG)]
        probes = [
            self._ask(topic, payload, kind, f"attacker/probe/{next(self._numbers)}") for topic, payload, kind in doors
        ]
        probes.append(self._ask("sparse/local/ingress/probe", numbers, JSON, "sparse/local/results/probe"))
        await asyncio.gather(*probes)

    async def _ask(self, topic: str, payload: bytes, content_type: str, answer: str) -> None:
        event = self._answers[answer] = asyncio.Event()
        properties = Properties(content_type, response_topic=answer if answer.startswith("attacker") else "")
        try:
            async with asyncio.timeout(PROCESS_TIMEOUT_S):
                while not event.is_set():
                    await self._transport.publish(topic, payload, properties)
                    try:
                        await asyncio.wait_for(event.wait(), _PROBE_AGAIN_S)
                    except TimeoutError:
                        continue
        except TimeoutError:
            raise AssertionError(f"nobody answers at {topic}: {json.dumps(self.sent)}") from None
        finally:
            del self._answers[answer]
