"""Chat templates are strangers' programs: rendered as transformers renders them, in bounded time and memory."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any

import pytest
from prompts import PROMPTS, for_transformers
from small_checkpoint import CHAT_TEMPLATE

from pocketllava import Bundle, BundleError, InputError, Llava
from pocketllava.convert.read.original import BY_KIND, BY_TOKEN
from pocketllava.convert.read.templates import LLAMA3_TEMPLATE
from pocketllava.models.bundle import DEFAULT_TEMPLATE
from pocketllava.models.chat_template import MAX_S, MAX_SOURCE, check, render
from pocketllava.prompt.template import Template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
USER = for_transformers([("user", "What is it?", 1)])
DOUBLED = (
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
)

BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text in a loop": "{% for a in range(99999) %}" + "x" * 5000 + "{% endfor %}",
    "a captured loop": "{% set x %}{% for a in range(99999) %}" + "x" * 9000 + "{% endfor %}{% endset %}",
    "a product": "{{ 'a' * 10**10 }}",
    "a list's product": "{{ [1] * 10**9 }}",
    "a power": "{{ (2 ** 4096) ** 4096 }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "~": DOUBLED.replace("STEP", "ns.x ~ ns.x"),
    "+": DOUBLED.replace("STEP", "ns.x + ns.x"),
    "join": DOUBLED.replace("STEP", "[ns.x, ns.x] | join"),
    "replace": DOUBLED.replace("STEP", "ns.x | replace('a', ns.x)"),
    "lists": DOUBLED.replace("STEP", "[ns.x, ns.x]"),
    "dicts": DOUBLED.replace("STEP", "{1: ns.x, 2: ns.x}"),
    "tuples": DOUBLED.replace("STEP", "(ns.x, ns.x)"),
    "blocks": "{% set x %}ab{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x }}",
    "center": "{{ 'a' | center(999999999) }}",
    "indent": "{{ ('\n' * 100000) | indent(10000) }}",
    "a wide number": "{{ '%999999999d' | format(1) }}",
    "a wide operator": "{{ '%*d' % (999999999, 1) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "a nested format": "{{ '{:{}}'.format(1, 999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "str.join": "{{ ('x' * 99999).join(range(99999) | map('string')) }}",
    "join of many": "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "wide JSON": "{{ range(99999) | list | tojson(indent=99999) }}",
    "a macro in itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a macro's tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a loop in itself": "{% for a in range(10) recursive %}{{ loop(range(10)) }}{% endfor %}",
    "sorting in a loop": "{% for i in range(99999) %}{% set x = range(99999) | sort %}{% endfor %}",
    "comparing": "{% set a = range(99999) | list %}{% set b = range(99999) | list %}{% for i in range(99999) %}"
    "{% if a == b %}{% endif %}{% endfor %}",
    "lipsum": "{{ lipsum(n=99999) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks in blocks": "{% if a %}" * 300 + "{% endif %}" * 300,
    "loops in loops": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "a growing list": "{% set l = [1] %}{% for x in l %}{{ l.append(1) }}{% endfor %}",
    "infinity": "{{ 1e999 }}",
    "a date's width": "{{ strftime_now('%999999999d' * 9999) }}",
    "a long chain": "{{ a" + " < a" * 12000 + " }}",
    "size": "{# " + "x" * MAX_SOURCE + " #}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_in_time(name: str) -> None:
    start = time.process_time()
    with pytest.raises(BundleError, match="chat template: ") as caught:
        check("{# image #}" + BOMBS[name], "<image>", TOKENS)
    assert time.process_time() - start < 3 * MAX_S
    assert len(str(caught.value)) <= 1000
    assert "\n" not in str(caught.value)


FAULTS = {
    "no end": ("{% for %}", "cannot be rendered"),
    "an unknown filter": ("{{ 'a' | nothing }}", "No filter named"),
    "an unknown name": ("{{ a.b.c }}", "'a' is undefined"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "Python's insides": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a division": ("{{ 1 / 0 }}", "division by zero"),
    "a list for a text": ("{{ 'a' + [] }}", "can only concatenate"),
    "a lone surrogate's text": ("{{ messages[9].role }}", "cannot be rendered"),
    "any conversation refused": ("{{ raise_exception('no\nway') }}", "no way; expected a template for any"),
    "images never": ("USER: {{ messages[-1]['role'] }}", "shows 0 images of a conversation with 1"),
    "an image always": ("<image>", "shows 1 images of a conversation with 0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_template_that_cannot_be_used(name: str) -> None:
    source, message = FAULTS[name]
    with pytest.raises(BundleError, match=message):
        check(source, "<image>", TOKENS)


@pytest.mark.parametrize(
    "source", [DEFAULT_TEMPLATE, CHAT_TEMPLATE, LLAMA3_TEMPLATE, *BY_KIND.values(), *BY_TOKEN.values()]
)
def test_published_templates_pass(source: str) -> None:
    check(source, "<image>", TOKENS)


def test_a_template_may_refuse_a_system_message() -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    )
    check(source, "<image>", TOKENS)
    with pytest.raises(InputError, match="chat template: no system"):
        render(source, for_transformers([("system", "Be brief.", 0), ("user", "a", 0)]), TOKENS)


def test_long_conversations_are_no_bombs() -> None:
    turns = [("user", "word " * 2000, 1), ("assistant", "word " * 2000, 0)] * 200
    text = render(CHAT_TEMPLATE, for_transformers(turns), TOKENS)
    assert text.count("<image>") == 200
    assert len(text) > 4_000_000


NAMES: dict[str, tuple[str, str]] = {
    "tokens": ("{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}", "<s></s><pad><unk>"),
    "time": ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
    "JSON": ("{{ {'b': 'é<', 'a': [1]} | tojson }}", '{"b": "é<", "a": [1]}'),
    "JSON in order": (
        "{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'
    ),
    "JSON's separators": ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
    "loop controls": ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    "generation": ("{% generation %}a{% endgeneration %}", "a"),
    "constants": ("{{ 'a' ~ (1 + 2) }}{{ 'ab' | upper | center(4) }}{{ 2 ** 3 }}", "a3 AB 8"),
    "white space": ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
    "slices": ("{{ messages[1:] | length }}{{ 'abc'[::-1] }}", "0cba"),
    "methods": ("{{ ' a,b '.strip().split(',') | join('+') }}{{ 'x{}'.format(1) }}", "a+bx1"),
    "macros": ("{% macro f(a) %}[{{ a }}{{ caller() }}]{% endmacro %}{% call f(1) %}2{% endcall %}", "[12]"),
    "recursion": ("{% for a in [1, [2]] recursive %}{{ a if a is number else loop(a) }}{% endfor %}", "12"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_templates_may_use(name: str) -> None:
    source, expected = NAMES[name]
    assert render(source, USER, TOKENS) == expected


def changed(bundle: Bundle, folder: Any, template: str) -> Any:
    """The bundle with another template."""
    for path in (bundle.model, bundle.mmproj):
        (folder / path.name).symlink_to(path)
    manifest = json.loads((bundle.folder / "bundle.json").read_text("utf-8"))
    (folder / "bundle.json").write_text(json.dumps({**manifest, "chat_template": template}), "utf-8")
    return folder


@pytest.mark.parametrize("template", [BOMBS["loops"], "{% for %}", "no image"])
def test_a_bundle_with_such_a_template_is_not_loaded(bundle: Bundle, tmp_path: Any, template: str) -> None:
    with pytest.raises(BundleError, match="chat template: "):
        Llava.load(changed(bundle, tmp_path, template))


def test_white_space_beside_stripping_tokens() -> None:
    special = {"<s>": 1, "</s>": 2, "<image>": 7}
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}</s> {% endfor %}"
    settings: dict[str, Any] = {"special": special, "image_token": "<image>", "bos": "<s>", "eos": "</s>"}
    message = [("user", " \n a \t", 0)]

    def pieces(strip: dict[str, str]) -> list[Any]:
        template = Template(source, add_bos=True, space_prefix="every", strip=strip, **settings)
        from prompts import messages

        return template.pieces(messages(message), [])

    assert pieces({}) == [1, " \n a \t", 2, " "]
    assert pieces({"</s>": "left"}) == [1, " \n a", 2, " "]
    assert pieces({"</s>": "right"}) == [1, " \n a \t", 2]
    assert pieces({"</s>": "both"}) == [1, " \n a", 2]


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "source",
    [
        CHAT_TEMPLATE,
        DEFAULT_TEMPLATE,
        LLAMA3_TEMPLATE,
        *BY_KIND.values(),
        *BY_TOKEN.values(),
        *(s for s, _ in NAMES.values()),
    ],
)
def test_renders_as_transformers_does(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for turns in PROMPTS.values():
        conversation = for_transformers(turns)
        (expected,), _ = render_jinja_template(
            [conversation], chat_template=source, add_generation_prompt=True, **TOKENS
        )
        assert render(source, conversation, TOKENS) == expected
