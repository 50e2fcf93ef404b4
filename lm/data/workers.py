"""Worker processes that end when they should."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def start_worker() -> None:
    """Makes this process a worker that leaves signals to the main process and ends with it.

    A terminal's Ctrl-C and a scheduler's SIGTERM reach all processes. The main one ends its workers itself; one that
    was killed can't, so each worker watches for that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
