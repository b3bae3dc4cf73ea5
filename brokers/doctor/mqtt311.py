"""Whether a broker that does not speak MQTT 5 speaks MQTT 3.1.1: one CONNECT of that version, one answer."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from dataclasses import dataclass

from brokers.mqtt.publish_packet import encode_varint
from brokers.mqtt.socket_connect import TlsConfig
from brokers.protocol.broker_url import BrokerAddress

ACCEPTED, NOT_AUTHORIZED = 0, (4, 5)  # return codes: MQTT 3.1.1, table 3.1
CONNACK_TIMEOUT_S = 5.0
_CONNACK_BYTES = 4


@dataclass(frozen=True, slots=True)
class Connack311:
    """The return code of a CONNACK of MQTT 3.1.1."""

    code: int

    @property
    def is_mqtt311(self) -> bool:
        """Whether it was of the version, be it that it let nobody in."""
        return self.code in (ACCEPTED, *NOT_AUTHORIZED)


def encode_connect(client_id: str, user: str | None, password: str | None) -> bytes:
    """Return a CONNECT of MQTT 3.1.1 with a clean session (its section 3.1)."""
    flags = 0x02 | (0x80 if user is not None else 0) | (0x40 if user is not None and password is not None else 0)
    texts = [client_id, *((user,) if user is not None else ()), *((password,) if flags & 0x40 and password else ())]
    body = b"\x00\x04MQTT\x04" + struct.pack("!BH", flags, 10)
    body += b"".join(struct.pack("!H", len(text.encode())) + text.encode() for text in texts)
    return b"\x10" + encode_varint(len(body)) + body


def decode_connack(data: bytes) -> Connack311 | None:
    """Return what a CONNACK says; None for bytes that are none."""
    if len(data) < _CONNACK_BYTES or data[:2] != b"\x20\x02" or data[2] > 1:
        return None
    return Connack311(data[3])


async def probe_mqtt311(address: BrokerAddress, tls: TlsConfig, client_id: str) -> Connack311 | None:
    """Return what the broker answers to a client of MQTT 3.1.1; None when that is no CONNACK, or nothing in 5 s."""
    with contextlib.suppress(OSError, TimeoutError, EOFError):
        async with asyncio.timeout(CONNACK_TIMEOUT_S):
            if address.is_unix_socket:
                reader, writer = await asyncio.open_unix_connection(address.host)
            else:
                context = tls.create_context() if address.is_tls else None
                reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
            try:
                writer.write(encode_connect(client_id, address.user, address.password))
                return decode_connack(await reader.readexactly(_CONNACK_BYTES))
            finally:
                writer.close()
                await writer.wait_closed()
    return None
