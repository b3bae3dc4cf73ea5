"""Shutdown of a process: on a signal, or when its parent process ends.

A child of `sparse run` has a pipe from its parent as standard input, which closes when the parent ends, even if killed.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

# With the parent the broker is often gone too, and a clean shutdown would wait for it forever.
PARENT_EXIT_GRACE_S = 5.0
EXIT_INTERRUPTED = 130  # the exit status that shells report after Ctrl-C


class ShutdownEvent(asyncio.Event):
    """Set when the process shall shut down; `interrupted`: by Ctrl-C (SIGINT), not by SIGTERM or its parent."""

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


def exit_with_parent(shutdown: asyncio.Event) -> None:
    """Set `shutdown`, on the running loop, when standard input closes; exit 5 s later if the process is still up."""
    loop = asyncio.get_running_loop()

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(shutdown.set)
        time.sleep(PARENT_EXIT_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
