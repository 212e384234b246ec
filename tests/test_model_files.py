"""support/model_files.py: downloads, weights that fit or don't, flags and exports.

What is special about the files of GPT-2 and Llama is tested in test_gpt2_files.py and
test_llama_files.py; that the models compute what they should, in the tests of the scripts.
"""

import contextlib
import functools
import hashlib
import http.server
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import weakref
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from conftest import refused_input
from safetensors.torch import save_file

from support import model_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make_weights() -> dict[str, torch.Tensor]:
    """Some of the weights of a model, with the names and shapes of the files."""
    torch.manual_seed(1)
    shapes = {
        EMBEDDING: (7, 3), "model.layers.0.self_attn.q_proj.weight": (6, 3),
        "model.layers.0.mlp.gate_proj.weight": (5, 3), "model.norm.weight": (3,),
    }  # fmt: skip
    return {name: torch.randn(shape) for name, shape in shapes.items()}


# ---- downloads

REPOSITORY = "HuggingFaceTB/SmolLM2-135M"
SETTINGS = {"config.json": b"{}", "tokenizer.json": b"words", "generation_config.json": b"[]"}
ONE_FILE = {**SETTINGS, "model.safetensors": b"weights " * 99}
SHARDS = {
    **SETTINGS,
    "model-00001-of-00002.safetensors": b"weights " * 99,
    "model-00002-of-00002.safetensors": b"more weights " * 99,
}
OTHERS = {"README.md": b"A model.", "pytorch_model.bin": b"weights", "onnx/model.onnx": b"weights"}
COMMIT = "0" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that its client asks for."""

    def do_GET(self):  # noqa: N802
        files = self.server.files
        path = self.path.partition("?")[0]
        file = re.fullmatch(rf"/{REPOSITORY}/resolve/\w+/([\w./-]+)", path)
        if file:
            content = files.get(file[1])
        elif files and path == f"/api/models/{REPOSITORY}/revision/main":
            content = json.dumps({"id": REPOSITORY, "sha": COMMIT}).encode()
        elif files and path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            one = {"type": "file", "size": 9, "oid": "0"}
            content = json.dumps([{**one, "path": name} for name in files]).encode()
        else:
            content = None
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound" if file else "RepoNotFound")
        self.end_headers()
        if self.command == "GET" and content:
            if file:
                self.server.sent.append(file[1])
            self.wfile.write(content[: self.server.limit] if file else content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running_hub(files: dict[str, bytes]):
    """Serve files as the repository."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {**files, **OTHERS} if files else {}
    server.sent = []
    server.limit = None  # bytes of a file after which the connection is closed
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def no_waiting(monkeypatch):
    """The client of the hub waits between its attempts, for up to 23 seconds."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


REAL_DOWNLOAD = huggingface_hub.snapshot_download


def use_hub(server, cache: Path, monkeypatch):
    """Let the client of the hub download from here to a cache of its own."""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    download = functools.partial(REAL_DOWNLOAD, endpoint=endpoint, cache_dir=cache)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def download(repository: str = REPOSITORY) -> Path:
    """Download a model as v11c does."""
    files = ["config.json", "tokenizer.json"]
    return model_files.download("model", repository, files, ["generation_config.json"])


@pytest.mark.parametrize("files", [ONE_FILE, SHARDS], ids=["one file", "shards"])
@pytest.mark.parametrize("lacking", ["nothing", "generation_config.json"])
def test_a_model_is_downloaded_once_and_then_needs_no_network(
    tmp_path, monkeypatch, no_waiting, capsys, files, lacking
):
    """And nothing but what it needs."""
    files = {name: content for name, content in files.items() if name != lacking}
    with running_hub(files) as server:
        use_hub(server, tmp_path, monkeypatch)
        folder = download()
        assert {path.name for path in folder.iterdir()} == set(files)
        for name, content in files.items():
            assert (folder / name).read_bytes() == content
        assert download() == folder
        assert sorted(server.sent) == sorted(files), "each file once"
    assert download() == folder
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert download() == folder
    for name, content in files.items():
        assert (folder / name).read_bytes() == content
    assert capsys.readouterr().err.startswith("looking for model in the cache and on the Hugging")


@pytest.mark.parametrize("lacking", ["all", "config.json", "tokenizer.json", "end"])
def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch, no_waiting, lacking):
    with running_hub(SHARDS) as server:
        use_hub(server, tmp_path, monkeypatch)
        if lacking == "all":
            server.files.clear()
        elif lacking == "end":
            server.limit = 1
        else:
            del server.files[lacking]
        line = refused_input(download)
    assert line.startswith("--init_from model: can't download it (")
    remedy = "check the name and the network, or name a folder with the model's files"
    assert line.endswith(f"; {remedy}")
    if lacking not in ("all", "end"):
        assert f"({lacking} is neither there nor in the cache)" in line
    assert list(tmp_path.glob("*/snapshots/*/model.safetensors")) == []


def test_a_repository_without_safetensors_is_one_line(tmp_path, monkeypatch, no_waiting):
    with running_hub(SETTINGS) as server:
        use_hub(server, tmp_path, monkeypatch)
        line = refused_input(download)
    assert "(no model.safetensors there or in the cache)" in line
    assert sorted(server.sent) == sorted(SETTINGS)


@pytest.mark.parametrize("lacking", ["tokenizer.json", "model-00002-of-00002.safetensors"])
def test_a_cache_without_one_of_the_files_is_one_line(tmp_path, monkeypatch, no_waiting, lacking):
    """As after a download that was stopped, with this or another program."""
    with running_hub(SHARDS) as server:
        use_hub(server, tmp_path, monkeypatch)
        folder = download()
    (folder / lacking).unlink()
    line = refused_input(download)  # nobody answers any more
    assert line.startswith("--init_from model: can't download it (")
    assert lacking in line


def test_another_repository_is_one_line(tmp_path, monkeypatch, no_waiting):
    with running_hub(ONE_FILE) as server:
        use_hub(server, tmp_path, monkeypatch)
        line = refused_input(download, "HuggingFaceTB/SmolLM9")
    assert line.startswith("--init_from model: can't download it (")


def test_no_network_is_one_line(tmp_path, monkeypatch, no_waiting):
    """The client of the hub reports each of its attempts, which isn't worth reading."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    with running_hub(ONE_FILE) as server:
        use_hub(server, tmp_path, monkeypatch)  # and nobody answers there from now on
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    try:
        line = refused_input(download)
    finally:
        logger.removeHandler(handler)
    assert line.startswith("--init_from model: can't download it (")
    assert said == []


def test_an_empty_cache_without_a_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot_download = functools.partial(REAL_DOWNLOAD, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert refused_input(download).startswith("--init_from model: can't download it (")


def test_half_a_cache_without_a_network_is_one_line(tmp_path, monkeypatch):
    """As after a download by another program that was stopped."""
    for name in ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: tmp_path)
    line = refused_input(download)
    why = "only 1 of the 2 weight files there or in the cache"
    assert line.startswith(f"--init_from model: can't download it ({why}); check the name and ")


@pytest.mark.parametrize("error", [None, OSError()])
def test_signals_end_a_download_at_once(tmp_path, monkeypatch, error):
    """The client of the hub downloads in threads, for which Python's own handlers would wait."""
    during = []

    def snapshot_download(*_, **__):
        during.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
        if error is not None:
            raise error
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    refused_input(download)
    assert during == [signal.SIG_DFL, signal.SIG_DFL] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ConnectionError()])
def test_an_error_of_any_kind_is_one_line_even_without_a_message(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    line = refused_input(download)
    assert line.startswith("--init_from model: can't download it (")
    assert "()" not in line
    assert str(error) in line


# ---- weights


def save_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write weights into two files."""
    names = list(weights)
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in names[i::2]}, folder / file)


SAVERS = {
    "one file": lambda folder, weights: save_file(weights, folder / "model.safetensors"),
    "shards": save_shards,
}


@pytest.fixture(params=SAVERS)
def save(request):
    """A function that writes weights to a folder."""
    return SAVERS[request.param]


def read(folder: Path, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in a folder that should have the shapes of own."""
    expected = {name: weight.to("meta") for name, weight in own.items()}
    return dict(model_files.read_weights(folder, expected, EMBEDDING))


def assert_equal(weights, expected):
    assert set(weights) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


def test_weights_come_from_one_file_or_shards(tmp_path, save):
    save(tmp_path, make_weights())
    assert_equal(read(tmp_path, make_weights()), make_weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_keep_the_dtype_of_the_file(tmp_path, dtype):
    stored = {name: weight.to(dtype) for name, weight in make_weights().items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert_equal(read(tmp_path, make_weights()), stored)


def test_numbers_too_large_for_float32_are_refused(tmp_path):
    own = make_weights()
    stored = own | {"model.norm.weight": torch.full((3,), 1e300, dtype=torch.float64)}
    save_file(stored, tmp_path / "model.safetensors")
    assert "model.norm.weight has numbers that aren't finite" in refused_input(read, tmp_path, own)


def test_numbers_too_large_for_the_dtype_of_the_model_are_refused(tmp_path):
    stored = make_weights() | {"model.norm.weight": torch.full((3,), 1e6)}
    save_file(stored, tmp_path / "model.safetensors")
    own = {name: weight.half() for name, weight in stored.items()}
    line = refused_input(read, tmp_path, own)
    assert "model.norm.weight has numbers that aren't finite in float16" in line


def test_a_weight_with_two_names_is_refused(tmp_path):
    own = make_weights()
    both = own | {"transformer.model.norm.weight": torch.zeros(3)}
    save_file(both, tmp_path / "model.safetensors")
    line = refused_input(read, tmp_path, own)
    assert line.endswith("with and without transformer.: model.norm.weight")


def test_parts_may_be_numbered_with_any_number_of_digits(tmp_path):
    rest = make_weights()
    first = {EMBEDDING: rest.pop(EMBEDDING)}
    save_file(first, tmp_path / "model-00001-of-000002.safetensors")
    save_file(rest, tmp_path / "model-00002-of-000002.safetensors")
    save_file(rest, tmp_path / "model-of-another.safetensors")
    assert_equal(read(tmp_path, make_weights()), make_weights())


def test_one_file_comes_before_shards(tmp_path):
    save_shards(tmp_path, make_weights())
    expected = {name: weight + 1 for name, weight in make_weights().items()}
    save_file(expected, tmp_path / "model.safetensors")
    assert_equal(read(tmp_path, expected), expected)


def test_entries_that_are_not_weights_are_ignored(tmp_path, save):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)}
    save(tmp_path, make_weights() | buffers)
    assert_equal(read(tmp_path, make_weights()), make_weights())


def test_a_head_that_is_the_embedding_may_be_stored(tmp_path, save):
    own = make_weights()
    save(tmp_path, own | {HEAD: own[EMBEDDING].clone()})
    assert_equal(read(tmp_path, own), own)


@pytest.mark.parametrize("head", [torch.ones(7, 3), torch.ones(2)])
def test_another_head_is_refused(tmp_path, save, head):
    own = make_weights()
    save(tmp_path, own | {HEAD: head})
    line = refused_input(read, tmp_path, own)
    assert line.startswith(f"--init_from {tmp_path}")
    assert "its lm_head.weight isn't its token embedding, but this model has one for both" in line


def test_a_model_with_a_head_of_its_own_gets_it(tmp_path, save):
    own = make_weights() | {HEAD: torch.randn(7, 3)}
    save(tmp_path, own)
    assert_equal(read(tmp_path, own), own)


def test_a_weight_at_a_time_is_in_memory(tmp_path, save, monkeypatch):
    """And its file is opened for it alone, because the system counts what has been read."""
    own = {**make_weights(), **{f"more.{i}": torch.randn(3, 2) for i in range(9)}}
    save(tmp_path, own)
    released, n_alive, n_read = [], [], []
    real_open = safetensors.safe_open

    class File:
        def __init__(self, path, framework):
            self.file = real_open(path, framework=framework)

        def __enter__(self):
            self.opened = self.file.__enter__()
            n_read.append(0)
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.opened.keys()

        def get_tensor(self, name):
            n_alive.append(sum(weight() is not None for weight in released))
            n_read[-1] += 1
            weight = self.opened.get_tensor(name)
            released.append(weakref.ref(weight))
            return weight

    monkeypatch.setattr(safetensors, "safe_open", File)
    for name, weight in model_files.read_weights(tmp_path, own, EMBEDDING):
        assert torch.equal(weight, own[name])
        del weight
    assert len(released) == len(own)
    assert max(n_alive) <= 1, "the one before, until the next one is there"
    assert max(n_read) == 1


def test_missing_and_extra_weights_are_named(tmp_path, save):
    own = make_weights()
    stored = own | {"model.layers.1.extra": torch.ones(2)}
    del stored["model.norm.weight"], stored[EMBEDDING]
    save(tmp_path, stored)
    line = refused_input(read, tmp_path, own)
    missing = f"missing: {EMBEDDING}, model.norm.weight"
    said = f"the weights don't fit; {missing}; extra: model.layers.1.extra"
    assert line == f"--init_from {tmp_path}: {said}"


@pytest.mark.parametrize("shape", [(6, 3), (3, 7), (7,), (7, 3, 1), ()])
def test_a_weight_of_another_shape_is_refused(tmp_path, save, shape):
    save(tmp_path, make_weights() | {EMBEDDING: torch.ones(shape)})
    line = refused_input(read, tmp_path, make_weights())
    assert line.startswith(f"--init_from {tmp_path}")
    assert line.endswith(f".safetensors: {EMBEDDING} has the shape {shape} instead of (7, 3)")


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(tmp_path, number, dtype):
    stored = {name: weight.to(dtype) for name, weight in make_weights().items()}
    stored[EMBEDDING][6, 2] = number
    save_file(stored, tmp_path / "model.safetensors")
    line = refused_input(read, tmp_path, make_weights())
    path = tmp_path / "model.safetensors"
    assert line == f"--init_from {path}: {EMBEDDING} has numbers that aren't finite in float32"


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_weights_of_another_dtype_are_refused(tmp_path, dtype):
    stored = make_weights()
    stored["model.norm.weight"] = torch.ones(3).to(dtype)
    save_file(stored, tmp_path / "model.safetensors")
    line = refused_input(read, tmp_path, make_weights())
    path = tmp_path / "model.safetensors"
    only = "but only float32, bfloat16, float16 can be loaded"
    assert line == f"--init_from {path}: model.norm.weight is {dtype}, {only}"


@pytest.mark.parametrize("file", ["model.safetensors", "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise", "folder"])
def test_damaged_weights_are_refused(tmp_path, file, damage):
    SAVERS["one file" if file == "model.safetensors" else "shards"](tmp_path, make_weights())
    path = tmp_path / file
    content = path.read_bytes()
    path.unlink()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(content[:-9])
    elif damage == "noise":
        path.write_bytes(bytes(range(256)) * 20)
    elif damage == "folder":
        path.mkdir()
    line = refused_input(read, tmp_path, make_weights())
    if damage == "missing" and file == "model.safetensors":
        assert line == f"--init_from {tmp_path}: no model.safetensors; name another folder"
    elif damage == "missing":
        assert line == f"--init_from {tmp_path}: only 1 of the 2 weight files; name another folder"
    else:
        assert line.startswith(f"--init_from {path}: can't read it (")
        assert not line.endswith("()")


def test_what_a_shard_lacks_is_named(tmp_path):
    save_shards(tmp_path, make_weights())
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_file({EMBEDDING: make_weights()[EMBEDDING]}, path)
    line = refused_input(read, tmp_path, make_weights())
    assert line.endswith("the weights don't fit; missing: model.layers.0.mlp.gate_proj.weight")


def test_a_weight_without_numbers_has_the_wrong_shape(tmp_path):
    save_file(make_weights() | {EMBEDDING: torch.ones(0, 3)}, tmp_path / "model.safetensors")
    assert "has the shape (0, 3) instead of (7, 3)" in refused_input(read, tmp_path, make_weights())


# ---- flags that contradict --init_from


@dataclass
class Config:
    """The settings of a script that can start from released weights."""

    init_from: str = "model"
    resume: bool = False
    sample_only: bool = False
    out_dir: str = ""


Presets = make_dataclass("Presets", [("preset", str, "")], bases=(Config,))


@pytest.mark.parametrize(
    ("cfg", "flag"),
    [
        (Config(resume=True), "--resume"),
        (Config(resume=True, out_dir="run"), "--resume"),
        (Config(resume=True, sample_only=True), "--resume"),
        (Config(sample_only=True, out_dir="run"), "--out_dir"),
        (Presets(preset="small"), "--preset"),
        (Presets(preset="small", sample_only=True), "--preset"),
    ],
)
def test_a_run_has_only_one_beginning(cfg, flag):
    line = refused_input(model_files.refuse_conflicts, cfg)
    why = f"can't be used together with {flag}; leave one of them out"
    assert line == f"--init_from model: {why}"


@pytest.mark.parametrize(
    "cfg", [Config(), Config(out_dir="run"), Config(sample_only=True), Presets(out_dir="run")]
)
def test_other_flags_go_with_released_weights(cfg):
    model_files.refuse_conflicts(cfg)


# ---- exports


END = {
    "id": 5, "content": "<end>", "single_word": False, "lstrip": True, "rstrip": False,
    "normalized": False, "special": True,
}  # fmt: skip
OTHER = {**END, "id": 6, "content": "<other>", "lstrip": False}


@pytest.mark.parametrize(
    ("added", "ids", "expected"),
    [
        ([END, OTHER], [5], END), ([END, OTHER], [6, 5], OTHER), ([OTHER, END], [2, 5], END),
        ([END], [], None), ([END], [2], None), ([], [5], None), (None, [5], None),
    ],
)  # fmt: skip
def test_an_end_of_text_is_named_as_the_tokenizer_has_it(added, ids, expected):
    """And not at all if it is an ordinary token."""
    text = json.dumps({"added_tokens": added})
    config = json.loads(model_files.tokenizer_config(text, ids))
    if expected is not None:
        expected = {"__type": "AddedToken", **expected}
        del expected["id"]
    assert config.pop("eos_token", None) == expected
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False
    }  # fmt: skip


def test_only_changes_rewrite_a_text():
    text = '{"a":1, "b":   "世", "c": null}'
    assert model_files.with_changes(text, {}) == text
    assert json.loads(model_files.with_changes(text, {"a": None, "d": 2})) == {
        "b": "世", "c": None, "d": 2
    }  # fmt: skip
    assert "世" in model_files.with_changes(text, {"a": None})


def write(folder: Path) -> None:
    """Export some weights, with a configuration."""
    model_files.save_model(folder, {"config.json": "{}"}, make_weights())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_others_may_read_an_export_if_the_umask_says_so(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(weights, path, metadata):
        Path(path).write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    line = refused_input(write, tmp_path)
    assert line.startswith(f"--export {tmp_path}: can't write the weights (")
    assert "No space left on device" in line
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_another_program_is_reading_is_renamed_a_moment_later(tmp_path, monkeypatch):
    """On Windows, a virus scanner opens each new file."""
    refused = iter([True])
    real = Path.replace

    def replace(old, new):
        if new.name == "model.safetensors" and next(refused, False):
            raise PermissionError(13, "Access is denied")
        return real(old, new)

    monkeypatch.setattr(Path, "replace", replace)
    write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_an_export_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    def stop(weights, path, metadata):
        Path(path).write_bytes(b"the first half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_an_export_is_made_and_stays_empty(tmp_path):
    model_files.check_export(tmp_path / "new" / "export")
    assert list((tmp_path / "new" / "export").iterdir()) == []


@pytest.mark.parametrize("name", ["probe", "notes.txt", "probe.unfinished"])
def test_files_beside_an_export_stay_as_they_were(tmp_path, name):
    (tmp_path / name).write_text("mine", encoding="utf-8")
    model_files.check_export(tmp_path)
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", *model_files.COMPANIONS]
)
def test_a_model_is_never_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine", encoding="utf-8")
    line = refused_input(model_files.check_export, tmp_path)
    why = 'already holds a model; name another folder, or "" to export nothing'
    assert line == f"--export {tmp_path}: {why}"
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


def test_an_export_that_was_killed_may_be_made_again(tmp_path):
    for name in ("config.json", "model.safetensors.unfinished"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    model_files.check_export(tmp_path)
    (tmp_path / "model.safetensors").write_text("mine", encoding="utf-8")
    assert "already holds a model" in refused_input(model_files.check_export, tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_can_not_be_made_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    line = refused_input(model_files.check_export, tmp_path / place)
    assert line.startswith(f"--export {tmp_path / place}: can't write there (")


@pytest.mark.skipif(sys.platform != "linux", reason="a folder where even root can't write")
def test_a_folder_where_nothing_can_be_written_is_refused():
    line = refused_input(model_files.check_export, Path("/proc/self"))
    assert line.startswith("--export /proc/self: can't write there (")
