"""MLflow's page in a real browser: Debian's Chromium, headless, which reaches this machine alone."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Locator, Page, sync_playwright

# Chromium calls home in the background, whatever page is open: no name but this machine's is resolved.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
PATIENCE_MS = 60_000


@contextmanager
def open_page(url: str) -> Iterator[Page]:
    """A page of a server on this machine; whoever it asks for more must be that server."""
    program = shutil.which("chromium")
    assert program is not None, "there is no Chromium: apt-get install chromium"
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 1150})
            page.set_default_timeout(PATIENCE_MS)
            page.on("request", lambda request: asked.append(request.url))
            page.goto(url)
            yield page
        finally:
            browser.close()
    elsewhere = {host for host in map(_host, asked) if host not in ("", _host(url))}
    assert not elsewhere, f"the page asked {elsewhere}"


def _host(url: str) -> str:
    return urlsplit(url).netloc  # data: and blob: have none


def cards(page: Page) -> Locator:
    """The charts of the page that compares runs, drawn."""
    found = page.get_by_test_id("experiment-view-compare-runs-card")
    page.locator(".main-svg").first.wait_for()
    return found


def save_picture(page: Page, file: Path) -> None:
    """A screenshot of the page that compares runs, without what MLflow puts beside it."""
    cards(page)
    for name in ("Hide banner", "Close"):
        for button in page.get_by_role("button", name=name, exact=True).all():
            button.click()
    page.wait_for_timeout(3000)  # charts are drawn again for their new width
    page.screenshot(path=file)


if __name__ == "__main__":  # python -m tests.browser URL FILE
    with open_page(sys.argv[1]) as shown:
        save_picture(shown, Path(sys.argv[2]))
