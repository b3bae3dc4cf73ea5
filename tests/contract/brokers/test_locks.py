"""Each role at a real, locked Mosquitto: what it may do works, and what it may not the broker refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.mqtt.client import MqttTransport
from brokers.mqtt.connect_errors import OperationRefused
from brokers.protocol.transport import Will
from tests.support.brokers.broker_kinds import DeliveryQueue, run_async
from tests.support.brokers.locked_broker import SecureBroker, forge_credentials, start_secure_broker, tls_from_folder

# A fourth stage is of a user's own, and may send its work anywhere.
PIPELINE = Pipeline.model_validate(
    {
        "pipeline": {"name": "street", "model": "yolov3-tiny", "cuts": [8, 13]},
        "stage": [
            {"name": "head", "site": "device"},
            {"name": "body", "site": "device"},
            {"name": "tail", "site": "cloud"},
            {"name": "own", "site": "cloud", "executor": "somewhere:function"},
        ],
        "site": [
            {"name": "device", "links": [{"to": "cloud"}], "cameras": ["door"]},
            {"name": "cloud"},
        ],
        "source": {"site": "device"},
    }
)
ANYBODY = "anybody"  # the test's own: it writes what others read, and reads what they write
# What another pipeline at this broker gives the viewer, named a second time, is added to what this one gives.
MORE_ACCESS = f"\nuser {ANYBODY}\ntopic readwrite #\n\nuser viewer\ntopic read elsewhere\n"

HEAD, BODY = "sparse/device/street/head", "sparse/device/street/body"
TAIL, OWN = "sparse/cloud/street/tail", "sparse/cloud/street/own"
OTHER = "sparse/device/other/stage"
INBOX = "sparse/device/source/source-1/inbox"

# Who, at which site's broker; what they may write and read there, and what not.
MAY: dict[tuple[str, str], tuple[set[str], set[str]]] = {
    ("camera.door", "device"): ({"sparse/device/ingress/door"}, set()),
    ("street.head", "device"): (
        {f"{HEAD}/up/w", f"{BODY}/in/w", INBOX, f"{OWN}/in/w"},
        {f"{HEAD}/up/w", f"{HEAD}/in/w", f"{HEAD}/tasks", f"{BODY}/up/w"},
    ),
    ("street.body", "device"): (
        {f"{BODY}/up/w", f"{HEAD}/in/w", f"{TAIL}/in/w", INBOX, f"{OWN}/in/w"},
        {f"{BODY}/up/w", f"{BODY}/in/w", f"{BODY}/tasks", f"{TAIL}/up/w"},
    ),
    ("street.source", "device"): (
        {f"{HEAD}/in/w", "sparse/device/street/source/up/source-1", "sparse/device/results/door"},
        {INBOX, f"{HEAD}/up/w", f"{BODY}/up/w", f"{TAIL}/up/w", f"{OWN}/up/w", "sparse/device/ingress/door"}
        | {"sparse/device/ingress/gate"},
    ),
    ("viewer", "device"): (set(), {"sparse/device/results/door", "elsewhere"}),
    ("monitor", "device"): (
        set(),
        {f"{each}/up/w" for each in (HEAD, BODY, TAIL, OWN)} | {"sparse/device/street/source/up/source-1"},
    ),
    ("street.tail", "cloud"): (
        {f"{TAIL}/up/w", f"{BODY}/in/w", f"{OWN}/in/w", INBOX},
        {f"{TAIL}/up/w", f"{TAIL}/in/w", f"{TAIL}/tasks", f"{OWN}/up/w"},
    ),
    ("street.own", "cloud"): (
        {f"{OWN}/up/w", f"{HEAD}/in/w", f"{BODY}/in/w", f"{TAIL}/in/w", f"{OWN}/in/w", INBOX},
        {f"{each}/up/w" for each in (HEAD, BODY, TAIL, OWN)} | {f"{OWN}/in/w", f"{OWN}/tasks"},
    ),
    # The bridge that the device's broker keeps: what is for the cloud goes there, what is for the device comes from it.
    ("broker.device", "cloud"): (
        {f"{TAIL}/in/w", f"{TAIL}/tasks", f"{OWN}/in/w", f"{OWN}/tasks"}
        | {f"{HEAD}/up/w", f"{BODY}/up/w", f"{OTHER}/up/w", "sparse/device/street/source/up/source-1"},
        {f"{HEAD}/in/w", f"{HEAD}/tasks", f"{BODY}/in/w", f"{BODY}/tasks", f"{OTHER}/in/w", f"{OTHER}/tasks"}
        | {f"{TAIL}/up/w", f"{OWN}/up/w", INBOX, "sparse/device/ingress/door", "sparse/device/ingress/gate"}
        | {"sparse/device/results/door"},
    ),
    # Who has a certificate of the authority, and no business at this broker.
    ("street.head", "cloud"): (set(), set()),
    ("camera.door", "cloud"): (set(), set()),
    ("broker.cloud", "device"): (set(), set()),
    ("broker.device", "device"): (set(), set()),
    ("stranger", "device"): (set(), set()),
}
OPERATORS = {f"{each}/{end}" for each in (HEAD, BODY, TAIL, OWN) for end in ("in/w", "up/w", "tasks")} | {
    INBOX, "sparse/device/street/source/up/source-1", "sparse/device/ingress/door", "sparse/device/ingress/gate",
    "sparse/device/results/door",
}  # fmt: skip
MAY["operator", "device"] = MAY["operator", "cloud"] = (OPERATORS, OPERATORS)
# All that anybody above may do, and things that nobody may.
EVERYTHING = sorted(OPERATORS | {f"{OTHER}/in/w", f"{OTHER}/up/w", f"{OTHER}/tasks", "elsewhere", "sparse/device"})


@pytest.fixture(scope="module", name="doors")
def _doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SecureBroker]]:
    folder = tmp_path_factory.mktemp("locks")
    with ExitStack() as stack:
        yield {
            site: stack.enter_context(start_secure_broker(folder, PIPELINE, site, extra_acl=MORE_ACCESS))
            for site in ("device", "cloud")
        }


@pytest.fixture(scope="module", name="forged")
def _forged(doors: dict[str, SecureBroker]) -> dict[str, Path]:
    """Credentials of the right authority that `sparse certs` makes for nobody."""
    certs = doors["device"].certs
    return {name: forge_credentials(certs, name) for name in (ANYBODY, "stranger")}


async def is_taken(line: MqttTransport, topic: str) -> bool:
    """Whether the broker takes a publication."""
    try:
        await line.publish(topic, b"x", qos=1)
    except OperationRefused as error:
        return error.reason != "Not authorized"
    return True


@pytest.mark.parametrize(("who", "site"), MAY, ids=lambda value: value)
def test_who_writes_what_and_nothing_else(
    doors: dict[str, SecureBroker], forged: dict[str, Path], who: str, site: str
) -> None:
    async def test() -> None:
        line = doors[site].create_transport(forged.get(who, Path(who)))
        await line.connect()
        written = {topic for topic in EVERYTHING if await is_taken(line, topic)}
        await line.close()
        assert written == MAY[who, site][0]

    run_async(test())


@pytest.mark.parametrize(("who", "site"), MAY, ids=lambda value: value)
def test_who_reads_what_and_nothing_else(
    doors: dict[str, SecureBroker], forged: dict[str, Path], who: str, site: str
) -> None:
    async def test() -> None:
        line, author = (
            doors[site].create_transport(forged.get(who, Path(who))),
            doors[site].create_transport(forged[ANYBODY]),
        )
        heard: set[str] = set()
        await line.connect()
        await author.connect()
        # Whatever is subscribed to: the broker grants it, and delivers only what may be read.
        await line.subscribe("#", lambda delivery: heard.add(delivery.topic), qos=1)
        for topic in EVERYTHING:
            await author.publish(topic, b"x", qos=1)
        await line.subscribe("answered/when/all/has/been/delivered", DeliveryQueue())
        await line.close()
        await author.close()
        assert heard == MAY[who, site][1]

    run_async(test())


def test_a_stage_takes_no_task_from_outside_its_pipeline(doors: dict[str, SecureBroker]) -> None:
    """Whatever it asks for: a shared subscription is no way round."""

    async def test() -> None:
        head, operator = doors["device"].create_transport("street.head"), doors["device"].create_transport("operator")
        own, others = DeliveryQueue(), DeliveryQueue()
        await head.connect()
        await operator.connect()
        await head.subscribe(f"$share/street.head/{HEAD}/tasks", own, qos=1)
        await head.subscribe(f"$share/street.body/{BODY}/tasks", others, qos=1)
        await operator.publish(f"{BODY}/tasks", b"x", qos=1)
        await operator.publish(f"{HEAD}/tasks", b"x", qos=1)
        await own.next()
        await others.assert_empty()
        await head.close()
        await operator.close()

    run_async(test())


def test_a_last_will_is_no_way_round(doors: dict[str, SecureBroker], forged: dict[str, Path]) -> None:
    """Else whoever may connect could take away the record of any worker."""

    async def test() -> None:
        author, camera = (
            doors["device"].create_transport(forged[ANYBODY]),
            doors["device"].create_transport("camera.door"),
        )
        heard = DeliveryQueue()
        await author.connect()
        await author.subscribe(f"{HEAD}/up/w", heard)
        await camera.connect(will=Will(f"{HEAD}/up/w", b"", retain=True))
        assert camera._connection is not None
        camera._connection._pump.close("the test cuts it")  # no goodbye: the broker publishes the will
        await heard.assert_empty(1.0)
        await camera.close()
        await author.close()

    run_async(test())


def test_a_name_that_is_claimed_counts_for_nothing(doors: dict[str, SecureBroker]) -> None:
    """The certificate says who it is, whatever user name and client id say."""

    async def test() -> None:
        door = doors["device"]
        address = door.address.replace("mqtts://", "mqtts://operator:any@")
        line = MqttTransport(address, client_id="street.head", tls=tls_from_folder(door.certs / "camera.door"))
        await line.connect()
        assert await is_taken(line, "sparse/device/ingress/door")
        assert not await is_taken(line, f"{HEAD}/in/w")
        assert not await is_taken(line, f"{HEAD}/up/w")
        await line.close()

    run_async(test())
