"""A chapter at every combination: what is run, where it ends up, and when it is run again."""

import json
import re
import shutil
import tempfile

import nbformat
import pytest
import sweep_tasks

from sparsity_lib import notebook_sweep, notebooks, parameters, project, records, sweep
from sparsity_lib.errors import SparsityError

PARAMETERS = """
density: float = 0.5  # (0, 1] share
model: str = "x"  # any text
steps: list[float] = [0.5]  # (0, 1] shares
"""
KNOWN = parameters.parse_cell(PARAMETERS)


@pytest.mark.parametrize(("text", "values"), [
    ("0.3,0.5", ["0.3", "0.5"]), ("0.3", ["0.3"]), (" a , b ", ["a", "b"]), ("[0.5,0.3],[0.7]", ["[0.5,0.3]", "[0.7]"]),
    ("'a,b',c", ["'a,b'", "c"]), ("it's,so", ["it's", "so"]), ("", [""]), ("a,,b", ["a", "", "b"]),
])
def test_values_are_cut_at_commas(text, values):
    assert parameters.split_values(text) == values


def test_combinations_are_each_there_once():
    pairs = ["density=0.3,0.5,0.30", "model=a,'b,c'", "steps=[0.5,0.3],[0.1]"]
    found = parameters.read_combinations(pairs, KNOWN)
    expected = [{"density": d, "model": m, "steps": s} for d in (0.3, 0.5) for m in ("a", "b,c") for s in ([0.5, 0.3], [0.1])]
    assert found == expected
    assert parameters.read_combinations([], KNOWN) == [{}]


@pytest.mark.parametrize(("pairs", "said"), [
    (["density=0.3,1.5"], "(0, 1]"), (["density=0.3,"], "a number"), (["densty=0.3,0.5"], "did you mean 'density'"),
    (["density"], "name=value"), (["density=0.3", "density=0.5"], "given twice"), (["model=a,"], "a text"),
])
def test_bad_values_are_refused_before_anything_runs(checkout, pairs, said):
    write(checkout, "open('../ran', 'w')")
    with pytest.raises(SparsityError, match=re.escape(said)):
        notebook_sweep.sweep("demo", pairs)
    assert not (checkout / "ran").exists() and not (checkout / "runs").exists()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    for name in ("notebooks", "sparsity_lib", "results", "kernels"):
        (folder / name).mkdir(parents=True)
    for file in ("_toc.yml", "pyproject.toml", "requirements.lock", "sparsity_lib/a.py"):
        (folder / file).write_text("one\n")
    monkeypatch.setenv(project.SWITCH, str(folder))
    for switch in (records.SWITCH, sweep.WORKERS, sweep.CLUSTER):
        monkeypatch.delenv(switch, raising=False)
    return folder


def write(folder, *cells):
    made = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    made += [nbformat.v4.new_code_cell(cell) for cell in cells]
    for index, cell in enumerate(made):
        cell["id"] = f"cell-{index}"
    path = folder / "notebooks" / "demo.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


def test_each_combination_is_executed_into_its_folder(checkout, tmp_path, monkeypatch, capsys):
    record = ("import json, os, pathlib\nplace = pathlib.Path(os.environ['SPARSITY_RECORDS'])\nplace.mkdir(exist_ok=True)\n"
              "(place / 'demo.json').write_text(json.dumps({'entries': {'double': {'value': density * 2}}}))")
    chapter = write(checkout, record, "print(density, model)", "open('../log', 'a').write('.')")
    before = chapter.read_bytes()
    monkeypatch.syspath_prepend(str(sweep_tasks.stub(tmp_path / "stub")))
    monkeypatch.setenv(sweep.WORKERS, "2")
    assert notebooks.main(["sweep", "demo", "density=0.25,0.5", "model=it's $HOME"]) == 0
    lines = capsys.readouterr().out.splitlines()
    folders = sorted((checkout / "runs" / "sweeps" / "demo").iterdir())
    assert len(lines) == len(folders) == 2 and chapter.read_bytes() == before
    for line, density in zip(lines, (0.25, 0.5), strict=True):
        folder = checkout / line.split()[0]
        assert line.endswith(f"density={density} model=it's $HOME") and folder in folders
        assert sorted(path.name for path in folder.iterdir()) == ["demo.ipynb", "records", "sweep.json"]
        texts = [output.text for cell in nbformat.read(folder / "demo.ipynb", 4).cells for output in cell.get("outputs", [])
                 if output.output_type == "stream"]
        assert texts == [f"{density} it's $HOME\n"]
        assert records.read(folder / "records" / "demo.json")["double"]["value"] == 2 * density
        facts = json.loads((folder / "sweep.json").read_text())
        assert facts["parameters"] == {"density": density, "model": "it's $HOME", "steps": [0.5]}
        assert facts["code"] == project.code_hash() and facts["seconds"] > 0
    monkeypatch.delenv(sweep.WORKERS)
    assert notebooks.main(["sweep", "demo", "density=0.5,0.25", "model=it's $HOME"]) == 0
    assert (checkout / "log").read_text() == ".."


def test_a_failing_cell_is_named_with_its_parameters_and_leaves_no_folder(checkout, capsys):
    write(checkout, "1 / 0")
    assert notebooks.main(["sweep", "demo", "density=0.3"]) == 1
    error = capsys.readouterr().err
    assert "demo density=0.3: demo.ipynb failed in cell" in error and "ZeroDivisionError" in error
    assert not (checkout / "runs").exists()


@pytest.fixture
def quick(monkeypatch):
    """Chapters that are not executed; the parameters of those that would be."""
    calls = []

    def execute(name, source, given, code):
        calls.append(given)
        return {"notebook": "{}" * 100, "records": {"demo.json": "{}"}}

    monkeypatch.setattr(notebook_sweep, "execute", execute)
    return calls


def test_what_decides_the_outcome_decides_whether_it_is_run_again(checkout, tmp_path, quick):
    chapter = write(checkout, "print(density)")
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("1")
    pairs = ["density=0.3,0.5", f"model={model}"]
    folders = notebook_sweep.sweep("demo", pairs)
    assert len(quick) == 2 and notebook_sweep.sweep("demo", pairs) == folders and len(quick) == 2
    assert notebook_sweep.sweep("demo", ["density=0.3,0.7", f"model={model}"])[0] == folders[0] and len(quick) == 3
    notebook = nbformat.read(chapter, 4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="shown")]
    nbformat.write(notebook, chapter)
    assert notebook_sweep.sweep("demo", pairs) == folders and len(quick) == 3
    changes = (model / "weights", checkout / "sparsity_lib" / "a.py", checkout / "results" / "r.json")
    for count, file in enumerate(changes, 1):
        file.write_text("two\n")
        assert not set(notebook_sweep.sweep("demo", pairs)) & set(folders) and len(quick) == 3 + 2 * count, file
    write(checkout, "print(2 * density)")
    notebook_sweep.sweep("demo", pairs)
    assert len(quick) == 11


DAMAGES = {
    "demo.ipynb is not": lambda folder: (folder / "demo.ipynb").write_bytes((folder / "demo.ipynb").read_bytes()[:100]),
    "demo.ipynb is missing": lambda folder: (folder / "demo.ipynb").unlink(),
    "records/demo.json is missing": lambda folder: shutil.rmtree(folder / "records"),
    "records/demo.json is not": lambda folder: (folder / "records" / "demo.json").write_text("{ }"),
    "sweep.json is missing": lambda folder: (folder / "sweep.json").unlink(),
    "sweep.json is not": lambda folder: changed(folder, chapter="memo"),
    "sweep.json is not ": lambda folder: changed(folder, sha256=None),  # of a version that sealed nothing
    "sweep.json or a file": lambda folder: (folder / "sweep.json").write_bytes(b"\xff{"),
    "sweep.json or a file ": lambda folder: (folder / "sweep.json").write_text("[" * 10**5),
    "sweep.json or a file that": lambda folder: (shutil.rmtree(folder), folder.write_text("no folder")),
    "it is of another run": lambda folder: (shutil.rmtree(folder), shutil.copytree(other(folder), folder)),
}


def changed(folder, **facts):
    about = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**about, **facts}))


def other(folder):
    return next(path for path in folder.parent.iterdir() if path != folder)


@pytest.mark.parametrize("said", DAMAGES)
def test_a_folder_that_is_damaged_is_run_again_and_replaced(checkout, quick, capsys, said):
    write(checkout, "print(density)")
    folders = notebook_sweep.sweep("demo", ["density=0.3,0.5"])
    before = {path.name: path.read_bytes() for path in folders[1].iterdir() if path.is_file()}
    capsys.readouterr()
    DAMAGES[said](folders[0])
    assert notebook_sweep.sweep("demo", ["density=0.3,0.5"]) == folders and [each["density"] for each in quick] == [0.3, 0.5, 0.3]
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"runs/sweeps/demo/{folders[0].name} is damaged: {said.strip()}")
    assert sorted(path.name for path in folders[0].iterdir()) == ["demo.ipynb", "records", "sweep.json"]
    assert notebook_sweep.read(folders[0])["parameters"]["density"] == 0.3
    assert {path.name: path.read_bytes() for path in folders[1].iterdir() if path.is_file()} == before
    assert sorted(folders[0].parent.iterdir()) == sorted(folders), "nothing of the old one is left"
    assert notebook_sweep.sweep("demo", ["density=0.3,0.5"]) == folders and len(quick) == 3


def test_what_a_reader_adds_to_a_folder_does_no_harm(checkout, quick):
    write(checkout, "print(density)")
    folder, = notebook_sweep.sweep("demo", [])
    (folder / "notes.txt").write_text("mine")
    assert notebook_sweep.sweep("demo", []) == [folder] and len(quick) == 1 and (folder / "notes.txt").exists()


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["cell", "disk"])
def test_a_run_that_fails_takes_nothing_away(checkout, quick, monkeypatch, capsys, fault):
    write(checkout, "print(density)")
    folder, = notebook_sweep.sweep("demo", [])
    (folder / "records" / "demo.json").unlink()
    left = (folder / "demo.ipynb").read_bytes()
    with monkeypatch.context() as patch:
        if fault == "cell":
            patch.setattr(notebook_sweep, "execute", lambda *_: (_ for _ in ()).throw(SparsityError("a cell failed")))
        else:
            patch.setattr(project.os, "fsync", full)
        assert notebooks.main(["sweep", "demo"]) == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and (fault == "cell" or "No space left on device. Fix: " in error)
    assert (folder / "demo.ipynb").read_bytes() == left and list(folder.parent.iterdir()) == [folder]
    assert notebooks.main(["sweep", "demo"]) == 0 and notebook_sweep.read(folder)


def test_a_checkout_that_cannot_be_written_is_refused_before_anything_runs(checkout, quick, monkeypatch, capsys):
    write(checkout, "print(density)")
    (checkout / "runs").touch()
    assert notebooks.main(["sweep", "demo"]) == 1
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: cannot write in {checkout}/runs: it is no folder. Fix: ")
    (checkout / "runs").unlink()
    monkeypatch.setattr(project.os, "access", lambda path, mode: False)
    assert notebooks.main(["sweep", "demo"]) == 1 and not quick and not (checkout / "runs").exists()
    assert f"cannot write in {checkout}: you may not" in capsys.readouterr().err


def test_a_full_disk_of_temporary_files_is_named(checkout, tmp_path, monkeypatch, capsys):
    write(checkout, "print(density)")
    monkeypatch.setattr("papermill.iorw.LocalHandler.write", full)
    assert notebooks.main(["sweep", "demo", "density=0.3"]) == 1
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: demo density=0.3: demo.ipynb cannot be run into /") and "No space left" in error
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert notebooks.main(["sweep", "demo", "density=0.3"]) == 1
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: cannot write temporary files in {tmp_path}/gone: ") and "TMPDIR=" in error
    assert not (checkout / "runs").exists()


def test_a_library_that_changes_meanwhile_is_refused(checkout):
    write(checkout, "open('../sparsity_lib/a.py', 'w').write('three')")
    with pytest.raises(SparsityError, match="the library was changed while it ran"):
        notebook_sweep.sweep("demo", ["density=0.3"])
    assert not (checkout / "runs").exists()


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a" / "key"
    with monkeypatch.context() as patch:
        patch.setattr(project, "write_atomic", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SparsityError, match="No space left"):
            project.write_folder(path, {"x": "1"})
    assert list(path.parent.iterdir()) == []
    project.write_folder(path, {"x": "1", "records/y.json": "2"})
    project.write_folder(path, {"x": "3"})
    assert (path / "x").read_text() == "1" and (path / "records" / "y.json").read_text() == "2"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_whole_gives_way(tmp_path, monkeypatch):
    path, rename = tmp_path / "key", project.os.rename

    def whole(folder):
        return (folder / "x").is_file() and (folder / "x").read_text() != "torn"

    path.mkdir()
    (path / "x").write_text("torn")
    project.write_folder(path, {"x": "1"}, whole)
    project.write_folder(path, {"x": "2"}, whole)
    assert (path / "x").read_text() == "1"

    def overtaken(source, target):
        """Another process replaces the folder just before."""
        monkeypatch.setattr(project.os, "rename", rename)
        project.write_folder(path, {"x": "3"}, whole)
        rename(path, tmp_path / "theirs")  # and is in the middle of it again
        try:
            rename(source, target)
        finally:
            rename(tmp_path / "theirs", path)

    (path / "x").write_text("torn")
    monkeypatch.setattr(project.os, "rename", overtaken)
    project.write_folder(path, {"x": "4"}, whole)
    assert (path / "x").read_text() == "3" and list(tmp_path.iterdir()) == [path]
