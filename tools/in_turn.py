"""Run a command while no other process runs one under the same lock: in_turn.py LOCK WHAT COMMAND [ARGUMENT ...].

Two `make` at once would install into one environment, or build into one folder. The second waits; the lock goes with the
process that holds it, however that ends. The standard library alone: the environment may not be there yet.
"""

import fcntl
import subprocess
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """The command's exit code."""
    lock, what, *command = arguments
    try:
        Path(lock).parent.mkdir(parents=True, exist_ok=True)
        handle = open(lock, "w")
    except OSError as error:
        print(f"error: cannot write {lock}: {error.strerror}. Fix: free some space or make the folder writable.", file=sys.stderr)
        return 1
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another make works on {what}: waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        # The command holds the lock too: it may outlive this process.
        return subprocess.run(command, pass_fds=[handle.fileno()]).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
