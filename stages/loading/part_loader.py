"""A part of a network with its weights, of which a worker keeps only its own, checked against the whole network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from brokers.errors import UsageError, describe_error
from stages.loading.evaluation_cuts import find_evaluation_cuts
from stages.loading.model_builder import build_from_seed, build_without_parameters, one_at_a_time
from stages.loading.network_digest import network_digest
from stages.loading.weights_file import WeightsFile
from stages.models.registry import ModelSpec
from stages.partition.part_state import add_unused_state
from stages.partition.partition import Part, partition
from stages.partition.tracing import TracedModel, trace
from stages.verification.example import Inputs, declared_example, guess_example, join_requests
from stages.verification.inference_check import check_inference, set_channels_last
from stages.verification.network_run import OUT_OF_MEMORY
from stages.verification.training_check import check_training
from stages.verification.verdict import Verdict
from stages.verification.verdict_cache import cached_verdict, verdict_key

_CPU = torch.device("cpu")
Parameters = Mapping[str, nn.Parameter]  # by name
# Called with the trainable parameters of a network, those of its parts, and the names of those with sparse gradients.
InspectParameters = Callable[[Parameters, Sequence[Parameters], Sequence[str]], None]
Mode = Literal["inference", "training", "evaluation"]  # evaluation: of a network that is trained, without gradients


@dataclass(frozen=True, slots=True, eq=False)
class TrainablePart:
    """A part in training mode and in evaluation mode: two graphs over the same modules, and what the check found.

    `trainable`: the parameters that require gradients, by their names and in their order in the network.
    `min_rows`: of a micro-batch. `is_exact`: gradients are those of the unsplit network bit for bit. `network`: the
    digest of the whole network as it is before training.
    """

    training: Part
    evaluation: Part
    trainable: Parameters
    min_rows: int
    is_exact: bool
    network: str


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A whole network on the CPU, with its weights; `file` is None where they are initial values from `seed`.

    `example`: the inputs of one request, or of one row in training.
    """

    spec: ModelSpec
    model: nn.Module
    example: Inputs | None
    seed: int
    weights: Path | None
    file: WeightsFile | None

    def trace(self, device: torch.device = _CPU, *, training: bool = False) -> TracedModel:
        """Trace the network in its present mode, to run on `device`.

        `training`: for micro-batches, thus with two rows if it accepts them: batch norms may refuse a single one.
        """
        rows = join_requests([self.example] * 2) if training and self.example else None
        if rows is not None:
            try:
                return trace(self.model, rows, device)
            except UsageError:
                pass
        return trace(self.model, self.example, device)


def load_model(spec: ModelSpec, weights: Path | None, seed: int, *, training: bool = False) -> LoadedModel:
    """Build a network; its tensors from a weights file are not read, but mapped, unless it is to be trained.

    Raises `UsageError`: those of the factory and of `WeightsFile`.
    """
    file = None
    build = build_from_seed if weights is None or training else build_without_parameters
    model = build(spec, seed)
    if weights is not None:
        file = WeightsFile(weights, model)
        if training:
            model.load_state_dict(file.read(model.state_dict()), strict=False)  # names are checked by `require`
        else:
            file.assign(model)
    if any(is_lazy(parameter) for parameter in model.parameters()):
        problem = "it has parameters without shapes, of lazy modules: call it once on an example in its factory"
        raise UsageError("BadModel", f"model {spec.name!r}: {problem}", key="pipeline.model", model=spec.name)
    model.train(training)
    example = declared_example(spec, model)
    return LoadedModel(spec, model, example or guess_example(model), seed, weights, file)


@one_at_a_time
def load_part(
    spec: ModelSpec,
    cuts: Sequence[int],
    index: int,
    weights: Path | None,
    seed: int,
    device: str | torch.device,
    *,
    max_batch: int = 1,
) -> Part:
    """Return part `index` of the network on `device`, in evaluation mode.

    Without a weights file the whole network is initialised from `seed`, so that all parts together are that network.
    `max_batch`: if above 1, find out whether the part may batch so many requests.

    Raises `UsageError`: those of `load_model`, `partition` and `check_parts`.
    """
    device = torch.device(device)
    loaded = load_model(spec, weights, seed)
    traced = loaded.trace(device)
    parts = partition(traced, cuts)
    if loaded.file is not None:
        loaded.file.require(name for part in parts for name in part.module.state_dict())
    verdict = check_parts(loaded, traced, cuts, device, max_batch=max_batch)
    part = parts[index]
    part.network = network_digest(traced, cuts, weights)
    if loaded.file is not None:
        part.module.load_state_dict(loaded.file.read(part.module.state_dict()), strict=False, assign=True)
    if verdict.channels_last:
        set_channels_last(part.module)
    _apply(verdict, part, index)
    part.to(device)
    return part


@one_at_a_time
def load_trainable_part(
    spec: ModelSpec,
    cuts: Sequence[int],
    index: int,
    weights: Path | None,
    seed: int,
    device: str | torch.device,
    *,
    inspect: InspectParameters | None = None,
) -> TrainablePart:
    """Return part `index` of the network, to be trained.

    The whole network is built from `seed`, so that the parts begin with the weights of the unsplit network. The last
    part has also the state that no part uses, so that all parts together have the whole state. `inspect` may refuse
    the trainable parameters of the network and its parts.

    Raises `UsageError`: those of `inspect`, `load_model`, `partition` and `check_parts`, "SharedWeights" or
    "CannotEvaluate".
    """
    device = torch.device(device)
    loaded = load_model(spec, weights, seed, training=True)
    trained = loaded.trace(device, training=True)
    parts = partition(trained, cuts)
    _check_shared(parts)
    if loaded.file is not None:
        loaded.file.require(name for part in parts for name in part.module.state_dict())
    network = network_digest(trained, cuts, weights)
    verdict = check_parts(loaded, trained, cuts, device, mode="training")
    loaded.model.eval()
    evaluated = loaded.trace(device, training=True)
    evaluation_cuts = find_evaluation_cuts(trained, parts, cuts, evaluated)
    evaluation_verdict = check_parts(loaded, evaluated, evaluation_cuts, device, mode="evaluation")
    evaluation = partition(evaluated, evaluation_cuts)[index]
    used = [tensor for part in parts for tensor in (*part.module.parameters(), *part.module.buffers())]
    add_unused_state(parts[-1].module, loaded.model, used)
    whole = {name: each for name, each in loaded.model.named_parameters() if each.requires_grad}
    trainable = [_select(whole, part) for part in parts]
    if inspect is not None:
        inspect(whole, trainable, verdict.sparse_gradients)
    for part, found in ((parts[index], verdict), (evaluation, evaluation_verdict)):
        _apply(found, part, index)
        part.to(device)
    return TrainablePart(parts[index], evaluation, trainable[index], verdict.min_rows, verdict.is_exact, network)


def _select(parameters: Parameters, part: Part) -> Parameters:
    own = {id(parameter) for parameter in part.module.parameters()}
    return {name: parameter for name, parameter in parameters.items() if id(parameter) in own}


def check_parts(
    loaded: LoadedModel,
    traced: TracedModel,
    cuts: Sequence[int],
    device: torch.device,
    *,
    mode: Mode = "inference",
    max_batch: int = 1,
) -> Verdict:
    """Compare the parts with the network, on `device`, in the mode in which they will run; the verdict is cached.

    Raises `UsageError` "PartsDiffer", or "NoExampleInput" if there are no inputs with which to compare them.
    """
    example = loaded.example
    if example is None:
        if traced.is_chain:  # its children are called one after the other, in both
            return Verdict()
        raise example_error(loaded.spec)

    def check() -> Verdict:
        if mode == "training":
            return check_training(traced, cuts, example, device)
        grad_mode = torch.no_grad if mode == "evaluation" else torch.inference_mode
        return check_inference(traced, cuts, example, device, max_batch=max_batch, grad_mode=grad_mode)

    extra = f"{mode} max_batch={max_batch} {device.type} seed={loaded.seed} settings={loaded.spec.settings}"
    key = verdict_key(traced, cuts, example, loaded.weights, loaded.spec.folder, extra)
    try:
        verdict = cached_verdict(key, lambda: _check_on_device(loaded.model, device, check))
    except OUT_OF_MEMORY as error:
        message = (
            f"model {loaded.spec.name!r}: {device} has too little memory for the whole network, with which its parts "
            f"are compared before they are first used: {describe_error(error)}"
        )
        raise UsageError("NotEnoughMemory", message, key="stage.device", model=loaded.spec.name) from error
    if verdict.problem:
        message = f"model {loaded.spec.name!r} cannot be split at {list(cuts)}: {verdict.problem}"
        raise UsageError("PartsDiffer", message, key="pipeline.model", model=loaded.spec.name, problem=verdict.problem)
    return verdict


def _check_on_device(model: nn.Module, device: torch.device, check: Callable[[], Verdict]) -> Verdict:
    """Run a check with the network on a device; again in one thread if several did not add up in the same order."""
    threads = torch.get_num_threads()
    model.to(device)
    try:
        verdict = check()
        if verdict.problem and threads > 1:
            torch.set_num_threads(1)
            verdict = check()
        return verdict
    finally:
        torch.set_num_threads(threads)
        model.to(_CPU)


def _apply(verdict: Verdict, part: Part, index: int) -> None:
    if verdict.layouts:
        part.layouts = verdict.layouts[index]
    if verdict.batchable:
        part.batchable = verdict.batchable[index]
    if verdict.gradient_layouts:
        part.gradient_layouts = verdict.gradient_layouts[index]


def _check_shared(parts: Sequence[Part]) -> None:
    owners: dict[int, int] = {}
    for index, part in enumerate(parts):
        for name, parameter in part.module.named_parameters():
            first = owners.setdefault(id(parameter), index)
            if first != index and parameter.requires_grad:
                message = (
                    f"parameter {name!r} is used by parts {first} and {index} (from 0), and each would train a copy: "
                    "cut where no parameter is shared"
                )
                raise UsageError(
                    "SharedWeights", message, key="pipeline.cuts", parameter=name, first=first, second=index
                )


def example_error(spec: ModelSpec, problem: str = "no input is known with which its parts can be run") -> UsageError:
    """Return the error for a model without a usable example of its inputs."""
    message = (
        f"model {spec.name!r}: {problem}; give its factory an attribute `input_shape = (1, C, H, W)`, or "
        "`example_inputs`, a tensor or a dict of tensors by argument name"
    )
    return UsageError("NoExampleInput", message, key="pipeline.model", model=spec.name)
