"""A real Chromium on the page of a real `pocketllava serve demo`. Knows how to open it and ask; tests nothing."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

api = pytest.importorskip("playwright.sync_api", reason="the page needs playwright: make page")

PLACES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PLACES)), None)
if CHROMIUM is None:
    pytest.skip("the page needs a Chromium: apt-get install chromium", allow_module_level=True)

PAGE = Path(__file__).parents[1] / "runtime" / "serve" / "page"
EXAMPLE = (PAGE / "example.png").read_bytes()
CENTER = "What is at the center?"
TIMEOUT_MS = 20_000
PHONE = {
    "viewport": {"width": 390, "height": 664},
    "is_mobile": True,
    "has_touch": True,
    "device_scale_factor": 3,
}


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def serving(*options):
    """The address of a server with the demo model."""
    command = [sys.executable, "-m", "pocketllava", "serve", "demo", "--port", "0", *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = []
        for line in child.stdout:
            lines.append(line)
            if address := re.search(r"http://[\d.:]+\d", line):
                yield address[0]
                return
        pytest.fail(f"no address in {lines}")
    finally:
        child.terminate()
        child.wait(20)
        child.stdout.close()


@pytest.fixture(scope="module")
def address():
    with serving() as address:
        yield address


@contextmanager
def opened(browser, address, **options):
    """A fresh browser's page, which asked no other host, broke no policy and threw nothing."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
    context.set_default_timeout(TIMEOUT_MS)
    context.add_init_script(
        "addEventListener('securitypolicyviolation', ({blockedURI, violatedDirective}) =>"
        " (window.violations ??= []).push(`${violatedDirective} ${blockedURI}`))"
    )
    requests, faults = [], []
    context.on("request", lambda request: requests.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Policy" in message.text else None)
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.goto(address)
    page.wait_for_selector("#status[data-state=ready]")
    yield page
    strangers = [url for url in requests if not url.startswith((address + "/", "blob:", "data:"))]
    violations = page.evaluate("window.violations ?? []")
    context.close()
    assert (strangers, faults, violations) == ([], [], [])


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        yield page


def choose(page, *pictures, selector="#picker"):
    page.set_input_files(
        selector, [{"name": n, "mimeType": "image/png", "buffer": data} for n, data in pictures]
    )


def ask(page, question):
    """Types a question, presses Enter and returns the answer that came."""
    before = page.locator(".answer footer").count()
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.locator(".answer footer").nth(before).wait_for()
    return page.locator(".answer .text").nth(before).inner_text()


def conversation(page, question=CENTER):
    choose(page, ("scene.png", EXAMPLE))
    return ask(page, question)
