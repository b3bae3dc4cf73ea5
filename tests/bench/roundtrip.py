"""Tensor round trips: this project's line through a broker, against a new TCP connection and a pickle for each task.

Both in one run, in turns, each with its echo in a process of its own; medians, and their ratio (below 1.0: the line is
faster).

* line: a float32 tensor as a whole task, encoded, chunked, sent at QoS 0 through a broker, assembled and decoded as
  between two stages; the echo makes a torch tensor of it and sends that back in a task of its own.
* baseline: what the authors of the paper do, and do not need a broker for: connect, send the pickle of the torch tensor
  behind its length, the echo loads it, pickles it again, and answers on the same connection.

    python -m tests.bench.roundtrip --rounds 15 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import pickle
import socket
import statistics
import struct
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe

import torch

from brokers.dispatch.channel import MessageChannel
from brokers.mqtt.client import MqttTransport
from brokers.protocol.chunking import CHUNK_BYTES
from brokers.protocol.messages import Message, ReplyTo, Task, TensorContent, new_request_id
from brokers.protocol.safetensors_codec import from_torch, to_torch
from brokers.server.local_broker import LocalBroker, start_broker

KIB = 1 << 10
SIZES = tuple(size * KIB for size in (1, 16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10))
WAIT_S = 60.0


class TensorEndpoint:
    """One end of a line: tasks with one tensor go out and come in, as between two stages."""

    def __init__(self, address: str, mine: str, theirs: str, chunk_bytes: int) -> None:
        self.channel = MessageChannel(MqttTransport(address), chunk_bytes=chunk_bytes)
        self.received: asyncio.Queue[Message] = asyncio.Queue()
        self._mine, self._theirs = mine, theirs

    async def open(self) -> None:
        await self.channel.open()
        await self.channel.subscribe(self._mine, lambda topic, message: self.received.put_nowait(message))

    async def send(self, tensor: torch.Tensor) -> None:
        content = TensorContent({"x": from_torch(tensor)})
        task = Task(request_id=new_request_id(), content=content, reply_to=ReplyTo(self._mine))
        await self.channel.send(self._theirs, task)

    async def receive(self) -> torch.Tensor:
        message = await self.received.get()
        assert isinstance(message, Task)
        assert isinstance(message.content, TensorContent)
        return to_torch(message.content.tensors["x"])


async def _line_echo(address: str, chunk_bytes: int, pipe: Pipe) -> None:
    endpoint = TensorEndpoint(address, "bench/echo", "bench/client", chunk_bytes)
    await endpoint.open()
    pipe.send("ready")
    while True:
        await endpoint.send(await endpoint.receive())


def channel_echo(address: str, chunk_bytes: int, pipe: Pipe) -> None:
    torch.set_num_threads(1)
    asyncio.run(_line_echo(address, chunk_bytes, pipe))


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    """As the baseline's authors do: pieces are collected until all are there."""
    pieces, missing = [], count
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


def baseline_round_trip(port: int, tensor: torch.Tensor) -> torch.Tensor:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        _send_pickled(sock, tensor)
        return _receive_pickled(sock)


async def measure(
    address: str, chunk_bytes: int, baseline_port: int, sizes: list[int], rounds: int
) -> list[dict[str, float]]:
    """Return a row for each size: medians in ms of both, and their ratio."""
    endpoint = TensorEndpoint(address, "bench/client", "bench/echo", chunk_bytes)
    await endpoint.open()
    async with asyncio.timeout(WAIT_S * len(sizes)):
        rows = [await _measure_size(endpoint, baseline_port, size, rounds) for size in sizes]
    await endpoint.channel.close()
    return rows


async def _measure_size(endpoint: TensorEndpoint, baseline_port: int, size: int, rounds: int) -> dict[str, float]:
    """The row of one size."""
    tensor = torch.randn(size // 4)
    line_ms, baseline_ms = [], []
    for turn in range(rounds + 1):
        begin = time.perf_counter()
        await endpoint.send(tensor)
        came = await endpoint.receive()
        middle = time.perf_counter()
        back = baseline_round_trip(baseline_port, tensor)
        end = time.perf_counter()
        if turn == 0:  # also warms both up
            assert torch.equal(came, tensor)
            assert torch.equal(back, tensor)
            continue
        line_ms.append(1e3 * (middle - begin))
        baseline_ms.append(1e3 * (end - middle))
    line, baseline = statistics.median(line_ms), statistics.median(baseline_ms)
    return {"bytes": size, "line_ms": line, "baseline_ms": baseline, "ratio": line / baseline}


def _child(target: Callable[..., None], *arguments: object) -> tuple[multiprocessing.process.BaseProcess, object]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    return process, here.recv()


def run(broker: LocalBroker, chunk_bytes: int, sizes: list[int], rounds: int) -> list[dict[str, float]]:
    line, _ = _child(channel_echo, broker.address, chunk_bytes)
    baseline, port = _child(baseline_echo)
    try:
        assert isinstance(port, int)
        return asyncio.run(measure(broker.address, chunk_bytes, port, sizes, rounds))
    finally:
        for process in (line, baseline):
            process.kill()
            process.join()


def _show(chunk_bytes: int, kind: str, rows: list[dict[str, float]]) -> None:
    print(f"\nround trips through {kind}, chunks of {chunk_bytes // KIB} KiB, medians in ms")
    print(f"{'tensor':>10} {'line':>9} {'baseline':>9} {'ratio':>6}")
    for row in rows:
        size = f"{row['bytes'] // KIB} KiB" if row["bytes"] < 1 << 20 else f"{int(row['bytes']) >> 20} MiB"
        print(f"{size:>10} {row['line_ms']:9.2f} {row['baseline_ms']:9.2f} {row['ratio']:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Tensor round trips through a broker, against TCP and pickle without one."
    )
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
