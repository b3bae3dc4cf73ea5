"""The files of dashboards for Chronograf and Grafana: `python -m deploy.dashboards.write deploy` writes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deploy.dashboards import chronograf, grafana


def dashboard_files() -> dict[str, str]:
    """Their contents, by their places below deploy/."""
    found = {
        "chronograf/sparse.dashboard": chronograf.dashboard(),
        "grafana/dashboards/sparse.json": grafana.dashboard(),
    }
    return {place: json.dumps(content, indent=1) + "\n" for place, content in found.items()}


def write_dashboards(folder: Path) -> None:
    """Write them; raises `OSError`."""
    for place, text in dashboard_files().items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    write_dashboards(Path(sys.argv[1]))
