"""A suite: a pipeline file that is measured. The paper's four and two baselines for each task are in monitor/bench/suites."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from brokers.config.pipeline_file import Pipeline, load_pipeline
from monitor.bench.errors import UnknownSuite

SUITES_FOLDER = Path(__file__).parent / "suites"
# The paper's four, and the two that it lacks: one server, and no network at all.
DEPLOYMENTS = ("cloud", "cloudlet", "hybrid-off-device", "hybrid-on-device", "server", "device")
TASKS = ("detect", "train")
_COMMENT = re.compile(r"\A(?:#.*\n)+")


@dataclass(frozen=True, slots=True)
class Suite:
    """A pipeline file under the name that its runs have."""

    name: str
    path: Path
    pipeline: Pipeline

    @property
    def description(self) -> str:
        """What the comment at the file's top says in its first sentence; empty where there is none."""
        found = _COMMENT.match(self.path.read_text(errors="replace"))
        words = " ".join(line.strip("# ") for line in found.group().splitlines()) if found else ""
        return words.partition(". ")[0].rstrip(".") + "." if words else ""


def packaged_suites() -> dict[str, tuple[str, ...]]:
    """The suites that come with Sparse, by task, which is a name for all six of it."""
    return {task: tuple(f"{task}-{place}" for place in DEPLOYMENTS) for task in TASKS}


def find_suites(asked: Sequence[str]) -> list[Suite]:
    """The suites of these names: of a file, of a packaged suite, of a task. Each once, in the order asked for.

    Raises `UnknownSuite`, and `BadFile` for a file with a mistake in it.
    """
    paths = dict.fromkeys(path for name in asked for path in _paths(name))
    names: set[str] = set()
    found = []
    for path in paths:
        name = next(name for name in _names(path.stem) if name not in names)
        names.add(name)
        found.append(Suite(name, path, load_pipeline(path)))
    return found


def _paths(name: str) -> Iterator[Path]:
    groups = packaged_suites()
    ours = [suite for suites in groups.values() for suite in suites]
    if name in groups:
        yield from (SUITES_FOLDER / f"{suite}.toml" for suite in groups[name])
    elif name in ours:
        yield SUITES_FOLDER / f"{name}.toml"
    elif Path(name).is_file() or name.endswith(".toml"):
        yield Path(name)  # one that is not there is told as any pipeline file is
    else:
        raise UnknownSuite(name, (*groups, *ours))


def _names(stem: str) -> Iterator[str]:
    """A name for a file's runs: what folders and topics are made of, and another where two files share it."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "suite"
    yield plain
    number = 2
    while True:
        yield f"{plain}-{number}"
        number += 1
