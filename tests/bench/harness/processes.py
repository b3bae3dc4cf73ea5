"""Processes that benchmarks start and measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from monitor.launch.child_process import ChildProcess, terminate_all

WAIT_TIMEOUT_S = 60.0


@contextmanager
def start_stages(
    file: Path, address: str, folder: Path, stages: Mapping[str, tuple[str, ...]], **environment: str
) -> Iterator[dict[str, ChildProcess]]:
    """Start `sparse stage` for each name in `stages`, with these further options; terminate all at the end.

    The log of each is in `folder`.
    """
    children = {
        name: ChildProcess(
            name,
            ("stage", str(file), name, "--broker", address, *options),
            folder / f"{file.stem}-{name}.log",
            environment=environment,
        )
        for name, options in stages.items()
    }
    with running(*children.values()):
        yield children


@contextmanager
def running(*children: ChildProcess) -> Iterator[None]:
    """Start the processes; terminate all at the end."""
    try:
        for child in children:
            child.start()
        yield
    finally:
        terminate_all(children)


def wait_until(predicate: Callable[[], object], description: str) -> None:
    end_s = time.monotonic() + WAIT_TIMEOUT_S
    while not predicate():
        if time.monotonic() > end_s:
            raise TimeoutError(f"{description}: not within {WAIT_TIMEOUT_S:g} s")
        time.sleep(0.02)


def process_cpu_s(pid: int) -> float:
    """Processor time of a process so far, user and system."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system
