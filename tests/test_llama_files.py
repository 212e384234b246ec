"""support/llama_files.py: settings, tokenizers and exports, and what is wrong with them.

How weights are found and read is tested in test_model_files.py. That the models compute what they
should is tested in test_v11c_llama_weights.py.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import refused_input as refused
from safetensors.torch import load_file, save_file
from test_model_files import EMBEDDING, assert_equal, make_weights, save_shards
from tokenizers import Tokenizer, models, pre_tokenizers

from support import llama_files, model_files

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "hidden_size": 18, "intermediate_size": 40, "vocab_size": 7,
    "dtype": "bfloat16",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 5,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# ---- folders and downloads

REPOSITORY = "HuggingFaceTB/SmolLM2-135M"
COMPANIONS = {
    "generation_config.json": '{"eos_token_id": 3,\r\n"temperature":0.60}',
    "tokenizer_config.json": '{"tokenizer_class":"LlamaTokenizer", "model_max_length":  64}\n',
    "special_tokens_map.json": '{"eos_token": "w1"}',
    "chat_template.jinja": "{{ messages[0].content }}\r\n世\n",
}


@pytest.mark.parametrize("lost", [True, False])
def test_lost_end_of_text_tokens_are_noticed(tmp_path, monkeypatch, capsys, lost):
    def download(name, repository, files, optional):
        assert (name, repository) == (REPOSITORY, REPOSITORY)
        assert files == ["config.json", "tokenizer.json"]
        assert sorted(optional) == sorted(COMPANIONS)
        return tmp_path

    if not lost:
        (tmp_path / "generation_config.json").touch()
    monkeypatch.setattr(model_files, "download", download)
    assert llama_files.find_folder(REPOSITORY) == tmp_path
    assert capsys.readouterr().err.startswith("notice: no generation_config.json there") == lost


def test_a_folder_comes_before_a_repository_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files, "download", lambda *_: pytest.fail("no need"))
    Path(REPOSITORY).mkdir(parents=True)
    assert llama_files.find_folder(REPOSITORY) == Path(REPOSITORY)
    assert llama_files.find_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["SmolLM2-135M", "a/b/c", "/missing", "owner/a model", "x.json"])
def test_a_name_of_neither_a_folder_nor_a_repository_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files, "download", lambda *_: pytest.fail("no need"))
    (tmp_path / "x.json").write_text("a file", encoding="utf-8")
    line = refused(llama_files.find_folder, name)
    assert line.startswith(f"--init_from {name}: no such folder, nor the name of a repository, ")


# ---- config.json


def read(folder: Path, **changes) -> dict:
    """Read a configuration with changes, those to None removed; "null" is JSON's null."""
    config = {}
    for name, value in (CONFIG | changes).items():
        if value is not None:
            config[name] = None if value == "null" else value
    write_json(folder / "config.json", config)
    return llama_files.read_config(folder)


def test_a_configuration_is_read_by_our_names(tmp_path):
    assert read(tmp_path) == {
        "n_layer": 2, "n_head": 6, "n_kv_head": 3, "n_embd": 18, "head_size": 0,
        "intermediate_size": 40, "vocab_size": 7, "rope_theta": 10_000.0, "rope_factor": 1.0,
        "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "qkv_bias": False, "qk_norm": False,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "dtype_of_files": "bfloat16",
        "characters": "",
        "tokenizer": str(tmp_path), "block_size": 1024, "max_position_embeddings": 2048,
        "folder": tmp_path,
    }  # fmt: skip


def test_the_tokenizer_has_the_whole_path_of_its_folder(tmp_path, monkeypatch):
    """Which a run notes, and a flag may repeat in any folder."""
    read(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert llama_files.read_config(Path("."))["tokenizer"] == str(tmp_path.resolve())


QWEN2 = {"model_type": "qwen2"}
MANY_HEADS = {"num_attention_heads": 64, "hidden_size": 128, "num_key_value_heads": None}
WINDOWS = {"model_type": "qwen2", "max_window_layers": 1}  # from the second of two layers on


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "qwen3"}, {"qk_norm": True, "qkv_bias": False, "head_size": 128}),
        ({"model_type": "qwen3", "head_dim": 8}, {"qk_norm": True, "head_size": 8}),
        ({"model_type": "mistral", "sliding_window": "null"}, {"qk_norm": False}),
        ({"model_type": "qwen2"}, {"qkv_bias": True, "qk_norm": False, "head_size": 0}),
        ({"model_type": "qwen2", "head_dim": 8}, {"qkv_bias": True, "head_size": 8}),
        ({"model_type": "qwen2", "attention_bias": False}, {"qkv_bias": True}),
        ({"model_type": "qwen2", "attention_bias": True}, {"qkv_bias": True}),
        ({"model_type": "qwen2"}, {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}),
        ({"model_type": "qwen2", "num_key_value_heads": "null"}, {"n_kv_head": 6}),
        ({"model_type": "qwen2", **MANY_HEADS}, {"n_kv_head": 32}),
        ({"model_type": "qwen3", **MANY_HEADS}, {"n_kv_head": 32}),
        ({"model_type": "mistral", "sliding_window": "null", **MANY_HEADS}, {"n_kv_head": 8}),
        ({"head_dim": 8}, {"head_size": 8}),
        ({"head_dim": "null"}, {"head_size": 0}),
        ({"num_key_value_heads": None}, {"n_kv_head": 6}),
        ({"num_key_value_heads": "null"}, {"n_kv_head": 6}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-5}),
        ({"characters": '\n "ab世'}, {"characters": '\n "ab世', "tokenizer": "char"}),
        ({"hidden_size": 20, "head_dim": 4}, {"n_embd": 20, "head_size": 4}),
        ({"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}, {}),
        ({"quantization_config": "null", "pretraining_tp": 1, "use_cache": True}, {}),
        ({"num_experts": 0, "layer_types": ["full_attention", "full_attention"]}, {}),
        ({"use_sliding_window": False, "sliding_window": 4096, **QWEN2}, {}),
        ({"model_type": "qwen3", "sliding_window": 4096}, {}),
        ({"sliding_window": 4096, "max_window_layers": 1, **QWEN2}, {}),
        ({"use_sliding_window": True, "max_window_layers": 2, **QWEN2}, {}),
        ({"use_sliding_window": True, "model_type": "qwen3"}, {}),
        ({"use_sliding_window": True, "sliding_window": "null", **WINDOWS}, {}),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 2, **WINDOWS}, {}),
    ],
)
def test_what_an_entry_means_if_it_is_there_or_not(tmp_path, changes, expected):
    assert read(tmp_path, **changes).items() >= expected.items()


OURS = {
    "rope_factor": 8.0, "rope_low_freq_factor": 2.0, "rope_high_freq_factor": 5.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
OLD_LLAMA3 = {**LLAMA3, "type": "llama3"}
del OLD_LLAMA3["rope_type"]
SHORT_LLAMA3 = dict(LLAMA3)
del SHORT_LLAMA3["original_max_position_embeddings"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_factor": 1.0}),
        ({"rope_theta": 1_000_000}, {"rope_theta": 1e6}),
        ({"rope_theta": 5e5, "rope_scaling": "null"}, {"rope_theta": 5e5, "rope_factor": 1.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, {"rope_theta": 7e5}),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e5}}, {"rope_theta": 7e5}),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_theta": 5e5, **OURS}),
        ({"rope_theta": 5e5, "rope_scaling": OLD_LLAMA3}, {"rope_theta": 5e5, **OURS}),
        ({"rope_scaling": LLAMA3}, {"rope_theta": 1e4, **OURS}),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 7e5}}, {"rope_theta": 7e5, **OURS}),
        ({"rope_parameters": SHORT_LLAMA3, "max_position_embeddings": 32}, OURS),
        ({"rope_scaling": {"rope_type": "default", "factor": 8}}, {"rope_factor": 1.0}),
        ({"rope_scaling": {"type": "default"}}, {"rope_factor": 1.0}),
        ({"partial_rotary_factor": 1.0}, {"rope_factor": 1.0}),
        ({"rope_parameters": {"partial_rotary_factor": 1}}, {"rope_factor": 1.0}),
    ],
)
def test_the_rotation_is_read_from_old_and_new_files(tmp_path, changes, expected):
    assert read(tmp_path, **changes).items() >= expected.items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_may_have_either_name_or_none(tmp_path, dtype):
    """Then it is that of the embedding, in one file or in shards."""
    name = str(dtype).removeprefix("torch.")
    assert read(tmp_path, dtype=name)["dtype_of_files"] == name
    assert read(tmp_path, dtype=None, torch_dtype=name)["dtype_of_files"] == name
    assert read(tmp_path, dtype=None, torch_dtype=f"torch.{name}")["dtype_of_files"] == name
    weights = {"model.norm.weight": torch.ones(3, dtype=torch.float64)}
    weights[EMBEDDING] = torch.ones(7, 3, dtype=dtype)
    save_shards(tmp_path, weights)
    assert read(tmp_path, dtype=None)["dtype_of_files"] == name
    save_file(weights, tmp_path / "model.safetensors")
    assert read(tmp_path, dtype="null", torch_dtype="null")["dtype_of_files"] == name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "gpt2"},
            "its model_type is 'gpt2', but only llama, mistral, qwen2, qwen3 can be loaded",
        ),
        ({"model_type": "qwen2_moe"}, "its model_type is 'qwen2_moe', "),
        ({"model_type": "qwen3_moe"}, "its model_type is 'qwen3_moe', "),
        ({"model_type": "mixtral"}, "its model_type is 'mixtral', "),
        ({"model_type": None}, "its model_type is None, "),
        ({"model_type": ["llama"]}, "its model_type is ['llama'], "),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "its rope_type is 'linear', "),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "its rope_type is 'yarn', "),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "its rope_type is 'dynamic', "),
        ({"rope_parameters": {"rope_type": ["llama3"]}}, "its rope_type is ['llama3'], "),
        ({"rope_parameters": [1]}, "its rope_parameters is [1], not a JSON object"),
        ({"rope_scaling": "linear"}, "its rope_scaling is 'linear', not a JSON object"),
        ({"partial_rotary_factor": 0.5}, "it rotates only a part of each head, "),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "it rotates only a part of each "),
        ({"model_type": "mistral", "sliding_window": 4096}, "it has sliding windows, "),
        ({"model_type": "mistral", "max_window_layers": 28}, "it has sliding windows, "),
        ({"use_sliding_window": True, "sliding_window": 9, **WINDOWS}, "it has sliding windows, "),
        ({"use_sliding_window": True, **WINDOWS}, "it has sliding windows, "),
        (
            {**WINDOWS, "model_type": "qwen3", "use_sliding_window": True},
            "it has sliding windows, ",
        ),
        ({"use_sliding_window": True, **WINDOWS, "max_window_layers": 0}, "it has sliding windows"),
        (
            {"use_sliding_window": True, **WINDOWS, "max_window_layers": "1"},
            "its max_window_layers is '1', not an integer from 0 to ",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            "it has sliding windows, ",
        ),
        ({"sliding_window": 9}, "it has sliding windows, "),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "it has sliding windows, ",
        ),
        ({"num_experts": 8}, "it has experts, "),
        ({"num_local_experts": 8}, "it has experts, "),
        ({"n_routed_experts": 8}, "it has experts, "),
        ({"attention_bias": True}, "it has biases in attention, "),
        ({"attention_bias": True, "model_type": "qwen3"}, "it has biases in attention, "),
        ({"mlp_bias": True, "model_type": "qwen2"}, "it has biases in the feed-forward network, "),
        ({"mlp_bias": True}, "it has biases in the feed-forward network, "),
        ({"hidden_act": "gelu"}, "it has the activation 'gelu', "),
        ({"quantization_config": {"bits": 4}}, "it has quantized weights, "),
        (
            {"hidden_act": "relu", "mlp_bias": True},
            "it has biases in the feed-forward network and the activation 'relu', which this model",
        ),
        ({"dtype": "float64"}, "its dtype is 'float64', but only float32, bfloat16, float16 can "),
        ({"dtype": ["float32"]}, "its dtype is \"['float32']\", but only "),
    ],
)
def test_what_this_model_lacks_is_named(tmp_path, changes, said):
    line = refused(lambda: read(tmp_path, **changes))
    assert line.startswith(f"--init_from {tmp_path / 'config.json'}: {said}")


@pytest.mark.parametrize("name", llama_files.INTEGERS.values())
@pytest.mark.parametrize("value", ["2", -1, 2.0, True, float("nan"), 2**31, [2]])
def test_sizes_that_are_not_positive_integers_are_refused(tmp_path, name, value):
    line = refused(lambda: read(tmp_path, **{name: value}))
    assert line.startswith(f"--init_from {tmp_path / 'config.json'}: its {name} is {value!r}, not ")


NEEDED = ["num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size",
          "vocab_size"]  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_sizes_that_are_not_there_are_refused(tmp_path, name):
    for value, seen in ((None, "None"), ("null", "None"), (0, "0")):
        line = refused(lambda value=value: read(tmp_path, **{name: value}))
        path = tmp_path / "config.json"
        assert line.startswith(f"--init_from {path}: its {name} is {seen}, not an integer from 1 ")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("rms_norm_eps", None), ("rope_theta", None), ("rope_theta", "rope_parameters"),
        ("factor", "rope_scaling"), ("factor", "rope_parameters"),
        ("low_freq_factor", "rope_parameters"), ("high_freq_factor", "rope_parameters"),
        ("original_max_position_embeddings", "rope_parameters"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["2", -1.0, 0, float("nan"), float("inf"), 10**30, True, [1]])
def test_numbers_that_are_not_positive_are_refused(tmp_path, name, place, value):
    changes = {name: value} if place is None else {place: {**LLAMA3, name: value}}
    line = refused(lambda: read(tmp_path, **changes))
    assert line.startswith(f"--init_from {tmp_path / 'config.json'}: its {name} is {value!r}, not ")


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_llama3_rotation_needs_its_factors(tmp_path, name):
    rope = {key: value for key, value in LLAMA3.items() if key != name}
    line = refused(lambda: read(tmp_path, rope_parameters=rope))
    assert f"its {name} is None, not a number from " in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_key_value_heads": 4}, "its num_attention_heads is not a multiple of its num_key_v"),
        ({"hidden_size": 20}, "its hidden_size is not a multiple of its num_attention_heads"),
        ({"tie_word_embeddings": "no"}, "its tie_word_embeddings is 'no', not a bool"),
        ({"attention_bias": 1}, "its attention_bias is 1, not a bool"),
        ({"mlp_bias": "null"}, "its mlp_bias is None, not a bool"),
        ({"characters": "ba"}, "its characters aren't in order, so it is damaged"),
        ({"characters": "aab"}, "its characters aren't in order, so it is damaged"),
        (
            {"rope_parameters": {**LLAMA3, "low_freq_factor": 5}},
            "its low_freq_factor isn't below its high_freq_factor",
        ),
        ({"characters": ["a", "b"]}, "its characters aren't in order, so it is damaged"),
    ],
)
def test_an_impossible_configuration_is_refused(tmp_path, changes, said):
    line = refused(lambda: read(tmp_path, **changes))
    assert line.startswith(f"--init_from {tmp_path / 'config.json'}: {said}")


DAMAGED = [
    (b"", "not JSON ("), (b"{", "not JSON ("), (b"\xff\xfe", "not JSON ("),
    (b"[" * 100_000, "not JSON ("), (b"[]", "should hold a JSON object"),
    (b"3", "should hold a JSON object"), (None, "can't read it (No such file or directory)"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), DAMAGED)
def test_a_damaged_configuration_is_refused(tmp_path, content, said):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    line = refused(llama_files.read_config, tmp_path)
    assert line.startswith(f"--init_from {path}: {said}")


# ---- tokenizers


def save_tokenizer(folder: Path, n: int = 5) -> Path:
    """Write a tokenizer.json with n words; return its path."""
    words = ["fox", "hens", *[f"w{i}" for i in range(n - 2)]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("by_folder", [True, False])
@pytest.mark.parametrize(("vocab_size", "n_vocab"), [(None, 5), (5, 5), (8, 8)])
def test_a_tokenizer_is_read_with_what_lies_beside_it(tmp_path, by_folder, vocab_size, n_vocab):
    path = save_tokenizer(tmp_path)
    expected = {"json": path.read_text(encoding="utf-8"), "n_vocab": n_vocab, "end_of_text": []}
    if vocab_size is not None:
        write_json(tmp_path / "config.json", {"vocab_size": vocab_size, "eos_token_id": 3})
        expected["end_of_text"] = [3]
    assert llama_files.read_tokenizer(tmp_path if by_folder else path, "--tokenizer") == expected


def save_companions(folder: Path) -> None:
    """Write what may be beside a tokenizer.json."""
    for name, text in COMPANIONS.items():
        (folder / name).write_bytes(text.encode("utf-8"))


@pytest.mark.parametrize("by_folder", [True, False])
def test_a_tokenizer_brings_its_companions_word_for_word(tmp_path, by_folder):
    path = save_tokenizer(tmp_path)
    save_companions(tmp_path)
    (tmp_path / "README.md").touch()
    content = llama_files.read_tokenizer(tmp_path if by_folder else path, "--tokenizer")
    assert content["files"] == COMPANIONS
    assert content["end_of_text"] == [3]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", b"{", "not JSON ("),
        ("tokenizer_config.json", b"[]", "should hold a JSON object"),
        ("special_tokens_map.json", b"{", "not JSON ("),
        ("chat_template.jinja", b"\xff", "not text in UTF-8 ("),
    ],
)
def test_a_damaged_companion_is_refused_before_any_work(tmp_path, name, content, said):
    save_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    line = refused(llama_files.read_tokenizer, tmp_path, "--tokenizer")
    assert line.startswith(f"--tokenizer {tmp_path / name}: {said}")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    line = refused(llama_files.read_tokenizer, tmp_path, "--tokenizer")
    assert line.startswith(f"--tokenizer {tmp_path / name}: can't read it (")


def test_a_tokenizer_may_have_another_name(tmp_path):
    path = save_tokenizer(tmp_path).rename(tmp_path / "words.json")
    assert llama_files.read_tokenizer(path, "--tokenizer")["n_vocab"] == 5


@pytest.mark.parametrize("ids", ["</s>", [1, "2"], 2.0, True, {"id": 2}, [None]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_impossible_end_of_text_is_refused(tmp_path, ids, name):
    save_tokenizer(tmp_path)
    path = write_json(tmp_path / name, {"eos_token_id": ids})
    line = refused(llama_files.read_tokenizer, tmp_path, "--tokenizer")
    assert line == f"--tokenizer {path}: its eos_token_id is {ids!r}, not token ids"


@pytest.mark.parametrize(("content", "said"), DAMAGED[:-1])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_configuration_beside_a_tokenizer_is_refused(tmp_path, content, said, name):
    save_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    line = refused(llama_files.read_tokenizer, tmp_path, "--tokenizer")
    assert line.startswith(f"--tokenizer {tmp_path / name}: {said}")


def test_more_tokens_than_the_model_has_are_refused(tmp_path):
    save_tokenizer(tmp_path)
    path = write_json(tmp_path / "config.json", {"vocab_size": 4})
    line = refused(llama_files.read_tokenizer, tmp_path, "--tokenizer")
    assert line == f"--tokenizer {path}: its vocab_size is 4, but tokenizer.json has 5 tokens"


def test_the_dtype_of_a_folder_without_an_embedding_is_unknown(tmp_path):
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    line = refused(lambda: read(tmp_path, dtype=None))
    assert line == f"--init_from {tmp_path}: the weights don't fit; missing: {EMBEDDING}"


# ---- exports


@dataclass
class Config:
    """The settings that an export depends on."""

    export: str
    n_layer: int = 2
    n_head: int = 6
    n_kv_head: int = 3
    n_embd: int = 18
    head_size: int = 0
    block_size: int = 64
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = 7e5
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 2.0
    rope_high_freq_factor: float = 5.0
    original_max_position_embeddings: int = 32


@dataclass
class FakeTokenizer:
    """What an export needs of a tokenizer."""

    name: str = "file"
    n_vocab: int = 7
    characters: str = ""
    end_of_text: list[int] = field(default_factory=list)
    content: dict = field(default_factory=lambda: {"json": '{"words": "Zoë 世"}'})


def write(
    folder: Path, tokenizer: FakeTokenizer | None = None, released: dict | None = None, **changes
) -> dict:
    """Export some weights; return what config.json says."""
    cfg = Config(str(folder), **changes)
    llama_files.write_model(cfg, released or {}, make_weights(), tokenizer or FakeTokenizer())
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_an_export_has_what_a_folder_of_transformers_has(tmp_path):
    config = write(tmp_path)
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 18, "head_dim": 3,
        "intermediate_size": 5, "vocab_size": 7, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5},
        "rope_theta": 7e5, "rope_scaling": None, "tie_word_embeddings": False, "dtype": "float32",
        "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    assert_equal(load_file(tmp_path / "model.safetensors"), make_weights())
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert text == FakeTokenizer().content["json"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"qk_norm": True}, {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}),
        ({"qkv_bias": True}, {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}),
        ({"head_size": 8}, {"head_dim": 8}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        (
            {"rope_factor": 8.0},
            {
                "rope_parameters": {**LLAMA3, "rope_theta": 7e5}, "rope_theta": 7e5,
                "rope_scaling": LLAMA3,
            },
        ),
    ],
)  # fmt: skip
def test_an_export_has_the_settings_of_its_model(tmp_path, changes, expected):
    assert write(tmp_path, **changes).items() >= expected.items()
    released = llama_files.read_config(tmp_path)
    cfg = vars(Config("", **{"head_size": 3} | changes))
    for name in set(cfg) - {"export", "block_size"}:
        if cfg["rope_factor"] != 1 or not name.startswith(("rope_low", "rope_high", "original")):
            assert released[name] == cfg[name], name


@pytest.mark.parametrize("rope_factor", [1.0, 8.0])
@pytest.mark.parametrize("removed", [["rope_parameters"], ["rope_theta", "rope_scaling"]])
def test_an_export_says_it_once_for_old_and_once_for_new_programs(tmp_path, removed, rope_factor):
    config = write(tmp_path, rope_factor=rope_factor)
    expected = llama_files.read_config(tmp_path)
    assert (expected["rope_theta"], expected["rope_factor"]) == (7e5, rope_factor)
    for name in removed:
        del config[name]
    write_json(tmp_path / "config.json", config)
    assert llama_files.read_config(tmp_path) == expected


@pytest.mark.parametrize(
    ("released", "expected"),
    [({}, 64), ({"max_position_embeddings": 2048}, 2048), ({"max_position_embeddings": 8}, 64)],
)
def test_an_export_has_the_longer_context_of_the_run_and_its_model(tmp_path, released, expected):
    assert write(tmp_path, released=released)["max_position_embeddings"] == expected


def test_an_export_is_reported_when_it_is_complete(tmp_path, capsys):
    write(tmp_path)
    assert capsys.readouterr().err == f"exported to {tmp_path}\n"


@pytest.mark.parametrize(("ids", "expected"), [([], None), ([3], 3), ([3, 5], [3, 5])])
def test_an_export_says_which_tokens_end_a_text(tmp_path, ids, expected):
    assert write(tmp_path, FakeTokenizer(end_of_text=ids))["eos_token_id"] == expected


@pytest.mark.parametrize(
    ("stored", "ids", "expected"),
    [
        (None, [], None),
        (None, [3], {"eos_token_id": 3}),
        (None, [3, 5], {"eos_token_id": [3, 5]}),
        ({"top_p": 0.5}, [3], {"top_p": 0.5, "eos_token_id": 3}),
        ({"eos_token_id": None}, [3], {"eos_token_id": 3}),
        ({"eos_token_id": [4, 3]}, [4, 3], {"eos_token_id": [4, 3]}),
        ({"top_p": 0.5}, [], {"top_p": 0.5}),
    ],
)  # fmt: skip
def test_an_export_also_says_it_where_transformers_looks_first(tmp_path, stored, ids, expected):
    files = {} if stored is None else {"generation_config.json": json.dumps(stored)}
    write(tmp_path, FakeTokenizer(end_of_text=ids, content={"json": "{}", "files": files}))
    path = tmp_path / "generation_config.json"
    assert (json.loads(path.read_text(encoding="utf-8")) if path.exists() else None) == expected


def test_an_export_has_the_files_that_its_tokenizer_came_with(tmp_path):
    """Word for word, as long as all they say is true."""
    tokenizer = FakeTokenizer(end_of_text=[3], content={"json": "{}", "files": dict(COMPANIONS)})
    write(tmp_path, tokenizer)
    for name, text in COMPANIONS.items():
        assert (tmp_path / name).read_bytes().decode("utf-8") == text
    assert tokenizer.content["files"] == COMPANIONS, "as it was"


@pytest.mark.parametrize(
    ("change", "block_size", "expected"),
    [
        ({}, 65, {"model_max_length": 65}),
        ({"model_max_length": 1e30}, 65, {"model_max_length": 1e30}),
        ({"model_max_length": None}, 65, {"model_max_length": None}),
        ({"auto_map": {"AutoTokenizer": ["mine.Words", None]}}, 64, {}),
    ],
)
def test_what_is_no_longer_true_of_those_files_is_changed(tmp_path, change, block_size, expected):
    old = {**json.loads(COMPANIONS["tokenizer_config.json"]), "chat_template": "世", **change}
    files = {"tokenizer_config.json": json.dumps(old)}
    tokenizer = FakeTokenizer(content={"json": "{}", "files": files})
    write(tmp_path, tokenizer, block_size=block_size)
    new = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del old["model_max_length"]
    old.pop("auto_map", None)
    assert new == {"model_max_length": 64, **old, **expected}


def test_a_qwen2_with_other_tokens_than_qwen_is_noticed(tmp_path, capsys):
    files = {"tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'}
    for name, content, said in (
        ("own", {"json": "{}"}, True), ("qwen", {"json": "{}", "files": files}, False)
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        write(tmp_path / name, FakeTokenizer(content=content), qkv_bias=True)
        assert capsys.readouterr().err.startswith("notice: --export ") == said
    (tmp_path / "llama").mkdir()
    write(tmp_path / "llama", FakeTokenizer(content={"json": "{}"}))
    assert "notice" not in capsys.readouterr().err


def test_an_export_of_characters_has_its_characters_instead_of_a_tokenizer(tmp_path):
    tokenizer = FakeTokenizer("char", 4, '\n"a世', end_of_text=())
    config = write(tmp_path, tokenizer)
    assert config["characters"] == '\n"a世'
    assert config["eos_token_id"] is None
    assert not (tmp_path / "tokenizer.json").exists()
    released = llama_files.read_config(tmp_path)
    assert (released["characters"], released["tokenizer"]) == ('\n"a世', "char")


def test_an_export_that_fails_leaves_no_weights(tmp_path, capsys):
    """Those come last, so that a folder with weights has everything."""
    (tmp_path / "config.json").mkdir()
    line = refused(write, tmp_path)
    assert line.startswith(f"--export {tmp_path}: can't save config.json (")
    assert list(tmp_path.glob("model*")) == []
    assert "exported" not in capsys.readouterr().err


# ---- layers, windows and flags


def test_layer_types_must_be_a_list(tmp_path):
    line = refused(lambda: read(tmp_path, layer_types=5))
    assert line.endswith("its layer_types are 5, not a list")


def test_a_mistral_has_a_sliding_window_unless_it_says_otherwise(tmp_path):
    line = refused(lambda: read(tmp_path, model_type="mistral", num_key_value_heads=3))
    assert "it has sliding windows" in line


def test_a_mistake_beside_a_tokenizer_names_its_flag(tmp_path):
    save_tokenizer(tmp_path)
    write_json(tmp_path / "config.json", {"vocab_size": "9"})
    line = refused(llama_files.read_tokenizer, tmp_path, "--tokenizer")
    assert line.startswith(f"--tokenizer {tmp_path / 'config.json'}: its vocab_size is '9', ")
