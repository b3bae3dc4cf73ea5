"""The folder of a report: which files in it are a report's own, so that nobody else's is written over or taken away."""

from __future__ import annotations

from pathlib import Path

from brokers.errors import BadFile
from monitor.report.figures import NAMES

PAGE, FIGURES, DATA = "index.html", "figures", "data"
PERCENTILES, SUMMARY = "-percentiles", "summary"
# In the head of every page that a report made.
MARK = '<meta name="generator" content="sparse report">'
_MARK_WITHIN = 1000  # characters


def check_folder(folder: Path, kinds: tuple[str, ...]) -> None:
    """Raises `BadFile` for one that holds anything that a report, whose pictures are of these kinds, did not make."""
    # The first level by itself first: somebody may name a folder in which all of a disk lies.
    own, within = own_files(folder, kinds), {folder / FIGURES, folder / DATA}
    above = _entries(folder)
    if not above:
        return
    ours = above <= own | within and all(_entries(each) <= own for each in within)
    if not ours or not _is_page(folder / PAGE):
        raise BadFile(str(folder), "it holds something else than a report: name another folder, or an empty one")


def make_room(folder: Path, kinds: tuple[str, ...]) -> None:
    """The folders for a new report; what an earlier one made is gone, so that no figure of it stands among the new."""
    for path in own_files(folder, kinds) - {folder / PAGE}:
        path.unlink(missing_ok=True)
    for name in (FIGURES, DATA):
        (folder / name).mkdir(parents=True, exist_ok=True)


def own_files(folder: Path, kinds: tuple[str, ...]) -> set[Path]:
    """All that reports make there."""
    pictures = {folder / FIGURES / f"{name}.{kind}" for name in NAMES for kind in kinds}
    tables = {folder / DATA / f"{name}.csv" for name in (*NAMES, *(name + PERCENTILES for name in NAMES), SUMMARY)}
    return {folder / PAGE, *pictures, *tables}


def _entries(folder: Path) -> set[Path]:
    return set(folder.iterdir()) if folder.is_dir() else set()


def _is_page(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return MARK in file.read(_MARK_WITHIN)
    except OSError:
        return False
