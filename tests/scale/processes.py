"""Processes of a test and of whatever it starts, found by a mark in their environment."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "CRIBSHEET_TEST_MARK"
SRC = Path(__file__).parents[2] / "src"


def marked(mark, title=""):
    """Numbers of the live processes with this mark whose command begins with `title`."""
    found = []
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not place.name.isdigit() or f"{MARK}={mark}".encode() not in (place / "environ").read_bytes():
                continue
            command = (place / "cmdline").read_bytes().decode(errors="replace")
            if command.startswith(title) and int(place.name) != os.getpid():
                found.append(int(place.name))
    return found


def kill(mark, title):
    """Kill one of them as `kill -9` does."""
    victim = marked(mark, title)[0]
    os.kill(victim, signal.SIGKILL)
    return victim


def wait_until(true, seconds=120):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def environment(mark):
    """For a process of its own: one thread, this source tree, the mark."""
    paths = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH", "")]))
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return own | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", MARK: mark}


@contextlib.contextmanager
def started(arguments, folder, mark):
    """`cribsheet serve` in a folder: the process and its address. It ends with the block, of its own accord or not."""
    log = folder / f"log-{time.monotonic_ns()}.txt"
    command = [sys.executable, "-m", "cribsheet", "serve", *arguments]
    with (
        open(log, "w") as out,
        subprocess.Popen(command, env=environment(mark), cwd=folder, stderr=out, stdout=out) as server,
    ):
        try:
            wait_until(lambda: "(page)" in log.read_text() or server.poll() is not None)
            found = re.search(r"at (http://\S+?:\d+)/ \(page\)", log.read_text())
            assert found, log.read_text()
            yield server, found[1]
        finally:
            server.terminate()
