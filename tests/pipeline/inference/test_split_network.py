"""A network in two processes gives what it gives in one: torch tensors through a real broker, both ways."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.errors import RequestFailed
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_torch, to_torch
from brokers.server.local_broker import LocalBroker
from sources.client.offloader import Offloader
from tests.support.brokers.presence import wait_for_workers
from tests.support.pipelines.pipeline_files import write_pipeline_file
from tests.support.pipelines.processes import process_sandbox
from tests.support.training.factories import TinyNetwork

SEED = 11


@pytest.fixture(scope="module", name="halves")
def _halves(embedded_broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pipeline]]:
    """Three pipelines of one network: both parts plain, in batches, and with float16 on the wire; one worker each."""
    folder = tmp_path_factory.mktemp("halves")
    network: dict[str, Any] = {"model": "tests.support.training.factories:tiny_network", "cuts": [2], "seed": SEED}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "batched": {"max_batch": 4, "max_wait_ms": 100},
        "half": {"wire": "float16"},
    }
    with process_sandbox(folder) as sandbox:
        found = {}
        for name, settings in variants.items():
            stages = [{"name": "head", **settings}, {"name": "tail", **settings}]
            found[name] = load_pipeline(write_pipeline_file(folder, stages, name=name, **network))
            for stage in stages:
                sandbox.start_sparse("stage", found[name].path, stage["name"], "--broker", embedded_broker.address)
        wait_for_workers(embedded_broker.address, lambda workers: len(workers) == 2 * len(variants))
        yield found


@pytest.fixture(scope="module", name="whole")
def _whole() -> TinyNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return TinyNetwork().eval()


def inputs(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 6, generator=generator) for _ in range(count)]


def test_tensors_in_and_out_are_those_of_the_unsplit_network(
    halves: dict[str, Pipeline], embedded_broker: LocalBroker, whole: TinyNetwork
) -> None:
    async def ask() -> tuple[list[torch.Tensor], dict[str, torch.Tensor], Any]:
        async with Offloader(halves["plain"], broker=embedded_broker.address, window=8) as offload:
            single = await asyncio.gather(*(offload(x) for x in inputs(20)))
            table = await offload({"input": inputs(1)[0]})
            array = await offload(inputs(1)[0].numpy())
            return single, table, array

    single, table, array = asyncio.run(ask())
    with torch.inference_mode():
        for x, found in zip(inputs(20), single, strict=True):
            assert isinstance(found, torch.Tensor)
            assert torch.equal(found, whole(x))
        assert list(table) == ["output"]
        assert torch.equal(table["output"], whole(inputs(1)[0]))
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, whole(inputs(1)[0]).numpy())


def test_batches_give_what_the_unsplit_network_gives(
    halves: dict[str, Pipeline], embedded_broker: LocalBroker, whole: TinyNetwork
) -> None:
    async def ask() -> list[tuple[torch.Tensor, list[int]]]:
        async with Offloader(halves["batched"], broker=embedded_broker.address, window=12) as offload:
            contents = [TensorContent({"input": from_torch(x)}) for x in inputs(24)]
            answers = await asyncio.gather(*(offload.request(content) for content in contents))
        found = []
        for answer in answers:
            assert isinstance(answer.result.content, TensorContent)
            found.append((to_torch(answer.result.content.tensors["output"]), [hop.batch for hop in answer.result.hops]))
        return found

    answers = asyncio.run(ask())
    with torch.inference_mode():
        for x, (found, _) in zip(inputs(24), answers, strict=True):
            torch.testing.assert_close(found, whole(x), rtol=1e-5, atol=1e-6)
    assert max(batches[0] for _, batches in answers) == 4
    assert max(batches[1] for _, batches in answers) > 1


def test_float16_on_the_wire_halves_what_crosses_and_rounds_it(
    halves: dict[str, Pipeline], embedded_broker: LocalBroker, whole: TinyNetwork
) -> None:
    async def ask(name: str) -> tuple[torch.Tensor, int]:
        async with Offloader(halves[name], broker=embedded_broker.address) as offload:
            answer = await offload.request(TensorContent({"input": from_torch(inputs(1)[0])}))
        assert isinstance(answer.result.content, TensorContent)
        return to_torch(answer.result.content.tensors["output"]), answer.result.hops[0].bytes_out

    exact, exact_bytes = asyncio.run(ask("plain"))
    rounded, rounded_bytes = asyncio.run(ask("half"))
    assert rounded_bytes == exact_bytes / 2
    assert rounded.dtype == torch.float32  # the last stage answers in full
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=1e-2)


def test_a_tensor_of_the_wrong_shape_fails_its_request_alone(
    halves: dict[str, Pipeline], embedded_broker: LocalBroker, whole: TinyNetwork
) -> None:
    async def ask() -> list[Any]:
        async with Offloader(halves["batched"], broker=embedded_broker.address) as offload:
            values = [inputs(1)[0], torch.zeros(1, 7), {"x": inputs(1)[0], "y": torch.zeros(1)}, b"\xff\xd8\xff none"]
            return await asyncio.gather(*(offload(value) for value in values), return_exceptions=True)

    good, shape, names, picture = asyncio.run(ask())
    with torch.inference_mode():
        torch.testing.assert_close(good, whole(inputs(1)[0]), rtol=1e-5, atol=1e-6)
    assert isinstance(shape, RequestFailed)
    assert (shape.stage, shape.error) == ("head", "RuntimeError")
    assert isinstance(names, RequestFailed)
    assert "expects ['input'], got ['x', 'y']" in names.reason
    assert isinstance(picture, RequestFailed)
    assert picture.error == "BadPayload"
