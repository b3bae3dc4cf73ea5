"""What paho takes for its socket: it sends into our queue, and receives only the packets set aside for it."""

from __future__ import annotations

from brokers.mqtt.socket_loop import PacketSocket


class PahoSocket:
    """Bytes to a pump, and bytes that somebody puts into `inbox`."""

    def __init__(self, pump: PacketSocket, descriptor: int) -> None:
        self._pump = pump
        self._descriptor = descriptor
        self.receive_buffer = bytearray()

    def send(self, data: bytes) -> int:
        self._pump.push((memoryview(bytes(data)),))
        return len(data)

    def recv(self, count: int) -> bytes:
        if not self.receive_buffer:
            raise BlockingIOError
        data = bytes(self.receive_buffer[:count])
        del self.receive_buffer[:count]
        return data

    def fileno(self) -> int:
        return self._descriptor

    def setblocking(self, flag: bool) -> None:
        """It never blocks."""

    def close(self) -> None:
        """Nothing: the connection closes the real socket when its queue has left."""
