"""The result store: whole files, honest manifests, runs that resume."""

import json
import math
import os
from functools import partial

import numpy
import pytest
import sweep_tasks

from sparsity_lib import machine, project, results, sweep
from sparsity_lib.errors import SparsityError


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for folder in ("notebooks", "results", "sparsity_lib"):
        (tmp_path / folder).mkdir()
    for file in ("_toc.yml", "pyproject.toml"):
        (tmp_path / file).write_text("")
    monkeypatch.setenv(project.SWITCH, str(tmp_path))
    return tmp_path


def save(name="claws/sweep", data=None):
    return results.save(name, data or {"ppl": numpy.float64(17.5), "mask": numpy.arange(3)}, params={"density": 0.5},
                        seeds=[0, 1], command="make results R=claws/sweep", seconds=12.34)


def test_round_trip_with_a_full_manifest(checkout):
    path = save()
    result = results.load("claws/sweep")
    assert path == checkout / "results" / "claws" / "sweep.json"
    assert result.data == {"ppl": 17.5, "mask": [0, 1, 2]} and results.names() == ["claws/sweep"]
    manifest = result.manifest
    assert manifest["seeds"] == [0, 1] and manifest["seconds"] == 12.3 and manifest["command"].startswith("make ")
    assert set(machine.PACKAGES) < set(manifest["versions"]) and manifest["machine"]["cores"] >= 1
    assert str(checkout) not in path.read_text()


def test_configurations_of_trained_networks_are_no_results(checkout):
    save()
    folder = checkout / "results" / results.MODELS / "small-net"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert results.names() == ["claws/sweep"]


@pytest.mark.parametrize("data", [{"x": math.nan}, {"x": [math.inf]}, {"x": object()}, {"x": {1, 2}}])
def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(checkout, data):
    before = save().read_bytes()
    with pytest.raises(SparsityError, match="cannot be stored"):
        save(data=data)
    assert (checkout / "results/claws/sweep.json").read_bytes() == before
    assert len(list((checkout / "results/claws").iterdir())) == 1


@pytest.mark.parametrize("name", ["../up", "", "a b", "/abs", "a//b", "a.b"])
def test_names_that_could_leave_the_folder_are_refused(checkout, name):
    with pytest.raises(SparsityError, match="result name"):
        save(name)


def test_missing_and_damaged_results_name_the_command(checkout):
    with pytest.raises(SparsityError, match="make results R=claws/swep"):
        results.load("claws/swep")
    save().write_text("{")
    with pytest.raises(SparsityError, match="make results R=claws/sweep"):
        results.load("claws/sweep")


def test_a_full_disk_leaves_nothing_behind(checkout, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SparsityError, match="No space left"):
        save()
    assert list((checkout / "results/claws").iterdir()) == []


def test_an_interrupted_experiment_resumes(checkout):
    calls = []

    def experiment(checkpoint, stop_at=None):
        def measure(density):
            if density == stop_at:
                raise KeyboardInterrupt
            calls.append(density)
            return {"ppl": 10 / density}

        data = [checkpoint.item({"density": d}, lambda d=d: measure(d)) for d in (0.7, 0.5, 0.3)]
        return data, {"densities": [0.7, 0.5, 0.3]}, [0]

    with pytest.raises(KeyboardInterrupt):
        results.make("sweep", {"sweep": lambda checkpoint: experiment(checkpoint, stop_at=0.3)})
    assert results.names() == [] and calls == [0.7, 0.5]
    results.make("sweep", {"sweep": experiment})
    assert calls == [0.7, 0.5, 0.3]
    result = results.load("sweep")
    assert result.data[1] == {"ppl": 20.0} and result.manifest["resumed_items"] == 2
    assert not (checkout / "results/.partial/sweep").exists()
    assert all(len(checksum) == 64 for checksum in result.manifest["assets"].values()) and result.manifest["assets"]


def test_a_changed_library_shows_in_the_manifest(checkout):
    def first(checkpoint):
        checkpoint.item({"a": 1}, lambda: 1)
        raise KeyboardInterrupt

    def second(checkpoint):
        return [checkpoint.item({"a": a}, lambda: 1) for a in (1, 2)], {}, []

    with pytest.raises(KeyboardInterrupt):
        results.make("x", {"x": first})
    (checkout / "sparsity_lib" / "changed.py").write_text("")
    results.make("x", {"x": second})
    assert len(results.load("x").manifest["code"]) == 2


def test_a_damaged_checkpoint_item_is_computed_again(checkout):
    checkpoint = results.Checkpoint("x")
    checkpoint.item({"a": 1}, lambda: 5)
    (file,) = checkpoint.folder.iterdir()
    file.write_text(json.dumps({"value": 1})[:-3])
    assert checkpoint.item({"a": 1}, lambda: 6) == 6
    assert checkpoint.item({"a": 1}, lambda: 7) == 6


def test_unknown_results_are_refused_with_the_nearest(checkout):
    with pytest.raises(SparsityError, match="did you mean 'sweep'"):
        results.make("swep", {"sweep": lambda checkpoint: (1, {}, [])})


def _square(number):
    """An item that a worker process can compute; negative numbers have none."""
    if number < 0:
        raise ValueError("no square here")
    return {"square": number**2, "process": os.getpid()}


def test_items_are_computed_by_several_processes_and_kept(checkout, tmp_path_factory, monkeypatch):
    monkeypatch.syspath_prepend(str(sweep_tasks.stub(tmp_path_factory.mktemp("stub"))))
    checkpoint = results.Checkpoint("grid")
    wanted = [({"n": n}, partial(_square, n)) for n in range(3)]
    first = checkpoint.item(*wanted[0])
    monkeypatch.setenv("SPARSITY_WORKERS", "2")
    found = checkpoint.items(wanted)
    assert [each["square"] for each in found] == [0, 1, 4] and found[0] == first
    assert os.getpid() not in {each["process"] for each in found[1:]}
    assert checkpoint.items(wanted) == found and len(list(checkpoint.folder.iterdir())) == 3
    with pytest.raises(ValueError, match="no square"):
        checkpoint.items([({"n": n}, partial(_square, n)) for n in (-1, 5, 6)])
    monkeypatch.setenv("SPARSITY_WORKERS", "1")
    assert checkpoint.items([({"n": 9}, partial(_square, 9))])[0]["process"] == os.getpid()
    monkeypatch.setenv("SPARSITY_WORKERS", "many")
    with pytest.raises(SparsityError, match="SPARSITY_WORKERS"):
        checkpoint.items(wanted)


def test_an_experiment_says_how_far_it_is_and_leaves_no_model_open(checkout, capsys):
    opened = sweep.kept_open(lambda name: name.upper())

    def run(checkpoint, ends=True):
        checkpoint.item({"n": 0}, lambda: 0)
        found = checkpoint.items([({"n": n}, partial(int, n)) for n in range(3)])
        assert opened("a") == "A" and sweep._open and ends
        return found, {}, []

    with pytest.raises(AssertionError):
        results.make("grid", {"grid": partial(run, ends=False)})
    assert not sweep._open and capsys.readouterr().out.splitlines() == [f"grid: {n} of 2 items, this one 0 s" for n in (1, 2)]
    results.make("grid", {"grid": run})
    assert not sweep._open and not capsys.readouterr().out and results.load("grid").data == [0, 1, 2]


@pytest.mark.parametrize("harm", ["params", "value", "flip", "key"])
def test_an_item_that_is_not_what_was_written_is_computed_again(checkout, harm):
    checkpoint = results.Checkpoint("x")
    checkpoint.item({"a": 1}, lambda: 5)
    (file,) = checkpoint.folder.iterdir()
    whole = file.read_text()
    checkpoint.item({"a": 2}, lambda: 8)
    if harm == "params":  # another item's file under this one's name
        file.write_text(next(path for path in checkpoint.folder.iterdir() if path != file).read_text())
    else:
        harms = {"value": ('"value": 5', '"value": 7'), "flip": ('"seconds"', '"secondr"'), "key": ('"sha256"', '"sha257"')}
        old, new = harms[harm]
        file.write_text(whole.replace(old, new))
        assert file.read_text() != whole
    assert checkpoint.item({"a": 1}, lambda: 6) == 6
    content = json.loads(whole)
    del content["sha256"]
    file.write_text(json.dumps(content))
    assert checkpoint.item({"a": 1}, lambda: 9) == 9


def test_a_result_that_was_damaged_or_renamed_is_refused(checkout):
    path = save()
    whole = path.read_text()
    for harmed in (whole.replace("17.5", "18.5"), whole.replace('"data"', '"dara"'), "[" * 100_000, "[]", "\xff"):
        path.write_text(harmed)
        with pytest.raises(SparsityError, match="is damaged"):
            results.load("claws/sweep")
    (path.parent / "other.json").write_text(whole)
    with pytest.raises(SparsityError, match="it says it is 'claws/sweep'"):
        results.load("claws/other")
    content = json.loads(whole)
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(SparsityError, match="is damaged"):
        results.load("claws/sweep")


def test_what_a_killed_process_left_is_no_obstacle(checkout):
    """A file half-written in the folder of items, which no other process will ever finish."""
    def experiment(checkpoint):
        value = checkpoint.item({"a": 1}, lambda: 1)
        (checkpoint.folder / ".x.json.abc.partial").write_text("half")
        return value, {}, []

    results.make("x", {"x": experiment})
    assert results.load("x").data == 1 and not (checkout / "results/.partial/x").exists()


def test_a_result_is_made_by_one_process_at_a_time(checkout):
    def experiment(checkpoint):
        with pytest.raises(SparsityError, match="the result x is being made by another process"):
            results.make("x", {"x": lambda checkpoint: (1, {}, [])})
        return 2, {}, []

    results.make("x", {"x": experiment})
    assert results.load("x").data == 2
    results.make("x", {"x": lambda checkpoint: (3, {}, [])})
