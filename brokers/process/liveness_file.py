"""The pulse of a process: a file that says, to whoever looks after it, that the broker knew it was up just now.

Docker and Kubernetes ask a container every few seconds whether it is well. Presence at the broker is what counts, and
the process that keeps it knows; to ask the broker would take a second client, with a password, each time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)


class LivenessFile:
    """Touches the file that SPARSE_LIVENESS_FILE names, at each beat; without one it does nothing."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        named = environment.get("SPARSE_LIVENESS_FILE")
        self._file = Path(named) if named else None

    def touch(self) -> None:
        """The broker has just acknowledged that this process is up."""
        if self._file is None:
            return
        try:
            self._file.touch()
        except OSError as error:  # no reason to stop working, and no reason to say so each second
            log.warning("the pulse cannot be kept in SPARSE_LIVENESS_FILE: %s", error)
            self._file = None
