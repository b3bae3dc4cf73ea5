"""Benchmark suites: pipeline files by name. The packaged ones are in monitor/bench/suites."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.errors import UsageError, did_you_mean

SUITES_FOLDER = Path(__file__).parent / "suites"
# The paper's four deployments, and two baselines: one server, and the device alone.
DEPLOYMENTS = ("cloud", "cloudlet", "hybrid-off-device", "hybrid-on-device", "server", "device")
TASKS = ("detect", "train")
_COMMENT = re.compile(r"\A(?:#.*\n)+")


@dataclass(frozen=True, slots=True)
class Suite:
    """A pipeline file, under a name that is unique in a benchmark."""

    name: str
    path: Path
    pipeline: Pipeline

    @property
    def description(self) -> str:
        """The first sentence of the comment at the top of the file; empty without a comment."""
        comment = _COMMENT.match(self.path.read_text(errors="replace"))
        text = " ".join(line.strip("# ") for line in comment.group().splitlines()) if comment else ""
        return text.partition(". ")[0].rstrip(".") + "." if text else ""


def packaged_suites() -> dict[str, tuple[str, ...]]:
    """The names of the packaged suites by task; a task's name stands for all of them."""
    return {task: tuple(f"{task}-{deployment}" for deployment in DEPLOYMENTS) for task in TASKS}


def find_suites(names: Sequence[str]) -> list[Suite]:
    """The suites for names of files, packaged suites or tasks: each once, in the given order.

    Raises `UsageError` ("UnknownSuite"), and `BadFile` for an invalid pipeline file.
    """
    suites: dict[str, Suite] = {}
    for path in dict.fromkeys(path for name in names for path in _paths(name)):
        # The name is part of folders and topics; files of one name are numbered.
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-.") or "suite"
        candidates = (plain if number == 1 else f"{plain}-{number}" for number in count(1))
        name = next(name for name in candidates if name not in suites)
        suites[name] = Suite(name, path, load_pipeline(path))
    return list(suites.values())


def _paths(name: str) -> Iterator[Path]:
    by_task = packaged_suites()
    packaged = [suite for suites in by_task.values() for suite in suites]
    if name in by_task or name in packaged:
        yield from (SUITES_FOLDER / f"{suite}.toml" for suite in by_task.get(name, (name,)))
    elif Path(name).is_file() or name.endswith(".toml"):
        yield Path(name)  # `load_pipeline` reports a missing file
    else:
        known = [*by_task, *packaged]
        hint = did_you_mean(name, known) or f": expected a pipeline file or one of {', '.join(known)}"
        raise UsageError("UnknownSuite", f"there is no suite {name!r}{hint}", name=name)
