"""A small book in a folder of its own, for tests of what the build computes."""

import nbformat
import yaml

from sparsity_lib import project, results
from sparsity_lib.book import launch, markdown

ROOT = project.root()


def small_book(tmp_path, monkeypatch):
    """A book of one chapter, two pages, and a chapter that is not there."""
    for folder in ("notebooks", "book", "results"):
        (tmp_path / folder).mkdir()
    for name in ("_toc.yml", "_config.yml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "pyproject.toml").write_text("")
    toc = {"root": "book/index", "parts": [{"chapters": [{"file": "notebooks/demo"}, {"file": "notebooks/later"}]},
                                           {"chapters": [{"file": "book/more", "sections": [{"file": "book/gone"}]}]}]}
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    (tmp_path / "book" / "index.md").write_text("# Start\n\n(a-place)=\n## Here\n")
    (tmp_path / "book" / "more.md").write_text(":::{table} x\n:name: tab-more\n:::\n")
    new = nbformat.v4
    cells = [new.new_markdown_cell("# A demo\n\n:::{glue:md} tab-live\n:::", id="a"),
             new.new_code_cell('model: str = "m"   # a name\nshare: float = 0.5  # (0, 1] of it', id="b", execution_count=1,
                               metadata={"tags": ["parameters"]}),
             new.new_code_cell("1 + 1", id="c", execution_count=2,
                               outputs=[new.new_output("execute_result", {"text/plain": "2"}, execution_count=2)])]
    nbformat.write(new.new_notebook(cells=cells), tmp_path / "notebooks" / "demo.ipynb")
    monkeypatch.setenv(project.SWITCH, str(tmp_path))
    monkeypatch.delenv(launch.SWITCH, raising=False)
    for cached in (markdown.source, markdown.labels):
        cached.cache_clear()
    yield tmp_path
    for cached in (markdown.source, markdown.labels):
        cached.cache_clear()


def put(name, data, **params):
    """A made-up result in the checkout of a test, never in this one."""
    assert project.root() != ROOT
    results.save(name, data, params=params, seeds=[], command="none", seconds=0)
