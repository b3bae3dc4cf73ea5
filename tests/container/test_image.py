"""The image: its size and contents, its unprivileged user, and that it exits on SIGTERM at any time."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.environment.checkout import ROOT
from tests.support.environment.container_engine import docker, docker_inspect
from tests.support.environment.image import build_image
from tests.support.pipelines.processes import eventually

pytestmark = pytest.mark.slow

# Without PyTorch and its own libraries: the CPU build has as much again, the CUDA build seven times as much.
SIZE_LIMIT_BYTES = 800_000_000
TORCH_FOLDERS = "torch nvidia triton cuda"


def test_image_runs_as_an_unprivileged_user(image: str) -> None:
    assert docker("run", "--rm", "--read-only", "--cap-drop", "ALL", image, "--version").startswith("sparse 0.1.0")
    assert docker("run", "--rm", "--entrypoint", "id", image, "-u").strip() == "10001"


def test_image_has_runtime_packages_only(image: str) -> None:
    packages = docker("run", "--rm", "--entrypoint", "pip", image, "list", "--format", "freeze")
    names = {line.partition("==")[0].lower() for line in packages.splitlines()}
    assert {"torch", "paho-mqtt", "av", "sparse-mqtt"} <= names
    assert names.isdisjoint({"opencv-python-headless", "pytest", "ruff", "mypy", "hatchling", "scikit-learn"})
    script = (
        f"cd /opt/sparse/lib/python3*/site-packages && du --bytes --summarize --total {TORCH_FOLDERS} 2>&1 | tail -n 1"
    )
    torch_bytes = int(docker("run", "--rm", "--entrypoint", "sh", image, "-c", script).split()[0])
    assert docker_inspect(image)["Size"] - torch_bytes < SIZE_LIMIT_BYTES


def test_image_includes_the_weights_of_the_demo(image: str) -> None:
    code = "from stages.loading.weights_file import find_weights; print(find_weights('yolov3-tiny').stat().st_size)"
    options = ("--rm", "--network", "none", "--read-only", "--entrypoint", "python3")
    assert docker("run", *options, image, "-c", code).strip() == "35434956"


def test_container_exits_on_sigterm_before_its_handler_is_installed(image: str, tmp_path: Path) -> None:
    """While Python starts; without an init process the kernel would ignore the signal."""
    tmp_path.chmod(0o755)
    code = "import time; print('starting', flush=True); time.sleep(600)"
    (tmp_path / "sitecustomize.py").write_text(code)  # Python imports it before anything else
    options = ("--detach", "--volume", f"{tmp_path}:/startup:ro", "--env", "PYTHONPATH=/startup")
    container = docker("run", *options, image, "stage", "/etc/sparse/street.toml", "body").strip()
    try:
        eventually("the start of Python", lambda: "starting" in docker("logs", container))
        docker("stop", "--time", "60", container)
        assert docker_inspect(container)["State"]["ExitCode"] == 128 + signal.SIGTERM
    finally:
        docker("rm", "--force", container)


STUB = """\
FROM {base}
RUN site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \\
    mkdir -p $site/torch $site/torch-2.15.0.dist-info && \\
    echo '__version__ = "2.15.0"' > $site/torch/__init__.py && \\
    printf 'Metadata-Version: 2.1\\nName: torch\\nVersion: 2.15.0\\n' > $site/torch-2.15.0.dist-info/METADATA
"""


def test_torch_of_the_base_image_is_kept(image: str) -> None:
    """As with NVIDIA's images for Jetson. The torch of this base image is a stub: a name and a version."""
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    (base,) = (line.partition("=")[2] for line in lines if line.startswith("ARG BASE="))
    command = ["docker", "build", "--tag", "sparse-test-base", "-"]
    subprocess.run(command, input=STUB.format(base=base), text=True, check=True, capture_output=True)
    try:
        arguments = ["--build-arg", "BASE=sparse-test-base", "--build-arg", "TORCH=base"]
        build_image("sparse:test-base", "--target", "torch", *arguments)
        code = "import torch; print(torch.__version__, torch.__file__)"
        version, file = docker("run", "--rm", "sparse:test-base", "python3", "-c", code).split()
        assert version == "2.15.0"
        assert not file.startswith("/opt/sparse")
    finally:
        docker("image", "rm", "--force", "sparse:test-base", "sparse-test-base")
