"""Files are written whole or not at all, and read as what they claim to be or not at all."""

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap

import pytest

from kvtrim import files
from kvtrim.errors import FileError, KvtrimError


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027, 0o000])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, umask, mask):
    umask(mask)
    files.replace(tmp_path / "x", b"new")
    assert mode(tmp_path / "x") == 0o666 & ~mask


@pytest.mark.parametrize("old", [0o600, 0o640, 0o664, 0o444])
def test_a_replaced_file_keeps_its_mode(tmp_path, umask, old):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(old)
    files.replace(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", old)


def test_nobody_else_can_read_a_file_while_it_is_written(tmp_path, umask):
    umask(0)
    with files.replacement(tmp_path / "x") as partial:
        partial.write_bytes(b"secret")
        assert mode(partial.parent) == 0o700


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("there/real")
    files.replace(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "real").read_bytes() == b"new"


def fifo(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path)


def socket(path):
    os.mknod(path, 0o600 | stat.S_IFSOCK)


@pytest.mark.parametrize("make", [fifo, folder, loop, socket])
def test_only_files_are_replaced(tmp_path, make):
    make(tmp_path / "x")
    before = os.lstat(tmp_path / "x").st_mode
    with pytest.raises(FileError, match=r"cannot write .*x: "):
        files.replace(tmp_path / "x", b"new")
    assert os.lstat(tmp_path / "x").st_mode == before
    assert os.listdir(tmp_path) == ["x"]


def test_a_device_is_not_replaced_either():
    with pytest.raises(FileError, match="it is not a regular file"):
        files.replace(files.Path("/dev/null"), b"new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(FileError, match="No space left"), files.replacement(tmp_path / "x") as new:
        new.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_what_a_killed_writer_left_goes_when_the_file_is_written_again(tmp_path):
    program = """
        import os, signal, sys
        from kvtrim import files
        with files.replacement(files.Path(sys.argv[1])) as partial:
            partial.write_bytes(b"half")
            (partial.parent / ".tmpabc").write_bytes(b"of a library")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "a[b]*.kv"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(path)])
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    files.replace(path, b"whole")
    assert os.listdir(tmp_path) == [path.name]


def test_a_writer_that_still_writes_is_left_alone(tmp_path):
    with files.replacement(tmp_path / "x") as slow:
        slow.write_bytes(b"slow")
        files.replace(tmp_path / "x", b"fast")
        assert slow.exists()
    assert (tmp_path / "x").read_bytes() == b"slow"


def short(monkeypatch, room):
    """A disk that takes so many bytes: first a part of what it is given, then nothing."""
    real, left = os.write, [room]

    def write(file, content):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(file, bytes(content[: left[0]]))
        left[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("room", [0, 1, 5, 9])
def test_a_line_is_appended_whole_or_not_at_all(tmp_path, monkeypatch, room):
    path = tmp_path / "x"
    files.extend(path, b"first\n")
    with monkeypatch.context() as patched:
        short(patched, room)
        with pytest.raises(FileError, match="No space left"):
            files.extend(path, b"the second\n")
    assert path.read_bytes() == b"first\n"
    files.extend(path, b"third\n")
    assert path.read_bytes() == b"first\nthird\n"


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, content: real(file, bytes(content[:3])))
    files.extend(tmp_path / "x", b"a longer line\n")
    assert (tmp_path / "x").read_bytes() == b"a longer line\n"


DAMAGED = {
    "deep": "[" * 100_000,
    "deep but closed": "[" * 500 + "]" * 500,
    "deep objects": '{"a":' * 500 + "1" + "}" * 500,
    "half a pair": r'{"a": "\ud83d"}',
    "half a pair as a key": r'{"\uDE00": 1}',
    "pair turned round": r'["\ude00\ud83d"]',
    "no JSON": "{",
    "empty": "",
    "long number": "1" * 5000,
    "mark of order": "\ufeff{}",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=list(DAMAGED))
def test_json_that_is_damaged_is_one_clear_error(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    for read in (files.json_of, files.record_of, lambda p: list(files.lines_of(p))):
        if read is files.json_of or text:
            path.write_text(text + "\n", encoding="utf-8")
            with pytest.raises(FileError, match=r"cannot read .*x\.json"):
                read(path)


def test_whole_pairs_and_ordinary_depths_are_read(tmp_path):
    path = tmp_path / "x.json"
    for text, found in {"5": 5, "null": None, '"a"': "a", "[[[1]]]": [[[1]]]}.items():
        path.write_text(text)
        assert files.json_of(path) == found
    path.write_text(r'{"a": ["\ud83d\ude00", "\\ud83d"]}' + "\n")
    assert files.record_of(path) == {"a": ["😀", r"\ud83d"]}
    assert list(files.lines_of(path)) == [(1, {"a": ["😀", r"\ud83d"]})]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\xed\xa0\x80", b"a\x80"])
def test_what_is_no_text_is_one_clear_error(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FileError, match="not UTF-8 text"):
        files.text_of(tmp_path / "x")


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, ".".join("a" * 500) + " = 1", "a = ", "=1"])
def test_toml_that_is_damaged_is_one_clear_error(tmp_path, text):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(FileError, match=r"x\.toml: it is "):
        files.toml_of(tmp_path / "x.toml")


def test_a_line_is_named(tmp_path):
    (tmp_path / "x").write_text('{"a": 1}\n[1]\n{"a"')
    with pytest.raises(FileError, match=r"x:2: this is no JSON object"):
        list(files.lines_of(tmp_path / "x"))


@pytest.mark.parametrize("make", [fifo, folder, loop])
def test_only_files_are_read(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(FileError, match="cannot read"):
        files.text_of(tmp_path / "x")


def test_a_file_error_is_ours_and_the_systems():
    error = FileError("write", "x", OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(error, KvtrimError) and isinstance(error, OSError)
    assert (error.errno, str(error)) == (errno.ENOSPC, "cannot write x: No space left on device")
