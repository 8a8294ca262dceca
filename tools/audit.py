"""Build the project from the ranges in pyproject.toml, not from the lock, and report what is newer and what breaks.

    python tools/audit.py              # everything, in a clone in _build/audit (an hour on two cores, some gigabytes)
    python tools/audit.py --resolve    # only what the resolver would install, compared with the lock

Meant to run weekly. What is committed is cloned, gets a lock of the newest packages, and goes through everything that guards
the project: all tests, the operators under sanitizers, every notebook against its committed text and numbers, and a build of
the book that executes them. The exit code is 1 where a step failed. The lock stays as it is: `make lock` renews it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import lock

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "_build" / "audit"
CLONE = FOLDER / "clone"
EXTRAS = "[book,test,cluster]"
#: What make is asked for in the clone, and what it is called in the report.
TARGETS = {
    "lint": "lint", "native": "operators under sanitizers", "unit": "tests", "nbval": "notebooks, their text and numbers",
    "book": "book, executed",
}
#: What a make around this one, or a user's shell, says of another checkout.
_NOT_HANDED_ON = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "VENV", "PYTHONPATH", "SPARSITY_PROJECT")
NO_NETWORK = re.compile(
    r"No matching distribution|Could not find a version|Connection|Temporary failure|timed out|Max retries", re.I)


@dataclass(frozen=True)
class Step:
    """name; outcome: "passed", "failed" or "not possible here"; said: the end of what it printed; minutes that it took."""

    name: str
    outcome: str
    said: str
    minutes: float = 0.0


def pins(text: str) -> dict[str, str]:
    """Package, in its normal spelling -> version, of a lock or of `pip freeze`."""
    found = {}
    for line in text.splitlines():
        name, equals, version = line.partition("==")
        if equals and not line.startswith("#"):
            found[normal(name)] = version.partition(";")[0].partition("+")[0].strip()
    return found


def normal(name: str) -> str:
    """The one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def planned(report: str) -> dict[str, str]:
    """Package -> version of pip's installation report, the project itself left out."""
    entries = (entry["metadata"] for entry in json.loads(report)["install"])
    return {normal(each["name"]): each["version"].partition("+")[0] for each in entries if normal(each["name"]) != "sparsity-lib"}


def differences(locked: dict[str, str], found: dict[str, str]) -> list[str]:
    """A row of a table for each package that is another than in the lock."""
    names = sorted(locked.keys() | found.keys())
    return [f"| {name} | {locked.get(name, '–')} | {found.get(name, '–')} |" for name in names
            if name in found and locked.get(name) != found[name]]


def run(name: str, command: list[str | Path], **options) -> Step:
    """Run a command, its output kept in a file, the end of it shown."""
    print(f"== {name}", flush=True)
    started = time.monotonic()
    log = log_of(name)
    try:
        with open(log, "w") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, cwd=ROOT, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Step(name, "failed", str(error))
    said = "\n".join(log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-40:])
    print(said, flush=True)
    return Step(name, "failed" if done.returncode else "passed", said, (time.monotonic() - started) / 60)


def log_of(name: str) -> Path:
    """The file of what a step printed."""
    return FOLDER / f"{re.sub(r'[^a-z]+', '-', name.lower()).strip('-')}.log"


def install(step: Step) -> Step:
    """The step, its message put plainly where what it lacked was a network."""
    if step.outcome == "failed" and NO_NETWORK.search(step.said):
        fix = "the package index could not be reached, or lacks a version. Fix: check the network and pip's settings"
        return Step(step.name, "not possible here", f"{fix}.\n{step.said}", step.minutes)
    return step


def write(steps: list[Step], rows: list[str], left_out: int) -> Path:
    """The report."""
    lines = ["# Audit", "", "| step | outcome | minutes |", "|---|---|---|",
             *(f"| {step.name} | {step.outcome} | {step.minutes:.1f} |" for step in steps), ""]
    if rows:
        head = [f"{len(rows)} packages are others than in `requirements.lock`:", "", "| package | lock | here |", "|---|---|---|"]
        lines += [*head, *rows, ""]
    elif left_out == 0:
        lines += ["Nothing is newer than in `requirements.lock`.", ""]
    for step in steps:
        if step.outcome != "passed":
            lines += [f"## {step.name}: {step.outcome}", "", "```text", step.said, "```", ""]
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "report.md"
    path.write_text("\n".join(lines))
    return path


def rebuild(python: Path, quiet: list[str]) -> tuple[list[Step], list[str]]:
    """Clone, install the newest, run everything: the steps, and the rows of packages that differ from the lock."""
    shutil.rmtree(CLONE, ignore_errors=True)
    steps = [run("clone of what is committed", ["git", "clone", "-q", ROOT, CLONE])]
    steps.append(run("new environment", [sys.executable, "-m", "venv", CLONE / ".venv"]))
    if all(step.outcome == "passed" for step in steps):
        command = [python, "-m", "pip", "install", *quiet, "-e", f"{CLONE}{EXTRAS}"]
        steps.append(install(run("install from pyproject.toml", command)))
    if any(step.outcome != "passed" for step in steps):
        return steps, []
    freeze = subprocess.run([python, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True).stdout
    newest = lock.HEAD + "".join(f"{line}\n" for line in lock.pins(freeze))
    rows = differences(pins((ROOT / lock.LOCK.name).read_text()), pins(newest))
    (CLONE / lock.LOCK.name).write_text(newest)
    (CLONE / lock.CONDA.name).write_text(lock.conda(newest))
    (CLONE / ".venv" / ".installed").touch()  # make takes the environment as it is
    steps.append(run("consistency (pip check)", [python, "-m", "pip", "check"]))
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_HANDED_ON}
    environment["SPARSITY_NEWEST"] = "1"
    for target, name in TARGETS.items():
        steps.append(run(name, ["make", "-C", CLONE, "VENV=.venv", target], env=environment))
    return steps, rows


def resolve(python: Path, quiet: list[str]) -> tuple[list[Step], list[str]]:
    """Only what would be installed, against the lock."""
    report = FOLDER / "install.json"
    report.unlink(missing_ok=True)
    steps = [run("new environment", [sys.executable, "-m", "venv", "--clear", python.parents[1]])]
    command = [python, "-m", "pip", "install", *quiet, "--dry-run", "--report", report, f"{ROOT}{EXTRAS}"]
    steps.append(install(run("resolve pyproject.toml", command)))
    locked = pins((ROOT / lock.LOCK.name).read_text())
    return steps, differences(locked, planned(report.read_text())) if report.exists() else []


def main(arguments: list[str] | None = None) -> int:
    """Run all steps; 1 where one failed or could not be made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolve", action="store_true", help="only say what would be installed")
    options = parser.parse_args(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    quiet = ["--disable-pip-version-check", "--no-input", "-q"]
    if options.resolve:
        steps, rows = resolve(FOLDER / "venv" / "bin" / "python", quiet)
    else:
        python = CLONE / ".venv" / "bin" / "python"
        steps, rows = rebuild(python, quiet)
        if python.exists():
            steps.append(vulnerabilities(python, quiet))
    path = write(steps, rows, left_out=sum(step.outcome != "passed" for step in steps))
    print(f"report: {path.relative_to(ROOT)}")
    return int(any(step.outcome != "passed" for step in steps))


def vulnerabilities(python: Path, quiet: list[str]) -> Step:
    """What the public lists of vulnerabilities say of the lock; they need a network of their own."""
    name = "known vulnerabilities of the lock (pip-audit)"
    step = install(run(name, [python, "-m", "pip", "install", *quiet, "pip-audit"]))
    if step.outcome != "passed":
        return step
    command = [python, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off", "-r", "requirements.lock"]
    step = run(name, command, timeout=900)
    return known(step, log_of(name).read_text(errors="replace"), len(pins((ROOT / lock.LOCK.name).read_text())))


def known(step: Step, printed: str, packages: int) -> Step:
    """What pip-audit's run says, where it could look up any of so many packages at all."""
    skipped = printed.count("could not be audited")
    if skipped >= packages or (step.outcome == "failed" and not re.search(r"Found \d+ known vulnerabilit", printed)):
        said = f"the list of vulnerabilities could not be had from here ({skipped} of {packages} packages not looked up)."
        return Step(step.name, "not possible here", f"{said}\n{step.said}", step.minutes)
    return Step(f"{step.name}, {packages - skipped} of {packages} packages", step.outcome, step.said, step.minutes)


if __name__ == "__main__":
    sys.exit(main())
