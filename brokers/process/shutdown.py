"""How a process is told to leave: by a signal, or by the end of whoever started it.

What `sparse run` starts ends with it, even if it is killed: its end of the pipe to their input closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

# The broker is often gone with the parent, and nobody is left to say goodbye to: who waits for it would never end.
PARENT_EXIT_GRACE_S = 5.0
EXIT_INTERRUPTED = 130  # what a shell reports for a Ctrl-C


class ShutdownEvent(asyncio.Event):
    """Set when this process shall leave; `interrupted` if by a Ctrl-C, and not as a service is ended in good order."""

    interrupted = False

    def install_signal_handlers(self, force: Callable[[], object] = lambda: os._exit(EXIT_INTERRUPTED)) -> None:
        """Have the first SIGTERM or SIGINT set the event, on the running loop, and each later one call `force`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number, force)

    def _on_signal(self, number: int, force: Callable[[], object]) -> None:
        if self.is_set():
            force()
        else:
            self.interrupted = number == signal.SIGINT
            self.set()


def exit_with_parent(leaving: asyncio.Event) -> None:
    """Set `leaving`, on the running loop, when whoever started this process with a pipe as standard input is gone.

    What has not ended by itself some seconds later is ended.
    """
    loop = asyncio.get_running_loop()

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(leaving.set)
        time.sleep(PARENT_EXIT_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
