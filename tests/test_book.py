"""What the build computes for pages: text, boxes, launch buttons, docstrings, provenance."""

import os
import subprocess
import sys

import nbformat
import pytest
import yaml
from book_checkout import ROOT, small_book

from sparsity_lib import notebooks, results
from sparsity_lib.book import browser, computed, docstrings, launch, markdown, provenance, rerun, start
from sparsity_lib.errors import SparsityError
from sparsity_lib.parameters import parse_cell

checkout = pytest.fixture(small_book)


class TestMarkdown:
    def test_numbers_keep_three_digits_of_the_largest(self):
        assert str(markdown.number(0.0123, 0.01, 0.5)) == "0.012 [0.010, 0.500]"
        assert str(markdown.number(123.4, 99.0, 150.0)) == "123 [99, 150]" and str(markdown.number(-0.0001)) == "0.000"
        assert str(markdown.number(0.0)) == "0.000" and str(markdown.number(7.61, -2.0, 10.8)) == "7.6 [-2.0, 10.8]"

    def test_tables_align_numbers_escape_bars_and_take_a_caption(self):
        text = markdown.table(["a|b", "n"], [["x|y\nz", 1], [None, markdown.number(2.0)]], "Caption.", "tab-x")
        assert text.splitlines() == [
            ":::{table} Caption.", ":name: tab-x", ":align: center", "", "| a\\|b | n |", "|---|---:|", "| x\\|y z | 1 |",
            '| – | <span class="num">2.00</span> |', ":::"]
        assert markdown.table(["a"], []) == "| a |\n|---|\n"

    def test_words(self):
        assert [markdown.listed(["a", "b", "c"][:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
        assert markdown.plural(1, "claim") == "1 claim" and markdown.plural(2, "claim") == "2 claims"

    def test_pages_and_labels_are_those_that_are_there(self, checkout):
        assert markdown.pages() == ["book/index", "notebooks/demo", "book/more"] and markdown.chapters() == ["demo"]
        assert markdown.labels() == {"a-place": "book/index", "tab-live": "notebooks/demo", "tab-more": "book/more"}
        assert markdown.reference("tab-live") == "{numref}`tab-live`" and markdown.reference("tab-none") == "`tab-none`"
        assert markdown.link("notebooks/demo") == "{doc}`A demo </notebooks/demo>`"
        assert markdown.link("notebooks/later", "later") == "later" and markdown.title("book/more") == "book/more"
        assert start.chapters() == "1. {doc}`A demo </notebooks/demo>`\n"


class TestComputed:
    def test_every_name_leads_to_a_function(self):
        import importlib

        for table in (computed.BLOCKS, computed.WORDS):
            for target in table.values():
                module, _, function = target.partition(":")
                assert callable(getattr(importlib.import_module(module), function)), target

    def test_every_page_asks_for_what_there_is(self):
        import re

        text = "\n".join(path.read_text() for path in (ROOT / "book").rglob("*.md"))
        blocks = re.findall(r":::\{computed\} (\S+)", text)
        words = re.findall(r"\{computed\}`(\S+?)[ `]", text)
        assert blocks and words and set(blocks) <= set(computed.BLOCKS) and set(words) <= set(computed.WORDS)
        assert set(computed.BLOCKS) - set(blocks) == set() and set(computed.WORDS) - set(words) == set()

    def test_an_unknown_name_and_an_empty_text_are_refused(self, monkeypatch):
        with pytest.raises(SparsityError, match="did you mean 'explorer'"):
            computed.compute("explorr")
        monkeypatch.setattr(start, "chapters", lambda: " \n")
        with pytest.raises(SparsityError, match="came out empty"):
            computed.compute("chapters")


class TestRerun:
    def test_the_command_has_the_readers_model_and_one_number(self):
        known = parse_cell('model: str = "m"  # a name\nseed: int = 3  # [0, 9] order\nshare: float = 0.5  # (0, 1] of it', "x")
        assert rerun.example(known) == "model=YOUR_MODEL seed=3"
        known = parse_cell('models: list[str] = ["m"]  # names\nn: int = 2  # [1, 9] of them', "x")
        assert rerun.example(known) == 'models=["YOUR_MODEL"] n=2'

    @pytest.mark.parametrize("chapter", markdown.chapters())
    def test_every_chapters_command_is_one_that_the_runner_takes(self, chapter):
        import shlex

        from sparsity_lib import parameters

        make, run, which, pairs = shlex.split(rerun.command(chapter))
        assert (make, run, which) == ("make", "run", f"NB={chapter}")
        pairs = parameters.split_assignments(pairs.removeprefix("P="))
        given = parameters.read_assignments(pairs, notebooks.parameters_of(chapter))
        assert given and len(given) <= 2

    def test_the_box_escapes_and_has_buttons_only_with_a_repository(self, checkout, monkeypatch):
        text = "".join(node.astext() for node in rerun.box("demo"))
        assert "Run this chapter with your model" in text and "launch" not in text and "(0, 1]" in text
        assert 'make run NB=demo P="model=YOUR_MODEL share=0.5"' in text and "<code>&quot;m&quot;</code>" in text
        monkeypatch.setenv(launch.SWITCH, "someone/book")
        text = "".join(node.astext() for node in rerun.box("demo"))
        assert text.count('class="launch"') == 2 and "Open in Binder" in text

    def test_it_goes_behind_the_first_paragraphs(self):
        from docutils import nodes

        opening = [nodes.title(), nodes.paragraph(), nodes.paragraph()]
        assert rerun._after_opening([*opening, nodes.section()]) == 3 and rerun._after_opening(opening) == 3


class TestLaunch:
    def test_without_a_repository_there_are_no_links_but_a_way(self, checkout):
        assert launch.repository() is None and launch.links("demo") == {}
        assert "python -m sparsity_lib.book.launch OWNER/NAME" in launch.how()

    @pytest.mark.parametrize("text", ["someone/a.book", "https://github.com/someone/a.book",
                                      "https://github.com/someone/a.book.git/"])
    def test_one_value_makes_the_links(self, checkout, monkeypatch, text):
        monkeypatch.setenv(launch.SWITCH, text)
        assert launch.links("demo") == {
            "Colab": "https://colab.research.google.com/github/someone/a.book/blob/main/notebooks/demo.ipynb",
            "Binder": "https://mybinder.org/v2/gh/someone/a.book/main?urlpath=lab%2Ftree%2Fnotebooks%2Fdemo.ipynb"}
        assert "someone/a.book" in launch.how()

    @pytest.mark.parametrize("text", ["someone", "a/b/c", "https://elsewhere.example/a/b", "a b/c", "a/b\nc: d"])
    def test_what_is_no_repository_is_refused_and_changes_nothing(self, checkout, text, capsys):
        before = [path.read_bytes() for path in (checkout / "_config.yml", checkout / "notebooks" / "demo.ipynb")]
        assert launch.main([text]) == 1 and "OWNER/NAME" in capsys.readouterr().err
        assert before == [path.read_bytes() for path in (checkout / "_config.yml", checkout / "notebooks" / "demo.ipynb")]
        assert launch.main([]) == 2

    def test_connecting_writes_the_value_and_the_cells_once(self, checkout):
        assert launch.connect("someone/book") == ["demo"] and launch.repository() == "someone/book"
        config = yaml.safe_load((checkout / "_config.yml").read_text())
        assert config["repository"] == {"url": "https://github.com/someone/book", "branch": "main"}
        original = yaml.safe_load((ROOT / "_config.yml").read_text())
        assert {**config, "repository": None} == {**original, "repository": None}
        notebook = nbformat.read(checkout / "notebooks" / "demo.ipynb", 4)
        nbformat.validate(notebook)
        assert [c.get("execution_count") for c in notebook.cells] == [None, 1, 2, 3]
        assert notebook.cells[3].outputs[0].execution_count == 3 and notebook.cells[1].metadata.tags == launch.TAGS
        assert list(notebooks.parameters_of("demo")) == ["model", "share"]
        assert launch.connect("someone/book") == []
        assert launch.connect("other/place") == ["demo"] and launch.repository() == "other/place"
        notebook = nbformat.read(checkout / "notebooks" / "demo.ipynb", 4)
        assert len(notebook.cells) == 4 and "other/place" in notebook.cells[1].source

    def test_the_cell_fetches_what_is_missing_and_else_does_nothing(self, tmp_path):
        cell = launch.setup_cell("someone/book")
        here = subprocess.run([sys.executable, "-c", cell], cwd=ROOT, capture_output=True, text=True)
        assert (here.returncode, here.stdout, here.stderr) == (0, "", "")
        alone = tmp_path / "alone.py"
        alone.write_text(f"""
import importlib.util, os, subprocess, sys
importlib.util.find_spec = lambda name: None
ran = []
def run(command, check):
    assert check
    ran.append([sys.executable == part and "python" or part for part in command])
    os.makedirs("sparsity-book/notebooks", exist_ok=True)
subprocess.run = run
{cell}
print(ran, os.path.basename(os.getcwd()), os.path.relpath(sys.path[0]))
""")
        env = {**os.environ, "PYTHONSAFEPATH": "1"}
        made = subprocess.run([sys.executable, alone], cwd=tmp_path, capture_output=True, text=True, env=env)
        assert made.returncode == 0, made.stderr
        assert made.stdout == (
            "[['git', 'clone', '--depth', '1', 'https://github.com/someone/book', 'sparsity-book'], "
            "['python', '-m', 'pip', 'install', '--quiet', '-e', './sparsity-book']] notebooks ..\n")


class TestDocstrings:
    def test_marks_that_sphinx_would_read_stand_for_themselves(self):
        given = ["Keep |x| > t of x [tokens, *], by `name`s and ``code|x|``, see results_ too."]
        assert docstrings.convert(given) == [
            "Keep \\|x\\| > t of x [tokens, \\*], by ``name``\\ s and ``code|x|``, see results\\_ too."]

    def test_indented_text_is_shown_as_it_is_but_sections_are_kept(self):
        given = ["Summary.", "", "    x = a_ * b", "", "Parameters", "----------", "x", "    A number."]
        assert docstrings.convert(given) == ["Summary.", "", "::", "", "    x = a_ * b", "", "Parameters", "----------", "x",
                                             "    A number."]


    def test_signatures_show_defaults_that_are_no_python(self):
        given = "(a: ~x.Y = <factory>, b=<function <lambda>>, c=<function mean at 0x7f>, d=<class 'torch.nn.Linear'>, e: int = 3)"
        assert docstrings.signature(None, "class", "x", None, None, given, "int") == (
            "(a: ~x.Y = ..., b=..., c=mean, d=Linear, e: int = 3)", "int")
        assert docstrings.signature(None, "class", "x", None, None, None, None) == (None, None)

    def test_what_a_class_overrides_without_a_word_is_described_where_it_comes_from(self):
        from sparsity_lib.parts import base, select

        assert docstrings.repeats(select.TopK, "any_density") and docstrings.repeats(select.TopK, "kept")
        assert not docstrings.repeats(select.TopK, "count")  # its own
        assert not docstrings.repeats(base.Select, "kept")  # where it comes from


class TestProvenance:
    def test_every_result_has_its_row_its_command_and_its_checksum(self):
        rows, details, sums = provenance.stored(), provenance.details(), provenance.checksums()
        for name in results.names():
            assert f"[`{name}`](#result-" in rows and f"`make results R={name}` made it" in details
            line = f"{provenance.sha256(ROOT / 'results' / f'{name}.json')}  results/{name}.json"
            assert line in sums.splitlines()

    def test_durations_are_in_units_that_suit(self):
        assert [provenance.duration(s) for s in (3.4, 89, 600, 7200)] == ["3 s", "89 s", "10 min", "2.0 h"]

    def test_machines_are_named_by_what_they_are_never_by_name(self):
        import platform

        assert platform.node() not in provenance.machines() or len(platform.node()) < 4


class TestBrowser:
    def test_it_is_the_one_that_is_named_else_the_first_on_the_path_else_refused(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv(browser.SWITCH, raising=False)
        with pytest.raises(SparsityError, match="no Chromium found. Fix: install one"):
            browser.chromium()
        for name in ("google-chrome", "chromium"):
            (tmp_path / name).write_text("")
            (tmp_path / name).chmod(0o755)
        assert browser.chromium() == str(tmp_path / "chromium")
        monkeypatch.setenv(browser.SWITCH, "/elsewhere/chrome")
        assert browser.chromium() == "/elsewhere/chrome"
