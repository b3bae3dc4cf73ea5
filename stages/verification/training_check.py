"""The check of parts for training: results, gradients and buffers of a micro-batch, then two of them in flight."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from brokers.errors import describe_error
from stages.models.registry import random_tensor
from stages.partition.boundary import find_layout, restore_layout
from stages.partition.named_values import pack_result
from stages.partition.partition import partition
from stages.partition.tracing import TracedModel
from stages.verification.comparison import describe_difference, difference_problem, find_last_equal_layer
from stages.verification.difference_cause import find_cause, find_replaced, kept_state_problem
from stages.verification.example import Inputs, call_model, join_requests, second_example
from stages.verification.model_state import ModelState, seeded
from stages.verification.network_run import KEEPS_STATE, OUT_OF_MEMORY, CheckFailed, run_network
from stages.verification.part_chain import PartChain, PartRun, Tensors, receive
from stages.verification.verdict import Layouts, Verdict


def check_training(traced: TracedModel, cuts: Sequence[int], example: Inputs, device: torch.device) -> Verdict:
    """Compare the parts of a network with itself, in training mode, on `device`, where the network is.

    `example`: the inputs of one row, by argument name.
    """
    with torch.enable_grad(), seeded(device):
        return _TrainingCheck(traced, cuts, example, device).run()


@dataclass(frozen=True, slots=True)
class _StepResult:
    """What one forward and backward compute, all by name; a parameter without a gradient is absent."""

    results: Tensors
    gradients: Tensors
    buffers: Tensors


class _TrainingCheck:
    """One check. Each run begins and ends with the network's state as it was before."""

    def __init__(self, traced: TracedModel, cuts: Sequence[int], example: Inputs, device: torch.device) -> None:
        self._traced = traced
        self._model = traced.model
        self._device = device
        self._chain = PartChain(partition(traced, cuts))
        self._state = ModelState(self._model)
        self._parameters = dict(self._model.named_parameters())
        self._row = {name: tensor.to(device) for name, tensor in example.items()}
        self._inputs = join_requests([self._row, second_example(self._row)]) or self._row
        self._gradient_layouts: list[Layouts] = []

    def run(self) -> Verdict:
        try:
            expected = self._run_network()
            second = self._run_twice()
            is_exact = self._compare(expected)
            self._check_two_in_flight(second)
        except CheckFailed as error:
            return Verdict(problem=str(error))
        return Verdict(
            layouts=tuple(self._chain.layouts),
            gradient_layouts=tuple(self._gradient_layouts),
            is_exact=is_exact,
            min_rows=1 if self._can_train_one_row() else 2,
            sparse_gradients=tuple(name for name, gradient in expected.gradients.items() if gradient.is_sparse),
        )

    def _run_network(self) -> _StepResult:
        try:
            return self._step_of_network(self._inputs)
        except CheckFailed as error:  # it may not accept two rows, or values in another order
            self._inputs = self._row
            try:
                return self._step_of_network(self._inputs)
            except CheckFailed:
                raise error from None

    def _run_twice(self) -> Tensors:
        """Return the network's results for the second of two micro-batches."""
        values: list[list[object]] = []
        results: Tensors = {}

        def run_twice() -> None:
            for _ in range(2):
                results.update(_receive_all(pack_result(call_model(self._model, self._inputs))))
                values.append(self._state.python_values)

        torch.manual_seed(0)
        try:
            run_network(self._state, run_twice)
        finally:
            self._state.restore()
        if values[0] != values[1]:
            raise CheckFailed(KEEPS_STATE)
        return results

    def _step_of_network(self, inputs: Inputs) -> _StepResult:
        torch.manual_seed(0)

        def step() -> tuple[Tensors, list[tuple[Tensor, Tensor]]]:
            results = pack_result(call_model(self._model, inputs))
            return results, _find_gradients(results, _loss_gradients(results), self._parameters.values())

        try:
            results, gradients = run_network(self._state, step)
            return self._step(results, {id(parameter): gradient for parameter, gradient in gradients})
        finally:
            self._state.restore()

    def _step_of_parts(self) -> _StepResult:
        torch.manual_seed(0)
        try:
            runs = self._chain.run(self._inputs)
            gradients = self._run_backward(runs)
            return self._step(runs[-1].outputs, gradients)
        finally:
            self._state.restore()

    def _run_backward(self, runs: Sequence[PartRun]) -> dict[int, Tensor]:
        """Run the backward of all parts, the last one first; return the gradients of parameters by their ids."""
        gradients: dict[int, Tensor] = {}
        output_gradients: Mapping[str, Tensor] = _loss_gradients(runs[-1].outputs)
        layouts: list[Layouts] = []
        for run in reversed(runs):
            layouts.insert(0, {name: find_layout(gradient) for name, gradient in output_gradients.items()})
            received = {
                name: restore_layout(receive(gradient), layouts[0][name]) for name, gradient in output_gradients.items()
            }
            inputs = {id(tensor): name for name, tensor in run.inputs.items() if tensor.requires_grad}
            sources = [*self._parameters.values(), *run.inputs.values()]
            found = {id(source): each for source, each in _find_gradients(run.outputs, received, sources)}
            output_gradients = {name: found.pop(key) for key, name in inputs.items() if key in found}
            gradients |= found
        self._gradient_layouts = layouts
        return gradients

    def _check_two_in_flight(self, expected: Tensors) -> None:
        """Run the forward of two micro-batches before the first backward, as stages do; compare the second's results.

        The first one's are equal already.
        """
        torch.manual_seed(0)
        try:
            first, second = self._chain.run(self._inputs), self._chain.run(self._inputs)
            results = _receive_all(second[-1].outputs)
            self._run_backward(first)
        except (CheckFailed, *OUT_OF_MEMORY):
            raise
        except Exception as error:
            problem = "stages run the forward of several micro-batches before the first backward, which then fails"
            raise CheckFailed(f"{problem}: {describe_error(error)}") from error
        finally:
            self._state.restore()
        if describe_difference(results, expected, allow_rounding=self._device.type != "cpu"):
            raise CheckFailed(
                kept_state_problem(self._model, lambda: self._step_of_network(self._inputs), "micro-batch")
            )

    def _step(self, results: Tensors, gradients: Mapping[int, Tensor]) -> _StepResult:
        return _StepResult(
            results=_receive_all(results),
            gradients={name: gradients[id(each)] for name, each in self._parameters.items() if id(each) in gradients},
            buffers={name: buffer.clone() for name, buffer in self._model.named_buffers()},
        )

    def _compare(self, expected: _StepResult) -> bool:
        """Return whether the parts compute the same bits; false if gradients differ by rounding.

        Raises `CheckFailed` if they differ by more.
        """
        try:
            actual = self._step_of_parts()
        except (CheckFailed, *OUT_OF_MEMORY):
            raise
        except Exception as error:  # noqa: BLE001 - of torch, or of the network's own code
            self._raise_difference(f"they fail: {describe_error(error)}")
        allow_rounding = self._device.type != "cpu"
        for kind in ("results", "buffers"):
            difference = describe_difference(
                getattr(actual, kind), getattr(expected, kind), allow_rounding=allow_rounding
            )
            if difference and kind == "buffers":
                self._check_replaced_buffers()
            if difference:
                self._raise_difference(difference)
        if not (difference := describe_difference(actual.gradients, expected.gradients)):
            return True
        for name in expected.gradients.keys() ^ actual.gradients.keys():
            raise CheckFailed(f"{name!r} gets {'no' if name in expected.gradients else 'a'} gradient")
        difference = describe_difference(actual.gradients, expected.gradients, allow_rounding=True)
        if difference:
            raise CheckFailed(f"the gradient of {difference}")
        return False

    def _check_replaced_buffers(self) -> None:
        replaced = find_replaced(self._model, lambda: self._step_of_network(self._inputs))
        if names := [name for name, _ in self._model.named_buffers() if name in replaced]:
            problem = f"its forward replaces buffer {names[0]!r}, which tracing cannot see"
            raise CheckFailed(f"{problem}: modify it in place instead, as `copy_` does")

    def _raise_difference(self, difference: str) -> NoReturn:
        def run() -> object:
            return self._step_of_network(self._inputs)

        if cause := find_cause(self._model, run):
            raise CheckFailed(cause)
        layer = find_last_equal_layer(self._traced, run, self._step_of_parts)
        raise CheckFailed(difference_problem(difference, layer))

    def _can_train_one_row(self) -> bool:
        try:
            self._step_of_network(self._row)
        except CheckFailed:
            return False
        return True


def _receive_all(results: Mapping[str, Tensor]) -> Tensors:
    return {name: receive(tensor) for name, tensor in results.items()}


def _loss_gradients(results: Mapping[str, Tensor]) -> Tensors:
    """Return gradients of a loss that depends on each number of the results differently."""
    return {
        name: random_tensor(tensor.shape).to(tensor.device, tensor.dtype)
        for name, tensor in results.items()
        if tensor.requires_grad
    }


def _find_gradients(
    outputs: Mapping[str, Tensor], output_gradients: Mapping[str, Tensor], sources: Iterable[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return those of `sources` that have a gradient, with it."""
    names = [name for name, tensor in outputs.items() if tensor.requires_grad and name in output_gradients]
    leaves = [source for source in sources if source.requires_grad]
    # Hooks receive the gradients of inputs with the strides that they have in the network, which `grad` need not have.
    found: dict[int, Tensor] = {}
    hooks = [
        leaf.register_hook(partial(found.__setitem__, id(leaf)))  # type: ignore[no-untyped-call]
        for leaf in leaves
        if not isinstance(leaf, nn.Parameter)
    ]
    for leaf in leaves:
        leaf.grad = None
    if names:  # as training does: checkpoints of the kind "reentrant" refuse `torch.autograd.grad`
        torch.autograd.backward([outputs[name] for name in names], [output_gradients[name] for name in names])
    found = {id(leaf): leaf.grad for leaf in leaves if leaf.grad is not None} | found
    for hook in hooks:
        hook.remove()
    for leaf in leaves:
        leaf.grad = None
    return [(leaf, found[id(leaf)]) for leaf in leaves if id(leaf) in found]
