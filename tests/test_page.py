"""The page of `pocketllava serve` in a real Chromium, against a real server with the demo model. Knows no route but through it."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

api = pytest.importorskip("playwright.sync_api", reason="the page needs playwright: make page")

PLACES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PLACES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the page needs a Chromium: apt-get install chromium"
)

PAGE = Path(__file__).parents[1] / "runtime" / "serve" / "page"
EXAMPLE = (PAGE / "example.png").read_bytes()
CENTER = "What is at the center?"
TIMEOUT_MS = 20_000
HOSTILE = (
    "<script>pwned=1</script>",
    "<img src=x onerror=pwned=1>",
    "<svg onload=pwned=1>",
    "<svg><script>pwned=1</script></svg>",
    '"><img src=x onerror=pwned=1>',
    "'><img src=x onerror=pwned=1>",
    '" autofocus onfocus="pwned=1',
    "javascript:pwned=1",
    "[click](javascript:pwned=1)",
    "![x](javascript:pwned=1)",
    '<a href="javascript:pwned=1">here</a>',
    "<iframe src=javascript:parent.pwned=1></iframe>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<object data=javascript:pwned=1></object>",
    "<embed src=javascript:pwned=1>",
    "<base href=https://example.org/>",
    "<link rel=stylesheet href=https://example.org/x.css>",
    "<style>@import 'https://example.org/x.css';</style>",
    "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "<form action=https://example.org><button>go</button></form>",
    "<details open ontoggle=pwned=1>",
    "<video><source onerror=pwned=1></video>",
    "<math><mtext><img src=x onerror=pwned=1></mtext></math>",
    "<template><img src=x onerror=pwned=1></template>",
    "</textarea><script>pwned=1</script>",
    "</title><script>pwned=1</script>",
    "<!--><script>pwned=1</script>-->",
    "**<b onmouseover=pwned=1>bold</b>**",
    "- <img src=x onerror=pwned=1>\n1. <script>pwned=1</script>",
    "\u202e<script>pwned=1</script>\u0000\ufeff{{constructor.constructor('pwned=1')()}}${pwned=1}",
)


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


STORED = """() => new Promise((resolve) => {
    indexedDB.open("pocketllava").onsuccess = ({target}) => {
        const pictures = target.result.transaction("pictures").objectStore("pictures").getAll();
        pictures.onsuccess = () => resolve(pictures.result.map(({name, bytes}) => [name, [...new Uint8Array(bytes)]]));
    };
})"""


def stored(page):
    """The names and bytes of the pictures that the browser keeps."""
    return {name: bytes(values) for name, values in page.evaluate(STORED)}


TRANSFER = """([name, type, base64]) => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, {type}));
    return transfer;
}"""


def transfer(page, name="scene.png", kind="image/png", data=EXAMPLE):
    return page.evaluate_handle(TRANSFER, [name, kind, base64.b64encode(data).decode()])


def paste(page, **file):
    page.evaluate(
        "(clipboardData) => document.activeElement.dispatchEvent("
        "new ClipboardEvent('paste', {clipboardData, bubbles: true, cancelable: true}))",
        transfer(page, **file),
    )


def drop(page, **file):
    data = transfer(page, **file)
    page.dispatch_event("main", "dragover", {"dataTransfer": data})
    assert page.locator("#drop").is_visible()  # the whole window is the target
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})
    assert page.locator("#drop").is_hidden()


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("way", [drop, paste], ids=["drop", "paste"])
def test_a_picture_is_prepared_while_the_question_is_typed(page, way):
    way(page)
    page.locator("#tray li[data-state=ready]").wait_for()
    assert page.inner_text("#preparing") == "Picture ready"
    assert ask(page, CENTER) == "a red heart"
    assert "picture kept" in page.inner_text(".timing summary")


def test_picking_sends_the_original_bytes(page):
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if "completions" in r.url else None)
    with page.expect_file_chooser() as chooser:
        page.click("#empty [data-act=pick]")
    chooser.value.set_files([{"name": "scene.png", "mimeType": "image/png", "buffer": EXAMPLE}])
    assert ask(page, CENTER) == "a red heart"
    (image, text) = bodies[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": CENTER}
    assert image["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(EXAMPLE).decode()


def test_several_pictures_and_questions(page):
    other = io.BytesIO()
    Image.open(io.BytesIO(EXAMPLE)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other, "png")
    assert conversation(page, "Where is the yellow star?") == "top left"
    choose(page, ("other.png", other.getvalue()))
    assert page.locator(".card").count() == 1
    ask(page, "Where is the yellow star?")
    assert page.locator(".card").count() == 2  # a picture begins a card
    ask(page, CENTER)
    assert page.locator(".card").nth(1).locator(".exchange").count() == 2
    choose(page, ("one.png", EXAMPLE), ("two.png", other.getvalue()))
    page.get_by_label("Remove one.png").click()
    assert page.locator("#tray li").count() == 1
    ask(page, CENTER)
    assert stored(page) == {"scene.png": EXAMPLE, "other.png": other.getvalue(), "two.png": other.getvalue()}


def test_what_is_no_picture_is_refused_in_words(page, tmp_path):
    kinds = {
        "notes.pdf": (b"%PDF-1.7 ...", "not a picture that the model can be shown"),
        "empty.png": (b"", "could not be read"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "Save it as PNG"),
        "large.png": (EXAMPLE + bytes(20 << 20), "Up to 20 MB are sent"),
    }
    for name, (data, words) in kinds.items():
        (tmp_path / name).write_bytes(data)
        page.set_input_files("#picker", tmp_path / name)
        page.locator(".note", has_text=words).wait_for()
        assert page.locator("#tray li").count() == 0
        page.get_by_label("Dismiss").click()


def test_a_picture_that_the_model_cannot_read_is_named_before_it_is_asked_about(page):
    choose(page, ("torn.png", EXAMPLE[:200]))
    page.locator("#tray li[data-state=failed]").wait_for()
    assert page.inner_text("#preparing")
    heic = b"\0\0\0\x18ftypheic" + bytes(200)
    page.get_by_label("Remove torn.png").click()
    choose(page, ("IMG_1.HEIC", heic))
    page.locator("#tray li[data-state=failed]").wait_for()
    assert page.inner_text("#preparing")


def test_what_the_model_sees(page):
    conversation(page)
    page.click("text=What the model sees")
    page.locator("#grid-switch").wait_for()
    assert page.inner_text("#viewer-caption") == "All that the model gets: 6 × 6 patches, 36 tokens."
    assert page.locator("#grid").is_hidden()
    page.check("#show-grid")
    page.focus("#stage")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer-caption") == "Patch 23 of 36: row 4, column 5. One token."
    page.click("#show-original")
    assert page.locator("#grid").is_hidden()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.textContent") == "What the model sees"


# ---------------------------------------------------------------- answers


def test_stop_keeps_what_has_come(page):
    session = page.context.new_cdp_session(page)
    choose(page, ("scene.png", EXAMPLE))
    page.locator("#tray li[data-state=ready]").wait_for()
    session.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": 1500, "uploadThroughput": -1}
    session.send("Network.emulateNetworkConditions", slow)
    page.fill("#question", "Describe the image.")
    page.press("#question", "Enter")
    page.locator(".answer .text p", has_text="There").wait_for()
    page.keyboard.press("Escape")
    page.locator(".ending", has_text="Stopped.").wait_for()
    session.send("Network.emulateNetworkConditions", {**slow, "downloadThroughput": -1})
    text = page.inner_text(".answer .text")
    assert text.startswith("There")
    assert not text.endswith("background.")
    assert page.evaluate("document.activeElement.id") == "question"
    assert ask(page, CENTER)


def test_another_answer_and_an_edited_question(page):
    conversation(page, "Describe the image.")
    ask(page, CENTER)
    first = page.locator(".exchange").nth(0)
    first.get_by_label("Another answer").click()
    first.locator(".variants", has_text="2 of 2").wait_for()
    first.get_by_label("Previous answer").click()
    assert first.locator(".variants").inner_text() == "1 of 2"
    first.get_by_label("Edit and ask again").click()
    page.keyboard.press("Control+a")
    page.keyboard.type("What color is the heart?")
    page.keyboard.press("Control+Enter")
    page.locator(".answer .text", has_text="red").wait_for()
    assert page.locator(".exchange").count() == 1
    assert page.inner_text(".question h3") == "What color is the heart?"
    assert page.locator(".card.with-pictures").count() == 1


def test_timing_says_what_was_kept(page):
    conversation(page)
    ask(page, "How many objects are there?")
    page.locator("summary").nth(1).click()
    rows = page.locator(".timing").nth(1).inner_text()
    for words in ("Waiting in line", "kept from before", "tokens new", "of context", "Greedy"):
        assert words in rows
    assert page.locator(".timing").nth(1).locator("table .part.prompt").is_visible()


def test_answers_are_read_aloud_by_sentence(page):
    conversation(page, "Describe the image.")
    log = page.locator("#announcer")
    assert log.get_attribute("role") == "log"
    said = log.locator("p").all_inner_texts()
    assert [text for text in said if text.startswith("There is")] == [page.inner_text(".answer .text")]
    assert page.locator("main [aria-live]").count() == 0  # a word at a time would be chatter


# ---------------------------------------------------------------- history


def test_history_survives_a_reload_and_can_be_taken_along(page, tmp_path):
    answer = conversation(page)
    page.reload()
    page.locator(".answer footer").wait_for()
    assert page.inner_text(".answer .text") == answer
    assert stored(page) == {"scene.png": EXAMPLE}
    assert ask(page, CENTER) == answer  # the conversation goes on
    with page.expect_download() as download:
        page.click("#export")
    path = tmp_path / "history.json"
    download.value.save_as(path)
    history = json.loads(path.read_text("utf-8"))
    assert base64.b64decode(history["pictures"][0]["base64"]) == EXAMPLE
    page.click("#clear")
    page.click("#confirm-ok")
    page.locator(".none").wait_for()
    page.reload()
    assert page.locator("#conversations li").count() == 0
    page.set_input_files("#import-file", path)
    page.click("#conversations .open")
    page.locator(".answer footer").nth(1).wait_for()
    assert stored(page) == {"scene.png": EXAMPLE}


def test_deleting_can_be_undone(page):
    conversation(page)
    page.click("#new")
    page.hover("#conversations li")
    page.get_by_label(f"Delete {CENTER}").click()
    page.locator(".none").wait_for()
    page.click("text=Undo")
    page.click("#conversations .open")
    page.locator(".answer footer").wait_for()
    assert stored(page) == {"scene.png": EXAMPLE}


def test_a_file_that_is_no_history_changes_nothing(page, tmp_path):
    conversation(page)
    for text in ("", "[]", '{"format": "pocketllava-history", "version": 1, "conversations": [{}]}'):
        (tmp_path / "other.json").write_text(text)
        page.set_input_files("#import-file", tmp_path / "other.json")
        page.locator(".note", has_text="could not be imported").wait_for()
        page.get_by_label("Dismiss").first.click()
    assert page.locator("#conversations li").count() == 1


# ---------------------------------------------------------------- strangers' texts


def stream(text):
    """A recorded answer, as the server sends it, with another text."""
    delta = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    return "".join(f"data: {json.dumps(item)}\n\n" for item in (delta, end)) + "data: [DONE]\n\n"


def test_texts_and_file_names_never_become_markup(page):
    texts = iter(HOSTILE)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=stream(next(texts))),
    )
    page.route("**/v1/prepare", lambda route: route.fulfill(status=404, body="{}"))
    for text in HOSTILE:
        choose(page, (text, EXAMPLE))
        ask(page, text)
        page.click("#new")
    assert page.locator("#conversations li").count() == len(HOSTILE)
    for n, text in enumerate(reversed(HOSTILE)):
        page.locator("#conversations .open").nth(n).click()
        page.locator(".answer footer").wait_for()
        assert page.locator(".question h3").text_content() == text
        page.click(".thumb")
        assert page.locator("#viewer-title").text_content() == text
        page.keyboard.press("Escape")
        plain = re.sub(r"\*\*|^(- |1\. )", "", text, flags=re.MULTILINE).replace("\n", "")
        assert page.locator(".answer .text").text_content() == plain
    assert page.evaluate("window.pwned") is None
    inside = "#conversation, #history, #viewer, #announcer, #title"
    forbidden = (
        "script, iframe, object, embed, form, style, link, base, meta, video, template, math, a, [onerror]"
    )
    assert (
        page.eval_on_selector_all(
            inside, f"roots => roots.flatMap(r => [...r.querySelectorAll('{forbidden}')])"
        )
        == []
    )


# ---------------------------------------------------------------- when something is wrong


def refusal(status, **error):
    return {"status": status, "content_type": "application/json", "body": json.dumps({"error": error})}


def test_a_full_line_is_waited_for(page):
    answers = iter(
        [refusal(429, message="queue full", code="queue_full") | {"headers": {"retry-after": "1"}}]
    )

    def once(route):
        answer = next(answers, None)
        route.fulfill(**answer) if answer else route.continue_()

    page.route("**/v1/chat/completions", once)
    choose(page, ("scene.png", EXAMPLE))
    page.fill("#question", CENTER)
    page.press("#question", "Enter")
    page.locator(".waiting", has_text="The line is full. Asking again in 1 s").wait_for()
    page.locator(".answer .text", has_text="a red heart").wait_for()


def test_the_page_waits_for_a_model_that_is_being_loaded(page):
    loading = [refusal(503, message="Loading model", code=503)]
    page.route("**/health", lambda route: route.fulfill(**loading[0]) if loading else route.continue_())
    page.evaluate("window.dispatchEvent(new Event('focus'))")
    page.reload()
    page.locator("#status", has_text="Loading the model").wait_for()
    choose(page, ("scene.png", EXAMPLE))
    page.fill("#question", CENTER)
    page.press("#question", "Enter")
    page.locator(".waiting", has_text="The model is being loaded").wait_for()
    loading.clear()
    page.locator(".answer .text", has_text="a red heart").wait_for()


def test_the_death_of_the_engine_is_said_in_words(page):
    died = refusal(503, message="engine died") | {"headers": {"x-should-retry": "false"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**died))
    conversation(page)
    assert "The engine stopped while it answered" in page.inner_text(".error")
    page.unroute("**/v1/chat/completions")
    page.get_by_label("Ask again", exact=True).click()
    page.locator(".answer .text", has_text=re.compile("[a-z]")).wait_for()
    assert page.locator(".error").count() == 0


def test_a_conversation_that_does_not_fit_is_said_in_words(page):
    conversation(page, "star " * 3000)
    assert "no longer fits the model" in page.inner_text(".error")


def test_a_key_is_asked_for_once(browser, tmp_path):
    key = tmp_path / "key"
    key.write_text("open sesame\n")
    with serving("--api-key-file", str(key)) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.fill("#key-text", "wrong")
        page.press("#key-text", "Enter")
        page.locator("#key-error", has_text="not accepted").wait_for()
        page.fill("#key-text", "open sesame")
        page.press("#key-text", "Enter")
        page.locator("#key").wait_for(state="hidden")
        assert conversation(page) == "a red heart"
        page.reload()
        page.locator(".answer footer").wait_for()
        assert ask(page, CENTER) == "a red heart"
        assert page.locator("#key").is_hidden()
        assert "sesame" not in page.url
        assert page.evaluate("localStorage.length") == 0
        context.close()


# ---------------------------------------------------------------- sizes, keys, eyes and ears


PHONE = {
    "viewport": {"width": 390, "height": 664},
    "is_mobile": True,
    "has_touch": True,
    "device_scale_factor": 3,
}
SMALL = """() => [...document.querySelectorAll('button, summary, input:not([hidden]), textarea')]
    .filter((node) => node.checkVisibility({visibilityProperty: true}) && !node.closest('[inert]'))
    .map((node) => [node.getAttribute('aria-label') || node.textContent, node.getBoundingClientRect()])
    .filter(([, {width, height}]) => width < 43.5 || height < 43.5).map(([label]) => label)"""
OVERFLOW = "() => document.documentElement.scrollWidth > innerWidth || document.querySelector('main').scrollWidth > innerWidth"


def test_a_phone(browser, address):
    with opened(browser, address, **PHONE) as page:
        assert (page.evaluate(SMALL), page.evaluate(OVERFLOW)) == ([], False)
        choose(page, ("photo.jpg", EXAMPLE), selector="#camera")
        assert page.get_attribute("#camera", "capture") == "environment"
        page.fill("#question", "What is")
        page.press("#question", "Enter")
        page.keyboard.type("at the center?")
        assert page.input_value("#question") == "What is\nat the center?"  # Enter starts a line
        page.tap("#send")
        page.locator(".answer footer").wait_for()
        assert (page.evaluate(SMALL), page.evaluate(OVERFLOW)) == ([], False)
        page.tap("#open-history")
        page.locator("#close-history").wait_for()
        assert page.evaluate("document.activeElement.id") == "close-history"
        assert page.evaluate("document.getElementById('page').inert")
        page.tap("#conversations .open")
        assert not page.evaluate("document.getElementById('page').inert")


def tab_to(page, label, most=40):
    """Presses Tab until the element so named has the focus, which must be visible on each."""
    for _ in range(most):
        page.keyboard.press("Tab")
        name, has_outline = page.evaluate(
            "(() => { const node = document.activeElement; const style = getComputedStyle(node);"
            "return [node.getAttribute('aria-label') || (node.matches('body, main') ? '' : node.textContent.trim()),"
            " node.matches('textarea, body, main') || style.outlineStyle !== 'none']; })()"
        )
        assert has_outline, name
        if label in name:
            return
    pytest.fail(f"no way to {label!r} by Tab")


def test_keyboard_only(page):
    tab_to(page, "No picture at hand?")
    page.keyboard.press("Enter")
    page.locator("#tray li").wait_for()
    page.keyboard.type(CENTER)
    page.keyboard.press("Enter")
    page.locator(".answer footer").wait_for()
    page.keyboard.type("What color is the heart?")
    page.keyboard.press("Enter")
    page.locator(".answer footer").nth(1).wait_for()
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "What the model sees")
    page.keyboard.press("Enter")
    page.locator("#grid-switch").wait_for()
    tab_to(page, "", most=1)
    page.keyboard.press("Escape")
    tab_to(page, "Edit and ask again")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Edit and ask again"
    tab_to(page, "First word after")
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1


def test_reduced_motion(browser, address):
    with opened(browser, address, reduced_motion="reduce") as page:
        choose(page, ("scene.png", EXAMPLE))
        moving = "() => document.getAnimations().filter((a) => a.playState === 'running').length"
        assert page.evaluate(moving) == 0


def axe_faults(page):
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text("utf-8"))
    result = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    return [
        (fault["impact"], fault["id"], [node["html"] for node in fault["nodes"]])
        for fault in result["violations"]
        if fault["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{}, PHONE], ids=["desk", "phone"])
def test_nothing_serious_for_axe(browser, address, scheme, size):
    pytest.importorskip("axe_playwright_python", reason="the page needs axe-playwright-python: make page")
    with opened(browser, address, color_scheme=scheme, reduced_motion="reduce", **size) as page:
        assert axe_faults(page) == []
        choose(page, ("scene.png", EXAMPLE))
        page.locator("#tray li[data-state=ready]").wait_for()
        assert axe_faults(page) == []
        page.fill("#question", CENTER)
        page.click("#send")
        page.locator(".timing summary").click()
        assert axe_faults(page) == []
        page.click("text=What the model sees")
        page.check("#show-grid")
        assert axe_faults(page) == []
