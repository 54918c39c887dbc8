"""What a process may not have is one line before llama.cpp asks for it, which would end the process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from machines import linux, no_driver

from pocketllava import BackendError, Bundle
from pocketllava.models.limits import cgroup_limits, check_room, limits
from pocketllava.models.memory import memory

MIB = 1 << 20
PHOTO = Path(__file__).parent / "photo.jpg"
CHILD = """
import resource, sys
import psutil
from pocketllava import Llava, PocketLlavaError
from pocketllava.llamacpp.devices import gpus

kind, room, folder, weights = sys.argv[1:]
gpus()  # loads the libraries
used = psutil.Process().memory_info()
used = used.vms if kind == "RLIMIT_AS" else used.data
resource.setrlimit(getattr(resource, kind), (used + int(room),) * 2)
try:
    with Llava.load(folder, weights=weights, n_threads=1) as llava:
        print(llava.ask(None, "What is it?", max_tokens=2).finish_reason)
except PocketLlavaError as error:
    print(f"{type(error).__name__}: {error}")
    print(getattr(error, "plan", ""))
"""


def loaded(kind: str, room: int, folder: Path, weights: str) -> str:
    """What a child prints that has so many bytes left when it loads a bundle; it must end by itself."""
    command = [sys.executable, "-I", "-c", CHILD, kind, str(room), str(folder), weights]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    return done.stdout.strip()


@linux
@no_driver
@pytest.mark.parametrize(
    ("kind", "weights", "room"),
    [("RLIMIT_AS", "mapped", 20), ("RLIMIT_AS", "memory", 180), ("RLIMIT_DATA", "mapped", 180)],
)
def test_too_little_room_is_one_line(bundle: Bundle, kind: str, weights: str, room: int) -> None:
    """Without the check the process ends by SIGABRT."""
    lines = loaded(kind, room * MIB, bundle.folder, weights).splitlines()
    needed = r"needs about [0-9.]+ MB of memory, expected at most the [0-9.]+ MB that"
    assert re.match(rf"OutOfMemory: .*: {needed} {kind}.* leaves; less is taken by ", lines[0]), lines
    assert lines[0].isprintable()
    assert lines[1].startswith("model  ")
    assert any(re.match(rf"too large: [0-9.]+ MB of {kind}.* are missing", line) for line in lines), lines


@linux
@no_driver
def test_enough_room_is_enough(bundle: Bundle) -> None:
    assert loaded("RLIMIT_AS", 320 * MIB, bundle.folder, "mapped") in ("stop", "length")


@linux
@no_driver
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_command_under_any_limit_ends_in_an_answer_or_in_words(bundle: Bundle, kind: str) -> None:
    """Set before it starts, so that already its libraries may find no room."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_CORE, (0, 0));"
        " resource.setrlimit(getattr(resource, sys.argv.pop(1)), (int(sys.argv.pop(1)) << 20,) * 2);"
        " from pocketllava.cli import main; main()"
    )
    ends = set()
    for mib in (60, 120, 180, 250, 700):
        question = ["ask", str(bundle.folder), "-", "What is it?", "--max-tokens", "2", "-t", "1", "-q"]
        command = [sys.executable, "-I", "-c", code, kind, str(mib), *question]
        done = subprocess.run(command, capture_output=True, check=False, input=PHOTO.read_bytes())
        *_, last = done.stderr.decode().splitlines() or [""]
        assert done.returncode in (0, 1), (mib, done.returncode, last)
        assert done.returncode == 0 or last.startswith("error: "), (mib, last)
        ends.add(done.returncode)
    assert ends == {0, 1}


def test_mapped_files_count_as_addresses_only(tmp_path: Path) -> None:
    huge = 1 << 50
    check_room(tmp_path, MIB, huge)  # no limit on addresses here
    with pytest.raises(BackendError, match=r"needs about 1125899\.91 GB .* this machine's memory leaves"):
        check_room(tmp_path, huge)


def cgroup(folder: Path, **values: str) -> None:
    """A cgroup's files, a dot for each underscore in the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("memory_", "memory.", 1)).write_text(f"{value}\n")


def test_cgroups_of_version_2(tmp_path: Path) -> None:
    listed, mount = tmp_path / "cgroup", tmp_path / "sys"
    listed.write_text("0::/user.slice/job\n")
    stat = "anon 5\ninactive_file 300\nactive_file 100\nkernel 7"
    cgroup(mount / "user.slice" / "job", memory_max="max", memory_current="900", memory_stat=stat)
    cgroup(mount / "user.slice", memory_max="1000", memory_current="900", memory_stat=stat)
    assert [left for _, left in cgroup_limits(listed, mount)] == [1000 - 900 + 400]
    cgroup(mount, memory_max="600", memory_current="500")  # a container's own root
    assert [left for _, left in cgroup_limits(listed, mount)] == [500, 100]


def test_cgroups_of_version_1(tmp_path: Path) -> None:
    listed, mount = tmp_path / "cgroup", tmp_path / "sys"
    listed.write_text("12:cpu,cpuacct:/x\n4:memory:/docker/abc\n1:name=systemd:/\n0::/\n")
    none = str(2**63 - 4096)
    stat = "inactive_file 1\ntotal_inactive_file 30\ntotal_active_file 10"
    cgroup(mount / "memory", memory_limit_in_bytes=none, memory_usage_in_bytes="5")
    assert not list(cgroup_limits(listed, mount))  # the container sees its own group as the root
    cgroup(
        mount / "memory" / "docker" / "abc",
        memory_limit_in_bytes="700",
        memory_usage_in_bytes="650",
        memory_stat=stat,
    )
    assert [left for _, left in cgroup_limits(listed, mount)] == [90]


def test_no_cgroups(tmp_path: Path) -> None:
    assert not list(cgroup_limits(tmp_path / "nothing", tmp_path))
    (tmp_path / "odd").write_text("\n:::\n7\n4:memory:/../..\n")
    assert not list(cgroup_limits(tmp_path / "odd", tmp_path))


def test_this_machine_has_room_for_a_small_bundle(bundle: Bundle) -> None:
    assert any(limit.name == "this machine's memory" for limit in limits())
    check_room(bundle.folder, memory(bundle).total, threads=1)


@linux
def test_the_load_test_says_so_too(bundle: Bundle) -> None:
    code = (
        "import resource, sys; from pocketllava.llamacpp.load_test import load_test; import llama_cpp;"
        " import psutil; used = psutil.Process().memory_info().vms + (30 << 20);"
        " resource.setrlimit(resource.RLIMIT_AS, (used, used)); load_test(*sys.argv[1:])"
    )
    command = [sys.executable, "-I", "-c", code, str(bundle.model), str(bundle.mmproj)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-500:]
    assert "BackendError" in done.stderr.splitlines()[-1]
    assert "RLIMIT_AS" in done.stderr.splitlines()[-1]
