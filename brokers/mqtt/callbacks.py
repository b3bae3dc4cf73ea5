"""Calls of the application's callbacks. An exception in one is logged, without the payload, and ends no connection."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable

from brokers.mqtt.topic_filters import Subscription
from brokers.protocol.transport import Delivery, Properties

log = logging.getLogger(__name__)

ReconnectCallback = Callable[[], Awaitable[None]]


def provide_buffer(
    subscriptions: Iterable[Subscription], topic: str, properties: Properties, payload_bytes: int
) -> memoryview | None:
    """Return the buffer from the first subscription that provides one; None where none does."""
    for subscription in subscriptions:
        if subscription.buffer_provider is None:
            continue
        try:
            buffer = subscription.buffer_provider(topic, properties, payload_bytes)
        except Exception:
            log.exception("the buffer provider of %s failed on %d bytes", subscription.topic_filter, payload_bytes)
            continue
        if buffer is not None:
            return buffer
    return None


def call_handler(subscription: Subscription, delivery: Delivery) -> None:
    """Call the handler. If it raises, acknowledge the delivery: redelivered, it would raise again."""
    try:
        subscription.handler(delivery)
    except Exception:
        log.exception("the handler of %s failed on %d bytes", subscription.topic_filter, delivery.payload.nbytes)
        if delivery.ack is not None:
            delivery.ack()


async def run_reconnect_callbacks(callbacks: Iterable[ReconnectCallback], address: str) -> None:
    """Await each callback in turn."""
    for callback in callbacks:
        try:
            await callback()
        except Exception:
            log.exception("a callback after the reconnection to %s failed", address)
