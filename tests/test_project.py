"""The files around the library: lock, environment, chapters, book, and what must never be in them."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from sparsity_lib import notebooks, records

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lock_lines() -> list[str]:
    return [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]


def locked() -> dict[str, Requirement]:
    return {wanted.name.lower().replace("_", "-"): wanted for wanted in map(Requirement, lock_lines())}


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lock_holds_exact_versions_of_everything_asked_for():
    pins = locked()
    for wanted in pins.values():
        (clause,) = wanted.specifier
        assert clause.operator == "==" and "+" not in clause.version and wanted.url is None, str(wanted)
    extras = PROJECT["project"]["optional-dependencies"]
    asked = PROJECT["project"]["dependencies"] + [each for name in ("book", "cluster", "test") for each in extras[name]]
    assert set(extras) == {"book", "test", "cluster", "bench"}  # "bench" is compiled from source, on demand
    for wanted in map(Requirement, asked):
        pin = pins[wanted.name.lower().replace("_", "-")]
        assert wanted.specifier.contains(next(iter(pin.specifier)).version), f"{pin} is outside {wanted}"
    assert int(next(iter(pins["jupyter-book"].specifier)).version.split(".")[0]) == 1


@pytest.mark.skipif("SPARSITY_NEWEST" in os.environ, reason="the audit takes the newest of everything")
def test_what_is_fixed_by_decision_is_in_the_lock():
    pins = locked()
    for held in map(Requirement, tool("lock").HELD):
        assert held.specifier.contains(next(iter(pins[held.name].specifier)).version), f"{pins[held.name]} is not {held}"


def test_the_environment_for_conda_equals_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == lock_lines()
    assert "python=3.11" in environment["dependencies"]


def test_lock_tool_drops_local_builds_and_the_project_itself():
    freeze = "torch==2.13.0+cpu\npip==26\n-e git+ssh://x#egg=sparsity-lib\nsparsity-lib==0.1.0\nTriton==3\nattrs==1\n"
    lines = tool("lock").pins(freeze)
    assert lines[:2] == ["attrs==1", "torch==2.13.0"] and lines[2].startswith("Triton==3 ; ") and len(lines) == 3


def test_the_kernels_folder_is_not_taken_for_the_public_package():
    assert not list((ROOT / "kernels").glob("__init__*"))
    code = (
        "import importlib.util as u; s = u.find_spec('kernels'); "
        "assert s is None or s.origin is None or 'site-packages' in s.origin, s; "
        "from transformers.utils.import_utils import is_kernels_available as a; print(s is not None, a())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "False"


def test_the_installed_package_is_the_library_alone():
    from setuptools import find_packages

    found = find_packages(ROOT, include=PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
    assert "sparsity_lib" in found and all(name.split(".")[0] == "sparsity_lib" for name in found)
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("sparsity_lib/**/*.py")}
    assert folders == set(found), "a folder with modules needs an __init__.py to be installed"


def test_citation_and_package_agree_on_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def texts():
    skipped = {".venv", ".git", "_build", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    for path in ROOT.rglob("*"):
        relative = path.relative_to(ROOT)
        built = any(part in skipped or part.endswith("-info") for part in relative.parts)
        if path.is_file() and not built:
            try:
                yield relative, path.read_text()
            except UnicodeDecodeError:
                continue


def test_no_file_names_one_machine_or_a_package_registry():
    parts = [("/", "work/"), ("/", "root/"), ("/", "opt/"), ("pypi", r"\.org"), ("python", "hosted")]
    banned = re.compile("|".join(map("".join, parts)))  # in pieces, so that this file does not name them
    found = [f"{path}: {match[0]}" for path, text in texts() if (match := banned.search(text))]
    assert not found, found


def test_every_page_of_the_table_of_contents_exists():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    pages = [toc["root"]] + [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    for page in pages:
        assert any((ROOT / f"{page}{suffix}").exists() for suffix in (".md", ".ipynb")), page
    assert {f"notebooks/{path.stem}" for path in NOTEBOOKS} <= set(pages)


def test_the_readme_fits_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 45


def test_the_smoke_build_executes_nothing(tmp_path):
    command = [sys.executable, ROOT / "tools" / "smoke_config.py", ROOT / "_config.yml", tmp_path / "new" / "c.yml"]
    subprocess.run(command, check=True)
    changed = yaml.safe_load((tmp_path / "new" / "c.yml").read_text())
    original = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert changed["execute"].pop("execute_notebooks") == "off"
    assert original["execute"].pop("execute_notebooks") == "cache"
    assert changed == original and original["sphinx"]["config"]["nb_execution_raise_on_error"] is True


def test_make_expands_nothing_in_what_a_user_passes(tmp_path):
    mark = tmp_path / "ran"
    evil = f"name=$(shell touch {mark}) `touch {mark}` $(touch {mark})"
    command = ["make", "-C", ROOT, "-n", f"VENV={tmp_path / 'none'}"]
    for variable, goal in (("P", "run"), ("NB", "run"), ("P", "sweep"), ("NB", "refresh"), ("R", "results")):
        run = subprocess.run([*command, goal, f"{variable}={evil}"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "touch" not in run.stdout.replace("touch " + str(tmp_path / "none" / ".installed"), "")
        assert not mark.exists()


@pytest.mark.parametrize("killed", [False, True])
def test_two_makes_take_turns(tmp_path, killed):
    """The second command begins when the first has ended, by itself or killed; what it returns is returned."""
    log, lock, go = tmp_path / "log", tmp_path / "new" / "lock", tmp_path / "go"
    first = (f"import pathlib, time\nopen({str(log)!r}, 'a').write('begin ')\nwhile not pathlib.Path({str(go)!r}).exists(): "
             f"time.sleep(0.01)\nopen({str(log)!r}, 'a').write('end ')")
    second = f"open({str(log)!r}, 'a').write('second'); raise SystemExit(7)"
    command = [sys.executable, ROOT / "tools" / "in_turn.py", lock, "the pages", sys.executable, "-c"]
    one = subprocess.Popen([*command, first])
    while not log.exists():
        time.sleep(0.01)
    other = subprocess.Popen([*command, second], stderr=subprocess.PIPE, text=True)
    assert "another make works on the pages: waiting for it" in other.stderr.readline()
    assert other.poll() is None and log.read_text() == "begin "
    one.kill() if killed else go.touch()
    other.communicate(timeout=60)
    assert other.returncode == 7 and log.read_text() == ("begin second" if killed else "begin end second")
    assert one.wait() == (-signal.SIGKILL if killed else 0)


def test_a_make_that_waited_finds_the_environment_done(tmp_path):
    """It looks again, and does not install under the feet of the one that was first."""
    for name in ("requirements.lock", "pyproject.toml", "setup.py"):
        (tmp_path / name).touch()
    for name in ("Makefile", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / "none" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho installs >> {tmp_path}/log\nsleep 1\n")
    python.chmod(0o755)
    command = ["make", "-C", tmp_path, "VENV=none", f"PYTHON={sys.executable}", "env"]
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "INSIDE")}
    makes = [subprocess.Popen(command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [make.communicate(timeout=60)[0] for make in makes]
    assert [make.returncode for make in makes] == [0, 0], said
    assert (tmp_path / "log").read_text().split() == ["installs"] * 2, "two calls of pip, by one of them"
    assert sum("waiting for it" in each for each in said) == 1 and (tmp_path / "none" / ".installed").exists()


def test_a_lock_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, ROOT / "tools" / "in_turn.py", tmp_path / "file" / "lock", "the pages", "true"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: cannot write") and "Fix: " in run.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestChapter:
    """What every committed chapter keeps to."""

    def test_it_is_executed_in_order_and_clean(self, path):
        notebook = nbformat.read(path, 4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "make refresh"
        assert sum(len(cell.outputs) for cell in code) > 3
        for cell in code:
            for output in cell.outputs:
                assert output.output_type != "error" and output.get("name") != "stderr", output
        notebooks.refuse_paths(notebook, path.name)
        assert "version" not in notebook.metadata.language_info

    def test_its_parameters_follow_the_grammar(self, path):
        assert notebooks.parameters_of(path.stem)

    def test_glued_tables_and_figures_are_pasted_and_described(self, path):
        notebook = nbformat.read(path, 4)
        prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        for cell in notebook.cells:
            names = {
                output.metadata.scrapbook.name: "".join(output.data)
                for output in cell.get("outputs", []) if "scrapbook" in output.get("metadata", {})
            }
            shown = [name for name, kinds in names.items() if "markdown" in kinds or "image" in kinds]
            if shown:
                assert "remove-output" in cell.metadata.get("tags", []), f"{shown}: tag the cell remove-output"
            for name in shown:
                assert re.search(rf"{{glue:(md|figure)}} {re.escape(name)}\b", prose), f"{name} is never pasted"
        for block in re.findall(r":::\{glue:figure\}.*?\n(.*?):::", prose, re.DOTALL):
            alt = re.search(r"^:alt: (.*)$", block, re.MULTILINE)
            assert alt and len(alt[1]) >= 20 and ":name:" in block, f"needs :name: and a sentence of :alt:\n{block}"

    def test_its_numbers_are_committed(self, path):
        assert records.read(path.parent / "records" / f"{path.stem}.json")
