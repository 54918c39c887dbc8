"""Answers: the reference's tokens, streams, stops, threads, and what happens after the end."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import machines
import numpy as np
import pictures
import pytest
import recorded
from hypothesis import given
from hypothesis import strategies as st

from pocketllava import (
    Bundle,
    ContextOverflow,
    ImageError,
    Llava,
    Message,
    Options,
    StateError,
    UnsupportedOption,
)
from pocketllava.engine.answer_text import AnswerText
from pocketllava.integrations.llama_cpp import LlavaChatHandler
from pocketllava.models.memory import context_size

GREEDY = Options(max_tokens=recorded.N_TOKENS)
SHORT = Options(max_tokens=4)


@pytest.mark.parametrize("name", recorded.ANSWERED)
def test_answers_equal_the_recorded_reference(make_bundle: Any, name: str) -> None:
    layout, quant, mmproj = recorded.ANSWERED[name]
    with Llava.load(make_bundle(quant, mmproj, **layout).folder) as llava:
        found = [
            list(llava.ask(data, recorded.QUESTION, options=GREEDY).token_ids) for data in pictures.four()
        ]
    reference = recorded.load()
    for ids, expected, ties in zip(
        found, reference[f"answers, {name}"], reference[f"ties, {name}"], strict=True
    ):
        recorded.assert_equal_or_tie(ids, expected, ties)


def test_the_handler_in_llama_cpp_answers_the_same(bundle: Bundle, llava: Llava) -> None:
    from llama_cpp import Llama

    picture = pictures.four()[0]
    expected = llava.ask(picture, recorded.QUESTION, options=GREEDY).text.replace(
        "\ufffd", ""
    )  # llama_cpp drops it
    llama = Llama(str(bundle.model), chat_handler=LlavaChatHandler(bundle.mmproj), n_ctx=2048, verbose=False)
    uri = "data:image/png;base64," + base64.b64encode(picture).decode()
    content: list[Any] = [
        {"type": "text", "text": recorded.QUESTION},
        {"type": "image_url", "image_url": {"url": uri}},
    ]
    request: Any = [{"role": "user", "content": content}]
    for _ in range(2):
        whole: Any = llama.create_chat_completion(request, max_tokens=GREEDY.max_tokens, temperature=0.0)
        assert whole["choices"][0]["message"]["content"].removeprefix(" ") == expected
    streamed: Any = llama.create_chat_completion(
        request, max_tokens=GREEDY.max_tokens, temperature=0.0, stream=True
    )
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed)
    assert text.removeprefix(" ") == expected
    for url in ("http://localhost/a.png", "file:///etc/passwd", "/etc/passwd"):
        with pytest.raises(ImageError, match="expected a data URI"):
            llama.create_chat_completion(
                [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
            )  # type: ignore[list-item, misc]
    with pytest.raises(UnsupportedOption, match="tools"):
        llama.create_chat_completion(request, tools=[{"type": "function"}])  # type: ignore[list-item, typeddict-item]
    llama.chat_handler.close()  # type: ignore[union-attr]
    llama.close()


def test_pictures_are_told_apart_and_remembered_right(llava: Llava) -> None:
    first, second = pictures.four()[:2]
    alone = [llava.ask(p, "What is it?", options=SHORT).token_ids for p in (first, second)]
    assert alone[0] != alone[1]
    assert [llava.ask(p, "What is it?", options=SHORT).token_ids for p in (first, second)] == alone
    forward = llava.ask([first, second], "Compare them.", options=GREEDY).token_ids
    assert llava.ask([second, first], "Compare them.", options=GREEDY).token_ids != forward
    assert llava.ask([first, second], "Compare them.", options=GREEDY).token_ids == forward


def test_a_stream_joins_to_the_answer(llava: Llava) -> None:
    turns = [Message("user", "Describe the image.", (pictures.four()[0],))]
    chunks = list(llava.stream(turns, options=GREEDY))
    answer = llava.chat(turns, options=GREEDY)
    assert "".join(c.text for c in chunks) == answer.text
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    timings = chunks[-1].timings
    assert timings is not None
    assert timings.image_tokens == 576
    assert timings.prompt_tokens > 576
    assert timings.answer_tokens == len(answer.token_ids) == GREEDY.max_tokens
    assert 0 < timings.encode_s + timings.prompt_s <= timings.first_token_s
    assert timings.devices[0].startswith(machines.text_place())


def test_sampling_repeats_with_its_seed(llava: Llava) -> None:
    def sampled(seed: int) -> tuple[int, ...]:
        options = Options(max_tokens=12, temperature=1.0, top_p=0.95, top_k=50, seed=seed)
        return llava.ask(None, "Tell me something.", options=options).token_ids

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_stop_texts_end_the_answer(llava: Llava) -> None:
    whole = llava.ask(None, "Say something.", options=Options(max_tokens=30)).text
    stop = whole[8:11]
    answer = llava.ask(None, "Say something.", options=Options(max_tokens=30, stop=(stop,)))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_every_end_token_of_config_json_ends_the_answer(bundle: Bundle, tmp_path: Path) -> None:
    with Llava.load(bundle.folder) as llava:
        whole = llava.ask(None, "Say something.", options=SHORT)
    several = Path(shutil.copytree(bundle.folder, tmp_path / "several"))
    manifest = json.loads((several / "bundle.json").read_text("utf-8"))
    manifest["eos_token_ids"].append(whole.token_ids[2])
    (several / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    with Llava.load(several) as llava:
        answer = llava.ask(None, "Say something.", options=SHORT)
    assert (answer.token_ids, answer.finish_reason) == (whole.token_ids[:2], "stop")


def test_the_prompt_must_fit(bundle: Bundle) -> None:
    with Llava.load(bundle.folder, n_ctx=700) as llava:
        assert llava.n_ctx == 768
        picture = pictures.four()[0]
        with pytest.raises(ContextOverflow, match=r"tokens .* do not fit a context of 768") as caught:
            llava.ask([picture, picture], "Compare.")
        assert caught.value.needed > 2 * 576
        assert caught.value.available == 768
        fewer = caught.value.fitting_image_tokens
        assert fewer is not None
        assert f"show each image by image_tokens={fewer} (--image-tokens {fewer})" in str(caught.value)
        usage = llava.ask([picture, picture], "Compare.", image_tokens=fewer, max_tokens=1).usage
        assert usage.prompt_tokens in (576 - 1, 576)  # a quarter of the context is for the answer
        answer = llava.ask(picture, "word " * 40, options=Options(max_tokens=2000))
        assert answer.finish_reason in ("length", "stop")
        assert answer.timings.prompt_tokens + answer.timings.answer_tokens <= 768


def test_threads_queue(llava: Llava) -> None:
    questions = [f"Question {n}?" for n in range(6)]
    expected = [llava.ask(pictures.four()[0], q, options=SHORT).token_ids for q in questions]
    found: dict[int, Any] = {}

    def work(n: int) -> None:
        found[n] = llava.ask(pictures.four()[0], questions[n], options=SHORT).token_ids

    workers = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[n] for n in range(6)] == expected


def test_a_call_from_another_thread_waits_for_a_stream(llava: Llava) -> None:
    stream = llava.stream([Message("user", "Count.")], options=Options(max_tokens=8))
    next(stream)
    order: list[str] = []

    def ask() -> None:
        llava.ask(None, "Now?", options=SHORT)
        order.append("asked")

    other = threading.Thread(target=ask)
    other.start()
    other.join(0.2)
    assert other.is_alive()
    for _ in stream:
        order.append("chunk")
    other.join()
    assert order[-1] == "asked"


def test_a_newer_call_ends_a_suspended_stream(llava: Llava) -> None:
    expected = llava.ask(None, "Newer?", options=SHORT).token_ids
    stream = llava.stream([Message("user", "Older?")], options=Options(max_tokens=8))
    next(stream)
    assert llava.ask(None, "Newer?", options=SHORT).token_ids == expected
    with pytest.raises(StateError, match="a newer call on this model ended it"):
        next(stream)
    abandoned = llava.stream([Message("user", "Older?")], options=Options(max_tokens=8))
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert llava.ask(None, "Newer?", options=SHORT).token_ids == expected


def test_after_a_failure_the_next_answer_is_right(llava: Llava) -> None:
    picture = pictures.four()[0]
    expected = llava.ask(picture, "What is it?", options=SHORT).token_ids
    with pytest.raises(ImageError):
        llava.ask(b"nonsense", "What is it?")
    with pytest.raises(ContextOverflow):
        llava.ask(picture, "word " * 5000)
    assert llava.ask(picture, "What is it?", options=SHORT).token_ids == expected


QUIET = """
import sys, pictures
from pocketllava import Llava, Options
with Llava.load(sys.argv[1]) as llava:
    llava.ask(pictures.four()[0], "What is it?", options=Options(max_tokens=3))
    llava.trace(pictures.four()[0], "What is it?")
print("done")
"""


def test_nothing_of_llama_cpps_log_reaches_the_terminal(bundle: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(bundle.folder)], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(("quant", "bound"), [("Q8_0", 1e-3), ("Q4_K_M", 0.2)])
def test_quantization_moves_the_next_tokens_little(
    make_bundle: Any, quant: str, bound: float, record_property: Any
) -> None:
    """Mean KL divergence of next-token probabilities from F16's, over the positions of a text."""
    divergence = mean_kl(next_token_logits(make_bundle()), next_token_logits(make_bundle(quant)))
    record_property(f"KL {quant}", divergence)
    print(f"\nmean KL divergence {quant} from F16: {divergence:.2e}")
    assert 0 <= divergence < bound


def next_token_logits(bundle: Bundle) -> Any:
    """(positions, vocabulary) float64."""
    from llama_cpp import Llama

    llama = Llama(str(bundle.model), n_ctx=256, logits_all=True, verbose=False)
    llama.eval(llama.tokenize(b"USER: What is shown in the image? Describe it in detail. ASSISTANT: A dog."))
    logits = np.array(llama.scores[: llama.n_tokens], dtype=np.float64)
    llama.close()
    return logits


def mean_kl(reference: Any, other: Any) -> float:
    """Mean over positions of sum p log(p / q), in nats."""

    def log_softmax(x: Any) -> Any:
        shifted = x - x.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@given(
    text=st.text(alphabet="ab ü🙂", max_size=30),
    stops=st.lists(st.text(alphabet="ab ü", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_pieces_of_bytes_join_to_the_text_before_the_first_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    data = (" " + text).encode()
    at = sorted({min(c, len(data)) for c in cuts} | {0, len(data)})
    parts, answer = AnswerText(stops), ""
    for start, end in pairwise(at):
        answer += parts.add(data[start:end])
        if parts.stopped:
            break
    else:
        answer += parts.finish()
    found = [text.index(s) for s in stops if s in text]
    if parts.stopped:
        assert found
        assert text.startswith(answer)
        assert not any(s in answer for s in stops)
    else:
        assert answer == text
        assert not found


def test_context_sizes() -> None:
    assert [context_size(n, 4096, 576) for n in (1, 256, 257, 4096)] == [256, 256, 512, 4096]
    assert [context_size(None, trained, 576) for trained in (4096, 512)] == [2048, 512]
    assert [context_size(None, 32768, most) for most in (36, 2928)] == [2048, 4608]
    for n in (0, 4097):
        with pytest.raises(UnsupportedOption, match=f"n_ctx: found {n}, expected 1 to 4096"):
            context_size(n, 4096, 576)


def test_gpu_layers_without_a_gpu_build(bundle: Bundle) -> None:
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        with pytest.raises(UnsupportedOption, match="was built for CPUs only"):
            Llava.load(bundle.folder, n_gpu_layers=5)
