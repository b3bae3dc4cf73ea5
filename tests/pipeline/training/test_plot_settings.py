"""A run is complete and has its learning curves with any settings of matplotlib in the environment."""

from __future__ import annotations

import pytest
from PIL import Image

from brokers.server.local_broker import LocalBroker
from tests.soak.harness.training_run import STAGES, write_training_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox


@pytest.mark.parametrize("backend", ["nonsense", "qtagg"])
def test_settings_of_matplotlib_do_not_matter(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker, backend: str
) -> None:
    settings = sandbox.folder / "matplotlibrc"
    settings.write_text("text.usetex: True\naxes.facecolor: red\n")
    environment = {"MPLBACKEND": backend, "MATPLOTLIBRC": str(settings)}
    path = write_training_pipeline_file(sandbox.folder, epochs=1)
    broker, checkpoints = ("--broker", embedded_broker.address), ("--checkpoints", sandbox.folder / "checkpoints")
    for name in STAGES:
        sandbox.start_sparse("stage", path, name, *broker, *checkpoints)
    out = sandbox.folder / "out"
    source = sandbox.start_sparse(  # not forked from a process that has imported matplotlib
        "source", path, *broker, "--json", "--out", out, environment=environment, forked=False
    )
    result = source.wait()
    assert result.returncode == 0, result.stderr
    assert result.json_output["files"]["curves"] == "training.png"
    assert (out / "summary.json").exists()
    with Image.open(out / "training.png") as picture:
        assert picture.convert("RGB").getpixel((600, 200)) != (255, 0, 0)
