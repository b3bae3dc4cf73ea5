"""The image of deploy/Dockerfile for tests; `python3 -m tests.support.environment.image` builds it.

It imports no other package, so that `.ci/run` can build the image while packages are being installed. The build uses
pip's configuration of this machine: a mirror of the package index, and a CPU build of PyTorch in a local folder, if
there is one. Elsewhere PyTorch comes from its own index, as in the image that a user builds; where that is out of
reach, from the package index, whose CUDA build is larger by 5 GB.
"""

from __future__ import annotations

import fcntl
import functools
import http.server
import re
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[3]
IMAGE_TAG = "sparse:0.1.0"
# The first free one serves the local folder. It is part of the command that installs PyTorch: a small range of ports
# lets a repeated build use the cached layer.
WHEEL_SERVER_PORTS = range(18970, 18990)
_INDEX_TIMEOUT_S = 10.0
_WHEEL = re.compile(r"torch-([^-]+)-cp(\d+)-.*x86_64\.whl")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""


def pip_settings() -> dict[str, str]:
    """The configuration of pip, from files and the environment: `{"index-url": ...}`."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = value.strip("'\"")
    return settings


def find_local_torch_wheel(settings: dict[str, str]) -> tuple[Path, str] | None:
    """A folder with a wheel of PyTorch for the Python of the image, and its version; None without such a folder."""
    for folder in settings.get("find-links", "").split():
        for wheel in sorted(Path(folder).glob("torch-*.whl")) if "://" not in folder else ():
            match = _WHEEL.fullmatch(wheel.name)
            if match and match[2] == "311":
                return Path(folder), match[1]
    return None


@contextmanager
def build_arguments(lock: IO[str]) -> Iterator[list[str]]:
    """The arguments of `docker build` for this machine; a local folder is served until the end of the block."""
    fcntl.flock(lock, fcntl.LOCK_EX)
    settings = pip_settings()
    arguments = []
    for name, argument in (("index-url", "PIP_INDEX_URL"), ("extra-index-url", "PIP_EXTRA_INDEX_URL")):
        addresses = " ".join(each for each in settings.get(name, "").split() if each.startswith("http"))
        if addresses:
            arguments += ["--build-arg", f"{argument}={addresses}"]
    wheel = find_local_torch_wheel(settings)
    if wheel is None:
        yield arguments if _is_torch_index_reachable() else [*arguments, "--build-arg", "TORCH_INDEX="]
        return
    folder, version = wheel
    server = _serve(folder)
    try:
        links = f"http://127.0.0.1:{server.server_address[1]}/"
        values = {"PIP_FIND_LINKS": links, "TORCH_INDEX": "", "TORCH": f"torch=={version}"}
        for argument, value in values.items():
            arguments += ["--build-arg", f"{argument}={value}"]
        yield [*arguments, "--network", "host"]
    finally:
        server.shutdown()
        server.server_close()


def _is_torch_index_reachable() -> bool:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    index = re.search(r"^ARG TORCH_INDEX=(\S+)$", dockerfile, re.MULTILINE)
    assert index is not None
    try:
        with urllib.request.urlopen(f"{index[1]}/torch/", timeout=_INDEX_TIMEOUT_S):
            return True
    except OSError:
        return False


def build_image(tag: str = IMAGE_TAG, *options: str) -> None:
    """Build the image; raises `subprocess.CalledProcessError` with the output of the engine.

    One process builds at a time: the next uses the cache of the engine for all layers.
    """
    with (Path(tempfile.gettempdir()) / "sparse-test-image.lock").open("w") as lock, build_arguments(lock) as arguments:
        command = ["docker", "build", "--file", "deploy/Dockerfile", "--tag", tag, *arguments, *options, "."]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _serve(folder: Path) -> http.server.ThreadingHTTPServer:
    handler = functools.partial(_Quiet, directory=str(folder))
    for port in WHEEL_SERVER_PORTS:
        try:
            server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        except OSError:
            continue
        threading.Thread(target=server.serve_forever, name="wheels", daemon=True).start()
        return server
    raise OSError(f"no port of {WHEEL_SERVER_PORTS.start} to {WHEEL_SERVER_PORTS.stop - 1} is free")


if __name__ == "__main__":
    try:
        build_image()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{IMAGE_TAG} could not be built:\n{error.stdout}")
