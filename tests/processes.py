"""Child processes of tests."""

import os
import signal
import subprocess
import sys
import time


def start(*arguments, **options) -> subprocess.Popen:
    """Python with `arguments`, its output piped, and interruptible by Ctrl-C.

    A job in the background of a shell, as CI may run the tests, ignores SIGINT, and so would its children.
    """
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def together(processes: int, *arguments) -> subprocess.Popen:
    """`processes` of Python with `arguments` that train together, on the CPU.

    By torchrun, as `accelerate launch` does it on GPUs. Without GPUs the latter starts a single process, whatever it is told.
    """
    port = str(20_000 + int(time.time() * 1000) % 20_000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return start(
        "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port, *arguments, env=environment)
