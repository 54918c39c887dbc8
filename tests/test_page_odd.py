"""The page when something is odd: hostile texts, faults of the server, phones, keys only, and what axe says."""

# ruff: noqa: F401, F811 -- fixtures are imported

import json
import re
import time
from importlib.resources import files

import pytest
from web_page import (
    CENTER,
    EXAMPLE,
    PHONE,
    address,
    ask,
    browser,
    choose,
    conversation,
    opened,
    page,
    serving,
)

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


# ---------------------------------------------------------------- strangers' texts


def stream(text):
    """A recorded answer, as the server sends it, with another text."""
    delta = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    return "".join(f"data: {json.dumps(item)}\n\n" for item in (delta, end)) + "data: [DONE]\n\n"


def shows(page, selector, text):
    """Waits until an element holds exactly this text."""
    end = time.monotonic() + 20
    while (found := page.locator(selector).text_content()) != text and time.monotonic() < end:
        page.wait_for_timeout(10)
    assert found == text


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
        shows(page, ".question h3", text)
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
    key.write_text("open-sesame\n")
    with serving("--api-key-file", str(key)) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.fill("#key-text", "wrong")
        page.press("#key-text", "Enter")
        page.locator("#key-error", has_text="not accepted").wait_for()
        page.fill("#key-text", "open-sesame")
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
        page.locator("#page:not([inert])").wait_for()


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
