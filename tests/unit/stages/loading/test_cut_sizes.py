"""The measured bytes of each cut are those that its stages send."""

from __future__ import annotations

from pathlib import Path

import torch

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import UsageError
from stages.loading.cut_sizes import measure_cuts
from tests.support.environment.checkout import ROOT
from tests.support.errors import raises_error
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file


def test_cuts_of_the_street_detector() -> None:
    head, body = measure_cuts(load_pipeline(ROOT / "examples" / "street.toml"))
    assert (head.sender, head.receiver, head.after) == ("head", "body", 8)
    assert head.tensors == {"layers.7": [1, 128, 26, 26]}
    assert head.wire_bytes == head.float32_bytes == 4 * 128 * 26 * 26
    assert body.tensors == {"layers.8": [1, 256, 26, 26], "layers.12": [1, 1024, 13, 13]}
    assert body.wire_bytes == 4 * (256 * 26 * 26 + 1024 * 13 * 13)


def test_float16_wire_halves_the_bytes(tmp_path: Path) -> None:
    stages = [stage_table("head", wire="float16"), stage_table("tail")]
    (cut,) = measure_cuts(load_pipeline(write_pipeline_file(tmp_path, stages, model="vgg11-small", cuts=[6])))
    assert (cut.wire, 2 * cut.wire_bytes) == ("float16", cut.float32_bytes)


def test_training_measures_the_largest_micro_batch(tmp_path: Path) -> None:
    stages = [stage_table("head"), stage_table("tail")]
    (single,) = measure_cuts(load_pipeline(write_pipeline_file(tmp_path, stages, model="vgg11-small", cuts=[6])))
    path = write_pipeline_file(tmp_path, stages, model="vgg11-small", cuts=[6], kind="training")
    path.write_text(path.read_text() + "[training]\nbatch = 30\nmicro_batches = 4\n")
    (cut,) = measure_cuts(load_pipeline(path))
    assert cut.wire_bytes == 8 * single.wire_bytes  # of micro-batches of 8, 8, 7 and 7 rows


def test_pipeline_without_a_model_has_no_cuts() -> None:
    pipeline = load_pipeline(ROOT / "examples" / "sensor.toml")
    assert measure_cuts(pipeline) == measure_cuts(pipeline, every=True) == []


def test_unknown_input_shape_raises_usage_error(tmp_path: Path) -> None:
    (tmp_path / "shapeless.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return (x + 1) * 2\n"
    )
    stages = [stage_table("a"), stage_table("b")]
    pipeline = load_pipeline(write_pipeline_file(tmp_path, stages, model="shapeless:Net", cuts=[1]))
    with raises_error(UsageError, "NoExampleInput", match="input_shape") as caught:
        measure_cuts(pipeline)
    assert caught.value.key == "pipeline.model"


def test_measuring_does_not_change_the_random_state() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    measure_cuts(load_pipeline(ROOT / "examples" / "digits-inference.toml"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_cut_has_the_size_that_it_has_alone() -> None:
    pipeline = load_pipeline(ROOT / "examples" / "street.toml")
    sizes = {cut.after: cut for cut in measure_cuts(pipeline, every=True)}
    assert list(sizes) == list(range(1, max(sizes) + 1))
    for cut in measure_cuts(pipeline):
        assert (sizes[cut.after].tensors, sizes[cut.after].wire_bytes) == (cut.tensors, cut.wire_bytes)


def test_one_impossible_cut_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "mutating.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    input_shape = (1, 4)\n\n    def forward(self, x):\n"
        "        y = x * 2\n        view = y[:, :2]\n        view += 1\n        return y * 3\n"
    )
    stages = [stage_table("a"), stage_table("b")]
    pipeline = load_pipeline(write_pipeline_file(tmp_path, stages, model="mutating:Net", cuts=[2]))
    with raises_error(UsageError, "PartsDiffer", match=r"cannot be split at \[2\]"):
        measure_cuts(pipeline)
    assert [cut.after for cut in measure_cuts(pipeline, every=True)] == [1, 2, 3]
