"""Processes inside a trial: started by fork, which costs no second import, and ended whenever the trial says."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from sparsity_lib.errors import SparsityError
from sparsity_lib.progress import unshare

#: Exit codes of a child: done, refused with a clear error, interrupted by Ctrl-C as a command would say it, anything else.
DONE, REFUSED, INTERRUPTED, FAILED = 0, 3, 130, 4


def start(call: Callable[[], object], user: int | None = None) -> int:
    """Run `call` in a child, as another user where one is given; returns the process's id."""
    child = os.fork()
    if child:
        return child
    code = FAILED
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        unshare()
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        call()
        code = DONE
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SparsityError as error:
        code = REFUSED if str(error).strip() else FAILED
        print(f"refused: {error}", flush=True)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        print(f"failed: {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def _within(child: int, seconds: float) -> int | None:
    """The exit code of a child that ends by itself in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, raw = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(raw)
        time.sleep(0.0005)
    return None


def end(child: int, seconds: float = 120.0) -> int:
    """Wait for a child; its exit code, negative for a signal. One that hangs is killed, and -SIGALRM returned."""
    if (code := _within(child, seconds)) is not None:
        return code
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


def run(call: Callable[[], object], user: int | None = None) -> int:
    """`start` and `end`."""
    return end(start(call, user))


def interrupt(child: int, number: int, after: float) -> int:
    """Send a signal to a child after so many seconds, unless it is done before; its exit code."""
    if (code := _within(child, after)) is not None:
        return code
    os.kill(child, number)
    return end(child)
