"""The image: small, of nobody's account, quick to leave."""

from __future__ import annotations

import signal
import subprocess
import time

from tests.support.environment.checkout import ROOT
from tests.support.environment.container_engine import docker, docker_inspect
from tests.support.environment.image import build_image

LIMIT_BYTES = 1_600_000_000  # with a CPU build of PyTorch, which is half of it


def test_it_runs_as_an_account_without_rights_and_says_what_it_is(image: str) -> None:
    assert docker("run", "--rm", "--read-only", "--cap-drop", "ALL", image, "--version").startswith("sparse 0.1.0")
    account = docker("run", "--rm", "--entrypoint", "id", image, "-u").strip()
    assert account == "10001"


def test_it_holds_what_runs_and_nothing_that_tests_or_builds(image: str) -> None:
    listed = docker("run", "--rm", "--entrypoint", "pip", image, "list", "--format", "freeze")
    names = {line.partition("==")[0].lower() for line in listed.splitlines()}
    assert {"torch", "paho-mqtt", "av", "sparse-mqtt"} <= names
    assert names.isdisjoint({"opencv-python-headless", "pytest", "ruff", "mypy", "hatchling", "scikit-learn"})
    assert docker_inspect(image)["Size"] < LIMIT_BYTES


def test_its_weights_are_there_without_a_network(image: str) -> None:
    look = "from stages.partition.weight_files import find_weights; print(find_weights('yolov3-tiny').stat().st_size)"
    said = docker("run", "--rm", "--network", "none", "--read-only", "--entrypoint", "python3", image, "-c", look)
    assert said.strip() == "35434956"


def test_a_stage_that_has_not_begun_leaves_at_once_when_told_to(image: str) -> None:
    """It imports PyTorch then, and has no handler yet: a process number 1 would not hear the signal at all."""
    command = ["stage", "/etc/sparse/street.toml", "body", "--broker", "mqtt://127.0.0.1:1"]
    started = docker("run", "--detach", image, *command).strip()
    try:
        time.sleep(0.7)
        assert docker_inspect(started)["State"]["Running"], docker("logs", started)
        docker("stop", "--time", "60", started)
        assert docker_inspect(started)["State"]["ExitCode"] == 128 + signal.SIGTERM
    finally:
        docker("rm", "--force", started)


STUB = """\
FROM {base}
RUN site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \\
    mkdir -p $site/torch $site/torch-2.9.0.dist-info && \\
    echo '__version__ = "2.9.0"' > $site/torch/__init__.py && \\
    printf 'Metadata-Version: 2.1\\nName: torch\\nVersion: 2.9.0\\n' > $site/torch-2.9.0.dist-info/METADATA
"""


def test_a_base_image_that_brings_its_own_torch_keeps_it(image: str) -> None:
    """As NVIDIA's for Jetson do. This one's is a name and a version: that it is not replaced is what counts."""
    assert image
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    (base,) = (line.partition("=")[2] for line in lines if line.startswith("ARG BASE="))
    command = ["docker", "build", "--tag", "sparse-test-base", "-"]
    subprocess.run(command, input=STUB.format(base=base), text=True, check=True, capture_output=True)
    try:
        given = ["--build-arg", "BASE=sparse-test-base", "--build-arg", "TORCH=base"]
        build_image("sparse:test-base", "--target", "torch", *given)
        look = "import torch; print(torch.__version__, torch.__file__)"
        version, file = docker("run", "--rm", "sparse:test-base", "python3", "-c", look).split()
        assert version == "2.9.0"
        assert not file.startswith("/opt/sparse")
    finally:
        docker("image", "rm", "--force", "sparse:test-base", "sparse-test-base")
