"""The access list at a real Mosquitto: each user may do what it lists, and the broker refuses all else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.mqtt.client import MqttTransport
from brokers.mqtt.socket_connect import OperationRefused
from brokers.protocol.transport import Will
from tests.support.brokers.broker_kinds import DeliveryQueue, async_test
from tests.support.brokers.locked_broker import SecureBroker, forge_credentials, start_secure_broker, tls_from_folder

# The last stage has a user's executor, which may send its work to any stage.
PIPELINE = Pipeline.model_validate(
    {
        "pipeline": {"name": "street", "model": "yolov3-tiny", "cuts": [8, 13]},
        "stage": [
            {"name": "head", "site": "device"},
            {"name": "body", "site": "device"},
            {"name": "tail", "site": "cloud"},
            {"name": "custom", "site": "cloud", "executor": "somewhere:function"},
        ],
        "site": [
            {"name": "device", "links": [{"to": "cloud"}], "cameras": ["door"]},
            {"name": "cloud"},
        ],
        "source": {"site": "device"},
    }
)
TEST_USER = "test"  # may do everything
# The second entry of the viewer is as from another pipeline on this broker: it adds to the first.
EXTRA_ACL = f"\nuser {TEST_USER}\ntopic readwrite #\n\nuser viewer\ntopic read elsewhere\n"

HEAD, BODY = "sparse/device/street/head", "sparse/device/street/body"
TAIL, CUSTOM = "sparse/cloud/street/tail", "sparse/cloud/street/custom"
STAGES = (HEAD, BODY, TAIL, CUSTOM)
OTHER = "sparse/device/other/stage"
INBOX = "sparse/device/source/source-1/inbox"
SOURCE_PRESENCE = "sparse/device/street/source/up/source-1"
RESULTS = "sparse/device/results/door"
INGRESS, OTHER_INGRESS = "sparse/device/ingress/door", "sparse/device/ingress/gate"
OPERATOR_TOPICS = {
    *(f"{stage}/{level}" for stage in STAGES for level in ("in/w", "up/w", "tasks")),
    *(INBOX, SOURCE_PRESENCE, INGRESS, OTHER_INGRESS, RESULTS),
}
# (user, site of the broker) -> the topics that it may write, and those that it may read.
RIGHTS: dict[tuple[str, str], tuple[set[str], set[str]]] = {
    ("camera.door", "device"): ({INGRESS}, set()),
    ("street.head", "device"): (
        {f"{HEAD}/up/w", f"{BODY}/in/w", INBOX, f"{CUSTOM}/in/w"},
        {f"{HEAD}/up/w", f"{HEAD}/in/w", f"{HEAD}/tasks", f"{BODY}/up/w"},
    ),
    ("street.body", "device"): (
        {f"{BODY}/up/w", f"{HEAD}/in/w", f"{TAIL}/in/w", INBOX, f"{CUSTOM}/in/w"},
        {f"{BODY}/up/w", f"{BODY}/in/w", f"{BODY}/tasks", f"{TAIL}/up/w"},
    ),
    ("street.source", "device"): (
        {f"{HEAD}/in/w", SOURCE_PRESENCE, RESULTS},
        {INBOX, *(f"{stage}/up/w" for stage in STAGES), INGRESS, OTHER_INGRESS},
    ),
    ("viewer", "device"): (set(), {RESULTS, "elsewhere"}),
    ("monitor", "device"): (set(), {*(f"{stage}/up/w" for stage in STAGES), SOURCE_PRESENCE}),
    ("street.tail", "cloud"): (
        {f"{TAIL}/up/w", f"{BODY}/in/w", f"{CUSTOM}/in/w", INBOX},
        {f"{TAIL}/up/w", f"{TAIL}/in/w", f"{TAIL}/tasks", f"{CUSTOM}/up/w"},
    ),
    ("street.custom", "cloud"): (
        {f"{CUSTOM}/up/w", *(f"{stage}/in/w" for stage in STAGES), INBOX},
        {*(f"{stage}/up/w" for stage in STAGES), f"{CUSTOM}/in/w", f"{CUSTOM}/tasks"},
    ),
    # The bridge of the device's broker: it carries messages for the cloud there, and messages for the device back.
    ("broker.device", "cloud"): (
        {
            *(f"{TAIL}/in/w", f"{TAIL}/tasks", f"{CUSTOM}/in/w", f"{CUSTOM}/tasks"),
            *(f"{HEAD}/up/w", f"{BODY}/up/w", f"{OTHER}/up/w", SOURCE_PRESENCE),
        },
        {
            *(f"{HEAD}/in/w", f"{HEAD}/tasks", f"{BODY}/in/w", f"{BODY}/tasks", f"{OTHER}/in/w", f"{OTHER}/tasks"),
            *(f"{TAIL}/up/w", f"{CUSTOM}/up/w", INBOX, INGRESS, OTHER_INGRESS, RESULTS),
        },
    ),
    # Valid certificates of users that are not listed at this broker.
    ("street.head", "cloud"): (set(), set()),
    ("camera.door", "cloud"): (set(), set()),
    ("broker.cloud", "device"): (set(), set()),
    ("broker.device", "device"): (set(), set()),
    ("unlisted", "device"): (set(), set()),
    ("operator", "device"): (OPERATOR_TOPICS, OPERATOR_TOPICS),
    ("operator", "cloud"): (OPERATOR_TOPICS, OPERATOR_TOPICS),
}
# All of the above, and topics to which only the test user has rights.
TOPICS = sorted(OPERATOR_TOPICS | {f"{OTHER}/in/w", f"{OTHER}/up/w", f"{OTHER}/tasks", "elsewhere", "sparse/device"})


@pytest.fixture(scope="module", name="brokers")
def _brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SecureBroker]]:
    """The broker of each site."""
    folder = tmp_path_factory.mktemp("locks")
    with ExitStack() as stack:
        yield {
            site: stack.enter_context(start_secure_broker(folder, PIPELINE, site, extra_acl=EXTRA_ACL))
            for site in ("device", "cloud")
        }


@pytest.fixture(scope="module", name="forged")
def _forged(brokers: dict[str, SecureBroker]) -> dict[str, Path]:
    """Credentials that `sparse certs` does not make."""
    certs = brokers["device"].certs
    return {name: forge_credentials(certs, name) for name in (TEST_USER, "unlisted")}


async def may_publish(transport: MqttTransport, topic: str) -> bool:
    try:
        await transport.publish(topic, b"x", qos=1)
    except OperationRefused as error:
        return bool(error.fields["reason"] != "Not authorized")
    return True


@pytest.mark.parametrize(("user", "site"), RIGHTS, ids=lambda value: value)
@async_test
async def test_user_writes_only_its_topics(
    brokers: dict[str, SecureBroker], forged: dict[str, Path], user: str, site: str
) -> None:
    transport = brokers[site].create_transport(forged.get(user, Path(user)))
    await transport.connect()
    written = {topic for topic in TOPICS if await may_publish(transport, topic)}
    await transport.close()
    assert written == RIGHTS[user, site][0]


@pytest.mark.parametrize(("user", "site"), RIGHTS, ids=lambda value: value)
@async_test
async def test_user_reads_only_its_topics(
    brokers: dict[str, SecureBroker], forged: dict[str, Path], user: str, site: str
) -> None:
    """Mosquitto grants any subscription, and delivers only what the user may read."""
    transport = brokers[site].create_transport(forged.get(user, Path(user)))
    sender = brokers[site].create_transport(forged[TEST_USER])
    received: set[str] = set()
    await transport.connect()
    await sender.connect()
    await transport.subscribe("#", lambda delivery: received.add(delivery.topic), qos=1)
    for topic in TOPICS:
        await sender.publish(topic, b"x", qos=1)
    await transport.subscribe("answered/after/all/deliveries", DeliveryQueue())
    await transport.close()
    await sender.close()
    assert received == RIGHTS[user, site][1]


@async_test
async def test_shared_subscription_does_not_bypass_the_access_list(brokers: dict[str, SecureBroker]) -> None:
    head, operator = brokers["device"].create_transport("street.head"), brokers["device"].create_transport("operator")
    own, other = DeliveryQueue(), DeliveryQueue()
    await head.connect()
    await operator.connect()
    await head.subscribe(f"$share/street.head/{HEAD}/tasks", own, qos=1)
    await head.subscribe(f"$share/street.body/{BODY}/tasks", other, qos=1)
    await operator.publish(f"{BODY}/tasks", b"x", qos=1)
    await operator.publish(f"{HEAD}/tasks", b"x", qos=1)
    await own.next()
    await other.assert_empty(0)
    await head.close()
    await operator.close()


@async_test
async def test_will_does_not_bypass_the_access_list(brokers: dict[str, SecureBroker], forged: dict[str, Path]) -> None:
    """Otherwise any client could clear the presence record of any worker."""
    broker = brokers["device"]
    observer, camera = broker.create_transport(forged[TEST_USER]), broker.create_transport("camera.door")
    queue = DeliveryQueue()
    await observer.connect()
    await observer.subscribe(f"{HEAD}/up/w", queue)
    await observer.subscribe(INGRESS, queue)
    for topic in (f"{HEAD}/up/w", INGRESS):
        await camera.connect(will=Will(topic, b"will", retain=False))
        assert camera._connection is not None
        camera._connection.abort("without DISCONNECT, so that the broker publishes the will")
        await camera.close()
        camera = broker.create_transport("camera.door")
    assert (await queue.next()).topic == INGRESS  # its will follows the other, which was refused
    await observer.close()


@async_test
async def test_user_name_and_client_id_do_not_replace_the_certificate(brokers: dict[str, SecureBroker]) -> None:
    broker = brokers["device"]
    address = broker.address.replace("mqtts://", "mqtts://operator:any@")
    transport = MqttTransport(address, client_id="street.head", tls=tls_from_folder(broker.certs / "camera.door"))
    await transport.connect()
    assert await may_publish(transport, INGRESS)
    assert not await may_publish(transport, f"{HEAD}/in/w")
    assert not await may_publish(transport, f"{HEAD}/up/w")
    await transport.close()
