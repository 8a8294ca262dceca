"""Print the book's single page: pdf.py FOLDER TARGET. FOLDER is what Sphinx's singlehtml builder has written."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sparsity_lib.book.browser import chromium
from sparsity_lib.errors import SparsityError

#: Milliseconds that the page may take to load and to set its formulas.
PATIENCE = 300_000
MARGIN = dict.fromkeys(("top", "bottom", "left", "right"), "14mm")


def main(folder: Path, target: Path) -> int:
    """Write the PDF; returns the exit code."""
    from playwright.sync_api import sync_playwright

    try:
        browser_path = chromium()
    except SparsityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    page_file = folder / "all.html"
    shutil.copy(folder / "book" / "index.html", page_file)  # its pictures' addresses begin at the root
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path)
        page = browser.new_page(color_scheme="light")
        page.set_default_timeout(PATIENCE)
        page.goto(page_file.resolve().as_uri())
        page.evaluate("() => window.MathJax && MathJax.startup.promise")
        page.emulate_media(media="print", color_scheme="light")
        page.pdf(path=target, format="A4", print_background=True, margin=MARGIN, outline=True, tagged=True)
        browser.close()
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
