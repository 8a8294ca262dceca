"""Every trial of `make stress`, small; and the counting itself, whose errors would hide others."""

import importlib.util
import json
import os
import signal
import sys
import time

import pytest
from book_checkout import ROOT, small_book

from sparsity_lib import progress, results
from sparsity_lib.errors import SparsityError, refuse
from sparsity_lib.stress import base, builds, children, experiment, page, processes, writers
from sparsity_lib.stress.__main__ import main, said

checkout = pytest.fixture(small_book)


@pytest.mark.parametrize("name", base.TRIALS)
def test_nothing_is_lost(name):
    found = base.run(base.TRIALS[name], "quick")
    if "not_here" in found:
        pytest.skip(found["not_here"])
    assert found["lost"] == 0, "\n".join(found["described"])
    assert found["tried"] == found["right"] + found["refused"] > 0


def test_tests_run_as_trials_count_what_became_of_them(tmp_path):
    """A test that passes, one that fails, one that breaks before it begins."""
    file = tmp_path / "test_three.py"
    file.write_text("import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'no'\n"
                    "@pytest.fixture\ndef broken(): raise OSError('gone')\ndef test_broken(broken): pass\n")
    work = tmp_path / "work"
    work.mkdir()
    attempts = base.Attempts(work, "full", None)
    processes.run(attempts, (str(file),))
    assert (attempts.right, attempts.lost) == (1, 2)
    assert attempts.described[0].startswith("test_bad: AssertionError: no") and "OSError: gone" in attempts.described[1]
    attempts = base.Attempts(work, "full", None)
    processes.run(attempts, (f"{file}::test_of_no_name",))
    assert attempts.lost == 1, "a test that is no longer there"
    file.write_text("import pytest\ndef test_skipped(): pytest.skip('no extra')\n")
    with pytest.raises(base.NotHereError, match="test_skipped: no extra"):
        processes.run(base.Attempts(work, "full", None), (str(file),))


def test_builds_are_compared_file_by_file(tmp_path):
    for name, text in (("one", "a"), ("two", "b")):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "same.html").write_text("same")
        (tmp_path / name / "other.html").write_text(text)
        (tmp_path / name / ".buildinfo").write_text(text)
    (tmp_path / "two" / "more.png").write_text("")
    attempts = base.Attempts(tmp_path, "full", None)
    builds.compare(attempts, *(builds.contents(tmp_path / name) for name in ("one", "two")))
    assert attempts.described == ["more.png is in one of them only", "other.html differs at byte 0: b'a' and b'b'"]
    assert (attempts.right, attempts.lost) == (1, 2)


def test_pictures_of_times_are_left_out_by_name_and_no_others():
    def book(timed, other):
        page = f'''<figure class="align-default" id="fig-times"><a href="../_images/{timed}.png">
            <img src="../_images/{timed}.png"></a></figure><figure id="fig-other"><img src="../_images/{other}.png"></figure>'''
        return {"page.html": page.encode(), f"_images/{timed}.png": b"1", f"_images/{other}.png": b"2"}

    a, b, c = ("a" * 64, "b" * 64, "c" * 64)
    one, other = (builds.without(("fig-times",), book(timed, c)) for timed in (a, b))
    assert one == other and list(one) == ["page.html", f"_images/{c}.png"]
    one, other = (builds.without(("fig-times",), book(a, picture)) for picture in (b, c))
    assert one["page.html"] != other["page.html"]
    for shown in (book(a, b)["page.html"], b'<figure id="fig-none">a table</figure><img src="_images/%s.png">' % a.encode()):
        with pytest.raises(ValueError, match="no page shows fig-none"):
            builds.without(("fig-none",), {"page.html": shown})


def test_a_child_killed_while_it_draws_leaves_the_others_their_bars(monkeypatch):
    monkeypatch.setenv(progress.SWITCH, "1")
    reading, writing = os.pipe()

    def drawing():
        progress.tqdm.get_lock().acquire()
        os.write(writing, b"x")
        time.sleep(60)

    with progress.bar(total=1):  # from here on there is a lock that children would share
        pass
    child = children.start(drawing)
    os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    assert children.end(child) == -signal.SIGKILL
    assert children.end(children.start(lambda: progress.bar(total=1).close()), seconds=10) == children.DONE


def make(run):
    return base.Trial("made-up", "inputs", "something", "nothing", run)


def crash(attempts):
    attempts.check("fine", True)
    attempts.attempt("the last one", lambda: os.kill(os.getpid(), signal.SIGSEGV))


def hang(attempts):
    attempts.note("sleeping")
    if os.fork() == 0:  # what it started ends with it
        (attempts.folder.parent.parent / "stress-child").write_text(str(os.getpid()))
        time.sleep(60)
    time.sleep(60)


def wrong(attempts):
    attempts.attempt("a wrong result", lambda: 1, lambda found: found == 2)
    attempts.attempt("an acceptance", lambda: 1, right=False)
    attempts.attempt("a foreign error", lambda: {}["key"])
    attempts.attempt("an empty refusal", lambda: _raise(SparsityError("")))
    attempts.attempt("an endless refusal", lambda: _raise(SparsityError("x" * 10**5)))
    attempts.attempt("a refusal", lambda: _raise(refuse("k", 1, "2")))
    attempts.attempt("a right result", lambda: 1)


def _raise(error):
    raise error


class TestCounting:
    def test_each_end_is_counted_for_what_it_is(self):
        found = base.run(make(wrong), "quick")
        assert (found["tried"], found["right"], found["refused"], found["lost"]) == (7, 1, 1, 5)
        assert "gave another result" in found["described"][0] and "was accepted" in found["described"][1]
        assert "KeyError" in found["described"][2] and "100000 letters" in found["described"][4]
        assert said(found).startswith("LOST") and "KeyError" in said(found)

    def test_a_crash_is_a_loss_that_names_its_attempt(self):
        found = base.run(make(crash), "quick")
        assert found["lost"] == 1 and "status -11 at the last one" in found["described"][0]

    def test_a_hang_is_ended_with_all_it_started(self, monkeypatch):
        monkeypatch.setitem(base.PATIENCE, "quick", 0.5)
        began = time.monotonic()
        found = base.run(make(hang), "quick")
        assert found["lost"] == 1 and "did not end at sleeping" in found["described"][0] and time.monotonic() - began < 30

    def test_ctrl_c_ends_the_trial_as_well(self, monkeypatch):
        def interrupted(seconds):
            raise KeyboardInterrupt

        monkeypatch.setattr(base.time, "sleep", interrupted)
        forked, fork = [], os.fork
        monkeypatch.setattr(base.os, "fork", lambda: (child := fork()) and forked.append(child) or child)
        before = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            base.run(make(lambda attempts: signal.pause()), "quick")
        assert time.monotonic() - before < 30
        with pytest.raises(ChildProcessError):  # it is not left to wait for
            os.waitpid(forked[0], os.WNOHANG)

    def test_a_trial_that_fails_or_cannot_be_made_says_so(self):
        found = base.run(make(lambda attempts: 1 / 0), "quick")
        assert found["lost"] == 1 and "ZeroDivisionError" in found["described"][0]
        found = base.run(make(lambda attempts: _raise(base.NotHereError("no moon"))), "quick")
        assert found["not_here"] == "no moon" and found["lost"] == 0 and said(found).startswith("not here")

    def test_the_seed_decides_what_is_drawn(self):
        def draws(attempts):
            attempts.facts["drawn"] = attempts.random.random()

        drawn = [base.run(make(draws), "quick", seed)["facts"]["drawn"] for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]

    def test_unknown_names_are_refused(self, capsys):
        assert main(["sigkil"]) == 1 and "did you mean 'sigkill'" in capsys.readouterr().err
        with pytest.raises(SparsityError, match="did you mean 'full'"):
            base.run(make(crash), "fully")
        with pytest.raises(SparsityError, match="a new name"):
            base.trial("inputs", "", "")(lambda attempts: None) and base.trial("weather", "", "")(crash)

    def test_all_of_them_are_one_result(self, checkout, monkeypatch, capsys):
        monkeypatch.setattr(base, "TRIALS", {"made-up": make(wrong)})
        assert main([]) == 1 and "LOST" in capsys.readouterr().err
        assert results.load("stress").data["trials"][0]["lost"] == 5
        assert "| `made-up` | something | nothing | 7 | 1 | 1 | 5 |" in page.trials("inputs")
        assert "- `made-up` lost: a wrong result" in page.trials("inputs")
        assert page.summary() == ("1 trial with 7 attempts: 1 gave the right result, 1 were refused with a clear error, "
                                  "5 had another end")


def test_a_writer_that_writes_nothing_is_noticed(tmp_path, monkeypatch):
    """None stands for what an interruption may leave: expected of an undisturbed run, it would let everything pass."""
    monkeypatch.setattr(writers, "WRITERS", (writers.Writer("made-up", lambda folder: None, lambda folder: None),))
    with pytest.raises(AssertionError, match="made-up writes nothing"):
        writers.undisturbed(tmp_path)


class TestPage:
    def test_what_was_not_run_says_how(self, checkout):
        for text in (page.trials("inputs"), page.arithmetic()):
            assert text == "Not run yet: `make stress` runs it.\n"
        assert "make stress" in page.summary()

    def test_differences_are_a_table(self, checkout):
        facts = {"two threads": {"operator": 0.0, "logits": 3.2e-7}, "avx2": {"operator": 1e-6}}
        trial = {"name": "other-arithmetic", "facts": facts}
        results.save("stress", {"trials": [trial]}, params={}, seeds=[0], command="make stress", seconds=1)
        assert '| two threads | <span class="num">3e-07</span> | 0 |' in page.arithmetic()
        assert '| avx2 | – | <span class="num">1e-06</span> |' in page.arithmetic()

    def test_every_locked_package_has_one_licence(self):
        text = page.licences()
        assert "| MIT |" in text and page.licence("no-such-package") == "not installed here"
        assert page.licence("safetensors") == "Apache-2.0" and page.licence("pytest") == "MIT"
        assert all(name.replace("_", "\\_") in text for name in page.locked())

    def test_every_group_has_its_place(self):
        text = (ROOT / "book" / "trust.md").read_text()
        assert all(f"trust-trials {group}\n" in text for group in base.GROUPS)
        assert {each.group for each in base.TRIALS.values()} == set(base.GROUPS) and experiment.NAME == page.NAME


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "tools" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit"] = module
    spec.loader.exec_module(module)
    return module


class TestAudit:
    def test_versions_that_differ_are_listed(self, audit):
        locked = audit.pins("# head\nA_b==1.0\nc==2 ; platform_system == 'Linux'\nd==3\n")
        assert locked == {"a-b": "1.0", "c": "2", "d": "3"}
        report = json.dumps({"install": [{"metadata": {"name": n, "version": v}} for n, v in
                                         (("a.b", "1.1"), ("C", "2+cpu"), ("new", "1"), ("sparsity-lib", "0.1"))]})
        found = audit.planned(report)
        assert found == {"a-b": "1.1", "c": "2", "new": "1"}
        assert audit.differences(locked, found) == ["| a-b | 1.0 | 1.1 |", "| new | – | 1 |"]

    def test_without_a_network_it_says_so(self, audit):
        step = audit.install(audit.Step("install", "failed", "ERROR: No matching distribution found for torch"))
        assert step.outcome == "not possible here" and "check the network" in step.said
        assert audit.install(audit.Step("install", "failed", "error: g++ missing")).outcome == "failed"

    def test_the_report_names_what_failed(self, audit, tmp_path, monkeypatch):
        monkeypatch.setattr(audit, "FOLDER", tmp_path)
        text = audit.write([audit.Step("tests", "failed", "1 failed"), audit.Step("install", "passed", "")], ["| a | 1 | 2 |"], 1)
        text = text.read_text()
        assert "| tests | failed | 0.0 |" in text and "1 packages are others" in text and "1 failed" in text

    def test_its_targets_are_all_that_make_test_runs_and_the_book(self, audit):
        """What guards the project guards it with newer packages too."""
        (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("test:"))
        assert [*line.partition("##")[0].split()[1:], "book"] == list(audit.TARGETS)

    def test_packages_that_could_not_be_looked_up_are_not_said_to_be_safe(self, audit):
        line = "x Dependency not found on PyPI and could not be audited: x (1)\n"
        step = audit.Step("pip-audit", "passed", "")
        assert audit.known(step, 3 * line, 3).outcome == "not possible here"
        assert audit.known(step, line, 3) == audit.Step("pip-audit, 2 of 3 packages", "passed", "")
        failed = audit.Step("pip-audit", "failed", "")
        assert audit.known(failed, "connection refused", 3).outcome == "not possible here"
        assert audit.known(failed, "Found 1 known vulnerability", 3).outcome == "failed"

    def test_a_step_keeps_all_that_it_printed_and_shows_the_end(self, audit, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(audit, "FOLDER", tmp_path)
        step = audit.run("Tests, all", [sys.executable, "-c", "print(*range(100), sep='\\n'); raise SystemExit(3)"])
        assert step.outcome == "failed" and step.said.splitlines()[0] == "60" and step.said.splitlines()[-1] == "99"
        assert (tmp_path / "tests-all.log").read_text().splitlines()[0] == "0" and "99" in capsys.readouterr().out
        assert audit.run("none", [tmp_path / "none"]).outcome == "failed"
