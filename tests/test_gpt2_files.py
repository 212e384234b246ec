"""data/pretrained.py: models from the hub and from folders, what is wrong with them, and exports.

That the models compute what they should is tested in test_v8c_pretrained.py.
"""

import contextlib
import functools
import hashlib
import http.server
import json
import logging
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import data
from data import pretrained

import huggingface_hub
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "model_type": "gpt2", "n_layer": 2, "n_head": 3, "n_embd": 18, "n_positions": 5,
    "vocab_size": 97,
}  # fmt: skip


def make_weights():
    """Some of the weights of a model, with the names and shapes of the files."""
    torch.manual_seed(1)
    shapes = {
        "wte.weight": (7, 3), "wpe.weight": (5, 3), "h.0.attn.c_attn.weight": (3, 9),
        "h.0.attn.c_attn.bias": (9,), "ln_f.weight": (3,),
    }  # fmt: skip
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def refused(call, *args) -> str:
    """Let a function refuse its arguments; return its message as a user would see it."""
    with pytest.raises(data.InputError) as error:
        call(*args)
    return " ".join(str(error.value).split())


# ---- folders and downloads


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that its client asks for."""

    def do_GET(self):  # noqa: N802
        found = re.fullmatch(r"/openai-community/gpt2/resolve/main/([\w.]+)", self.path)
        content = self.server.files.get(found[1]) if found else None
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
        self.end_headers()
        if self.command == "GET" and content:
            self.server.sent.append(found[1])
            self.wfile.write(content[: self.server.limit])

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running_hub():
    """Serve two files as the weights of "gpt2"."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {"config.json": b"{}", "model.safetensors": b"weights " * 99}
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


def use_hub(server, cache: Path, monkeypatch):
    """Let the client of the hub download from here to a cache of its own."""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    download = functools.partial(REAL_DOWNLOAD, endpoint=endpoint, cache_dir=cache)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


REAL_DOWNLOAD = huggingface_hub.hf_hub_download


def test_a_model_is_downloaded_once_and_then_needs_no_network(tmp_path, monkeypatch, no_waiting):
    with running_hub() as server:
        use_hub(server, tmp_path, monkeypatch)
        folder = pretrained.find_folder("gpt2")
        for name, content in server.files.items():
            assert (folder / name).read_bytes() == content
        assert pretrained.find_folder("gpt2") == folder
        assert server.sent == ["config.json", "model.safetensors"]
    assert pretrained.find_folder("gpt2") == folder
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert pretrained.find_folder("gpt2") == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights " * 99


@pytest.mark.parametrize("lacking", ["all", "weights", "the end"])
def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch, no_waiting, lacking):
    with running_hub() as server:
        use_hub(server, tmp_path, monkeypatch)
        if lacking == "all":
            server.files.clear()
        elif lacking == "weights":
            del server.files["model.safetensors"]
        else:
            server.limit = 1
        line = refused(pretrained.find_folder, "gpt2")
    assert line.startswith("--init_from gpt2: can't download it (")
    remedy = "check the network, or name a folder that has config.json and model.safetensors"
    assert line.endswith(f"; {remedy}")
    assert list(tmp_path.glob("*/snapshots/*/model.safetensors")) == []


def test_no_network_is_one_line(tmp_path, monkeypatch, no_waiting):
    """The client of the hub reports each of its attempts, which isn't worth reading."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    with running_hub() as server:
        use_hub(server, tmp_path, monkeypatch)  # and nobody answers there from now on
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(handler)
    try:
        line = refused(pretrained.find_folder, "gpt2")
    finally:
        logger.removeHandler(handler)
    assert line.startswith("--init_from gpt2: can't download it (")
    assert said == []


def test_an_empty_cache_without_a_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    download = functools.partial(REAL_DOWNLOAD, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    line = refused(pretrained.find_folder, "gpt2")
    assert line.startswith("--init_from gpt2: can't download it (")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ConnectionError()])
def test_an_error_of_any_kind_is_one_line_even_without_a_message(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    line = refused(pretrained.find_folder, "gpt2-xl")
    assert line.startswith("--init_from gpt2-xl: can't download it (")
    assert "()" not in line
    assert str(error) in line


def test_a_folder_comes_before_a_model_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("no need"))
    (tmp_path / "gpt2").mkdir()
    assert pretrained.find_folder("gpt2") == Path("gpt2")
    assert pretrained.find_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["gpt3", "openai-community/gpt2", "model.safetensors"])
def test_another_name_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"a file")
    line = refused(pretrained.find_folder, name)
    released = "gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    assert line == f"--init_from {name}: no such folder, and not one of {released}"


# ---- config.json


def write_config(folder: Path, config) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(("kind", "norm"), [("gpt2", "pre"), ("openai-gpt", "post")])
def test_a_configuration_is_read_by_our_names(tmp_path, kind, norm):
    write_config(tmp_path, {**CONFIG, "model_type": kind, "dtype": "float32", "n_inner": None})
    assert pretrained.read_config(tmp_path) == {
        "norm": norm, "n_layer": 2, "n_head": 3, "n_embd": 18, "block_size": 5, "vocab_size": 97,
        "characters": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu_pytorch_tanh", "n_inner": 72, "layer_norm_epsilon": 1e-05},
        {"afn": "gelu", "model_type": "openai-gpt", "characters": "\nab"},
        {"scale_attn_weights": True, "tie_word_embeddings": True, "add_cross_attention": False},
    ],
)
def test_a_configuration_may_say_what_our_model_does_anyway(tmp_path, change):
    write_config(tmp_path, CONFIG | change)
    assert pretrained.read_config(tmp_path)["characters"] == change.get("characters", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "bert"}, "its model_type is 'bert', but only gpt2 and openai-gpt can be "),
        ({"model_type": None}, "its model_type is None, "),
        ({"model_type": ["gpt2"]}, "its model_type is ['gpt2'], "),
        ({"n_head": "two"}, "its n_head is 'two', not a positive integer"),
        ({"n_head": True}, "its n_head is True, not a positive integer"),
        ({"n_head": 5}, "its n_embd is not a multiple of its n_head"),
        ({"n_layer": 0}, "its n_layer is 0, not a positive integer"),
        ({"n_layer": 1001}, "its n_layer is 1001, "),
        ({"n_embd": 18.0}, "its n_embd is 18.0, not a positive integer"),
        ({"n_embd": 3 * 10**12}, "its n_embd is 3000000000000, "),
        ({"n_positions": None}, "its n_positions is None, not a positive integer"),
        ({"vocab_size": [97]}, "its vocab_size is [97], not a positive integer"),
        ({"n_inner": 64}, "its n_inner is 64, but this model has only 4 * n_embd"),
        ({"activation_function": "relu"}, "its activation_function is 'relu', but this model has"),
        ({"activation_function": "gelu"}, "its activation_function is 'gelu', but this model has"),
        ({"afn": "swish"}, "its afn is 'swish', but this model has only 'gelu'"),
        ({"layer_norm_epsilon": 1e-3}, "its layer_norm_epsilon is 0.001, but this model has only "),
        ({"layer_norm_epsilon": "1e-5"}, "its layer_norm_epsilon is '1e-5', but this model has"),
        ({"scale_attn_weights": False}, "its scale_attn_weights is False, but this model has only"),
        ({"scale_attn_by_inverse_layer_idx": True}, "its scale_attn_by_inverse_layer_idx is True,"),
        ({"reorder_and_upcast_attn": True}, "its reorder_and_upcast_attn is True, but this model "),
        ({"add_cross_attention": True}, "its add_cross_attention is True, but this model has only"),
        ({"tie_word_embeddings": False}, "its tie_word_embeddings is False, but this model has"),
        ({"characters": ["a", "b"]}, "its characters are ['a', 'b'], not a string"),
        ({"characters": None}, "its characters are None, not a string"),
        ({"characters": "ba"}, "its characters aren't in order"),
    ],
)
def test_a_model_unlike_ours_is_refused(tmp_path, change, said):
    path = write_config(tmp_path, CONFIG | change)
    assert refused(pretrained.read_config, tmp_path).startswith(f"--init_from {path}: {said}")


@pytest.mark.parametrize("name", ["model_type", *pretrained.SIZES])
def test_a_configuration_without_a_size_is_refused(tmp_path, name):
    config = dict(CONFIG)
    del config[name]
    path = write_config(tmp_path, config)
    line = refused(pretrained.read_config, tmp_path)
    assert line.startswith(f"--init_from {path}: its {name} is None, ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON (Expecting value: "),
        (b'{"model_type": "gpt2",', "not JSON (Expecting property name "),
        (b"\xff\xfe{}", "not JSON ('utf-8' codec can't decode byte 0xff "),
        (b"[" * 200_000, "not JSON ("),
        (b"[]", "not a configuration, which would be a JSON object"),
        (b'"gpt2"', "not a configuration, which would be a JSON object"),
        (b"null", "not a configuration, which would be a JSON object"),
        (b"{}", "its model_type is None, but only gpt2 and openai-gpt can be loaded"),
        (None, "can't read it (No such file or directory)"),
    ],
    ids=["empty", "half", "UTF-16", "deep", "list", "string", "null", "nothing", "missing"],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, said):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    assert refused(pretrained.read_config, tmp_path).startswith(f"--init_from {path}: {said}")


# ---- the vocabulary


@dataclass
class Tokenizer:
    """What of a tokenizer is used here."""

    name: str
    n_vocab: int
    characters: str = ""


@pytest.mark.parametrize(
    ("n_vocab", "n_released"), [(97, 97), (97, 128), (50_257, 50_304), (64, 64), (3, 64)]
)
def test_a_vocabulary_may_be_padded_to_a_multiple_of_64(n_vocab, n_released):
    pretrained.check_vocabulary({"vocab_size": n_released}, Tokenizer("gpt2", n_vocab))


@pytest.mark.parametrize(
    ("n_vocab", "n_released"), [(97, 96), (97, 98), (97, 127), (97, 192), (64, 128), (50_257, 97)]
)
def test_another_vocabulary_is_refused(n_vocab, n_released):
    config = {"vocab_size": n_released}
    line = refused(pretrained.check_vocabulary, config, Tokenizer("gpt2", n_vocab))
    said = f"its vocabulary has {n_released} tokens, the tokenizer {n_vocab:,}; "
    assert line.startswith(f"--init_from: {said}")


# ---- model.safetensors


def read(folder: Path, stored: dict, own: dict):
    save_file(stored, folder / "model.safetensors")
    return pretrained.read_weights(folder, own)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


def test_weights_come_back_under_their_names(tmp_path):
    """Whether or not the names have a prefix, as they have in the files of transformers."""
    own = make_weights()
    assert_equal(read(tmp_path, own, own), own)
    prefixed = {f"transformer.{name}": weight for name, weight in own.items()}
    assert_equal(read(tmp_path, prefixed, own), own)


def test_what_is_no_weight_is_left_out(tmp_path):
    """OpenAI's own files have the masks of attention, and GPT-1 numbers its positions."""
    own = make_weights()
    more = {
        "h.0.attn.bias": torch.ones(1, 1, 5, 5).tril(),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "position_ids": torch.arange(5),
        "lm_head.weight": own["wte.weight"].clone(),
    }
    assert_equal(read(tmp_path, own | more, own), own)


def test_an_output_layer_of_its_own_is_refused(tmp_path):
    own = make_weights()
    for names in ({}, {"wte.weight": "tokens_embed.weight"}):
        weights = {names.get(name, name): weight for name, weight in own.items()}
        for head in (own["wte.weight"] + 1, torch.ones(2)):
            stored = weights | {"lm_head.weight": head}
            line = refused(read, tmp_path, stored, weights)
            assert "its lm_head.weight isn't its token embedding" in line


def test_tokens_and_positions_that_are_not_needed_are_left_out(tmp_path):
    own = make_weights()
    stored = {**own, "lm_head.weight": torch.cat((own["wte.weight"], torch.zeros(57, 3)))}
    stored["wte.weight"] = stored["lm_head.weight"].clone()
    stored["wpe.weight"] = torch.cat((own["wpe.weight"], torch.full((3, 3), torch.nan)))
    assert_equal(read(tmp_path, stored, own), own)
    gpt1_names = {"wte.weight": "tokens_embed.weight", "wpe.weight": "positions_embed.weight"}
    stored = {gpt1_names.get(name, name): weight for name, weight in stored.items()}
    own = {gpt1_names.get(name, name): weight for name, weight in own.items()}
    assert_equal(read(tmp_path, stored, own), own)


def test_missing_extra_and_misshapen_weights_are_named_separately(tmp_path):
    own = make_weights()
    stored = {**own, "h.1.extra": torch.ones(2), "h.0.attn.c_attn.weight": torch.ones(9, 3)}
    del stored["ln_f.weight"], stored["wpe.weight"]
    line = refused(read, tmp_path, stored, own)
    missing = "missing: wpe.weight, ln_f.weight"
    misshapen = "misshapen: h.0.attn.c_attn.weight (9, 3) instead of (3, 9)"
    path = tmp_path / "model.safetensors"
    said = f"the weights don't fit; {missing}; extra: h.1.extra; {misshapen}"
    assert line == f"--init_from {path}: {said}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wte.weight": None}, "missing: wte.weight"),
        ({"h.0.extra": (2,)}, "extra: h.0.extra"),
        ({"wte.weight": (6, 3)}, "misshapen: wte.weight (6, 3) instead of (7, 3)"),
        ({"wpe.weight": (5,)}, "misshapen: wpe.weight (5,) instead of (5, 3)"),
        ({"wpe.weight": ()}, "misshapen: wpe.weight () instead of (5, 3)"),
        ({"ln_f.weight": (4,)}, "misshapen: ln_f.weight (4,) instead of (3,)"),
        ({f"h.{i}.x": (1,) for i in range(8)}, "extra: h.0.x, h.1.x, h.2.x, h.3.x, h.4.x and 3 mo"),
    ],
)
def test_only_what_is_wrong_is_named(tmp_path, change, said):
    own = make_weights()
    stored = dict(own)
    for name, shape in change.items():
        stored.pop(name, None)
        if shape is not None:
            stored[name] = torch.ones(shape)
    line = refused(read, tmp_path, stored, own)
    found = line.split("the weights don't fit; ")[1]
    assert found.startswith(said)
    assert ";" not in found


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, number):
    own = make_weights()
    stored = {name: weight.clone() for name, weight in own.items()}
    stored["wte.weight"][6, 2] = number
    line = refused(read, tmp_path, stored, own)
    path = tmp_path / "model.safetensors"
    assert line.startswith(f"--init_from {path}: wte.weight has numbers that aren't finite")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_weights_too(tmp_path, dtype):
    own = make_weights()
    stored = {name: weight.to(dtype) for name, weight in own.items()}
    assert_equal(read(tmp_path, stored, own), stored)


def test_numbers_too_large_for_float32_are_refused(tmp_path):
    own = make_weights()
    stored = own | {"ln_f.weight": torch.full((3,), 1e300, dtype=torch.float64)}
    assert "ln_f.weight has numbers that aren't finite" in refused(read, tmp_path, stored, own)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_damaged_weights_are_refused(tmp_path, damage):
    own = make_weights()
    path = tmp_path / "model.safetensors"
    save_file(own, path)
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_bytes(bytes(range(256)) * 20)
    line = refused(pretrained.read_weights, tmp_path, own)
    assert line.startswith(f"--init_from {path}: can't read it (")
    assert not line.endswith("()")


# ---- exports


@dataclass
class Config:
    """The settings that an export depends on."""

    export: str
    norm: str = "pre"
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 18
    block_size: int = 5


def write(folder: Path, tokenizer: Tokenizer | None = None, **changes) -> dict:
    """Export some weights; return what config.json says."""
    tokenizer = tokenizer or Tokenizer("gpt2", 97)
    pretrained.write_model(Config(str(folder), **changes), make_weights(), tokenizer)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_an_export_has_what_a_folder_of_transformers_has(tmp_path):
    config = write(tmp_path)
    assert config == CONFIG | {"bos_token_id": 96, "eos_token_id": 96}
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert_equal(load_file(tmp_path / "model.safetensors"), make_weights())


def test_an_export_of_gpt1_says_so(tmp_path):
    assert write(tmp_path, norm="post")["model_type"] == "openai-gpt"


def test_an_export_of_characters_has_its_characters_and_no_end_of_text(tmp_path):
    config = write(tmp_path, Tokenizer("char", 4, ["\n", '"', "a", "世"]))
    assert config["characters"] == '\n"a世'
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (4, None, None)
    assert pretrained.read_config(tmp_path)["characters"] == '\n"a世'


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
    line = refused(write, tmp_path)
    assert line.startswith(f"--export {tmp_path}: can't write the weights (")
    assert "No space left on device" in line
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    def stop(weights, path, metadata):
        Path(path).write_bytes(b"the first half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_an_export_is_made_and_stays_empty(tmp_path):
    pretrained.check_export(tmp_path / "new" / "export")
    assert list((tmp_path / "new" / "export").iterdir()) == []


@pytest.mark.parametrize("name", ["probe", "notes.txt", "probe.unfinished"])
def test_files_beside_an_export_stay_as_they_were(tmp_path, name):
    (tmp_path / name).write_text("mine", encoding="utf-8")
    pretrained.check_export(tmp_path)
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_is_never_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine", encoding="utf-8")
    line = refused(pretrained.check_export, tmp_path)
    why = 'already holds a model; name another folder, or "" to export nothing'
    assert line == f"--export {tmp_path}: {why}"
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_can_not_be_made_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    line = refused(pretrained.check_export, tmp_path / place)
    assert line.startswith(f"--export {tmp_path / place}: can't write there (")


@pytest.mark.skipif(sys.platform != "linux", reason="a folder where even root can't write")
def test_a_folder_where_nothing_can_be_written_is_refused():
    line = refused(pretrained.check_export, Path("/proc/self"))
    assert line.startswith("--export /proc/self: can't write there (")
