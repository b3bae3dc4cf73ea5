"""The result of the check of a partitioned network."""

from collections.abc import Mapping
from dataclasses import dataclass

from stages.partition.boundary import TensorLayout

Layouts = Mapping[str, TensorLayout]  # by tensor name


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the check of a network, partitioned at given cuts, found.

    * `problem`: why the parts must not be used; empty if they may be;
    * `batchable`, by part: whether the rows of its inputs are independent;
    * `layouts`, by part: of its inputs; `gradient_layouts`, by part: of the gradients of its outputs;
    * `channels_last`: the weights of convolutions may be stored with their channels innermost;
    * `is_exact`: gradients are those of the network bit for bit; otherwise they differ by rounding;
    * `min_rows`: of a micro-batch, with which the network can be trained;
    * `sparse_gradients`: the names of parameters whose gradients are sparse tensors.
    """

    problem: str = ""
    batchable: tuple[bool, ...] = ()
    layouts: tuple[Layouts, ...] = ()
    gradient_layouts: tuple[Layouts, ...] = ()
    channels_last: bool = False
    is_exact: bool = True
    min_rows: int = 1
    sparse_gradients: tuple[str, ...] = ()
