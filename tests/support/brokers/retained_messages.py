"""What a broker keeps for subscribers that come late."""

from __future__ import annotations

import asyncio

from brokers.doctor.probe_client import BrokerProbe
from brokers.protocol.broker_url import parse_address


def retained_topics(port: int) -> list[str]:
    """The topics of all retained messages that are there."""

    async def test() -> list[str]:
        async with BrokerProbe(parse_address(f"mqtt://127.0.0.1:{port}")).client() as late:
            await late.subscribe("sparse/#")
            return [heard.header.topic for heard in await late.receive_all(100, 0.5)]

    return asyncio.run(test())
