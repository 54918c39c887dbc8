"""The page of `pocketllava serve` in a real Chromium: pictures, answers and history. Knows no route but through it."""

# ruff: noqa: F401, F811 -- fixtures are imported

import base64
import io
import json

import pytest
from PIL import Image
from web_page import CENTER, EXAMPLE, address, ask, browser, choose, conversation, page

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
