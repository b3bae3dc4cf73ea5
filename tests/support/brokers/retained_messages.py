"""What a broker keeps for subscribers that come late."""

from __future__ import annotations

import asyncio

from brokers.doctor.probe_client import Visit


def left_at(port: int) -> list[str]:
    """The topics of all retained messages that are there."""

    async def test() -> list[str]:
        async with Visit.to(f"mqtt://127.0.0.1:{port}").visitor() as late:
            await late.subscribe("sparse/#")
            return [heard.topic for heard in await late.hear_all(100, 0.5)]

    return asyncio.run(test())
