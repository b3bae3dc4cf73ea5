"""What crosses the cuts of a network is what its stages send."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from brokers.config.pipeline_file import add_error_context, load_pipeline
from brokers.errors import BadFile
from stages.partition.cut_sizes import measure_all_cuts, measure_cuts
from tests.support.environment.checkout import ROOT
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file


def test_the_detectors_cuts_are_known() -> None:
    head, body = measure_cuts(load_pipeline(ROOT / "examples" / "street.toml"))
    assert (head.sender, head.receiver, head.after) == ("head", "body", 8)
    assert head.tensors == {"layers.7": [1, 128, 26, 26]}
    assert head.wire_bytes == head.float32_bytes == 4 * 128 * 26 * 26
    assert body.tensors == {"layers.8": [1, 256, 26, 26], "layers.12": [1, 1024, 13, 13]}
    assert body.wire_bytes == 4 * (256 * 26 * 26 + 1024 * 13 * 13)


def test_a_narrow_wire_halves_what_crosses(tmp_path: Path) -> None:
    stages = [stage_table("head", wire="float16"), stage_table("tail")]
    (cut,) = measure_cuts(load_pipeline(write_pipeline_file(tmp_path, stages, model="vgg11-small", cuts=[6])))
    assert (cut.wire, 2 * cut.wire_bytes) == ("float16", cut.float32_bytes)


def test_a_micro_batch_crosses_as_one(tmp_path: Path) -> None:
    path = write_pipeline_file(
        tmp_path, [stage_table("head"), stage_table("tail")], model="vgg11-small", cuts=[6], kind="training"
    )
    (one,) = measure_cuts(load_pipeline(ROOT / "examples" / "digits-inference.toml"))[:1]
    path.write_text(path.read_text() + "[training]\nbatch = 30\nmicro_batches = 4\n")
    (cut,) = measure_cuts(load_pipeline(path))
    assert cut.wire_bytes == 8 * one.wire_bytes  # the largest of 8, 8, 7 and 7 rows


def test_what_is_no_network_has_no_cuts() -> None:
    assert measure_cuts(load_pipeline(ROOT / "examples" / "sensor.toml")) == []


def test_a_network_that_does_not_say_what_it_eats_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\n\ndef net():\n    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))\n"
    )
    pipeline = load_pipeline(
        write_pipeline_file(tmp_path, [stage_table("a"), stage_table("b")], model="nets:net", cuts=[1])
    )
    with pytest.raises(BadFile, match=r"test\.toml: pipeline\.model: .*input_shape"), add_error_context(pipeline):
        measure_cuts(pipeline)


def test_finding_cuts_leaves_the_random_numbers_of_this_process_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    measure_cuts(load_pipeline(ROOT / "examples" / "digits-inference.toml"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_cut_carries_what_it_would_carry_alone() -> None:
    pipeline = load_pipeline(ROOT / "examples" / "street.toml")
    every = {cut.after: cut for cut in measure_all_cuts(pipeline)}
    assert list(every) == list(range(1, max(every) + 1))
    for cut in measure_cuts(pipeline):
        assert (every[cut.after].tensors, every[cut.after].wire_bytes) == (cut.tensors, cut.wire_bytes)
    assert measure_all_cuts(load_pipeline(ROOT / "examples" / "sensor.toml")) == []
