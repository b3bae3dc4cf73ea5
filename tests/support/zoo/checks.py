"""Checks of one network: its parts compute and learn what the network does, or it is refused with a reason."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from brokers.errors import UsageError
from stages.partition.boundary import find_layout, restore_layout
from stages.partition.named_values import pack_result
from stages.partition.partition import Part, partition
from stages.partition.tracing import trace
from stages.verification.inference_check import check_inference
from tests.support.zoo.networks import Network, build

CUTS = 3
# Batch sizes of the requests, one for each set of cuts. The network is traced with a request of one row; a stage may
# batch requests.
BATCHES = (1, 1, 2)
# Largest difference that rounding explains, relative to the largest value of an output.
BOUND = 1e-5
TRAINED_PARTS = 3
TRAINING_STEPS = 3
TRAINING_BATCH = 2
LEARNING_RATE = 0.01

Outcome = Literal["equal", "bound", "refused", "different", "failed"]


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of a check.

    `equal`: bit for bit; `bound`: except for rounding, by at most `BOUND`; `refused`: with a reason; `failed`: neither
    a result nor a reason. `detail`: the reason, the differences, or the error.
    """

    name: str
    outcome: Outcome
    detail: str = ""
    layers: int = 0


def check_network(network: Network) -> Result:
    """Compare the parts of a network with the network, in evaluation mode, bit for bit.

    Parts that the check of a worker finds wrong are refused; a difference that it does not find is a mistake.
    """
    model = build(network)
    torch.manual_seed(1)
    examples = {batch: network.make_inputs(batch) for batch in BATCHES}
    sampler = random.Random(network.name)
    problems = []
    largest = 0.0
    with torch.no_grad():
        results = {batch: model(**example) for batch, example in examples.items()}
        try:
            expected = {batch: pack_result(result) for batch, result in results.items()}
            traced = trace(model, examples[1])
            layers = len(traced.layer_names)
            for index, batch in enumerate(BATCHES):
                cuts = sorted(sampler.sample(range(1, layers), min(CUTS, layers - 1)))
                parts = partition(traced, cuts)
                run_parts(parts, examples[1], record_layouts=True)
                problem, size = difference(run_parts(parts, examples[batch]), expected[batch])
                if problem or index == 0:  # it takes longer than the comparison
                    verdict = check_inference(traced, cuts, dict(examples[1]), torch.device("cpu"), max_batch=1)
                    if verdict.problem:
                        return Result(network.name, "refused", verdict.problem, layers)
                if problem:
                    largest = max(largest, size)
                    problems.append(f"batch {batch}, cuts {cuts}: {problem}")
        except UsageError as error:
            return Result(network.name, "refused", str(error))
    if not problems:
        return Result(network.name, "equal", layers=layers)
    return Result(network.name, "bound" if largest <= BOUND else "different", "; ".join(problems), layers)


def send_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encode and decode tensors as a message does; each by itself, as two may share memory."""
    return {name: load(save({name: tensor.contiguous()}))[name] for name, tensor in tensors.items()}


def run_parts(
    parts: Sequence[Part], inputs: Mapping[str, Tensor], *, record_layouts: bool = False
) -> dict[str, Tensor]:
    """Run parts one after the other, with messages between them."""
    tensors = name_request(parts, inputs)
    for part in parts:
        if record_layouts:
            part.layouts = {name: find_layout(tensor) for name, tensor in tensors.items()}
        tensors = part(send_tensors(tensors))
    return tensors


def name_request(parts: Sequence[Part], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the inputs of a network as its first part does: a single one "input"."""
    names = parts[0].input_names
    return dict(zip(names, inputs.values(), strict=True)) if len(names) == 1 else dict(inputs)


def difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float]:
    """Compare the names, dtypes, shapes and bits of tensors.

    Return a description of the differences, empty if they are equal, and the largest one, relative to the largest
    expected value.
    """
    if list(actual) != list(expected):
        return f"names {list(actual)} instead of {list(expected)}", math.inf
    texts = []
    largest = 0.0
    for name, tensor in expected.items():
        other = actual[name]
        if (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            return (
                f"{name} is {other.dtype} {list(other.shape)} instead of {tensor.dtype} {list(tensor.shape)}",
                math.inf,
            )
        if _bytes(other) != _bytes(tensor):
            scale = tensor.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            size = float((other.double() - tensor.double()).abs().max() / scale)
            texts.append(f"{name} differs by {size:.1e}")
            largest = max(largest, math.inf if math.isnan(size) else size)
    return ", ".join(texts), largest


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_training(network: Network) -> Result:
    """Compare three steps of SGD in three parts with the loop of the whole network, by all parameters and buffers."""
    expected, model = build(network).train(), build(network).train()
    torch.manual_seed(1)
    requests = [network.make_inputs(TRAINING_BATCH) for _ in range(TRAINING_STEPS)]
    try:
        traced = trace(model, requests[0])
        layers = len(traced.layer_names)
        cuts = sorted(random.Random(network.name).sample(range(1, layers), TRAINED_PARTS - 1))
        parts = partition(traced, cuts)
    except UsageError as error:
        return Result(network.name, "refused", str(error))
    train(expected, requests, lambda request: torch.autograd.backward([_loss(pack_result(expected(**request)))]))
    train(model, requests, lambda request: _backpropagate(parts, request))
    problem, size = difference(model.state_dict(), expected.state_dict())
    outcome: Outcome = "equal" if not problem else "bound" if size <= BOUND else "different"
    return Result(network.name, outcome, problem and f"cuts {cuts}: {problem}", layers)


def train(
    model: nn.Module, requests: Sequence[Mapping[str, Tensor]], backpropagate: Callable[[Mapping[str, Tensor]], None]
) -> None:
    """Take one step of SGD for each request, with the same random numbers each time."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for step, request in enumerate(requests):
        torch.manual_seed(step)
        optimizer.zero_grad()
        backpropagate(request)
        optimizer.step()


def _loss(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the mean squares of all outputs that depend on parameters."""
    return sum((tensor.square().mean() for tensor in outputs.values() if tensor.requires_grad), torch.zeros(()))


def _backpropagate(parts: Sequence[Part], request: Mapping[str, Tensor]) -> None:
    """Run the parts forward and backward, with messages between them."""
    outputs = name_request(parts, request)
    steps = []
    for part in parts:
        part.layouts = {name: find_layout(tensor) for name, tensor in outputs.items()}
        inputs = {
            name: tensor.requires_grad_(outputs[name].requires_grad) for name, tensor in send_tensors(outputs).items()
        }
        outputs = part(inputs)
        steps.append((inputs, outputs))
    gradients: Mapping[str, Tensor] = {"loss": torch.ones(())}
    steps[-1] = (steps[-1][0], {"loss": _loss(outputs)})
    for inputs, outputs in reversed(steps):
        torch.autograd.backward([outputs[name] for name in gradients], list(gradients.values()))
        sent = {name: tensor.grad for name, tensor in inputs.items() if tensor.grad is not None}
        received = send_tensors(sent)
        gradients = {name: restore_layout(received[name], find_layout(gradient)) for name, gradient in sent.items()}
