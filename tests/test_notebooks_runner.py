"""run, refresh and the build's cache key, on small notebooks in a folder that looks like a checkout."""

import json
import os
import signal
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from processes import start

from sparsity_lib import notebooks, project, records
from sparsity_lib.errors import SparsityError
from sparsity_lib.stress import tiny

PARAMETERS = 'density: float = 0.5  # (0, 1] share\nname: str = "x"  # any text'


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for folder in ("notebooks", "sparsity_lib", "results", "kernels"):
        (tmp_path / folder).mkdir()
    for file in ("_toc.yml", "pyproject.toml", "requirements.lock", "sparsity_lib/a.py"):
        (tmp_path / file).write_text("one\n")
    monkeypatch.setenv(project.SWITCH, str(tmp_path))
    monkeypatch.delenv(records.SWITCH, raising=False)
    return tmp_path


def write(folder: Path, name: str, *cells: str) -> Path:
    made = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    made += [nbformat.v4.new_code_cell(cell) for cell in cells]
    for index, cell in enumerate(made):
        cell["id"] = f"cell-{index}"
    path = folder / "notebooks" / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


#: A cell that records a number, as a chapter does, without the library's seconds of import.
RECORD = ("import json, os, pathlib\nplace = pathlib.Path(os.environ['SPARSITY_RECORDS'])\nplace.mkdir(exist_ok=True)\n"
          "(place / 'demo.json').write_text(json.dumps({'entries': {'n': {'value': density}}}));")


def test_run_changes_the_parameters_and_leaves_the_chapter_alone(checkout):
    chapter = write(checkout, "demo", "from pathlib import Path\nprint(density * 2, name, Path.cwd().name)", RECORD)
    before = chapter.read_bytes()
    path = notebooks.run("demo", ["density=0.3", "name=it's $HOME `x`"])
    assert path.parent == checkout / "runs" and path.name.startswith("demo-")
    texts = [output.text for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    assert texts == ["0.6 it's $HOME `x` notebooks\n"]
    assert chapter.read_bytes() == before
    assert not list((checkout / "runs").glob("*.partial*"))
    assert records.read(checkout / "runs" / "records" / path.stem / "demo.json") == {"n": {"value": 0.3}}
    assert notebooks.run("demo", ["density=0.30", "name=it's $HOME `x`"]) == path


@pytest.mark.parametrize(("name", "pair", "said"), [
    ("dmo", "density=0.3", "did you mean 'demo'"), ("demo", "densitty=0.3", "did you mean 'density'"),
    ("demo", "density=1.5", "(0, 1]"), ("../demo", "density=0.5", "unknown"),
])
def test_bad_input_is_refused_before_anything_runs(checkout, name, pair, said):
    write(checkout, "demo", "open('../ran', 'w')")
    with pytest.raises(SparsityError) as caught:
        notebooks.run(name, [pair])
    assert said in str(caught.value)
    assert not (checkout / "ran").exists() and not (checkout / "runs").exists()


def test_a_failing_run_keeps_only_a_partial_notebook(checkout, capsys):
    write(checkout, "demo", RECORD, "1 / 0")
    assert notebooks.main(["run", "demo"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    (left,) = (checkout / "runs").glob("*.ipynb")
    assert left.name.endswith(".partial.ipynb") and not (checkout / "runs" / "records").exists()


def test_a_kernel_that_dies_is_an_error(checkout, capsys):
    write(checkout, "demo", "import os; os._exit(1)")
    assert notebooks.main(["run", "demo"]) == 1
    assert capsys.readouterr().err.splitlines()[-2].startswith("error: demo.ipynb failed: Kernel died")


def one_error(capsys, *said):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and " Fix: " in line and all(part in line for part in said), line


def test_a_disk_that_fills_under_a_run(checkout, monkeypatch, capsys):
    """While a cell runs: the kernel ends, nothing has its final name, and once there is room the same command does its work."""
    from papermill.iorw import LocalHandler

    write(checkout, "demo", "import os\nopen('../pid', 'w').write(str(os.getpid()))", RECORD)
    with monkeypatch.context() as patch:
        plain = LocalHandler.write

        def writes(handler, text, path):
            if (checkout / "pid").exists():
                raise OSError(28, "No space left on device")
            plain(handler, text, path)

        patch.setattr(LocalHandler, "write", writes)
        assert notebooks.main(["run", "demo"]) == 1
    one_error(capsys, "demo.ipynb cannot be run into ", "No space left on device")
    assert [path.name.rpartition(".")[0][-8:] for path in (checkout / "runs").glob("*.ipynb")] == [".partial"]
    assert not (checkout / "runs" / "records").exists() and ended((checkout / "pid").read_text())
    assert notebooks.main(["run", "demo"]) == 0
    assert not list((checkout / "runs").glob("*.partial*")) and len(list((checkout / "runs" / "records").iterdir())) == 1


def ended(pid):
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.1)
    os.kill(int(pid), signal.SIGKILL)
    return False


@pytest.fixture
def here(monkeypatch):
    """Cells are run in this process, without a kernel."""
    from papermill.engines import papermill_engines

    monkeypatch.setitem(papermill_engines._engines, None, papermill_engines.get_engine(None))
    tiny.run_cells()


def test_runs_that_cannot_be_written(checkout, here, monkeypatch, capsys):
    write(checkout, "demo", "1")
    runs = checkout / "runs"
    runs.touch()
    assert notebooks.main(["run", "demo"]) == 1
    one_error(capsys, f"cannot write in {runs}: ")
    runs.unlink()
    assert notebooks.main(["run", "demo"]) == 0
    (final,), (record,) = runs.glob("*.ipynb"), runs.glob("records/*/*.json")
    capsys.readouterr()
    places = {final.with_suffix(".partial.ipynb"): "demo.ipynb cannot be run into ", record: "cannot write demo.json in ",
              final: f"cannot write {final}: "}
    for place, said in places.items():
        place.unlink(missing_ok=True)
        place.mkdir()
        assert notebooks.main(["run", "demo"]) == 1
        one_error(capsys, said)
        place.rmdir()
        assert notebooks.main(["run", "demo"]) == 0 and final.is_file() and record.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(checkout / "gone"))
        assert notebooks.main(["run", "demo"]) == 1
        one_error(capsys, f"cannot write temporary files in {checkout}/gone: ", "TMPDIR=")
        assert notebooks.main(["refresh", "demo"]) == 1
        one_error(capsys, f"cannot write temporary files in {checkout}/gone: ", "TMPDIR=")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_checkout_that_is_read_only(checkout, capsys):
    write(checkout, "demo", "1")
    checkout.chmod(0o555)
    try:
        for command in ("run", "sweep"):
            assert notebooks.main([command, "demo"]) == 1
            one_error(capsys, "cannot write in ")
    finally:
        checkout.chmod(0o755)


def test_a_system_that_refuses_a_kernel_its_files(checkout, monkeypatch, capsys):
    chapter = write(checkout, "demo", "1")
    before = chapter.read_bytes()

    def refused(*_, **__):
        raise OSError(28, "No space left on device", "/home/me/.local/share/jupyter/runtime")

    monkeypatch.setattr("nbclient.NotebookClient.setup_kernel", refused)
    monkeypatch.setattr("nbclient.NotebookClient.async_setup_kernel", refused)
    for command in ("run", "refresh"):
        assert notebooks.main([command, "demo"]) == 1
        one_error(capsys, "demo.ipynb cannot be run into ", "No space left on device: '/home/me/.local/share/jupyter/runtime'")
    assert chapter.read_bytes() == before


@pytest.mark.parametrize("text", ["", "xx", "{}", "[]", "null", '{"nbformat": 99}', "[" * 10**5, "\udcff",
                                  '{"cells": [3], "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'])
def test_a_chapter_that_is_damaged_is_named(checkout, capsys, text):
    path = checkout / "notebooks" / "demo.ipynb"
    path.write_bytes(text.encode(errors="surrogateescape"))
    for command in ("show", "run", "sweep", "refresh"):
        assert notebooks.main([command, "demo"]) == 1, command
        one_error(capsys, f"{path} is no notebook that can be read", "git checkout")


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_ctrl_c_keeps_only_a_partial_notebook_and_ends_the_kernel(checkout, command):
    write(checkout, "demo", "import os\nopen('../pid', 'w').write(str(os.getpid()))\nimport time\ntime.sleep(100)")
    process = start("-m", "sparsity_lib.notebooks", command, "demo", start_new_session=True)
    pid = checkout / "pid"
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in error
    assert not [path for path in (checkout / "runs").glob("*.ipynb") if ".partial." not in path.name]
    assert ended(pid.read_text()), "the kernel outlived its notebook"


def test_refresh_is_repeatable_and_writes_the_record(checkout):
    chapter = write(
        checkout, "demo", "from sparsity_lib import report\nreport.start('demo')\nreport.glue_number('n', 0.25)",
        "print(density)")
    assert notebooks.main(["refresh", "demo"]) == 0
    first = chapter.read_bytes()
    assert notebooks.main(["refresh"]) == 0
    assert chapter.read_bytes() == first
    notebook = nbformat.reads(first.decode(), 4)
    assert "version" not in notebook.metadata.language_info and "execution" not in notebook.cells[0].metadata
    committed = records.read(checkout / "notebooks" / "records" / "demo.json")
    assert committed["n"]["value"] == 0.25


@pytest.mark.parametrize("cell", [
    "raise RuntimeError('no')", "import os; print(os.getcwd())", "import os; os._exit(1)",
])
def test_refresh_leaves_a_failing_or_leaking_chapter_as_it_was(checkout, cell):
    chapter = write(checkout, "demo", cell)
    before = chapter.read_bytes()
    assert notebooks.main(["refresh", "demo"]) == 1
    assert chapter.read_bytes() == before
    assert sorted(path.name for path in chapter.parent.iterdir()) == ["demo.ipynb"]


def test_the_cache_is_dropped_exactly_when_code_or_results_change(checkout):
    cache = checkout / notebooks.CACHE
    notebooks.prune_cache()
    for change in ("sparsity_lib/a.py", "kernels/k.cpp", "results/r.json", "requirements.lock"):
        cache.mkdir(parents=True)
        assert not notebooks.prune_cache() and cache.exists()
        (checkout / change).write_text("two\n")
        assert notebooks.prune_cache() and not cache.exists(), change
    cache.touch()  # what cannot be removed must not pass for executed with the library of now
    (checkout / "sparsity_lib/a.py").write_text("three\n")
    for _ in range(2):
        with pytest.raises(SparsityError, match="jupyter_cache: .*Fix: "):
            notebooks.prune_cache()
    cache.unlink()
    notebooks.prune_cache()
    cache.mkdir()
    (checkout / "notebooks" / "demo.ipynb").write_text(json.dumps({}))
    (checkout / "sparsity_lib" / "__pycache__").mkdir()
    (checkout / "sparsity_lib" / "__pycache__" / "a.pyc").write_text("x")
    assert not notebooks.prune_cache()


def test_outside_a_checkout_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv(project.SWITCH, str(tmp_path))
    with pytest.raises(SparsityError, match="checkout"):
        notebooks.names()
