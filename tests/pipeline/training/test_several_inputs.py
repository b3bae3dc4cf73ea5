"""`sparse run` trains a network with two inputs, which its data set provides by name."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from sources.datasets.dataset import Batches, map_inputs, split_micro_batches
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox
from tests.support.training.in_process_parts import UnsplitTrainer, assert_bitwise_equal
from tests.support.training.token_sequences import MODEL, TokenSequences, token_network

SEED = 5


def test_weights_are_those_of_the_plain_loop(sandbox: ProcessSandbox) -> None:
    source = {"kind": "tests.support.training.token_sequences:TokenSequences", "name": "tokens"}
    pipeline = {"kind": "training", "model": MODEL, "cuts": [2, 4], "seed": SEED}
    stages = [stage_table(name, threads=1) for name in ("head", "body", "tail")]
    path = write_pipeline_file(sandbox.folder, stages, source, **pipeline)
    path.write_text(path.read_text() + "\n[training]\nbatch = 40\nepochs = 2\nlr = 0.5\ndrop_last = true\n")
    out = sandbox.folder / "out"
    result = sandbox.run_sparse("run", path, "--broker", "embedded", "--json", "--no-pictures", "--out", out)
    assert result.returncode == 0, result.stderr
    assert (result.json_output["steps"], result.json_output["rows"]) == (4, 160)

    torch.manual_seed(SEED)
    model = token_network()
    unsplit = UnsplitTrainer(model, torch.optim.SGD(model.parameters(), lr=0.5), seed=SEED)
    batches = Batches(TokenSequences().train(), 40, SEED, drop_last=True)
    for step in range(4):
        micro_batches = split_micro_batches(*batches.batch(step), 4)
        batch = [(map_inputs(inputs, torch.from_numpy), torch.from_numpy(labels)) for inputs, labels in micro_batches]
        unsplit.train_step(step, batch)
    assert_bitwise_equal(load_file(out / "model.safetensors"), model.state_dict())
    sandbox.assert_nothing_left()
