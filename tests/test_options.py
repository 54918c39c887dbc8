"""Arguments are checked when they are given, types included, and each option is declared once."""

from __future__ import annotations

import io
import math
import pickle
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pocketllava import Answer, Chunk, ImageError, InputError, Message, Options, Timings, UnsupportedOption
from pocketllava.cli import cli
from pocketllava.prompt.openai import as_messages
from pocketllava.settings import settings
from pocketllava.types import LoadOptions, Usage, as_images, conversation, load_options, sampling

URI = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(
            ("max_tokens", value)
            for value in (0, -1, 2.5, True, "5", None, math.nan, 2**31, [1], np.float64(3))
        ),
        *(("temperature", value) for value in (-0.1, 101, math.nan, math.inf, "0", None, False, 1j)),
        *(("top_p", value) for value in (0, 1.1, math.nan, "1")),
        *(("top_k", value) for value in (-1, 2**31, 1.0, "40")),
        *(("min_p", value) for value in (-0.1, 1.5, math.nan, None)),
        *(("repeat_penalty", value) for value in (0, -1, math.inf, "1.1")),
        *(("seed", value) for value in (-1, 2**32 - 1, 1.0, "7", True)),
        *(("stop", value) for value in (None, "", ("",), ("a", 1), 5, b"ab", {"a"})),
        *(("truncate", value) for value in ("newest", True, 1, "")),
        *(("presence_penalty", value) for value in (-2.1, 3, "0", None)),
        *(("frequency_penalty", value) for value in (math.nan, 2.5)),
        *(("schema", value) for value in ("{}", [], 5, True)),
        *(("choices", value) for value in ("yes", (), ["yes", "yes"], ["yes", " "], ["a", 1], ["\ud800"])),
        *(("top_logprobs", value) for value in (-1, 21, 1.5, True)),
    ],
)
def test_wrong_sampling_is_refused_in_one_line(name: str, wrong: Any) -> None:
    for refused in (lambda: Options(**{name: wrong}), lambda: sampling(None, **{name: wrong})):
        with pytest.raises(InputError, match=rf"^{name}: found .*, expected ") as caught:
            refused()
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("n_ctx", value) for value in (0, -1, "2048", 2048.0, True, 2**31)),
        *(("n_threads", value) for value in (0, "4", 2.0, 513)),
        *(("n_gpu_layers", value) for value in (-2, -5, "all", 1.5, None)),
        *(("main_gpu", value) for value in (-1, 16, "0", True)),
        *(("tensor_split", value) for value in ("3,1", (), (0, 0), (-1, 2), ("a",), (math.inf,), 3)),
        *(("mmproj_device", value) for value in (0, b"CUDA0", "\ud800")),
        *(("exact", value) for value in (1, "yes")),
        *(("max_pixels", value) for value in (0, -1, 1e6, "1")),
        *(("kv_type", value) for value in ("q4_0", "F16", None, 1)),
        *(("weights", value) for value in ("ram", True)),
        *(("kept_bytes", value) for value in (-1, 1e9, "1GB")),
        *(("cache_dir", value) for value in ("", 5, b"folder", True)),
        *(("cache_bytes", value) for value in (0, math.nan, math.inf, 4e9, "4GB", None)),
        *(("keep_prefixes", value) for value in (1, "yes", None)),
    ],
)
def test_wrong_loading_is_refused_in_one_line(name: str, wrong: Any) -> None:
    with pytest.raises(UnsupportedOption, match=rf"^{name}: found .*, expected "):
        load_options(**{name: wrong})


def test_right_values_get_their_types() -> None:
    options = Options(max_tokens=np.int64(7), temperature=1, top_p=np.float32(0.5), stop=["a", "b"])  # type: ignore[arg-type]
    assert options == Options(max_tokens=7, temperature=1.0, top_p=0.5, stop=("a", "b"))
    assert [type(v) for v in (options.max_tokens, options.temperature, options.stop)] == [int, float, tuple]
    assert Options(stop="end").stop == ("end",)
    load = LoadOptions(n_ctx=np.uint16(512), cache_dir="~/kept", cache_bytes=10)  # type: ignore[arg-type]
    assert (load.n_ctx, load.cache_dir) == (512, Path.home() / "kept")
    with pytest.raises(UnsupportedOption, match="give cache_dir as well"):
        LoadOptions(keep_prefixes=True)


def test_sampling_changes_options_and_names_the_nearest() -> None:
    base = Options(max_tokens=5, seed=1)
    assert sampling(base, temperature=0.5) == Options(max_tokens=5, seed=1, temperature=0.5)
    assert sampling(None, stop="a") == Options(stop=("a",))
    assert sampling() == Options()
    with pytest.raises(InputError, match=r"^temprature: no such option, did you mean 'temperature'\?"):
        sampling(base, temprature=1)
    with pytest.raises(
        UnsupportedOption, match=r"^n_gpu_layer: no such option, did you mean 'n_gpu_layers'\?"
    ):
        load_options(n_gpu_layer=1)
    with pytest.raises(InputError, match=r"^options: found dict, expected pocketllava.Options"):
        sampling({"max_tokens": 5})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give a function as should_stop"):
        sampling(None, stop=lambda: False)


@pytest.mark.parametrize("options", [Options, LoadOptions])
def test_every_option_has_help_a_flag_and_a_line_of_documentation(options: type) -> None:
    help_text = "".join(
        CliRunner().invoke(cli, [command, "--help"], terminal_width=200).output for command in ("ask", "chat")
    )
    for name, setting in settings(options).items():
        assert setting.help.endswith("."), name
        assert all(
            re.search(rf"(?<![\w-]){flag}\b", help_text) for flag in "/".join(setting.flags).split("/")
        ), name
        assert setting.help.split(";")[0].rstrip(".") in " ".join(help_text.split()), name
        assert f"{name}: " in (options.__doc__ or "")
    assert list(settings(options)) == [f.name for f in fields(options)]


def test_a_message_takes_one_image_or_several(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4))
    array = np.zeros((4, 4, 3), np.uint8)
    for image in ("a.png", Path("a.png"), b"bytes", picture, array, URI):
        assert Message("user", "?", image).images == (image,)
        assert Message(images=[image]).images[0] is image
    assert Message("user", "?", ["a.png", Path("b.png")]).images == ("a.png", Path("b.png"))
    assert Message().images == Message(images=None).images == Message(images=[]).images == ()
    assert (Message().role, Message(images="a.png").text) == ("user", "")
    assert conversation(None, "?", "Be brief.") == [Message("system", "Be brief."), Message("user", "?")]


def test_values_can_be_copied_changed_and_sent_to_a_worker() -> None:
    message = Message("user", "?", ["a.png", b"bytes"])
    assert replace(message, text="!") == Message("user", "!", ("a.png", b"bytes"))
    for value in (message, Options(stop="a"), LoadOptions(n_ctx=512), Answer("a", (1,), Timings(), "stop")):
        assert pickle.loads(pickle.dumps(value)) == value
    with pytest.raises(FrozenInstanceError):
        message.text = "!"  # type: ignore[misc]


def test_open_files_are_read_when_they_are_given(tmp_path: Path) -> None:
    held = io.BytesIO()
    Image.new("RGB", (4, 4)).save(held, "PNG")  # stands at the end
    (tmp_path / "a.png").write_bytes(held.getvalue())
    with (tmp_path / "a.png").open("rb") as file:
        assert as_images([held, file]) == as_images((held, file)) == (held.getvalue(),) * 2
    assert Message(images=held).images == (held.getvalue(),)
    with pytest.raises(ImageError, match=r"^image file: cannot be read"):
        Message(images=file)  # closed
    with pytest.raises(ImageError, match=r"^image file: found str of length 4, expected a binary file"):
        Message(images=io.StringIO("text"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"role": "assistent"}, "^role: found 'assistent', expected one of .*, did you mean 'assistant'"),
        ({"role": None}, "^role: found None"),
        ({"text": None}, "^message text: found NoneType, expected str"),
        ({"text": "a\ud800"}, "^message text: found half a character at 1"),
        ({"images": 5}, "^image: found int, expected a path"),
        ({"images": ["a.png", None]}, "^image: found NoneType"),
        ({"images": {"a.png"}}, "^image: found set"),
        ({"role": "system", "images": "a.png"}, "^images in a 'system' message"),
    ],
)
def test_wrong_messages_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Message(**arguments)


def test_openais_messages_become_messages() -> None:
    found = as_messages(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": URI}},
                    {"type": "image_url", "image_url": URI, "detail": "high"},
                    {"type": "text", "text": "Say."},
                ],
            },
            {"role": "assistant", "content": None},
            Message("user", "And now?"),
        ]
    )
    assert found == [
        Message("system", "Be brief."),
        Message("user", "What is it? Say.", [URI, URI]),
        Message("assistant"),
        Message("user", "And now?"),
    ]
    assert as_messages(()) == []
    assert as_messages(iter(found)) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (Message("user", "a"), "^messages: found one Message, expected a list .*; put it in a list"),
        ({"role": "user", "content": "a"}, "^messages: found one dict"),
        ("Hello.", "^messages: found one str"),
        (5, "^messages: found int, expected a list"),
        ([Message("user", "a"), "b"], r"^messages\[1\]: found str, expected a Message or a dict"),
        ([{"content": "a"}], r"^messages\[0\]: role: missing"),
        ([{"role": "tool", "content": "a"}], r"^messages\[0\]: role: found 'tool'"),
        ([{"role": "user", "content": 5}], r"^messages\[0\]: content: found int, expected a text or a list"),
        (
            [{"role": "user", "content": [{"type": "input_audio"}]}],
            r"^messages\[0\]: content: found a part .*audio",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"^messages\[0\]: content: found a part"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 5}]}],
            "found text of type int, expected str",
        ),
        ([{"role": "user", "content": ["a"]}], r"^messages\[0\]: content: found a part 'a'"),
    ],
)
def test_wrong_conversations_name_the_message(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_messages(messages)


@pytest.mark.parametrize("url", ["https://a.example/b.png", "/etc/passwd", None, {}, {"url": 5}])
def test_only_data_uris_are_taken_from_openais_messages(url: Any) -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
    with pytest.raises(ImageError, match=r"^messages\[0\]: image_url: found .*, expected a data URI"):
        as_messages(messages)


def test_answers_and_chunks_read_as_their_text() -> None:
    timings = Timings(prompt_tokens=600, image_tokens=576, cached_tokens=580, answer_tokens=2)
    answer = Answer("A dog.", (1, 2), timings, "stop")
    assert f"{answer}" == "A dog."
    assert str(Chunk("A ")) == "A "
    assert answer.usage == Usage(
        prompt_tokens=600, completion_tokens=2, total_tokens=602, cached_tokens=580, image_tokens=576
    )
