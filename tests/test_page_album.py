"""The page's album in a real Chromium: search, likeness, pictures that are asked about. Knows no route but through it."""

# ruff: noqa: F401, F811 -- fixtures are imported

import base64

import pytest
from albums import album
from test_page_odd import HOSTILE, OVERFLOW, SMALL, axe_faults, tab_to
from web_page import EXAMPLE, PHONE, ask, browser, opened, serving

CAPTIONS = ("a red square at the left", "a blue star", "a red heart", *HOSTILE, *["a scene"] * 80)
ALBUM = "#album-hits li"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return album(tmp_path_factory.mktemp("album"), CAPTIONS, ("one", "two"))


@pytest.fixture(scope="module")
def address(path):
    with serving("--album", str(path.parent / "photos")) as address:
        yield address


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        page.click("#open-album")
        page.locator(ALBUM).nth(59).wait_for()
        yield page


def search(page, words, status):
    """Types words, presses Enter, and waits for what is said of them."""
    page.fill("#album-words", words)
    page.press("#album-words", "Enter")
    page.locator("#album-status", has_text=status).wait_for()
    return page.locator(f"{ALBUM} .name").all_inner_texts()


def drawn(page, selector):
    """Whether each picture so selected could be shown."""
    loaded = "node => node.decode().then(() => node.naturalWidth > 0, () => false)"
    nodes = page.locator(selector + "[src]")
    nodes.last.wait_for()
    return [nodes.nth(n).evaluate(loaded) for n in range(page.locator(selector).count())]


def test_words_find_pictures(page):
    assert page.inner_text("#album-title") == "photos"
    assert page.inner_text("#album-status") == f"60 of {len(CAPTIONS)} pictures"
    assert search(page, "red", "2 pictures") == ["2.webp", "0.png"]
    assert drawn(page, f"{ALBUM} img") == [True, True]
    assert search(page, "sta* NOT red", "1 picture, the best first") == ["1.jpg"]
    assert search(page, "purple", "Nothing found.") == []
    assert search(page, '"open', "close quotes and brackets") == []


def test_more_pictures_and_one_question(page):
    page.click("text=Show more")
    page.locator(ALBUM).nth(len(CAPTIONS) - 1).wait_for()
    assert page.locator("#album-more").is_hidden()
    first_new = page.locator(ALBUM).nth(60).locator(".thumb")
    assert first_new.evaluate("node => node === document.activeElement")
    page.select_option("#album-column", label="How many objects are there?")
    page.locator("#album-status", has_text="2 of").wait_for()
    assert page.locator(f"{ALBUM} .caption").all_inner_texts() == ["one", "two"]


def test_alike(page):
    page.get_by_label("Pictures like 1.jpg", exact=True).click()
    page.locator("#album-status", has_text="like 1.jpg, the most alike first").wait_for()
    assert page.locator(f"{ALBUM} .name").first.inner_text() == "1.jpg"
    first = page.locator(f"{ALBUM} .thumb").first
    assert first.evaluate("node => node === document.activeElement")
    page.set_input_files("#like-file", [{"name": "mine.png", "mimeType": "image/png", "buffer": EXAMPLE}])
    page.locator("#album-status", has_text="like mine.png, the most alike first").wait_for()
    page.set_input_files("#like-file", [{"name": "no.txt", "mimeType": "text/plain", "buffer": b"hello"}])
    page.locator("#album-status", has_text="no.txt is not a picture").wait_for()


def test_a_picture_is_asked_about_with_its_original_bytes(page, path):
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_buffer) if "prepare" in r.url else None)
    page.get_by_label("Ask about 1.jpg", exact=True).click()
    page.locator("#tray li[data-state=ready]").wait_for()
    assert page.locator("#album").is_hidden()
    assert ask(page, "How many objects are there?")
    assert base64.b64encode((path.parent / "photos" / "1.jpg").read_bytes()) in bodies[0]


def test_looking_and_coming_back(page):
    page.get_by_label("Look at 0.png", exact=True).click()
    page.locator("#viewer[open]").wait_for()
    assert drawn(page, "#viewer-image") == [True]
    page.click("#show-model")
    page.locator("#grid-switch").wait_for()
    page.keyboard.press("Escape")
    page.reload()
    page.locator(ALBUM).nth(59).wait_for()  # the address has it
    page.click("#new")
    assert page.locator("#album").is_hidden()
    assert page.locator("#question").is_visible()
    page.reload()
    page.locator("#open-album").wait_for()
    assert page.locator("#album").is_hidden()


def test_captions_are_text(page):
    shown = page.locator(f"{ALBUM} .caption").evaluate_all("nodes => nodes.map((node) => node.textContent)")
    assert set(shown) & set(HOSTILE)
    assert page.evaluate("window.pwned") is None
    forbidden = "script, iframe, object, style, a, [onerror]"
    assert page.locator(f"#album :is({forbidden})").count() == 0


def test_a_picture_that_is_gone_is_said(page, path):
    file = path.parent / "photos" / "0.png"
    data = file.read_bytes()
    file.unlink()
    try:
        page.get_by_label("Ask about 0.png", exact=True).click()
        page.locator("#album-status", has_text="it is gone, or was changed").wait_for()
    finally:
        file.write_bytes(data)


def test_keys_and_ears(browser, address):
    with opened(browser, address, reduced_motion="reduce") as page:
        tab_to(page, "Album")
        page.keyboard.press("Enter")
        page.locator(ALBUM).nth(59).wait_for()
        assert page.evaluate("document.activeElement.id") == "album-words"
        tab_to(page, "Ask about 0.png")
        page.keyboard.press("Enter")
        page.locator("#tray li").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{}, PHONE], ids=["desk", "phone"])
def test_nothing_serious_for_axe(browser, address, scheme, size):
    pytest.importorskip("axe_playwright_python", reason="the page needs axe-playwright-python: make page")
    with opened(browser, address, color_scheme=scheme, reduced_motion="reduce", **size) as page:
        page.goto(address + "/#album")
        page.reload()
        page.locator(ALBUM).nth(59).wait_for()
        assert (page.evaluate(SMALL), page.evaluate(OVERFLOW)) == ([], False)
        assert axe_faults(page) == []


def test_without_an_album_there_is_no_button(browser):
    with serving() as address, opened(browser, address) as page:
        page.goto(address + "/#album")
        page.reload()
        page.locator("#status", has_text="demo").wait_for()
        assert page.locator("#open-album").is_hidden()
        assert page.locator("#album").is_hidden()
