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

from brokers.dispatch.presence import Birth
from brokers.errors import SparseError
from brokers.mqtt.client import MqttTransport
from brokers.protocol.messages import JSON, PNG, Content
from brokers.protocol.topics import every_presence
from brokers.protocol.transport import Delivery, Properties
from brokers.server.local_broker import Kind, LocalBroker, start_broker
from stages.executor import Node, TaskContext, TaskExecutor, Tensors
from tests.soak.harness.hostile_messages import Hostile, Mutator, birth, made_up, picture
from tests.support.brokers.presence import await_workers
from tests.support.environment.external_programs import need
from tests.support.pipelines.pipeline_files import pipeline_file, stage
from tests.support.pipelines.processes import PATIENCE_S, Machine, Running, eventually

BASE = "sparse/local/test"
VICTIM = "sparse/local/source/victim/inbox"
LOOK = "sparse/local/look/look"
WORKERS = {f"{BASE}/double/up/double-1", f"{BASE}/last/up/last-1", f"{LOOK}/up/look-1"}
# Of one topic before a probe: what a broker holds for one reader (1000 messages) is never exceeded, nothing is dropped.
BURST = 50
_PROBE_AGAIN_S = 5.0


class Looker(TaskExecutor):
    """Says how many pixels a picture has."""

    def start(self, node: Node) -> None:
        import stages.models.image_preprocess  # noqa: F401 - torch with it, which takes seconds

    def prepare(self, content: Content, task: TaskContext) -> Tensors:
        from stages.models.image_preprocess import decode_picture

        return {"picture": decode_picture(bytes(getattr(content, "data", b"")))}

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        return {"pixels": tensors["picture"].size // 3}


@dataclass
class Town:
    """`sparse run` of two stages behind the ingress, and one worker that looks at pictures."""

    broker: LocalBroker
    path: Path
    run: Running
    look: Running
    box: Machine

    @property
    def address(self) -> str:
        return self.broker.address

    def processes(self) -> dict[str, psutil.Process]:
        """All of it, by name; those that have ended are missing."""
        words = {"run": ("run",), "source": ("source",), "double": ("stage", "double"), "last": ("stage", "last")}
        found = {name: self.box.find(*each, str(self.path)) for name, each in words.items()}
        found["look"] = self.box.find("stage", "look")
        return {name: process for name, process in found.items() if process}

    def said(self) -> dict[str, str]:
        """What each process has written to its log so far."""
        logs = {path.stem: path.read_text() for path in (self.box.folder / "out" / "logs").glob("*.log")}
        return {"run": self.run.said(), "look": self.look.said(), **logs}


@contextmanager
def town(box: Machine, kind: Kind) -> Iterator[Town]:
    need({"embedded": "iotcore"}.get(kind, kind))
    path = pipeline_file(box.folder, [stage("double", "double"), stage("last", "add_one")])
    look = pipeline_file(
        box.folder, [{"name": "look", "executor": "tests.soak.harness.hostile_clients:Looker"}], name="look"
    )
    with start_broker(kind=kind) as broker:
        words = ("--broker", broker.address)
        looker = box.sparse("stage", look, "look", *words, "--worker", "look-1")
        run = box.sparse("run", path, *words, "--out", box.folder / "out")
        found = Town(broker, path, run, looker, box)
        eventually("the gateway", lambda: "Ctrl-C ends it" in run.said())
        await_workers(broker.address, lambda workers: set(workers) >= WORKERS)
        yield found


@dataclass
class Attacker:
    """Publishes at quality of service 0, as fast as what it attacks can take it: probes tell."""

    town: Town
    seed: int
    sent: Counter[str] = field(default_factory=Counter)
    loads: dict[str, Birth] = field(default_factory=dict)

    async def __aenter__(self) -> Attacker:
        self._mutator = Mutator(self.seed, made_up(300))
        self._answers: dict[str, asyncio.Event] = {}
        self._numbers = itertools.count()
        self._inboxes = {VICTIM}
        self._flying: deque[bytes] = deque(maxlen=8)
        self._transport = MqttTransport(self.town.address, client_id="attacker")
        await self._transport.connect()
        await self._transport.subscribe("attacker/probe/+", self._answered)
        await self._transport.subscribe("sparse/local/results/+", self._answered)
        await self._transport.subscribe(every_presence(), self._born, qos=1)
        await self._transport.subscribe(f"{BASE}/double/in/+", self._overheard)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.close()

    def _answered(self, delivery: Delivery) -> None:
        if event := self._answers.get(delivery.topic):
            event.set()

    def _born(self, delivery: Delivery) -> None:
        if delivery.topic in WORKERS and delivery.payload:
            try:
                found = Birth.from_bytes(bytes(delivery.payload))
            except SparseError:
                return
            if found.fingerprint != "forged":
                self.loads[delivery.topic] = found

    @property
    def accounted(self) -> int:
        """Messages that workers say they have refused, or failed at."""
        return sum(each.load.refused + each.load.failed for each in self.loads.values())

    async def publish(self, topic: str, message: Hostile) -> None:
        await self._transport.publish(topic, message.payload, message.properties, retain=message.retain)

    # One after the other ------------------------------------------------------------------------------------------

    def _overheard(self, delivery: Delivery) -> None:
        """A request is on its way: its identifier is known now. Only those of the victim are made use of."""
        address = delivery.properties.response_topic
        if address == VICTIM:
            self._flying.append(delivery.properties.correlation)
        elif address.startswith("sparse/local/source/"):
            self._inboxes.add(address)

    async def attack(self) -> None:
        """One burst to each topic that the system reads; return when all that answer have answered a probe."""
        chance = self._mutator.chance
        for kind, topic in self._targets():
            for _ in range(BURST):
                message = self._message(kind)
                if topic in (VICTIM, f"{BASE}/double/in/double-1") and self._flying and chance.random() < 0.5:
                    properties = replace(message.properties, correlation=chance.choice(self._flying))
                    message = replace(message, properties=properties)
                await self.publish(topic.replace("#", str(chance.randrange(10_000))), message)
                self.sent[kind] += 1
        await self.probe()

    def _message(self, kind: str) -> Hostile:
        """What goes to a topic of this kind: mostly what is read there, wrong in some way."""
        message = self._mutator.next(self._addresses())
        if kind == "presence" and self._mutator.chance.random() < 0.6:
            # Not "up": whoever may forge that draws work to itself, which is another test.
            states = {"state": self._mutator.chance.choice(("draining", "stopped"))}
            worker = f"ghost-{self._mutator.chance.randrange(10_000)}"
            payload = birth(worker, "double", node="n" * self._mutator.chance.choice((1, 10, 10_000)), **states)
            return Hostile(Properties(), payload)
        return message

    def _targets(self) -> list[tuple[str, str]]:
        """Kinds of topics, and topics; in each place of a # comes a number."""
        doors = (f"{BASE}/double/tasks", f"{BASE}/last/tasks", f"{LOOK}/tasks")
        workers = (f"{BASE}/double/in/double-1", f"{BASE}/last/in/last-1", f"{LOOK}/in/look-1", f"{BASE}/last/in/x")
        ghosts = (f"{BASE}/double/up/ghost-#", f"{BASE}/last/up/ghost-#", f"{LOOK}/up/#", "sparse/local/other/x/up/#")
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
            f"{BASE}/double/tasks",
            f"{BASE}/last/in/last-1",
            f"{BASE}/double/in/double-1",
            "sparse/local/results/r",
        ]

    # Probes -------------------------------------------------------------------------------------------------------

    async def probe(self) -> None:
        """Return when everything that was sent before has been taken: a message behind it is answered."""
        numbers, sight = b'{"values": 1}', picture("PNG")
        doors = [(f"{BASE}/double/in/double-1", numbers, JSON), (f"{BASE}/last/in/last-1", numbers, JSON)]
        doors += [(f"{BASE}/double/tasks", numbers, JSON), (f"{BASE}/last/tasks", numbers, JSON)]
        doors += [(f"{LOOK}/in/look-1", sight, PNG), (f"{LOOK}/tasks", sight, PNG)]
        probes = [
            self._ask(topic, payload, kind, f"attacker/probe/{next(self._numbers)}") for topic, payload, kind in doors
        ]
        probes.append(self._ask("sparse/local/ingress/probe", numbers, JSON, "sparse/local/results/probe"))
        await asyncio.gather(*probes)

    async def _ask(self, topic: str, payload: bytes, content_type: str, answer: str) -> None:
        event = self._answers[answer] = asyncio.Event()
        properties = Properties(content_type, response_topic=answer if answer.startswith("attacker") else "")
        try:
            async with asyncio.timeout(PATIENCE_S):
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
