"""Places and streams of every kind: written where they point, refused in one line before the work, nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from attack import commands, streams
from click.testing import CliRunner
from test_repair import DEPTH, rewritten

from pocketllava import Bundle, ConvertError, InputError, Llava, Options, UnsupportedOption
from pocketllava.cli import cli
from pocketllava.convert import convert, requantize
from pocketllava.convert.pipeline import plan
from pocketllava.convert.repair import examine, repair
from pocketllava.convert.write.journal import JOURNAL, has_tensors
from pocketllava.measure.importance import write_matrix
from pocketllava.models.files import cache_folder, expanded, locked_write, text_of
from pocketllava.models.gguf_header import Header
from pocketllava.models.mmproj_contract import check_mmproj

POSIX = os.name == "posix"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> commands.Setup:
    """The model and the files that commands are tried on."""
    return commands.setup(tmp_path_factory.mktemp("attack") / "setup")


PLACES = {
    "ask": ">/dev/full", "ask --json": ">&-", "chat": "<&- >&- 2>&-", "inspect": "| true", "eval": "byte order marks",
    "convert": "--out a dangling link", "quantize": "names not UTF-8", "--help": ">/dev/full", "bench": "a model not UTF-8",
    "demo": "a folder called demo", "imatrix": "the last argument is empty", "repair": "--out a link to itself",
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="the oddities are a Linux shell's")
@pytest.mark.parametrize("command", PLACES)
def test_a_command_in_an_odd_place(prepared: commands.Setup, tmp_path: Path, command: str) -> None:
    """One a command here; all of them in tests/attack/streams.py."""
    assert streams.one(prepared, command, PLACES[command], tmp_path / "case").failures == []


def test_a_link_stays_one(make_checkpoint: Any, tmp_path: Path) -> None:
    for name, there in (("new", False), ("old", True)):
        target, link = tmp_path / "elsewhere" / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        if there:
            target.mkdir()
        link.symlink_to(target)
        convert(make_checkpoint(), link, quant="Q8_0")
        assert link.is_symlink()
        assert Bundle.open(target).manifest.types.model == "Q8_0"
    assert sorted(p.name for p in target.parent.iterdir()) == ["new", "old"]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ConvertError, match="loop: "):
        convert(make_checkpoint(), loop)


def test_the_current_folder_is_refused_before_the_work(
    make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    for out in (".", place, "../here"):
        with pytest.raises(ConvertError, match="the current folder is in it; --out must be another folder"):
            convert(make_checkpoint(), out, progress=lambda *_: pytest.fail("work had begun"))
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    assert list(place.iterdir()) == []


@pytest.mark.skipif(not streams.MAY_MOUNT, reason="mounting needs a namespace of its own")
def test_a_mount_point_is_refused_before_the_work(prepared: commands.Setup, tmp_path: Path) -> None:
    counts = streams.one(prepared, "convert", "--out a mount point", tmp_path / "case")
    assert (counts.refused, counts.failures) == (1, [])


def test_ctrl_c_keeps_the_work_and_says_how_to_go_on(
    make_checkpoint: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, work = tmp_path / "b", tmp_path / ".b.partial"

    def stop_at(share: float) -> Any:
        def stop(_stage: str, done: int, total: int, _name: str) -> None:
            if done > share * total:
                raise KeyboardInterrupt

        return stop

    with pytest.raises(KeyboardInterrupt):
        convert(make_checkpoint(), out, quant="Q8_0", progress=stop_at(0.5))
    assert has_tensors(work)
    assert "stopped; rerun with --resume to go on" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        convert(make_checkpoint(), out, quant="Q8_0", progress=stop_at(0.5))
    assert "begins anew, without the tensors of a stopped run; --resume goes on from them" in caplog.text
    shares: list[float] = []
    convert(
        make_checkpoint(),
        out,
        quant="Q8_0",
        resume=True,
        progress=lambda _s, done, all, _n: shares.append(done / all),
    )
    assert shares[0] > 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_an_interrupt_before_the_first_tensor_leaves_nothing(make_checkpoint: Any, tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(make_checkpoint(layers=1), tmp_path / "b", progress=stop)
    assert not (tmp_path / ".b.partial").exists() or has_tensors(tmp_path / ".b.partial")
    (tmp_path / JOURNAL).write_text('"identity"\n["model.gguf", 0, 100, "00"]\n[[[')
    assert not has_tensors(tmp_path)


KILLED = """
import sys, time
from pathlib import Path
from pocketllava.convert.repair import examine, repair
def look(part):
    print("written", flush=True)
    time.sleep(60)
repair(examine(Path(sys.argv[1])), Path(sys.argv[2]), look=look)
"""


@pytest.mark.skipif(not POSIX, reason="SIGKILL")
def test_what_a_killed_repair_left_goes_with_the_next(bundle: Bundle, tmp_path: Path) -> None:
    broken, out = rewritten(bundle.mmproj, tmp_path / "broken.gguf", drop=(DEPTH,)), tmp_path / "new.gguf"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(broken), str(out)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"written\n"
        with pytest.raises(ConvertError, match="another process is writing it"):
            repair(examine(broken), out)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    repair(examine(broken), out)
    check_mmproj(Header.read(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.gguf", "new.gguf"]


def test_a_repaired_pair_can_be_asked(make_bundle: Any, tmp_path: Path) -> None:
    """Two files under their own names, as the hub has them."""
    converted = make_bundle("Q4_0")
    shutil.copy(converted.model, tmp_path / "llava-q4_0.gguf")
    rewritten(converted.mmproj, tmp_path / "mmproj-f16.gguf", drop=(DEPTH,))
    arguments = ["convert", "--repair", str(tmp_path)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.stderr
    assert "bundle.json: written for llava-q4_0.gguf; pictures are cropped" in done.stderr
    pair = Bundle.open(tmp_path)
    assert (pair.model.name, pair.mmproj.name) == ("llava-q4_0.gguf", "mmproj-f16-repaired.gguf")
    pair.check_hashes()
    assert pair.template == converted.template
    assert replace(pair.manifest, source=converted.manifest.source, files={}, file_names={}) == replace(
        converted.manifest, files={}
    )
    photo, options = pictures.four()[0], Options(max_tokens=8)
    with Llava.load(tmp_path) as a, Llava.load(converted.folder) as b:
        assert (
            a.ask(photo, "What?", options=options).token_ids
            == b.ask(photo, "What?", options=options).token_ids
        )
    again = CliRunner().invoke(
        cli, [*arguments, "--out", str(tmp_path / "mmproj-f16-repaired.gguf"), "--force"]
    )
    assert again.exit_code == 0, again.stderr


def half_written(path: Path) -> None:
    """A write that fails in its middle."""
    with locked_write(path) as part:
        part.write_text("half")
        raise KeyError


def test_a_locked_write_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError):
        half_written(path)
    assert path.read_text() == "old"
    with locked_write(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_quantizing_with_a_matrix_is_converting_with_one(
    make_bundle: Any, make_checkpoint: Any, tmp_path: Path
) -> None:
    floats = make_bundle("F32", "F16", dtype="F32")
    rng = np.random.default_rng(0)
    sums = {
        t.name: (rng.random(t.shape[-1]), 1)
        for t in plan(make_checkpoint(dtype="F32")).text.tensors
        if len(t.shape) == 2
    }
    matrix = write_matrix(tmp_path / "matrix.gguf", sums, ["drawn"], 1, 512)
    direct = convert(make_checkpoint(dtype="F32"), tmp_path / "direct", quant="Q4_K_M", imatrix=matrix)
    (quantized,) = requantize(floats, {tmp_path / "quantized": "Q4_K_M"}, imatrix=matrix)
    assert quantized.model.read_bytes() == direct.model.read_bytes()
    with pytest.raises(UnsupportedOption, match=r"IQ2_S: found no importance matrix.* give it as --imatrix"):
        requantize(floats, {tmp_path / "no": "IQ2_S"})
    with pytest.raises(UnsupportedOption, match="--imatrix: does nothing with --quant F16"):
        requantize(floats, {tmp_path / "no": "F16"}, imatrix=matrix)
    for path, state in ((tmp_path / "none", "nothing"), (tmp_path, "a folder")):
        with pytest.raises(ConvertError, match=f"found {state}, expected an importance matrix"):
            requantize(floats, {tmp_path / "no": "Q4_0"}, imatrix=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "demo", "a", "--seed", "7"), "--seed does nothing at --temperature 0"),
        (("ask", "demo", "a", "--top-k", "7", "--temp", "0"), "--top-k does nothing at --temperature 0"),
        (("chat", "demo", "--min-p", "0.1"), "--min-p does nothing at --temperature 0"),
        (("ask", "demo", "a", "--cache-size", "1"), "--cache-size does nothing without --cache-dir"),
        (("inspect", "demo", "--question", "a"), "--question does nothing without --image"),
        (("convert", ".", "-o", "x", "--revision", "main"), "--revision does nothing with a folder"),
        (("convert", ".", "-o", "x", "--dry-run", "--force"), "--force does nothing with --dry-run"),
        (("convert", "--repair", "x", "--dry-run", "-o", "y"), "--out does nothing with --dry-run"),
        (("convert", "--repair", "x", "--quant", "F16"), "--quant does nothing with --repair"),
        (
            ("imatrix", "demo", "--text", "x", "-o", "y", "--max-pixels", "9"),
            "--max-pixels does nothing with --text",
        ),
        (("ask", "", "a"), "found an empty text, expected a path"),
        (("ask", "demo", "a", "--cache-dir", ""), "found '', expected a folder's path"),
        (("ask", "demo", "a", "--cache-dir", "x", "--cache-size", "inf"), "found 'inf', expected GB above 0"),
        (("eval", "demo", "--results", ""), "found an empty text, expected a path"),
        (("convert", "x", "--out", ""), "found an empty text, expected a path"),
    ],
)
def test_what_does_nothing_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(cli, arguments, terminal_width=300)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_a_piped_chat_that_only_fails_exits_1(bundle: Bundle, tmp_path: Path) -> None:
    def chat(text: str) -> int:
        return CliRunner().invoke(cli, ["chat", str(bundle.folder), "-n", "1"], input=text).exit_code

    assert chat("/nonsense\n" + "a" * 200_000) == 1
    assert chat("\ufeffHello.\n/nonsense\n") == 0
    assert chat("/nonsense\nHello.\n") == 0
    assert chat("") == 0


def test_a_rounded_context_is_told(bundle: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pocketllava", "ask", str(bundle.folder), "Hello.", "-n", "1", "--ctx", "20"],
        capture_output=True, check=False, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert "warning: n_ctx: 20 became 256" in done.stderr


def test_four_first_uses_of_the_demo_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pocketllava", "inspect", "demo", "--check"]
    processes = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
        )
        for _ in range(4)
    ]
    ends = [(p.communicate(timeout=120), p.returncode) for p in processes]
    assert [code for _, code in ends] == [0] * 4, ends
    assert len({stdout.splitlines()[0] for (stdout, _), _ in ends}) == 1


def test_no_home_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("")
    if sys.platform != "win32":
        with pytest.raises(InputError, match="cannot be used as the cache folder"):
            cache_folder()
    assert expanded("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_with_their_marks(encoding: str) -> None:
    assert text_of("Größe 大".encode(encoding)) == "Größe 大"
