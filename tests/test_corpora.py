"""data/corpora.py: Shakespeare and its download, Python's library in its place, text files."""

import hashlib
import http.server
import os
import re
import socket
import threading
from pathlib import Path

import pytest
from conftest import TEXT, refused, tiny_flags

import bigram
import data
from data import corpora


@pytest.mark.parametrize("ends", ["\r\n", "\r"])
def test_line_endings_of_every_system_are_read_alike(tmp_path, ends):
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufefffirst\nsecond\n".replace("\n", ends).encode("utf-8"))
    assert data.load_text(str(path)) == "first\nsecond\n"


def test_the_python_corpus_is_large_plain_and_always_the_same():
    text = data.load_text("python")
    assert len(text) == 1_100_000
    assert text.isascii()
    assert "\r" not in text
    assert "import " in text
    assert data.load_text("python") == text


def test_the_python_corpus_is_the_ascii_modules_by_name(tmp_path, monkeypatch):
    for name, text in {"b": "second\n", "a": "first\n", "c": "naïve\n"}.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    assert data.load_text("python") == "first\nsecond\n"


def test_the_constants_are_those_of_tiny_shakespeare():
    assert corpora.SHAKESPEARE.name == "tinyshakespeare.txt"
    if not corpora.SHAKESPEARE.exists():
        pytest.skip("Tiny Shakespeare is not there")
    raw = corpora.SHAKESPEARE.read_bytes()
    if b"\r" not in raw:  # a copy with Windows line endings is as good
        assert hashlib.sha256(raw).hexdigest() == corpora.SHA256
    text = data.load_text("shakespeare")
    assert (len(text), len(set(text))) == (1_115_394, 65)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine that stands in for GitHub's; tests choose what it answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            self.send_response(server.status)
            self.send_header("Content-Length", str(server.length or len(server.body)))
            self.end_headers()
            self.wfile.write(server.body)
            self.wfile.flush()
            server.stall.wait(60)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.status, server.body, server.length, server.requests = 200, TEXT.encode(), None, 0
    server.stall = threading.Event()
    server.stall.set()
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(corpora, "SHAKESPEARE", tmp_path / "data" / "tinyshakespeare.txt")
    monkeypatch.setattr(corpora, "URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    monkeypatch.setattr(corpora, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.stall.set()
    server.shutdown()
    server.server_close()


def test_shakespeare_is_downloaded_once(server, capsys):
    assert data.load_text("shakespeare") == TEXT
    assert data.load_text("shakespeare") == TEXT
    assert server.requests == 1
    assert [path.name for path in corpora.SHAKESPEARE.parent.iterdir()] == ["tinyshakespeare.txt"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err


@pytest.mark.parametrize(
    "fault", ["status", "cut off", "stalled", "checksum", "no server", "no folder"]
)
def test_without_shakespeare_a_run_trains_on_python(server, capsys, monkeypatch, fault):
    """A failed download leaves a notice and no file."""
    folder = corpora.SHAKESPEARE.parent
    if fault == "status":
        server.status = 404
    if fault == "cut off":
        server.length, server.body = len(server.body), server.body[:700]
    if fault == "stalled":
        server.length, server.body = len(server.body), server.body[:700]
        server.stall.clear()
        monkeypatch.setattr(corpora, "TIMEOUT", 0.2)
    if fault == "checksum":
        server.body = server.body[:-1] + b"?"
    if fault == "no server":
        monkeypatch.setattr(corpora, "URL", "http://127.0.0.1:1/input.txt")
    if fault == "no folder":
        monkeypatch.setattr(corpora, "SHAKESPEARE", folder / "missing" / "tinyshakespeare.txt")
    assert data.load_text("shakespeare") == data.load_text("python")
    assert list(folder.iterdir()) == [], "nothing is left of a download that failed"
    out, err = capsys.readouterr()
    assert out == ""
    notice = err.splitlines()[-1]
    assert notice.startswith("notice: couldn't download Tiny Shakespeare")
    assert ("timed out" in notice) == (fault == "stalled")
    assert corpora.URL in notice
    assert str(corpora.SHAKESPEARE) in notice
    assert socket.getdefaulttimeout() is None, "the timeout is for this download only"


BAD_FILES = {
    "empty": b"",
    "only a byte order mark": b"\xef\xbb\xbf",
    "binary": bytes(range(128)) * 40,
    "not UTF-8": "naïve café ".encode("latin-1") * 40,
    "UTF-16": TEXT.encode("utf-16"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_files_that_are_not_text(capsys, tmp_path, kind):
    path = tmp_path / "bad.txt"
    path.write_bytes(BAD_FILES[kind])
    assert f"--data {path}:" in refused(bigram, capsys, *tiny_flags(bigram), "--data", path)


def test_files_that_are_not_there(capsys, tmp_path):
    for path in (tmp_path, tmp_path / "missing.txt", tmp_path / "no" / "such.txt"):
        assert f"--data {path}:" in refused(bigram, capsys, *tiny_flags(bigram), "--data", path)
    for path in ("", "two\nlines", "x" * 3000):
        assert "--data" in refused(bigram, capsys, *tiny_flags(bigram), "--data", path)


def test_an_error_names_the_flag_that_the_file_came_from(tmp_path):
    with pytest.raises(data.InputError, match="^--prompt_file "):
        data.load_text(tmp_path / "missing.txt", "--prompt_file")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file"), "no such file; give the path of a text file"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "not UTF-8 text; save it as UTF-8"),
        (ValueError("embedded null byte"), "embedded null byte; give the path of a text file"),
    ],
)
def test_reading_turns_errors_into_a_line_that_names_the_flag(error, said):
    with (
        pytest.raises(data.InputError, match=f"^--val_data my.txt: {re.escape(said)}$"),
        corpora.reading(Path("my.txt"), "--val_data"),
    ):
        raise error


def test_reading_leaves_other_errors_as_they_are():
    for error in (data.InputError("--data: something else"), KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, corpora.reading(Path("my.txt"), "--data"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "--data: empty; give the path of a text file"),
        (
            "https://example.org/a//b.txt",
            "--data https://example.org/a//b.txt: an address; download the text and give the path",
        ),
    ],
)
def test_what_can_not_be_a_file_is_named_as_it_was_typed(name, said):
    with pytest.raises(data.InputError) as stop:
        data.load_text(name)
    assert str(stop.value).startswith(said)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such devices here")
@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom", "/dev/null"])
def test_devices_that_never_end_are_refused(name):
    with pytest.raises(data.InputError, match=f"^--data {name}: a device, which may never end; "):
        data.load_text(name)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_a_text_can_be_typed_into_a_terminal():
    ours, theirs = os.openpty()
    os.write(ours, b"typed\n\x04")
    assert data.load_text(os.ttyname(theirs)) == "typed\n"
    os.close(ours)
    os.close(theirs)


def test_utf_16_without_a_mark_is_called_what_it_is(tmp_path):
    path = tmp_path / "utf16.txt"
    path.write_bytes("a text".encode("utf-16-le"))
    with pytest.raises(data.InputError, match="a binary file, or text that isn't UTF-8; "):
        data.load_text(str(path))
