"""Build the project from the ranges in pyproject.toml, not from the lock, and report what is newer and what breaks.

    python tools/audit.py              # everything, into _build/audit (a gigabyte or two, and some minutes)
    python tools/audit.py --resolve    # only what the resolver would install, compared with the lock

Meant to run weekly. The exit code is 1 where a step failed. The lock stays as it is: `make lock` renews it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "_build" / "audit"
EXTRAS = f"{ROOT}[book,test]"
#: Tests that need no download, and touch what other packages change most often.
TESTS = ("test_core_recipe.py", "test_core_plan.py", "test_core_fit.py", "test_core_checkpoints.py", "test_core_families.py",
         "test_ops.py", "test_parameters.py", "test_results.py", "test_trainer.py", "test_report.py", "test_stress.py")
NO_NETWORK = re.compile(
    r"No matching distribution|Could not find a version|Connection|Temporary failure|timed out|Max retries", re.I)


@dataclass(frozen=True)
class Step:
    """name; outcome: "passed", "failed" or "not possible here"; said: the end of what it printed."""

    name: str
    outcome: str
    said: str


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
    """Run a command, its output shown and kept."""
    print(f"== {name}", flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Step(name, "failed", str(error))
    said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
    print(said, flush=True)
    return Step(name, "failed" if done.returncode else "passed", said)


def install(step: Step) -> Step:
    """The step, its message put plainly where what it lacked was a network."""
    if step.outcome == "failed" and NO_NETWORK.search(step.said):
        fix = "the package index could not be reached, or lacks a version. Fix: check the network and pip's settings"
        return Step(step.name, "not possible here", f"{fix}.\n{step.said}")
    return step


def write(steps: list[Step], rows: list[str], left_out: int) -> Path:
    """The report."""
    lines = ["# Audit", "", "| step | outcome |", "|---|---|", *(f"| {step.name} | {step.outcome} |" for step in steps), ""]
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


def main(arguments: list[str] | None = None) -> int:
    """Run all steps; 1 where one failed or could not be made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolve", action="store_true", help="only say what would be installed")
    options = parser.parse_args(arguments)
    locked = pins((ROOT / "requirements.lock").read_text())
    FOLDER.mkdir(parents=True, exist_ok=True)
    venv, report = FOLDER / "venv", FOLDER / "install.json"
    python, quiet = venv / "bin" / "python", ["--disable-pip-version-check", "--no-input", "-q"]
    steps = [run("new environment", [sys.executable, "-m", "venv", "--clear", venv])]
    if options.resolve:
        report.unlink(missing_ok=True)
        command = [python, "-m", "pip", "install", *quiet, "--dry-run", "--report", report, EXTRAS]
        steps.append(install(run("resolve pyproject.toml", command)))
        rows = differences(locked, planned(report.read_text())) if report.exists() else []
    else:
        steps.append(install(run("install from pyproject.toml", [python, "-m", "pip", "install", *quiet, EXTRAS])))
        rows = []
        if steps[-1].outcome == "passed":
            freeze = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
            rows = differences(locked, {name: v for name, v in pins(freeze).items() if name != "sparsity-lib"})
            environment = {**os.environ, "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}", "SPARSITY_PROGRESS": "0"}
            environment.pop("PYTHONPATH", None)
            smoke = FOLDER / "smoke"
            book = [venv / "bin" / "jupyter-book", "build", ".", "--config", smoke / "_config.yml", "--path-output", smoke]
            steps += [
                run("consistency (pip check)", [python, "-m", "pip", "check"]),
                # Not `python -m pytest`: that would import the checkout, and not what was installed.
                run("tests", [venv / "bin" / "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS)],
                    env=environment),
                run("configuration of the smoke build", [python, "tools/smoke_config.py", "_config.yml", smoke / "_config.yml"]),
                run("book from committed outputs", [*book, "-W", "-n", "--keep-going", "--all"], env=environment),
                vulnerabilities(python, quiet),
            ]
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
    if step.outcome == "failed" and not re.search(r"Found \d+ known vulnerabilit", step.said):
        return Step(name, "not possible here", f"the list of vulnerabilities could not be had from here.\n{step.said}")
    return step


if __name__ == "__main__":
    sys.exit(main())
