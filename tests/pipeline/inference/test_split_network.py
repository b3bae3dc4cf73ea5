"""A split network gives the results of the unsplit one, from torch tensors to torch tensors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brokers.errors import RequestFailed
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_torch, to_torch
from tests.support.pipelines.served_pipeline import ServedPipeline, with_pipeline
from tests.support.training.factories import TinyNetwork

SEED = 11
NETWORK: dict[str, Any] = {"model": "tests.support.training.factories:tiny_network", "cuts": [2], "seed": SEED}


def stages(**settings: Any) -> list[dict[str, Any]]:
    return [{"name": "head", **settings}, {"name": "tail", **settings}]


def make_inputs(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 6, generator=generator) for _ in range(count)]


def run_unsplit(x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(SEED)
        output: torch.Tensor = TinyNetwork().eval()(x)
        return output


def test_outputs_equal_the_unsplit_network(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        await served.add_all()
        async with served.offloader(window=8) as offload:
            outputs = await asyncio.gather(*(offload(x) for x in make_inputs(20)))
            (x,) = make_inputs(1)
            table = await offload({"input": x})
            array = await offload(x.numpy())
        for x, output in zip(make_inputs(20), outputs, strict=True):
            assert isinstance(output, torch.Tensor)
            assert torch.equal(output, run_unsplit(x))
        assert torch.equal(table["output"], outputs[0])
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, outputs[0].numpy())

    with_pipeline(tmp_path, test, *stages(), **NETWORK)


def test_batched_outputs_equal_the_unsplit_network(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        await served.add_all()
        async with served.offloader(window=12) as offload:
            contents = [TensorContent({"input": from_torch(x)}) for x in make_inputs(24)]
            responses = await asyncio.gather(*(offload.request(content) for content in contents))
        for x, response in zip(make_inputs(24), responses, strict=True):
            assert isinstance(response.result.content, TensorContent)
            output = to_torch(response.result.content.tensors["output"])
            torch.testing.assert_close(output, run_unsplit(x), rtol=1e-5, atol=1e-6)
            assert [hop.batch for hop in response.result.hops] == [4, 4]

    # A batch waits until it is full: the number of requests is a multiple of its size.
    with_pipeline(tmp_path, test, *stages(max_batch=4, max_wait_ms=60_000), **NETWORK)


def test_float16_wire_halves_the_bytes_and_rounds(tmp_path: Path) -> None:
    (x,) = make_inputs(1)
    outputs: list[torch.Tensor] = []
    sent_bytes: list[int] = []

    async def test(served: ServedPipeline) -> None:
        await served.add_all()
        async with served.offloader() as offload:
            response = await offload.request(TensorContent({"input": from_torch(x)}))
        assert isinstance(response.result.content, TensorContent)
        outputs.append(to_torch(response.result.content.tensors["output"]))
        sent_bytes.append(response.result.hops[0].bytes_out)

    with_pipeline(tmp_path, test, *stages(), **NETWORK)
    with_pipeline(tmp_path, test, *stages(wire="float16"), **NETWORK)
    exact, rounded = outputs
    assert rounded.dtype == torch.float32  # the last stage does not round
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=1e-2)
    assert sent_bytes[1] == sent_bytes[0] / 2


def test_bad_tensor_fails_its_request_alone(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        await served.add_all()
        (x,) = make_inputs(1)
        values = [x, torch.zeros(1, 7), {"x": x, "y": torch.zeros(1)}, b"\xff\xd8\xff none"]
        async with served.offloader() as offload:
            results: list[Any] = await asyncio.gather(*(offload(value) for value in values), return_exceptions=True)
        good, shape, names, image = results
        torch.testing.assert_close(good, run_unsplit(x), rtol=1e-5, atol=1e-6)
        assert [type(error) for error in (shape, names, image)] == [RequestFailed] * 3
        assert (shape.stage, shape.error) == ("head", "RuntimeError")
        assert "['input']" in names.reason
        assert "['x', 'y']" in names.reason
        assert image.error == "BadPayload"

    with_pipeline(tmp_path, test, *stages(max_batch=4), **NETWORK)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
