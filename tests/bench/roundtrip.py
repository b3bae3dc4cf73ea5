"""Benchmark: tensor round trips through a broker, compared with three other ways to send a tensor.

All in one run, in turns, each with an echo in a child process; medians in ms, and the ratio of `channel` to `baseline`.

* channel: a float32 tensor as a task, encoded, chunked, sent at QoS 0 through a broker, reassembled and decoded as
  between two stages; the echo makes it a torch tensor and sends that back in a separate task.
* baseline: the pattern of the paper's authors, without a broker: a new TCP connection, a pickled torch tensor behind
  its length; the echo unpickles it, pickles it again, and answers on the same connection.
* paho: the same messages in the same chunks through the same broker, published and received by a plain paho-mqtt
  client: what our publish path and our receive path save.
* library: the same channel with `safetensors.numpy` in place of our codec: what our codec saves.

    python -m tests.bench.roundtrip --rounds 15 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import pickle
import queue
import socket
import statistics
import struct
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from typing import Protocol

import safetensors.numpy
import torch
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties

from brokers.dispatch.channel import MessageChannel
from brokers.mqtt.client import MqttTransport
from brokers.protocol.broker_url import parse_address
from brokers.protocol.chunking import CHUNK_BYTES, ChunkHeader, split_into_chunks
from brokers.protocol.codec import decode, encode
from brokers.protocol.messages import BinaryContent, Content, Message, ReplyTo, Task, TensorContent, new_request_id
from brokers.protocol.safetensors_codec import from_torch, to_torch
from brokers.protocol.transport import Properties
from brokers.server.local_broker import LocalBroker, start_broker

KIB = 1 << 10
SIZES = tuple(size * KIB for size in (1, 16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10))
WAIT_S = 60.0
COLUMNS = ("channel", "baseline", "paho", "library")


class Endpoint(Protocol):
    """One end of a connection on which tensors go out and come in."""

    async def open(self) -> None: ...

    async def send(self, tensor: torch.Tensor) -> None: ...

    async def receive(self) -> torch.Tensor: ...

    async def close(self) -> None: ...


def task_with(content: Content, inbox: str) -> Task:
    return Task(request_id=new_request_id(), content=content, reply_to=ReplyTo(inbox))


def content_of(message: Message) -> Content:
    assert isinstance(message, Task)
    return message.content


class ChannelEndpoint:
    """Tasks with one tensor, as between two stages."""

    def __init__(self, address: str, chunk_bytes: int, inbox: str, peer: str) -> None:
        self._channel = MessageChannel(MqttTransport(address), chunk_bytes=chunk_bytes)
        self._received: asyncio.Queue[Message] = asyncio.Queue()
        self._inbox = inbox
        self._peer = peer

    async def open(self) -> None:
        await self._channel.open()
        await self._channel.subscribe(self._inbox, lambda topic, message: self._received.put_nowait(message))

    async def send(self, tensor: torch.Tensor) -> None:
        await self._channel.send(self._peer, task_with(self.encode(tensor), self._inbox))

    async def receive(self) -> torch.Tensor:
        return self.decode(content_of(await self._received.get()))

    async def close(self) -> None:
        await self._channel.close()

    def encode(self, tensor: torch.Tensor) -> Content:
        return TensorContent({"x": from_torch(tensor)})

    def decode(self, content: Content) -> torch.Tensor:
        assert isinstance(content, TensorContent)
        return to_torch(content.tensors["x"])


class LibraryEndpoint(ChannelEndpoint):
    """The same with the safetensors library: its bodies travel as bytes that our codec leaves alone."""

    def encode(self, tensor: torch.Tensor) -> Content:
        return BinaryContent("application/octet-stream", safetensors.numpy.save({"x": tensor.numpy()}))

    def decode(self, content: Content) -> torch.Tensor:
        assert isinstance(content, BinaryContent)
        return torch.from_numpy(safetensors.numpy.load(bytes(content.data))["x"])


class PahoEndpoint:
    """The same messages in the same chunks, by a plain paho-mqtt client with its network thread."""

    def __init__(self, address: str, chunk_bytes: int, inbox: str, peer: str) -> None:
        self._address = parse_address(address)
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._received: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._partial = bytearray()
        self._chunk_bytes = chunk_bytes
        self._inbox = inbox
        self._peer = peer

    async def open(self) -> None:
        self._client.on_message = self._on_message
        self._client.on_subscribe = lambda *_: self._received.put(None)
        self._client.connect(self._address.host, self._address.port)
        self._client.loop_start()
        self._client.subscribe(self._inbox)
        assert self._received.get(timeout=WAIT_S) is None

    async def send(self, tensor: torch.Tensor) -> None:
        packet = encode(task_with(TensorContent({"x": from_torch(tensor)}), self._inbox))
        for header, slices in split_into_chunks(tuple(map(memoryview, packet.buffers)), self._chunk_bytes):
            properties = PahoProperties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.ContentType = packet.properties.content_type
            properties.CorrelationData = packet.properties.correlation_data
            properties.ResponseTopic = packet.properties.response_topic
            properties.UserProperty = [*packet.properties.user_properties, ("chunk", str(header))]
            self._client.publish(self._peer, b"".join(slices), properties=properties)

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        user = dict(message.properties.UserProperty)  # type: ignore[union-attr]  # paho sets properties by name
        if ChunkHeader.parse(user["chunk"]).offset == 0:
            self._partial = bytearray()
        self._partial += message.payload
        if len(self._partial) == ChunkHeader.parse(user["chunk"]).total_bytes:
            self._received.put(memoryview(self._partial))

    async def receive(self) -> torch.Tensor:
        payload = self._received.get(timeout=WAIT_S)
        assert payload is not None
        user = (("sparse", "1"), ("kind", "task"))
        content = content_of(decode(Properties("", bytes(16), self._inbox, None, user), payload))
        assert isinstance(content, TensorContent)
        return to_torch(content.tensors["x"])

    async def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


ENDPOINTS: dict[str, Callable[[str, int, str, str], Endpoint]] = {
    "channel": ChannelEndpoint,
    "paho": PahoEndpoint,
    "library": LibraryEndpoint,
}


def broker_echo(kind: str, address: str, chunk_bytes: int, pipe: Pipe) -> None:
    async def echo() -> None:
        endpoint = ENDPOINTS[kind](address, chunk_bytes, f"bench/{kind}/echo", f"bench/{kind}/client")
        await endpoint.open()
        pipe.send("ready")
        while True:
            await endpoint.send(await endpoint.receive())

    torch.set_num_threads(1)
    asyncio.run(echo())


# The baseline -------------------------------------------------------------------------------------------------------


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    """As the authors do: collect pieces until all have arrived."""
    pieces = []
    missing = count
    while missing:
        piece = sock.recv(min(missing, 1 << 20))
        if not piece:
            raise ConnectionError("the other side closed")
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _send_pickled(sock: socket.socket, tensor: torch.Tensor) -> None:
    data = pickle.dumps(tensor)
    sock.sendall(struct.pack("!Q", len(data)) + data)


def _receive_pickled(sock: socket.socket) -> torch.Tensor:
    (length,) = struct.unpack("!Q", _receive_exactly(sock, 8))
    tensor: torch.Tensor = pickle.loads(_receive_exactly(sock, length))  # noqa: S301 - the baseline does
    return tensor


def baseline_echo(pipe: Pipe) -> None:
    torch.set_num_threads(1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        while True:
            with server.accept()[0] as sock:
                _send_pickled(sock, _receive_pickled(sock))


class BaselineEndpoint:
    """A new connection for each round trip."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sock: socket.socket

    async def open(self) -> None:
        pass

    async def send(self, tensor: torch.Tensor) -> None:
        self._sock = socket.create_connection(("127.0.0.1", self._port))
        _send_pickled(self._sock, tensor)

    async def receive(self) -> torch.Tensor:
        with self._sock:
            return _receive_pickled(self._sock)

    async def close(self) -> None:
        pass


# Measurement --------------------------------------------------------------------------------------------------------


async def measure(endpoints: dict[str, Endpoint], sizes: list[int], rounds: int) -> list[dict[str, float]]:
    """Return a row for each size: the medians in ms of all columns, and the ratio of channel to baseline."""
    for endpoint in endpoints.values():
        await endpoint.open()
    async with asyncio.timeout(WAIT_S * len(sizes)):
        rows = [await _measure_size(endpoints, size, rounds) for size in sizes]
    for endpoint in endpoints.values():
        await endpoint.close()
    return rows


async def _measure_size(endpoints: dict[str, Endpoint], size: int, rounds: int) -> dict[str, float]:
    tensor = torch.randn(size // 4)
    times_ms: dict[str, list[float]] = {name: [] for name in endpoints}
    for turn in range(rounds + 1):
        for name, endpoint in endpoints.items():
            begin_s = time.perf_counter()
            await endpoint.send(tensor)
            echoed = await endpoint.receive()
            duration_ms = 1e3 * (time.perf_counter() - begin_s)
            if turn == 0:  # which also warms up
                assert torch.equal(echoed, tensor), name
            else:
                times_ms[name].append(duration_ms)
    medians = {f"{name}_ms": statistics.median(values) for name, values in times_ms.items()}
    return {"bytes": size, **medians, "ratio": medians["channel_ms"] / medians["baseline_ms"]}


def _start_child(target: Callable[..., None], *arguments: object) -> tuple[multiprocessing.process.BaseProcess, object]:
    """Start an echo; return its process and what it sends when it is ready."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    return process, here.recv()


async def _measure_broker(
    address: str, chunk_bytes: int, port: int, sizes: list[int], rounds: int
) -> list[dict[str, float]]:
    endpoints: dict[str, Endpoint] = {
        kind: make(address, chunk_bytes, f"bench/{kind}/client", f"bench/{kind}/echo")
        for kind, make in ENDPOINTS.items()
    }
    endpoints["baseline"] = BaselineEndpoint(port)
    return await measure({name: endpoints[name] for name in COLUMNS}, sizes, rounds)


def run(broker: LocalBroker, chunk_bytes: int, sizes: list[int], rounds: int) -> list[dict[str, float]]:
    children = []
    try:
        for kind in ENDPOINTS:
            children.append(_start_child(broker_echo, kind, broker.address, chunk_bytes)[0])  # noqa: PERF401
        baseline, port = _start_child(baseline_echo)
        children.append(baseline)
        assert isinstance(port, int)
        return asyncio.run(_measure_broker(broker.address, chunk_bytes, port, sizes, rounds))
    finally:
        for process in children:
            process.kill()
            process.join()


def _show(chunk_bytes: int, kind: str, rows: list[dict[str, float]]) -> None:
    print(f"\nround trips through {kind}, chunks of {chunk_bytes // KIB} KiB, medians in ms")
    print(f"{'tensor':>10}" + "".join(f"{name:>10}" for name in COLUMNS) + f"{'ratio':>8}")
    for row in rows:
        size = f"{row['bytes'] // KIB} KiB" if row["bytes"] < 1 << 20 else f"{int(row['bytes']) >> 20} MiB"
        print(f"{size:>10}" + "".join(f"{row[f'{name}_ms']:10.2f}" for name in COLUMNS) + f"{row['ratio']:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tensor round trips: our channel, TCP and pickle, paho, safetensors.")
    parser.add_argument("--rounds", type=int, default=15, help="round trips of each kind and size (default 15)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[size // KIB for size in SIZES], help="in KiB")
    chunks = [CHUNK_BYTES // KIB]
    parser.add_argument("--chunks", type=int, nargs="*", default=chunks, help="chunk sizes in KiB, one table each")
    parser.add_argument("--broker", choices=("mosquitto", "embedded"), default="mosquitto")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables = {}
    with start_broker(kind=arguments.broker) as broker:
        for chunk in arguments.chunks:
            rows = run(broker, chunk * KIB, [size * KIB for size in arguments.sizes], arguments.rounds)
            _show(chunk * KIB, broker.kind, rows)
            tables[chunk * KIB] = rows
    if arguments.json:
        print(json.dumps({"broker": arguments.broker, "rounds": arguments.rounds, "by_chunk_bytes": tables}))


if __name__ == "__main__":
    main()
