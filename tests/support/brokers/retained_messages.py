"""The retained messages of a broker."""

from __future__ import annotations

import asyncio

from brokers.doctor.probe_client import BrokerProbe
from brokers.protocol.broker_url import parse_address


def retained_topics(port: int) -> list[str]:
    """The topics of all retained messages below `sparse/`."""

    async def read() -> list[str]:
        async with BrokerProbe(parse_address(f"mqtt://127.0.0.1:{port}")).client() as client:
            await client.subscribe("sparse/#")
            return [message.header.topic for message in await client.receive_all(100, 0.5)]

    return asyncio.run(read())
