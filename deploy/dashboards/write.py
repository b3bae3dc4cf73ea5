"""Writes the dashboard files of Chronograf and Grafana: `python -m deploy.dashboards.write deploy`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deploy.dashboards import chronograf, grafana


def dashboard_files() -> dict[str, str]:
    """The contents of the files, by their paths below deploy/."""
    dashboards = {
        "chronograf/sparse.dashboard": chronograf.build_dashboard(),
        "grafana/dashboards/sparse.json": grafana.build_dashboard(),
    }
    return {path: json.dumps(dashboard, indent=1) + "\n" for path, dashboard in dashboards.items()}


def write_dashboards(folder: Path) -> None:
    """Write the files below `folder`. Raises `OSError`."""
    for name, text in dashboard_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    write_dashboards(Path(sys.argv[1]))
