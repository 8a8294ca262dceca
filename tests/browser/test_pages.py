"""Every page of the built book in a browser: no errors, no broken link or picture, accessible, light, quick, at any width."""

import html
import html.parser
import importlib
import inspect
import re
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from sphinx.util.inventory import InventoryFile

from sparsity_lib.book.markdown import pages

#: Where our own content is; around it is the theme's.
OWN = "article.bd-article"
LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
MEGABYTES, SECONDS = 2.0, 2.0
WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
PAINTED = """() => new Promise((done) => {
  let last = 0;
  new PerformanceObserver((list) => { for (const entry of list.getEntries()) last = entry.startTime; })
    .observe({ type: "largest-contentful-paint", buffered: true });
  setTimeout(() => done(last / 1000), 100);
})"""
#: Elements that reach beyond the window without an ancestor that scrolls or cuts them.
BEYOND = """() => [...document.querySelectorAll("article.bd-article *")].filter((node) => {
  const box = node.getBoundingClientRect();
  if (!box.width || box.right <= document.documentElement.clientWidth + 1) return false;
  for (let up = node.parentElement; up && up.tagName !== "ARTICLE"; up = up.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)) return false;
  return !node.closest(".visually-hidden, mjx-assistive-mml");
}).map((node) => node.outerHTML.slice(0, 100))"""
#: Boxes whose content is cut off rather than scrolled.
CUT = """() => [...document.querySelectorAll("article.bd-article *")].filter((node) =>
  node.querySelector(":scope > table, :scope > pre") && node.scrollWidth > node.clientWidth + 1
  && getComputedStyle(node).overflowX === "hidden").map((node) => node.outerHTML.slice(0, 100))"""
SIZE = """() => performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation"))
  .filter((entry) => !entry.name.includes("/_static/") || entry.name.includes("hero") || entry.name.includes("explorer"))
  .reduce((sum, entry) => sum + entry.decodedBodySize, 0) / 1e6"""


def name(page: str) -> str:
    return f"{page}.html"


def axe(tab) -> list[str]:
    """Violations in our own content, one line each."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(tab, context=OWN, options={"runOnly": {"type": "tag", "values": LEVELS}, "resultTypes": ["violations"]})
    return [f"{v['id']}: {node['html'][:150]}" for v in found.response["violations"] for node in v["nodes"]]


@pytest.mark.parametrize("page", pages())
def test_a_page_is_whole_accessible_light_and_quick_at_any_width(tab, site, page):
    tab.goto(f"{site}/{name(page)}", wait_until="load")
    painted = tab.evaluate(PAINTED)
    tab.wait_for_function("!window.MathJax || !MathJax.startup || !MathJax.startup.promise || document.readyState === 'complete'")
    assert tab.troubles == []
    missing = tab.evaluate("() => [...document.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src)")
    assert missing == []
    assert tab.evaluate(SIZE) < MEGABYTES
    assert painted < SECONDS
    for scheme in ("light", "dark"):
        tab.evaluate(f"document.documentElement.dataset.theme = '{scheme}'")
        tab.wait_for_timeout(150)
        assert axe(tab) == [], scheme
    for size in (WIDE, PHONE):
        tab.set_viewport_size(size)
        assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), size
        assert tab.evaluate(BEYOND) == [], size
        assert tab.evaluate(CUT) == [], size
    tab.wait_for_timeout(400)  # the theme and figures.js make boxes that scroll reachable by keyboard
    assert axe(tab) == [], PHONE


class Links(html.parser.HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.places |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links += [found[key] for key in ("href", "src") if found.get(key) and tag in ("a", "img", "script", "link")]


def parsed(path: Path, known: dict[Path, Links]) -> Links:
    if path not in known:
        known[path] = Links()
        known[path].feed(path.read_text())
    return known[path]


def test_no_link_inside_the_book_is_broken(built):
    known: dict[Path, Links] = {}
    broken = []
    for page in pages():
        path = built / name(page)
        for link in parsed(path, known).links:
            target, place = urldefrag(link)
            if ":" in target.split("/")[0]:
                continue  # another site, mail or data
            file = (path.parent / unquote(target.partition("?")[0])).resolve() if target else path
            if not file.exists():
                broken.append(f"{page}: {link}")
            elif place and file.suffix == ".html" and unquote(place) not in parsed(file, known).places:
                broken.append(f"{page}: {link} has no such place")
    assert broken == []


def test_the_search_finds_and_the_scheme_changes(tab, site):
    tab.goto(f"{site}/search.html?q=stripes")
    tab.wait_for_selector("#search-results li a", timeout=15_000)
    tab.wait_for_load_state("networkidle")  # every page that was found is fetched for its summary
    tab.goto(f"{site}/index.html")
    tab.wait_for_url("**/book/index.html")  # where the folder's own index leads
    before = tab.evaluate("document.documentElement.dataset.theme")
    for _ in range(2):  # light, dark and the system's, in turn
        tab.locator("button.theme-switch-button").first.click()
    assert tab.evaluate("document.documentElement.dataset.theme") != before or \
        tab.evaluate("document.documentElement.dataset.mode") in ("light", "dark")
    assert tab.troubles == []


def test_chapters_carry_their_box_and_no_dead_buttons(built):
    from sparsity_lib.book import launch, rerun

    for chapter in (page for page in pages() if page.startswith("notebooks/")):
        page = (built / name(chapter)).read_text()
        text = html.unescape(re.sub("<[^>]+>", "", page))
        assert "What you may change" in text and rerun.command(chapter.removeprefix("notebooks/")) in text
        assert ('class="launch"' in page) == (launch.repository() is not None)


#: Packages whose `__all__` is what a reader may use.
PUBLIC = ("sparsity_lib", "sparsity_lib.methods", "sparsity_lib.ops", "sparsity_lib.decode", "sparsity_lib.train",
          "sparsity_lib.cwic", "sparsity_lib.assets", "sparsity_lib.evaluate.benchmarks")


def test_the_library_pages_have_every_public_name_once_and_nothing_private(built):
    """By the index that Sphinx writes: what is imported from elsewhere may stand there under that module's name, or both."""
    with (built / "objects.inv").open("rb") as file:
        index = InventoryFile.load(file, "", lambda base, path: path)
    listed = {name for kind, names in index.items() if kind.startswith("py:") and kind != "py:module" for name in names}
    private = [name for name in listed if any(part.startswith("_") for part in name.split("."))]
    assert private == []
    for package in map(importlib.import_module, PUBLIC):
        for name in package.__all__:
            found = getattr(package, name)
            home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
            missing = not {f"{package.__name__}.{name}", home} & listed and not any(n.endswith(f".{name}") for n in listed)
            assert inspect.ismodule(found) or not missing, f"{package.__name__}.{name}"
    objects: dict[int, str] = {}  # object -> its place
    for name, (_, _, place, _) in sorted({**index["py:class"], **index["py:function"]}.items()):
        module, _, own = name.rpartition(".")
        found = getattr(importlib.import_module(module), own)
        assert objects.setdefault(id(found), place) == place, name
