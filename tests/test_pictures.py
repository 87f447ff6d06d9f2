"""The one atomic write, and the helpers of runs.py that write through it."""
import io
import os
import sys
import time
from unittest.mock import Mock

import pytest
from conftest import ROOT, python

import runs
from photos.pairs import photo_paths
from photos.pictures import atomically, find_inputs, write_bytes


def test_the_file_appears_whole_and_alone(tmp_path):
    path, plain = tmp_path / "new" / "x.bin", tmp_path / "plain"
    with atomically(path) as temporary:
        assert temporary.parent == path.parent and not path.exists()
        temporary.write_bytes(b"content")
        with atomically(path) as other:  # a second writer of the same file, or the same process again
            assert other != temporary
            other.write_bytes(b"in between")
    assert path.read_bytes() == b"content" and os.listdir(path.parent) == ["x.bin"]
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, RuntimeError])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(error), atomically(tmp_path / "x") as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_odd_names(tmp_path):
    (tmp_path / ("あ" * 80)).mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_bytes(tmp_path / ("あ" * 80), "x")
    assert "あ'" in str(error.value) and ".tmp" not in str(error.value)
    write_bytes(tmp_path / "names", "b\udcff.png")  # as Python shows a name that is not UTF-8
    assert (tmp_path / "names").read_bytes() == b"b\\udcff.png"


def test_links_keep_their_names(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).symlink_to("c.png")
    (tmp_path / "c.png").touch()
    names = ["a.png", "b.png", "c.png"]
    assert [p.name for p in find_inputs([tmp_path, tmp_path / "a.png"])] == names
    assert [p.name for p in photo_paths([tmp_path, tmp_path])] == names


def test_it_reaches_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), replace(*paths)))
    write_bytes(tmp_path / "x", "content")
    assert done == ["fsync", "rename", "fsync"], "the file, then its name, then the folder"


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = f"""
import os, signal
from photos.pictures import atomically
with atomically({str(tmp_path / "x")!r}) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)"""
    python("-c", code)
    left, = tmp_path.iterdir()
    other = tmp_path / ".y.0123.tmp"
    other.touch()
    write_bytes(tmp_path / "x", b"1")
    assert left.exists(), "another process may be writing it"
    for path in (left, other):
        os.utime(path, (time.time() - 3700,) * 2)
    write_bytes(tmp_path / "x", b"2")
    assert not left.exists() and other.exists()


def test_nothing_else_writes_to_a_temporary_name():
    exempt = {"pictures.py", "faults.py"}  # the latter looks for what is left behind
    for path in (p for d in (".", "*") for p in ROOT.glob(f"{d}/*.py") if p.parent.name != "tests"):
        text = path.read_text(encoding="utf-8")
        assert path.name in exempt or not ("os.replace(" in text or '.tmp"' in text), path


def test_help_names_defaults_but_none_that_says_nothing():
    parser = runs.parser("a command")
    for name, default in (("--seed", 0), ("--rate", 0.5), ("--folder", None), ("--words", "")):
        parser.add_argument(name, default=default, help="x")
    parser.add_argument("--flag", action="store_true", help="x")
    shown = parser.format_help()
    assert shown.count("default") == 2 and "(default: 0)" in shown and "(default: 0.5)" in shown


def test_a_name_that_the_terminal_cannot_show_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert runs.command(lambda argv: print("→ é"))() == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"\\u2192 \\xe9\n"


def test_a_command_ends_with_one_line_where_memory_ran_out_or_it_was_interrupted(capsys):
    for error in (MemoryError(), RuntimeError("MPS backend out of memory")):
        with pytest.raises(SystemExit, match="^error: there is not enough memory"):
            runs.command(Mock(side_effect=error))()
    with pytest.raises(SystemExit, match="^130$"):
        runs.command(Mock(side_effect=KeyboardInterrupt))()
    assert capsys.readouterr().err == "interrupted; every file is whole\n"
    with pytest.raises(RuntimeError, match="a shape"):
        runs.command(Mock(side_effect=RuntimeError("a shape")))()


def test_numbers_and_commas_in_a_table(tmp_path):
    runs.write_csv(tmp_path / "t.csv", ["a", "b"], [{"a": 1 / 3, "b": "x, y"}, {"b": 2}])
    assert (tmp_path / "t.csv").read_bytes() == b'a,b\r\n0.333333,"x, y"\r\n,2\r\n'
