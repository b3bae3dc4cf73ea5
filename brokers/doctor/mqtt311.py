"""Finds out whether a broker without MQTT 5 speaks MQTT 3.1.1: one CONNECT of that version, and its CONNACK."""

from __future__ import annotations

import asyncio
import contextlib
import struct

from brokers.mqtt.publish_packet import encode_varint
from brokers.mqtt.socket_connect import TlsConfig
from brokers.protocol.broker_url import BrokerAddress

# Return codes (MQTT 3.1.1, table 3.1); any other is not of this version.
ACCEPTED = 0
NOT_AUTHORIZED = (4, 5)
CONNACK_TIMEOUT_S = 5.0
_CONNACK_BYTES = 4


def encode_connect(client_id: str, user: str | None, password: str | None) -> bytes:
    """A CONNECT packet with a clean session (MQTT 3.1.1, section 3.1)."""
    texts = [client_id]
    flags = 0x02
    if user is not None:
        texts.append(user)
        flags |= 0x80
        if password is not None:
            texts.append(password)
            flags |= 0x40
    body = b"\x00\x04MQTT\x04" + struct.pack("!BH", flags, 10)
    for text in texts:
        body += struct.pack("!H", len(text.encode())) + text.encode()
    return b"\x10" + encode_varint(len(body)) + body


def decode_connack(data: bytes) -> int | None:
    """The return code of a CONNACK packet; None for other bytes."""
    if len(data) < _CONNACK_BYTES or data[:2] != b"\x20\x02" or data[2] > 1:
        return None
    return data[3]


async def probe_mqtt311(address: BrokerAddress, tls: TlsConfig, client_id: str) -> int | None:
    """The return code for a client of MQTT 3.1.1, ACCEPTED or NOT_AUTHORIZED; None if the broker does not speak it."""
    with contextlib.suppress(OSError, TimeoutError, EOFError):
        async with asyncio.timeout(CONNACK_TIMEOUT_S):
            if address.is_unix_socket:
                reader, writer = await asyncio.open_unix_connection(address.host)
            else:
                context = tls.create_context() if address.is_tls else None
                reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
            try:
                writer.write(encode_connect(client_id, address.user, address.password))
                code = decode_connack(await reader.readexactly(_CONNACK_BYTES))
                return code if code in (ACCEPTED, *NOT_AUTHORIZED) else None
            finally:
                writer.close()
                await writer.wait_closed()
    return None
