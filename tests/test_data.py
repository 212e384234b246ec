"""The helper: tokenizer, corpora, the fallback without a network, the split, batches."""

import hashlib
import http.server
import socket
import threading

import numpy as np
import pytest
import torch
from conftest import TEXT

import data


def test_tokenizer_round_trip():
    text = "Grüße, 世界!\n\tþ🙂"
    tokenizer = data.CharTokenizer(text)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.n_vocab == len(set(text))
    assert sorted(set(tokens)) == list(range(tokenizer.n_vocab))
    assert all(type(token) is int for token in tokens)


def test_tokenizer_names_what_it_lacks():
    with pytest.raises(data.InputError, match="'x', 'é'"):
        data.CharTokenizer("abc").encode("axbé")


def test_a_text_without_newlines_can_still_start_a_sample():
    assert data.CharTokenizer("abc").encode("\n") == [0]


@pytest.mark.parametrize("ends", ["\r\n", "\r"])
def test_line_ends_are_all_alike(tmp_path, ends):
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
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    assert data.load_text("python") == "first\nsecond\n"


def test_the_constants_are_those_of_tiny_shakespeare():
    assert data.SHAKESPEARE.name == "tinyshakespeare.txt"
    if not data.SHAKESPEARE.exists():
        pytest.skip("Tiny Shakespeare is not there")
    raw = data.SHAKESPEARE.read_bytes()
    if b"\r" not in raw:  # a copy with Windows line ends is as good
        assert hashlib.sha256(raw).hexdigest() == data.SHA256
    text = data.load_text("shakespeare")
    assert (len(text), len(set(text))) == (1_115_394, 65)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on loopback in place of the one that has Shakespeare; tests set its answer."""

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
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(data, "SHAKESPEARE", tmp_path / "data" / "tinyshakespeare.txt")
    monkeypatch.setattr(data, "URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.stall.set()
    server.shutdown()
    server.server_close()


def test_shakespeare_is_downloaded_once(server, capsys):
    assert data.load_text("shakespeare") == TEXT
    assert data.load_text("shakespeare") == TEXT
    assert server.requests == 1
    assert [path.name for path in data.SHAKESPEARE.parent.iterdir()] == ["tinyshakespeare.txt"]
    out, err = capsys.readouterr()
    assert out == ""
    assert "100%" in err


@pytest.mark.parametrize(
    "fault", ["status", "cut off", "stalled", "checksum", "no server", "no folder"]
)
def test_without_shakespeare_a_run_trains_on_python(server, capsys, monkeypatch, fault):
    """What goes wrong with the download costs a notice, and no file."""
    folder = data.SHAKESPEARE.parent
    if fault == "status":
        server.status = 404
    if fault == "cut off":
        server.length, server.body = len(server.body), server.body[:700]
    if fault == "stalled":
        server.length, server.body = len(server.body), server.body[:700]
        server.stall.clear()
        set_timeout = socket.setdefaulttimeout
        monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds / 50))
    if fault == "checksum":
        server.body = server.body[:-1] + b"?"
    if fault == "no server":
        monkeypatch.setattr(data, "URL", "http://127.0.0.1:1/input.txt")
    if fault == "no folder":
        monkeypatch.setattr(data, "SHAKESPEARE", folder / "missing" / "tinyshakespeare.txt")
    assert data.load_text("shakespeare") == data.load_text("python")
    assert list(folder.iterdir()) == [], "nothing is left of a download that failed"
    out, err = capsys.readouterr()
    assert out == ""
    notice = err.splitlines()[-1]
    assert notice.startswith("notice: could not download Tiny Shakespeare")
    assert ("timed out" in notice) == (fault == "stalled")
    assert data.URL in notice
    assert str(data.SHAKESPEARE) in notice


def test_the_split_is_nine_to_one_and_in_order():
    train, val = data.split(list(range(1000)), block_size=8)
    assert train.dtype == val.dtype == np.uint16
    assert train.tolist() == list(range(900))
    assert val.tolist() == list(range(900, 1000))


def test_the_least_text_is_just_enough():
    train, val = data.split([0] * 81, block_size=8)
    assert min(len(train), len(val)) == 9
    data.get_batch(val, 4, 8, "cpu")
    with pytest.raises(data.InputError, match="80 tokens .* --block_size 8, .* 81"):
        data.split([0] * 80, block_size=8)


def test_too_many_distinct_characters_are_refused():
    with pytest.raises(data.InputError, match="65,536"):
        data.CharTokenizer("".join(map(chr, range(2**16 + 1))))


def test_targets_are_inputs_shifted_by_one():
    tokens = np.arange(50_000, dtype=np.uint16)
    x, y = data.get_batch(tokens, 16, 8, "cpu")
    assert x.shape == y.shape == (16, 8)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, x[:, :1] + torch.arange(8))


def test_batches_reach_the_first_and_the_last_window_and_no_further():
    tokens = np.arange(12, dtype=np.uint16)
    x, y = data.get_batch(tokens, 2000, 8, "cpu")
    assert x[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert y.max().item() == 11


def test_batches_come_from_a_memory_map_too(tmp_path):
    path = tmp_path / "tokens.bin"
    np.arange(300, dtype=np.uint16).tofile(path)
    x, y = data.get_batch(np.memmap(path, dtype=np.uint16, mode="r"), 4, 8, "cpu")
    assert torch.equal(y, x + 1)


def test_the_seed_decides_the_batches():
    tokens = np.arange(50_000, dtype=np.uint16)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(data.get_batch(tokens, 4, 8, "cpu")[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
