"""Run a command while no other process runs one under the same lock: in_turn.py LOCK WHAT COMMAND [ARGUMENT ...].

Two `make` at once would install into one environment, or build into one folder. The second waits. The command takes this
process's place and inherits the lock, which goes when it and all that it started have ended, however that happens. The standard
library alone: the environment may not be there yet.
"""

import fcntl
import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Wait for the lock and become the command."""
    lock, what, *command = arguments
    try:
        Path(lock).parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_CREAT | os.O_WRONLY, 0o644)
    except OSError as error:
        sys.exit(f"error: cannot write {lock}: {error.strerror}. Fix: free some space or make the folder writable.")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another make works on {what}: waiting for it", file=sys.stderr, flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    os.set_inheritable(handle, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
