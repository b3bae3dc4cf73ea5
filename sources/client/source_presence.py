"""The presence record of a source: a retained message, renewed each second, removed when the source ends."""

import asyncio
import logging
import re
import secrets
from collections.abc import Callable

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import SourceLoad, SourceRecord
from brokers.dispatch.presence_publisher import PresencePublisher, describe_process
from brokers.mqtt.client import MqttTransport, create_transport
from brokers.mqtt.socket_connect import OperationRefused

log = logging.getLogger(__name__)

# A source that ends tries this long to remove its record: its broker may be gone for good.
_REMOVE_TIMEOUT_S = 1.0
_ANNOUNCE_TIMEOUT_S = 5.0
_NAME_CHARACTERS = 64


def create_source_transport(name: str, address: str) -> MqttTransport:
    """A transport for source `name`, not yet connected."""
    # Unique: the broker disconnects the older of two clients with one id.
    return create_transport(address, client_id=f"source.{name}.{secrets.token_hex(4)}")


class SourcePresence(PresencePublisher[SourceRecord]):
    """Keeps the presence record of one source, with a new `load()` each second. A failure never stops the source."""

    def __init__(self, channel: MessageChannel, pipeline: Pipeline, name: str, load: Callable[[], SourceLoad]) -> None:
        # One topic level. The end of a long name is kept: it distinguishes sources of one pipeline file.
        topic_name = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[-_NAME_CHARACTERS:] or "source"
        record = SourceRecord(
            source=topic_name, pipeline=pipeline.name, site=pipeline.source.site, **describe_process()
        )
        super().__init__(channel.transport, record)
        self._load = load
        self._reporter: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Publish the record, then renew it each second and after each reconnection. The channel must be open.

        Raises `OperationRefused` where the broker's access control does not allow this identity to be a source: its
        requests would be dropped silently. All other failures are logged.
        """
        try:
            async with asyncio.timeout(_ANNOUNCE_TIMEOUT_S):
                await self._report()
        except OperationRefused:
            raise
        except Exception as error:  # noqa: BLE001 - the next report may succeed
            self.log_failure(error)
        self._transport.on_reconnect(self._on_reconnect)
        self._reporter = asyncio.create_task(self.report_periodically(self._report, Exception), name="source-presence")

    async def stop(self) -> None:
        """Publish the state `stopped`, then remove the record. Waits a second at most, never raises; idempotent."""
        reporter, self._reporter = self._reporter, None
        if reporter is None:
            return
        reporter.cancel()
        await asyncio.gather(reporter, return_exceptions=True)
        try:
            async with asyncio.timeout(_REMOVE_TIMEOUT_S):
                await self.remove(load=self._load())
        except Exception as error:  # noqa: BLE001 - the source ends anyway
            log.info("source %s: presence record not removed: %s", self.record.source, error)

    async def _on_reconnect(self) -> None:
        self.report_soon()  # the broker may have lost the record, or published the will

    async def _report(self) -> None:
        await self.publish(load=self._load())
