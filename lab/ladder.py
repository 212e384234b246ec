"""What experiments on the ladder share: its rungs in order, their diffs, v5's weights for v6."""

import ast
import difflib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RUNGS = ["bigram", "v2_single_head", "v3_multi_head", "v4_feedforward", "v5_gpt"]
RUNGS += ["v6_fast", "v7_training", "v8_sampling", "v9_gpt2"]
PAIRS = list(zip(RUNGS, RUNGS[1:], strict=False))


def source(rung: str) -> str:
    """The text of a rung's file."""
    return (ROOT / f"{rung}.py").read_text(encoding="utf-8")


def code_lines(rung: str) -> list[str]:
    """The lines of a rung after its module docstring."""
    text = source(rung)
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


def changed_lines(before: str, after: str) -> int:
    """How many lines a diff of two rungs takes out or puts in, module docstrings left out."""
    diff = difflib.unified_diff(code_lines(before), code_lines(after), n=0, lineterm="")
    return sum(line[0] in "-+" for line in list(diff)[2:])  # below the names of the two files


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """v5's weights, or their gradients, under the names and in the shapes that they have in v6.

    The query weights of all heads, then the key weights, then the value weights make one matrix
    of (3 * n_embd, n_embd).
    """
    kept = {name: tensor for name, tensor in state.items() if ".heads." not in name}
    attentions = sorted({name.split(".heads.")[0] for name in state if ".heads." in name})
    for attention in attentions:
        heads = [name for name in state if name.startswith(f"{attention}.heads.")]
        parts = [n for part in ("query", "key", "value") for n in heads if f".{part}." in n]
        tensors = [state[name] for name in parts]  # (head_size, n_embd) each
        kept[f"{attention}.query_key_value.weight"] = torch.cat(tensors)  # (3 * n_embd, n_embd)
    return kept
