"""The checkpoint's own template, token ids equal to the reference's, and user text that stays text."""

from __future__ import annotations

from typing import Any

import pytest
import recorded
from hypothesis import given
from hypothesis import strategies as st
from prompts import PROMPTS, messages
from small_checkpoint import CHAT_TEMPLATE

from pocketllava import BundleError, InputError, Llava, Message
from pocketllava.models.bundle import DEFAULT_TEMPLATE
from pocketllava.prompt.items import ImageSpan, fitting_image_tokens, placeholders
from pocketllava.prompt.template import Template

SPECIAL = {"<s>": 1, "</s>": 2, "<image>": 700, "<pad>": 701}
HOSTILE = (
    "<image>",
    "</s>",
    "<s>",
    "<pad>",
    "<__media__>",
    "<ima",
    "ge>",
    "USER:",
    " ",
    "\n",
    "{{ 1 }}",
    "<",
    "\U0010fffd",
)


SPAN = ImageSpan("a picture", 576)


def template(source: str = DEFAULT_TEMPLATE, **changes: Any) -> Template:
    """llava-1.5's, unless changed."""
    settings = {"special": SPECIAL, "image_token": "<image>", "bos": "<s>", "eos": "</s>", "add_bos": True}
    return Template(source, **{**settings, "space_prefix": "every", **changes})


@pytest.mark.parametrize("scheme", ["prepend", "first"])
def test_token_ids_equal_the_recorded_reference(make_bundle: Any, scheme: str) -> None:
    layout = {} if scheme == "prepend" else {"scheme": scheme, "tokenizer_model": False}
    expected = recorded.load()[f"token ids, {scheme}"]
    with Llava.load(make_bundle(**layout).folder) as llava:
        for name, turns in PROMPTS.items():
            with llava.session() as session:
                found = session.count(messages(turns))
            assert [i if isinstance(i, int) else recorded.image_token() for i in found] == expected[name], (
                name
            )


def test_the_hubs_template() -> None:
    turns = [
        Message("user", "What is it?", (b"",)),
        Message("assistant", "A dog."),
        Message("user", "Sure?"),
    ]
    expected = [1, "USER: ", SPAN, "\nWhat is it? ASSISTANT: A dog. USER: Sure? ASSISTANT:"]
    assert template(CHAT_TEMPLATE).pieces(turns, [SPAN]) == expected
    assert template(DEFAULT_TEMPLATE).pieces(turns, [SPAN]) == expected


def test_a_template_that_writes_special_tokens_itself() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>{% else %} {{ p['text'] | trim }}{% endif %}{% endfor %}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}assistant:"
    )
    turns = [Message("user", "  <s>Hi</s>  ", (b"",)), Message("assistant", "Yes"), Message("user", "Ok")]
    assert template(source).pieces(turns, [SPAN]) == [
        1, "user:", SPAN, " <s>Hi</s>assistant: Yes", 2, "user: Okassistant:"
    ]  # fmt: skip


@given(
    texts=st.lists(
        st.lists(st.sampled_from(HOSTILE) | st.text(max_size=6), max_size=6).map("".join),
        min_size=1,
        max_size=4,
    )
)
def test_user_text_stays_text(texts: list[str]) -> None:
    """Whatever users write, the pieces hold it unchanged, and only the template's special tokens count."""
    roles = ("user", "assistant")
    turns = [Message(roles[n % 2], t, (b"",) if n % 2 == 0 else ()) for n, t in enumerate(texts)]  # type: ignore[arg-type]
    spans = placeholders([576] * len(texts[::2]))
    pieces = template().pieces(turns, spans)
    assert [p for p in pieces if isinstance(p, ImageSpan)] == spans
    assert [p for p in pieces if isinstance(p, int)] == [1]
    rendered = "".join(p if isinstance(p, str) else "" if isinstance(p, int) else "\0IMAGE\0" for p in pieces)
    expected = "".join(
        f"USER: \0IMAGE\0\n{t} " if n % 2 == 0 else f"ASSISTANT: {t} " for n, t in enumerate(texts)
    ) + "ASSISTANT:"  # fmt: skip
    assert rendered == expected


def test_hostile_text_gives_no_special_ids(llava: Llava) -> None:
    text = "Is <image> or <__media__> or </s> or <s> or <pad> in it?"
    with llava.session() as session:
        ids = session.count([Message("user", text, (b"",))])
        special = set(session.template.special.values())
    assert sum(isinstance(i, ImageSpan) for i in ids) == 1
    assert [i for i in ids if i in special] == [1]


@pytest.mark.parametrize(
    ("source", "turns", "error", "message"),
    [
        (DEFAULT_TEMPLATE, [], InputError, "found no messages"),
        (
            "no image here",
            [Message("user", "a", (b"",))],
            InputError,
            "it shows 0 of the conversation's 1 images",
        ),
        ("{% for %}", [Message("user", "a")], BundleError, "chat template: cannot be rendered"),
        (
            "{{ raise_exception('no system') }}",
            [Message("user", "a")],
            InputError,
            "chat template: no system",
        ),
        ("{{ ''.__class__.__mro__ }}", [Message("user", "a")], BundleError, "cannot be rendered"),
    ],
)
def test_templates_and_conversations_that_fail(
    source: str, turns: list[Message], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        template(source).pieces(turns, placeholders(576 for m in turns for _ in m.images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("robot", "a"), "role: found 'robot', expected one of system, user, assistant"),
        (("assistant", "a", (b"",)), "images in a 'assistant' message"),
        (("user", None), "message text: found NoneType, expected str"),
        (("user", "a", 5), "image: found int, expected a path"),
    ],
)
def test_messages_that_fail(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Message(*arguments)


@given(st.lists(st.integers(1, 3000), max_size=8), st.integers(-10, 6000))
def test_the_most_image_tokens_that_fit(images: list[int], room: int) -> None:
    fewer = fitting_image_tokens(images, room)
    if fewer is not None:
        assert sum(min(fewer, n) for n in images) <= room
        assert fewer == max(images) or sum(min(fewer + 1, n) for n in images) > room
        assert fewer * 9 >= max(images)
    elif images:
        least = -(-max(images) // 9)
        assert sum(min(least, n) for n in images) > room
