"""python -m sparsity_lib lm_eval ...: lm-eval's own command, able to load sparse checkpoints.

    python -m sparsity_lib lm_eval run --model hf --model_args pretrained=smollm2-claws --tasks arc_easy --include_path TASKS
    python -m sparsity_lib tasks TASKS      write the book's task definitions (local data) into a folder

Plain `lm_eval` does not import this library: it would warn, and measure the model dense.
"""

from __future__ import annotations

import sys

from sparsity_lib.errors import SparsityError, command_line, unknown

COMMANDS = ("lm_eval", "tasks")


@command_line("nothing was written under a final name")
def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    return _lm_eval(rest) if command == "lm_eval" else _tasks(rest)


def _lm_eval(rest: list[str]) -> int:
    from lm_eval.__main__ import cli_evaluate

    import sparsity_lib  # noqa: F401  (registers the checkpoints' method with transformers)

    sys.argv = ["lm_eval", *rest]
    cli_evaluate()
    return 0


def _tasks(rest: list[str]) -> int:
    from sparsity_lib.evaluate.tasks import TASKS, write_tasks

    if len(rest) != 1:
        raise SparsityError("tasks needs one folder. Fix: python -m sparsity_lib tasks FOLDER")
    print(write_tasks(rest[0], tuple(TASKS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
