"""The command line: answers on stdout, the rest on stderr, one line and exit code 1 for what goes wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import machines
import pictures
import pytest
from click.testing import CliRunner, Result

from pocketllava import Bundle
from pocketllava.cli import cli, exit_code

PHOTO = str(Path(__file__).parent / "photo.jpg")


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The installed command, as a user starts it."""
    command = [sys.executable, "-m", "pocketllava.cli", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


def test_ask_streams_the_answer_and_times_it(bundle: Bundle) -> None:
    done = run("ask", str(bundle.folder), PHOTO, "What is it?", "--max-tokens", "3")
    assert done.returncode == 0
    assert done.stdout.endswith(b"\n")
    line = done.stderr.decode()
    assert line.count("\n") == 1
    for part in (
        "load ",
        "image ",
        "encoding ",
        "prompt ",
        "first token ",
        "3 tokens, ",
        f"text: {machines.text_place()}",
        "vision: ",
    ):
        assert part in line


def invoke(*arguments: str, stdin: bytes = b"") -> Result:
    """The same command in this process: what it prints does not depend on how it was started."""
    return CliRunner().invoke(cli, arguments, input=stdin)


def test_ask_as_json_from_stdin_and_a_data_uri(bundle: Bundle) -> None:
    arguments = (
        "What is it?",
        "--max-tokens",
        "3",
        "--json",
        "--temperature",
        "0.5",
        "--seed",
        "7",
        "--stop",
        "zz",
    )
    picture = Path(PHOTO).read_bytes()
    import base64

    uri = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    answers = [
        json.loads(start("ask", str(bundle.folder), source, *arguments, stdin=picture).stdout)
        for start, source in ((invoke, PHOTO), (run, "-"), (invoke, uri))
    ]
    assert answers[0]["token_ids"] == answers[1]["token_ids"] == answers[2]["token_ids"]
    assert set(answers[0]) == {"text", "token_ids", "timings", "finish_reason", "tokens_per_s", "usage"}
    assert answers[0]["timings"]["image_tokens"] == 576


def test_ask_about_several_images(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "second.png").write_bytes(pictures.four()[1])
    done = invoke(
        "ask",
        str(bundle.folder),
        PHOTO,
        "Both?",
        "--image",
        str(tmp_path / "second.png"),
        "--max-tokens",
        "1",
        "--json",
    )
    assert json.loads(done.stdout)["timings"]["image_tokens"] == 2 * 576


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("ask", "BUNDLE", "nowhere.png", "a"),
            "error: nowhere.png: no such file, expected an image; a question of several words needs quotes",
        ),
        (("ask", "BUNDLE", __file__, "a"), "bytes that are not an image"),
        (("ask", "BUNDLE", PHOTO, "a " * 4000), "do not fit a context of 2048"),
        (("ask", "BUNDLE", PHOTO, "a", "--ctx", "9999"), "error: n_ctx: found 9999, expected 1 to 4096"),
        (("ask", "nowhere", PHOTO, "a"), "error: nowhere: found nothing, expected a folder made by"),
        (("inspect", "nowhere"), "error: nowhere: found nothing"),
        (
            ("convert", "nowhere", "--out", "x"),
            "error: nowhere: found nothing, expected a checkpoint's folder",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_1(
    bundle: Bundle, arguments: tuple[str, ...], message: str, monkeypatch: Any, capsys: Any
) -> None:
    words = [str(bundle.folder) if a == "BUNDLE" else a for a in arguments]
    monkeypatch.setattr(sys, "argv", ["pocketllava", *words])
    assert exit_code() == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")


def test_a_process_ends_with_one_line_and_that_code(bundle: Bundle) -> None:
    done = run("ask", str(bundle.folder), __file__, "a")
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(r"error: .* bytes that are not an image.*\n", done.stderr.decode())
    assert run("nonsense").returncode == 2


def test_wrong_usage_exits_2() -> None:
    assert invoke("ask").exit_code == 2
    assert invoke("convert", "x").exit_code == 2
    assert invoke("nonsense").exit_code == 2


def test_convert_says_what_it_made(make_checkpoint: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = run("convert", str(make_checkpoint()), "--out", str(out), "--quant", "q4_0")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.decode().count("\n") == 1  # no bar without a terminal
    assert "model.gguf" in done.stderr.decode()
    assert Bundle.open(out).manifest.types.model == "Q4_0"
    quiet = run("convert", str(make_checkpoint()), "--out", str(out), "--force", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, b"", b"")


def test_a_dry_run_writes_nothing(make_checkpoint: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = CliRunner().invoke(cli, ["convert", str(make_checkpoint()), "--out", str(out), "--dry-run"])
    assert done.exit_code == 0
    assert not out.exists()
    for part in (
        "blk.0.attn_v.weight",
        "Q6_K",
        "v.patch_embd.weight",
        "left out: vision_tower",
        "disk: ",
        "memory: about",
    ):
        assert part in done.output


def test_the_dry_runs_size_is_the_real_one(make_checkpoint: Any, make_bundle: Any) -> None:
    from pocketllava.convert.pipeline import plan

    real = sum(record.bytes for record in make_bundle("Q8_0").manifest.files.values())
    assert real <= plan(make_checkpoint(), quant="Q8_0").disk_bytes <= real + (1 << 17)


def test_inspect_shows_three_parts(bundle: Bundle) -> None:
    shown = CliRunner().invoke(cli, ["inspect", str(bundle.folder), "--check"]).output
    for part in (
        "vision tower  37 tensors", "24 x 24 = 576", "projector  4 tensors", "mm.0.weight 256 x 64 F16",
        "text model  39 tensors", "vocabulary 704, context 4096", "resize shortest edge 336", "chat template: ",
        "SHA-256 of both files: as recorded",
    ):  # fmt: skip
        assert part in shown
    as_json = json.loads(CliRunner().invoke(cli, ["inspect", str(bundle.folder), "--json"]).output)
    assert as_json["types"] == {"model": "F16", "mmproj": "F16"}


def test_inspect_follows_one_picture(bundle: Bundle) -> None:
    shown = invoke("inspect", str(bundle.folder), "--image", PHOTO).stdout
    for part in (
        "pixel_values (3, 336, 336)", "24 x 24 = 576 patches", "vision tower (576, 64) (class token moved",
        "projector (576, 256)", "before: 1:'<s>'", "after: ", "are the image features",
    ):  # fmt: skip
        assert part in shown
