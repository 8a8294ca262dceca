"""A real browser on the built pages: `make browser`. Skipped where there is no Chromium."""

import functools
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sparsity_lib import project
from sparsity_lib.book.browser import chromium
from sparsity_lib.errors import SparsityError

#: Names another folder of built pages.
PAGES = "SPARSITY_HTML"
WIDE = {"width": 1200, "height": 900}


def html() -> Path:
    """The folder of built pages: the environment's, else that of `make book-smoke`."""
    return Path(os.environ.get(PAGES) or project.root() / "_build" / "smoke" / "_build" / "html")


@pytest.fixture(scope="session")
def built() -> Path:
    if not (html() / "index.html").exists():
        pytest.skip(f"no pages in {html()}: make book-smoke")
    return html()


@pytest.fixture(scope="session")
def site(built):
    """Address of a server of the built pages on this machine."""
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make env")
    try:
        found = chromium()
    except SparsityError as error:
        pytest.skip(str(error))
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=found)
        yield launched
        launched.close()


@pytest.fixture
def tab(browser):
    """A fresh page 1200 pixels wide whose console errors and failed requests are collected in `tab.troubles`."""
    context = browser.new_context(viewport=WIDE, color_scheme="light")
    page = context.new_page()
    page.troubles = []
    page.on("console", lambda message: page.troubles.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: page.troubles.append(f"script: {error}"))
    page.on("requestfailed", lambda request: page.troubles.append(f"failed: {request.url}"))
    page.on("response", lambda r: page.troubles.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    yield page
    context.close()
