"""Where the monitor of a node listens for events: a Unix socket."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

SOCKET_VARIABLE = "SPARSE_MONITOR"
RUN_VARIABLE = "SPARSE_RUN"  # the name of the run that a process is part of
_NAME = "sparse-monitor.sock"


def socket_path(environment: Mapping[str, str]) -> Path:
    """SPARSE_MONITOR; else in the user's runtime folder; else a name of the user's own among the temporary files."""
    if named := environment.get(SOCKET_VARIABLE):
        return Path(named)
    if folder := environment.get("XDG_RUNTIME_DIR"):
        return Path(folder) / _NAME
    return Path(tempfile.gettempdir()) / f"sparse-{os.getuid()}" / _NAME
