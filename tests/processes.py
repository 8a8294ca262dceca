"""Child processes of tests."""

import signal
import subprocess
import sys


def start(*arguments, **options) -> subprocess.Popen:
    """Python with `arguments`, its output piped, and interruptible by Ctrl-C.

    A job in the background of a shell, as CI may run the tests, ignores SIGINT, and so would its children.
    """
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)
