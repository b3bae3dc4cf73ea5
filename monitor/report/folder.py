"""The folder of a report: which files in it are a report's own, so that nobody else's is written over or taken away."""

from __future__ import annotations

from pathlib import Path

from brokers.errors import BadFile
from monitor.report.figures import FIGURE_NAMES

PAGE_FILE, FIGURES_FOLDER, DATA_FOLDER = "index.html", "figures", "data"
PERCENTILES_SUFFIX, SUMMARY_NAME = "-percentiles", "summary"
# In the head of every page that a report made.
GENERATOR_TAG = '<meta name="generator" content="sparse report">'
_MARK_WITHIN = 1000  # characters


def check_folder(folder: Path, kinds: tuple[str, ...]) -> None:
    """Raises `BadFile` for one that holds anything that a report, whose pictures are of these kinds, did not make."""
    # The first level by itself first: somebody may name a folder in which all of a disk lies.
    own, within = report_files(folder, kinds), {folder / FIGURES_FOLDER, folder / DATA_FOLDER}
    above = _entries(folder)
    if not above:
        return
    ours = above <= own | within and all(_entries(each) <= own for each in within)
    if not ours or not _is_page(folder / PAGE_FILE):
        raise BadFile(str(folder), "it holds something else than a report: name another folder, or an empty one")


def prepare_folder(folder: Path, kinds: tuple[str, ...]) -> None:
    """The folders for a new report; what an earlier one made is gone, so that no figure of it stands among the new."""
    for path in report_files(folder, kinds) - {folder / PAGE_FILE}:
        path.unlink(missing_ok=True)
    for name in (FIGURES_FOLDER, DATA_FOLDER):
        (folder / name).mkdir(parents=True, exist_ok=True)


def report_files(folder: Path, kinds: tuple[str, ...]) -> set[Path]:
    """All that reports make there."""
    pictures = {folder / FIGURES_FOLDER / f"{name}.{kind}" for name in FIGURE_NAMES for kind in kinds}
    tables = {
        folder / DATA_FOLDER / f"{name}.csv"
        for name in (*FIGURE_NAMES, *(name + PERCENTILES_SUFFIX for name in FIGURE_NAMES), SUMMARY_NAME)
    }
    return {folder / PAGE_FILE, *pictures, *tables}


def _entries(folder: Path) -> set[Path]:
    return set(folder.iterdir()) if folder.is_dir() else set()


def _is_page(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return GENERATOR_TAG in file.read(_MARK_WITHIN)
    except OSError:
        return False
