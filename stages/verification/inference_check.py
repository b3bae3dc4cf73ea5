"""The check of parts for inference: results for two requests, with and without channels last; batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from brokers.errors import describe_error
from stages.partition.named_values import pack_result
from stages.partition.partition import partition
from stages.partition.tracing import TracedModel
from stages.verification.batch_check import find_batchable
from stages.verification.comparison import describe_difference, difference_problem, find_last_equal_layer
from stages.verification.difference_cause import find_cause, kept_state_problem
from stages.verification.example import Inputs, call_model, second_example
from stages.verification.model_state import ModelState, seeded
from stages.verification.network_run import KEEPS_STATE, OUT_OF_MEMORY, CheckFailed, run_network
from stages.verification.part_chain import PartChain, Tensors, receive
from stages.verification.verdict import Verdict


def check_inference(
    traced: TracedModel,
    cuts: Sequence[int],
    example: Inputs,
    device: torch.device,
    *,
    max_batch: int = 1,
    grad_mode: Callable[[], AbstractContextManager[Any]] = torch.inference_mode,
) -> Verdict:
    """Compare the parts of a network with its forward, in evaluation mode, on `device`, where the network is.

    `example`: the inputs of one request, by argument name. `max_batch`: if above 1, find out which parts may batch
    requests. `grad_mode`: `torch.no_grad` for the evaluation of a training.
    """
    with grad_mode(), seeded(device):
        return _InferenceCheck(traced, cuts, example, device).run(max_batch)


class _InferenceCheck:
    """One check. Each run begins and ends with the network's state as it was before."""

    def __init__(self, traced: TracedModel, cuts: Sequence[int], example: Inputs, device: torch.device) -> None:
        self._traced = traced
        self._device = device
        self._chain = PartChain(partition(traced, cuts))
        self._state = ModelState(traced.model)
        self._is_stateful = False
        self._last_values: list[object] | None = None  # Python state after the last example, if it changes with each
        first = {name: tensor.to(device) for name, tensor in example.items()}
        self._examples = [first, second_example(first)]

    def run(self, max_batch: int) -> Verdict:
        try:
            expected = self._run_network()
            channels_last = self._is_equal_in_channels_last(expected)
            if not channels_last:
                self._compare(expected, allow_rounding=self._device.type != "cpu")
        except CheckFailed as error:
            return Verdict(problem=str(error))
        layouts = tuple(self._chain.layouts)
        batchable = [False] * len(layouts)
        if max_batch > 1 and not self._is_stateful:
            is_exact = self._device.type == "cpu"
            with channels_last_weights(self._traced.model) if channels_last else nullcontext():
                batchable = find_batchable(self._chain, self._examples[0], max_batch, is_exact=is_exact)
            self._state.restore()
        return Verdict(batchable=tuple(batchable), layouts=layouts, channels_last=channels_last)

    def _run_network(self) -> list[Tensors]:
        try:
            return self._forward_all()
        except CheckFailed:  # the values of the second example may not be valid ones
            self._examples[1] = self._examples[0]
            return self._forward_all()

    def _forward_all(self) -> list[Tensors]:
        self._state.restore()
        torch.manual_seed(0)
        model = self._traced.model
        values: list[list[object]] = []

        def run() -> list[Tensors]:
            results = []
            for inputs in self._examples:
                results.append(pack_result(call_model(model, inputs)))
                values.append(self._state.python_values)
            return results

        try:
            results = run_network(self._state, run)
            self._last_values = values[1] if values[0] != values[1] else None
            self._is_stateful = self._state.is_changed
            return [{name: receive(tensor) for name, tensor in result.items()} for result in results]
        finally:
            self._state.restore()

    def _run_parts(self) -> list[Tensors]:
        torch.manual_seed(0)
        try:
            results = [self._chain.run(inputs)[-1].outputs for inputs in self._examples]
            if self._last_values and self._last_values != self._state.python_values:
                raise CheckFailed(KEEPS_STATE)
            return results
        finally:
            self._state.restore()

    def _compare(self, expected: Sequence[Tensors], *, allow_rounding: bool = False) -> None:
        """Raise `CheckFailed` if the parts compute something else, with the layer after which they do."""
        try:
            actual = self._run_parts()
        except (CheckFailed, *OUT_OF_MEMORY):
            raise
        except Exception as error:  # noqa: BLE001 - of torch, or of the network's own code
            difference = f"they fail: {describe_error(error)}"
        else:
            differences = [
                describe_difference(*pair, allow_rounding=allow_rounding) for pair in zip(actual, expected, strict=True)
            ]
            difference = next(filter(None, differences), "")
            if difference and not differences[0] and self._keeps_state(allow_rounding=allow_rounding):
                raise CheckFailed(kept_state_problem(self._traced.model, self._forward_all))
        if difference:
            if cause := find_cause(self._traced.model, self._forward_all):
                raise CheckFailed(cause)
            layer = find_last_equal_layer(self._traced, self._forward_all, self._run_parts)
            raise CheckFailed(difference_problem(difference, layer))

    def _keeps_state(self, *, allow_rounding: bool) -> bool:
        """Whether the second of two equal requests differs, though the first one does not."""
        examples = self._examples
        self._examples = [examples[0], examples[0]]
        try:
            expected, actual = self._forward_all(), self._run_parts()
        finally:
            self._examples = examples
        return bool(describe_difference(actual[1], expected[1], allow_rounding=allow_rounding))

    def _is_equal_in_channels_last(self, expected: Sequence[Tensors]) -> bool:
        """Return whether the network and its parts work with the channels of convolutions innermost."""
        if self._device.type != "cpu":
            return False
        with channels_last_weights(self._traced.model) as count:
            if not count:
                return False
            try:
                reference = self._forward_all()
                self._compare(reference)
            except CheckFailed:
                return False
            pairs = zip(reference, expected, strict=True)
            return not any(describe_difference(*pair, allow_rounding=True) for pair in pairs)


@contextmanager
def channels_last_weights(model: nn.Module) -> Iterator[int]:
    """Store the weights of 2-d convolutions with their channels innermost; give the number of weights."""
    weights = {id(weight): weight for weight in _convolution_weights(model)}
    original = {key: weight.data for key, weight in weights.items()}
    try:
        set_channels_last(model)
        yield len(weights)
    finally:
        for key, weight in weights.items():
            weight.data = original[key]


def set_channels_last(model: nn.Module) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for weight in _convolution_weights(model):
            weight.data = weight.data.to(memory_format=torch.channels_last)


def _convolution_weights(model: nn.Module) -> list[Tensor]:
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and isinstance(module.weight, Tensor)
    ]
