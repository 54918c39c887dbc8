"""bundle.json is checked once, on opening: a manifest is valid, or one line says what is wrong with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketllava import Bundle, BundleError
from pocketllava.models.manifest import MANIFEST, Manifest

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()  # json writes NaN and Infinity, and reads them
    | st.text()
    | st.sampled_from(["\ud800", "\x1b[31m", "a" * 3000, 1 << 70, -1, 0, "\n"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a JSON document is."""
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from paths(child, (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at a place."""
    if not path:
        return value
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return document


def opened(bundle: Bundle, folder: Path, text: str) -> Bundle:
    """The bundle with another bundle.json."""
    for name in ("model.gguf", "mmproj.gguf"):
        if not (folder / name).exists():
            (folder / name).write_bytes((bundle.folder / name).read_bytes())
    (folder / MANIFEST).write_text(text, "utf-8", errors="surrogatepass")
    return Bundle.open(folder)


def stored(bundle: Bundle) -> Any:
    """bundle.json's content."""
    return json.loads((bundle.folder / MANIFEST).read_text("utf-8"))


def test_what_is_stored_is_read_back(make_bundle: Any) -> None:
    bundle = make_bundle("Q4_K_M")
    assert json.loads(json.dumps(bundle.manifest.to_json())) == stored(bundle)
    assert Manifest.from_json(bundle.manifest.to_json(), Path("x")) == bundle.manifest
    assert list(bundle.manifest.to_json()) == list(stored(bundle))


def test_headers_are_parsed_once(bundle: Bundle) -> None:
    again = Bundle.open(bundle.folder)
    assert again.model_header is again.model_header
    assert again.mmproj_header is again.mmproj_header
    assert again.model_header == bundle.model_header


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_manifest_is_valid_or_refused_in_one_line(
    bundle: Bundle, tmp_path: Path, data: st.DataObject
) -> None:
    document = stored(bundle)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(paths(document))))
        document = replaced(document, path, data.draw(JSON))
    if isinstance(document, dict) and data.draw(st.booleans()):
        document.pop(data.draw(st.sampled_from([*document, None])), None)
    try:
        changed = opened(bundle, tmp_path, json.dumps(document)).manifest
    except BundleError as error:
        assert str(error).isprintable()
        assert len(str(error)) <= 1000
        assert str(tmp_path) in str(error)
    else:
        assert Manifest.from_json(json.loads(json.dumps(changed.to_json())), Path("x")) == changed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_refused_in_one_line(bundle: Bundle, tmp_path: Path, data: st.DataObject) -> None:
    text = bytearray((bundle.folder / MANIFEST).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / MANIFEST
    path.write_bytes(text[: data.draw(st.integers(0, len(text)) | st.just(len(text)))])
    try:
        Manifest.read(path)
    except BundleError as error:
        assert str(error).isprintable()
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("format",), 2, "format is 2, expected 1; convert again"),
        (("format",), True, "format is True, expected 1"),
        (("files", "mmproj.gguf", "bytes"), "9", "files.mmproj.gguf.bytes is '9', expected a positive whole"),
        (
            ("files", "model.gguf", "header_bytes"),
            1 << 40,
            r"files.model.gguf.header_bytes is 1099511627776, .*1 to",
        ),
        (("files", "model.gguf", "sha256"), "zz", "files.model.gguf.sha256 is 'zz', expected 64 hexadecimal"),
        (("image", "n_patches"), 0, "image.n_patches is 0, expected a square number from 1 to"),
        (("image", "n_patches"), 1e300, "image.n_patches is 1e[+]300, expected a square number"),
        (
            ("preprocessing", "std"),
            [0.2, 0.2, float("nan")],
            "preprocessing.std is .*nan.*, expected three finite",
        ),
        (
            ("preprocessing", "std"),
            [0.2, 0.0, 0.2],
            "preprocessing.std is .*, expected three finite positive",
        ),
        (("preprocessing", "mean"), [0.2, 0.2], "preprocessing.mean is .*, expected three finite numbers"),
        (
            ("tokenizer", "space_prefix"),
            "all",
            "tokenizer.space_prefix is 'all', expected one of every, first",
        ),
        (("eos_token_ids",), [], "eos_token_ids is .*, expected a list of token ids"),
        (("eos_token_ids",), [True], "eos_token_ids is .*, expected a list of token ids"),
        (("chat_template",), None, "chat_template is None, expected text"),
        (("source",), [], "source is .*, expected a JSON object"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)
def test_each_fault_is_named(
    bundle: Bundle, tmp_path: Path, path: tuple[str, ...], value: Any, fault: str
) -> None:
    with pytest.raises(BundleError, match=fault):
        opened(bundle, tmp_path, json.dumps(replaced(stored(bundle), path, value)))


def test_a_missing_key_is_named(bundle: Bundle, tmp_path: Path) -> None:
    document = stored(bundle)
    del document["image"]["token"]
    with pytest.raises(BundleError, match=r"image\.token is missing, expected text; convert again"):
        opened(bundle, tmp_path, json.dumps(document))
    for text in ("[" * 100_000, "", "{", "[]", "9" * 5000):
        with pytest.raises(BundleError, match=r"bundle\.json"):
            opened(bundle, tmp_path, text)


@pytest.mark.parametrize("key", ["quantized_from", "quantised_from"])
def test_either_spelling_of_where_it_was_quantized_from(bundle: Bundle, tmp_path: Path, key: str) -> None:
    document = stored(bundle)
    document[key] = {"types": {"model": "F16", "mmproj": "F16"}, "sha256": {"model.gguf": "0" * 64}}
    manifest = opened(bundle, tmp_path, json.dumps(document)).manifest
    assert manifest.quantized_from
    assert manifest.quantized_from.types.model == "F16"
    assert "quantized_from" in manifest.to_json()
