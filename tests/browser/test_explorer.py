"""The explorer in a browser: by keyboard, by mouse, from a file; its numbers are those of the library."""

import pytest

from sparsity_lib import style
from sparsity_lib.book.curves import SITES, curves
from sparsity_lib.book.explorer import MASKS
from sparsity_lib.book.speeds import speed
from sparsity_lib.results import names


@pytest.fixture
def explorer(tab, site):
    tab.goto(f"{site}/book/explorer.html")
    tab.wait_for_function("document.querySelectorAll('#explorer-all tbody tr').length > 1")
    return tab


def share(tab) -> int:
    return int(tab.inner_text("#explorer-share-text").rstrip("%"))


def rows(tab) -> dict[str, list[str]]:
    """Method -> cells of the table."""
    cells = "() => [...document.querySelectorAll('#explorer-all tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    return {name: rest for name, *rest in tab.evaluate(cells)}


def test_by_keyboard_alone(explorer):
    explorer.focus("#explorer-model")
    explorer.keyboard.press("ArrowDown")
    assert explorer.input_value("#explorer-model") == list(curves())[1]
    explorer.keyboard.press("Tab")
    explorer.keyboard.press("ArrowDown")
    assert explorer.input_value("#explorer-sites") == next(iter(SITES))
    assert set(rows(explorer)) == {style.look(c.method).label + (" (a bound)" if c.method in ("oracle", "random") else "")
                                   for c in curves()[list(curves())[1]].values() if c.sites == next(iter(SITES))}
    explorer.keyboard.press("Tab")
    before = explorer.inner_text("#explorer-answer")
    explorer.keyboard.press("ArrowDown")
    assert explorer.inner_text("#explorer-answer") != before
    explorer.keyboard.press("Tab")
    start = share(explorer)
    explorer.keyboard.press("ArrowRight")
    assert share(explorer) == start + 1
    explorer.keyboard.press("Home")
    assert share(explorer) == 1 and "was measured on" in explorer.inner_text("#explorer-answer")
    assert explorer.get_attribute("#explorer-share", "aria-valuetext") == "1% of all weights skipped"
    assert explorer.troubles == []


def test_by_mouse(explorer):
    box = explorer.locator("#explorer-chart").bounding_box()
    explorer.mouse.click(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.4)
    middle = share(explorer)
    explorer.mouse.down()
    explorer.mouse.move(box["x"] + box["width"] * 0.35, box["y"] + box["height"] * 0.4)
    explorer.mouse.up()
    assert share(explorer) > middle > 1
    explorer.select_option("#explorer-method", "claws neurons")
    assert explorer.inner_text("#explorer-answer").startswith("CLAWS on ")
    assert explorer.locator("#explorer-all tr.chosen").count() == 1
    explorer.select_option("#explorer-sites", "neurons")
    assert explorer.input_value("#explorer-method") == "claws neurons"
    explorer.select_option("#explorer-sites", "inputs")
    assert explorer.input_value("#explorer-method") != "claws neurons"


@pytest.mark.parametrize("percent", [8, 20])
def test_its_numbers_are_the_librarys(explorer, percent):
    explorer.evaluate(f"() => {{ const s = document.getElementById('explorer-share'); s.value = {percent}; "
                      "s.dispatchEvent(new Event('input')); }")
    for model, found in curves().items():
        explorer.select_option("#explorer-model", model)
        shown = rows(explorer)
        assert len(shown) == len(found)
        for curve in found.values():
            label = f"{curve.label}, {SITES[curve.sites]}"
            cells = shown[label + (" (a bound)" if curve.method in ("oracle", "random") else "")]
            point = curve.at(percent / 100)
            if point is None:
                assert cells[0] == "not measured here"
                continue
            assert float(cells[0].split()[0]) == pytest.approx(point.kl.value, rel=0.01, abs=6e-4)
            assert cells[1] == "over 100,000" if point.perplexity > 1e5 else \
                float(cells[1].replace(",", "")) == pytest.approx(point.perplexity, rel=0.06)
            fast = speed(model, curve.method, percent / 100)
            assert cells[2] == "–" if fast is None or curve.method in ("oracle", "random") else \
                float(cells[2]) == pytest.approx(fast, abs=0.006)
            assert float(cells[3].rstrip("%")) == pytest.approx(100 * curve.own(point), abs=0.6)


@pytest.mark.skipif(MASKS not in names(), reason=f"no results/{MASKS}.json: make results R={MASKS}")
def test_masks_keep_what_is_not_dropped(explorer):
    explorer.select_option("#explorer-method", "claws neurons")
    explorer.locator("#explorer-share").fill("20")
    text = explorer.inner_text("#explorer-mask-text")
    model = next(iter(curves()))
    dropped = curves()[model]["claws neurons"].at(0.2).sites["gate"]
    kept = int(text.partition(" of those shown")[0].rpartition(" ")[2].rstrip("%"))
    assert abs(kept - 100 * (1 - dropped)) < 12 and "Every token keeps the same number." in text
    dark = explorer.evaluate("""() => { const c = document.getElementById('explorer-mask');
      const d = c.getContext('2d').getImageData(96, 0, c.width - 96, c.height).data; let n = 0;
      for (let i = 0; i < d.length; i += 4) n += d[i] < 200 || d[i + 2] < 200 ? 1 : 0; return n; }""")
    assert dark > 100
    explorer.select_option("#explorer-method", "random neurons")
    assert not explorer.is_visible("#explorer-masks")


def test_it_works_from_a_file_without_a_server(tab, built):
    tab.goto((built / "book" / "explorer.html").as_uri())
    tab.wait_for_function("document.querySelectorAll('#explorer-all tbody tr').length > 1")
    tab.focus("#explorer-share")
    tab.keyboard.press("ArrowRight")
    assert share(tab) > 1 and len(rows(tab)) > 1
