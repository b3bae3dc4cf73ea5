"""Liveness file for health checks: touched each time the broker acknowledges our presence record.

Docker and Kubernetes check a container every few seconds, by the age of this file. Asking the broker instead would take
a second client, with a password, for each check.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)


class LivenessFile:
    """The file named by SPARSE_LIVENESS_FILE; without that variable, `touch` does nothing."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        path = environment.get("SPARSE_LIVENESS_FILE")
        self._path = Path(path) if path else None

    def touch(self) -> None:
        """Record that the broker has just acknowledged this process; a failure is logged once and then ignored."""
        if self._path is None:
            return
        try:
            self._path.touch()
        except OSError as error:
            log.warning("cannot touch SPARSE_LIVENESS_FILE, health checks will fail: %s", error)
            self._path = None
