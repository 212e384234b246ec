"""support/gpt2_files.py: settings, vocabularies and exports, and what is wrong with them.

How weights are found and read is tested in test_model_files.py. That the models compute what they
should is tested in test_v8d_gpt2_weights.py.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import refused_input as refused
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as TokenizerFile
from tokenizers import pre_tokenizers

import data
from data import token_files
from support import gpt2_files, model_files

CONFIG = {
    "model_type": "gpt2", "n_layer": 2, "n_head": 3, "n_embd": 18, "n_positions": 5,
    "vocab_size": 97,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """GPT-2's vocabulary has 97 tokens here."""
    monkeypatch.setattr(gpt2_files, "N_VOCAB", 97)


def ascii_encoding():
    """97 tokens: 95 characters, one of two, and an end of text."""
    ranks = {bytes([byte]): i for i, byte in enumerate([10, *range(32, 126)])}
    ranks[b"he"] = 95
    special = {"<|endoftext|>": 96}
    return tiktoken.Encoding("97", pat_str=".+|\n", mergeable_ranks=ranks, special_tokens=special)


CORPUS = Path(data.__file__).with_name("tinyshakespeare.txt").read_text(encoding="utf-8")


def make_weights():
    """Some of the weights of a model, with the names and shapes of the files."""
    torch.manual_seed(1)
    shapes = {
        "wte.weight": (7, 3), "wpe.weight": (5, 3), "h.0.attn.c_attn.weight": (3, 9),
        "h.0.attn.c_attn.bias": (9,), "ln_f.weight": (3,),
    }  # fmt: skip
    return {name: torch.randn(shape) for name, shape in shapes.items()}


# ---- folders and downloads


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gpt2", "openai-community/gpt2"), ("gpt2-medium", "openai-community/gpt2-medium"),
        ("gpt2-large", "openai-community/gpt2-large"), ("gpt2-xl", "openai-community/gpt2-xl"),
        ("distilgpt2", "distilbert/distilgpt2"), ("microsoft/DialoGPT-small",) * 2,
        ("openai-community/gpt2",) * 2,
    ],
)  # fmt: skip
def test_a_released_model_is_downloaded_from_its_repository(
    tmp_path, monkeypatch, name, repository
):
    def download(*args):
        assert args == (name, repository, ["config.json"], ["tokenizer.json", "vocab.json"])
        return tmp_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files, "download", download)
    assert gpt2_files.find_folder(name) == tmp_path


def test_a_folder_comes_before_a_model_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files, "download", lambda *_: pytest.fail("no need"))
    (tmp_path / "gpt2").mkdir()
    assert gpt2_files.find_folder("gpt2") == Path("gpt2")
    assert gpt2_files.find_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["gpt3", "a/b/c", "/missing", "owner/a b", "model.safetensors"])
def test_another_name_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files, "download", lambda *_: pytest.fail("no need"))
    (tmp_path / "model.safetensors").write_bytes(b"a file")
    line = refused(gpt2_files.find_folder, name)
    released = "gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2"
    remedy = 'give a folder, one of these, or a repository, "owner/name"'
    assert line == f"--init_from {name}: no such folder, and not one of {released}; {remedy}"


# ---- config.json


def write_config(folder: Path, config) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt"])
def test_a_configuration_is_read_by_our_names(tmp_path, kind):
    write_config(tmp_path, {**CONFIG, "model_type": kind, "dtype": "float32", "n_inner": None})
    assert gpt2_files.read_config(tmp_path, kind) == {
        "n_layer": 2, "n_head": 3, "n_embd": 18, "block_size": 5,
        "folder": tmp_path, "tokenizer": "gpt2", "characters": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu_pytorch_tanh", "n_inner": 72, "layer_norm_epsilon": 1e-05},
        {"afn": "gelu"},
        {"scale_attn_weights": True, "tie_word_embeddings": True, "add_cross_attention": False},
        {"reorder_and_upcast_attn": True},
    ],
)
def test_a_configuration_may_say_what_our_model_does_anyway(tmp_path, change):
    write_config(tmp_path, CONFIG | change)
    assert gpt2_files.read_config(tmp_path)["n_embd"] == 18


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "bert"}, "its model_type is 'bert', not 'gpt2'; v8d_gpt2_weights.py loads"),
        ({"model_type": "openai-gpt"}, "its model_type is 'openai-gpt', not 'gpt2'; "),
        ({"model_type": None}, "its model_type is None, "),
        ({"model_type": ["gpt2"]}, "its model_type is ['gpt2'], "),
        ({"n_head": "two"}, "its n_head is 'two', not an integer from 1 to "),
        ({"n_head": True}, "its n_head is True, not an integer from 1 to "),
        ({"n_head": 5}, "its n_embd is not a multiple of its n_head"),
        ({"n_layer": 0}, "its n_layer is 0, not an integer from 1 to "),
        ({"n_layer": 1001}, "its n_layer is 1001, "),
        ({"n_embd": 18.0}, "its n_embd is 18.0, not an integer from 1 to "),
        ({"n_embd": 3 * 10**12}, "its n_embd is 3000000000000, "),
        ({"n_positions": None}, "its n_positions is None, not an integer from 1 to "),
        ({"vocab_size": [97]}, "its vocab_size is [97], not an integer from 1 to "),
        ({"n_inner": 64}, "its n_inner is 64, but this model has only 4 * n_embd"),
        ({"activation_function": "relu"}, "its activation_function is 'relu', but this model has"),
        ({"activation_function": "gelu"}, "its activation_function is 'gelu', but this model has"),
        ({"afn": "swish"}, "its afn is 'swish', but this model has only 'gelu'"),
        ({"layer_norm_epsilon": 1e-3}, "its layer_norm_epsilon is 0.001, but this model has only "),
        ({"layer_norm_epsilon": "1e-5"}, "its layer_norm_epsilon is '1e-5', but this model has"),
        ({"scale_attn_weights": False}, "its scale_attn_weights is False, but this model has only"),
        ({"scale_attn_by_inverse_layer_idx": True}, "its scale_attn_by_inverse_layer_idx is True,"),
        ({"reorder_and_upcast_attn": 2}, "its reorder_and_upcast_attn is 2, but this model has "),
        ({"add_cross_attention": True}, "its add_cross_attention is True, but this model has only"),
        ({"tie_word_embeddings": False}, "its tie_word_embeddings is False, but this model has"),
        ({"characters": ["a", "b"]}, "its characters aren't in order"),
        ({"characters": None}, "its characters aren't in order"),
        ({"characters": "ba"}, "its characters aren't in order"),
    ],
)
def test_a_model_unlike_ours_is_refused(tmp_path, change, said):
    path = write_config(tmp_path, CONFIG | change)
    assert refused(gpt2_files.read_config, tmp_path).startswith(f"--init_from {path}: {said}")


@pytest.mark.parametrize("name", ["model_type", *gpt2_files.SIZES])
def test_a_configuration_without_a_size_is_refused(tmp_path, name):
    config = dict(CONFIG)
    del config[name]
    path = write_config(tmp_path, config)
    line = refused(gpt2_files.read_config, tmp_path)
    assert line.startswith(f"--init_from {path}: its {name} is None, ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON (Expecting value: "),
        (b'{"model_type": "gpt2",', "not JSON (Expecting property name "),
        (b"\xff\xfe{}", "not JSON ('utf-8' codec can't decode byte 0xff "),
        (b"[" * 200_000, "not JSON ("),
        (b"[]", "should hold a JSON object"),
        (b'"gpt2"', "should hold a JSON object"),
        (b"null", "should hold a JSON object"),
        (b"{}", "its model_type is None, not 'gpt2'; v8d_gpt2_weights.py loads 'gpt2'"),
        (None, "can't read it (No such file or directory)"),
    ],
    ids=["empty", "half", "UTF-16", "deep", "list", "string", "null", "nothing", "missing"],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, said):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    assert refused(gpt2_files.read_config, tmp_path).startswith(f"--init_from {path}: {said}")


# ---- the vocabulary


def test_gpt2_has_the_tokens_of_its_tokenizer():
    assert token_files.N_VOCAB == 50_257


@pytest.mark.parametrize(
    ("n_vocab", "n_released"), [(97, 97), (97, 128), (50_257, 50_304), (64, 64)]
)
def test_a_vocabulary_may_be_padded_to_a_multiple_of_64(tmp_path, monkeypatch, n_vocab, n_released):
    monkeypatch.setattr(gpt2_files, "N_VOCAB", n_vocab)
    write_config(tmp_path, CONFIG | {"vocab_size": n_released})
    assert gpt2_files.read_config(tmp_path)["tokenizer"] == "gpt2"


@pytest.mark.parametrize(
    ("n_vocab", "n_released"),
    [(97, 96), (97, 98), (97, 127), (97, 192), (64, 128), (50_257, 97), (50_257, 40_478)],
)
def test_another_vocabulary_is_refused(tmp_path, monkeypatch, n_vocab, n_released):
    monkeypatch.setattr(gpt2_files, "N_VOCAB", n_vocab)
    path = write_config(tmp_path, CONFIG | {"vocab_size": n_released})
    said = f"its vocabulary has {n_released:,} tokens, the tokenizer {n_vocab:,}; "
    assert refused(gpt2_files.read_config, tmp_path).startswith(f"--init_from {path}: {said}")


def test_the_vocabulary_may_be_characters(tmp_path):
    for n_released in (3, 64):
        write_config(tmp_path, CONFIG | {"characters": "\nab", "vocab_size": n_released})
        released = gpt2_files.read_config(tmp_path)
        assert (released["tokenizer"], released["characters"]) == ("char", "\nab")
    path = write_config(tmp_path, CONFIG | {"characters": "\nab"})
    said = "its vocabulary has 97 tokens, the tokenizer 3; "
    assert refused(gpt2_files.read_config, tmp_path).startswith(f"--init_from {path}: {said}")


def save_tokens(folder: Path, name: str, tokens) -> Path:
    """Write the file in which a folder has its tokens."""
    content = {"model": {"vocab": tokens}} if name == "tokenizer.json" else tokens
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_as_many_tokens_of_another_language_are_refused(tmp_path, name):
    write_config(tmp_path, CONFIG)
    tokens = {"!": 0, "\u0120the": 262, "ale": 1000, "hello": 31_373, "\u0120gazed": 50_255}
    save_tokens(tmp_path, name, tokens)
    assert gpt2_files.read_config(tmp_path)["tokenizer"] == "gpt2"
    for others in ({**tokens, "\u0120the": 263}, {"o": 262}, {}, [], None):
        path = save_tokens(tmp_path, name, others)
        line = refused(gpt2_files.read_config, tmp_path)
        assert line.startswith(f"--init_from {path}: ")
        if name == "tokenizer.json" or isinstance(others, dict):
            assert "its tokens aren't those of GPT-2" in line
    write_config(tmp_path, CONFIG | {"characters": "\nab", "vocab_size": 3})
    assert gpt2_files.read_config(tmp_path)["tokenizer"] == "char", "the file doesn't count"


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's files")
def test_gpt2_has_the_tokens_that_are_compared():
    encoding = token_files.load_encoding()
    letters = gpt2_files.byte_letters()
    for token, rank in gpt2_files.SOME_TOKENS.items():
        content = encoding.decode_single_token_bytes(rank)
        assert "".join(letters[byte] for byte in content) == token


# ---- model.safetensors


def read(folder: Path, stored: dict, own: dict):
    save_file(stored, folder / "model.safetensors")
    return dict(gpt2_files.read_weights(folder, own))


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


# ---- exports


@dataclass
class Tokenizer:
    """What of a tokenizer an export depends on."""

    name: str
    n_vocab: int
    characters: str = ""
    encoding: tiktoken.Encoding = field(default_factory=ascii_encoding)


@dataclass
class Config:
    """The settings that an export depends on."""

    export: str
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 18
    block_size: int = 5


def write(folder: Path, tokenizer: Tokenizer | None = None, **changes) -> dict:
    """Export some weights; return what config.json says."""
    tokenizer = tokenizer or Tokenizer("gpt2", 97)
    gpt2_files.write_model(Config(str(folder)), make_weights(), tokenizer, **changes)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_an_export_has_what_a_folder_of_transformers_has(tmp_path):
    config = write(tmp_path)
    ends = {"bos_token_id": 96, "eos_token_id": 96}
    assert config == CONFIG | ends | {"architectures": ["GPT2LMHeadModel"]}
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert_equal(load_file(tmp_path / "model.safetensors"), make_weights())
    generation = (tmp_path / "generation_config.json").read_text(encoding="utf-8")
    assert json.loads(generation) == ends


def test_an_export_of_gpt1_says_so(tmp_path):
    config = write(tmp_path, kind="openai-gpt")
    assert config["model_type"] == "openai-gpt"
    assert config["architectures"] == ["OpenAIGPTLMHeadModel"]


def test_each_byte_has_the_letter_that_tokenizers_gives_it():
    letters = gpt2_files.byte_letters()
    assert sorted(letters) == list(range(256))
    assert sorted(letters.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("by", ["few tokens", "GPT-2"])
def test_an_export_has_a_tokenizer_that_gives_the_same_ids(tmp_path, by):
    """tiktoken's files aren't those that other programs read."""
    text = "The fox, then 12 hens;  don't\n\n wheeze!"
    encoding = ascii_encoding()
    if by == "GPT-2":
        if "TIKTOKEN_CACHE_DIR" not in os.environ:
            pytest.skip("needs GPT-2's files")
        encoding = token_files.load_encoding()
        text = f"{text} Zoë 世界 \U0001f600 \u00a0\u3000\t\r\n x१२ I'LL" + CORPUS[:50_000]
        text += "".join(chr(i) for i in range(0x80, 0x900))  # with almost all bytes of UTF-8
    write(tmp_path, Tokenizer("gpt2", encoding.n_vocab, encoding=encoding))
    tokenizer = TokenizerFile.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(text).ids == encoding.encode_ordinary(text)
    assert tokenizer.decode(encoding.encode_ordinary(text)) == text
    assert tokenizer.get_vocab_size() == encoding.n_vocab
    assert tokenizer.encode("<|endoftext|>he").ids[0] == encoding.eot_token


def test_an_export_of_characters_has_its_characters_and_no_end_of_text(tmp_path):
    config = write(tmp_path, Tokenizer("char", 4, ["\n", '"', "a", "世"]))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert config["characters"] == '\n"a世'
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (4, None, None)
    assert gpt2_files.read_config(tmp_path)["characters"] == '\n"a世'
















