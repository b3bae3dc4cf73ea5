"""What paho takes for its socket: it sends into our queue, and receives only the packets set aside for it."""

from __future__ import annotations

from brokers.mqtt.socket_loop import Pump


class PahoSocket:
    """Bytes to a pump, and bytes that somebody puts into `inbox`."""

    def __init__(self, pump: Pump, descriptor: int) -> None:
        self._pump = pump
        self._descriptor = descriptor
        self.inbox = bytearray()

    def send(self, data: bytes) -> int:
        self._pump.push((memoryview(bytes(data)),))
        return len(data)

    def recv(self, count: int) -> bytes:
        if not self.inbox:
            raise BlockingIOError
        data = bytes(self.inbox[:count])
        del self.inbox[:count]
        return data

    def fileno(self) -> int:
        return self._descriptor

    def setblocking(self, flag: bool) -> None:
        """It never blocks."""

    def close(self) -> None:
        """Nothing: the connection closes the real socket when its queue has left."""
