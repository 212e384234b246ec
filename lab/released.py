"""released.py: the speed and memory of released models in v11c and in transformers.

The weights are random, so nothing is downloaded: this makes a folder with the settings of a
released model, and both programs load it and continue the same prompt greedily. They take turns,
each in a process of its own. Memory is the peak of the process minus what it used before it began
to load the weights.

Run it:   python lab/released.py
          python lab/released.py --model qwen3-0.6b --weights bfloat16
"""

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are one folder up

import torch
from tqdm import tqdm

import data
from data import setting
from lab.bench import be_quiet, peak_memory
from part7_released import v11c_llama_weights as v11c

# The sizes in the config.json of each model on the Hugging Face hub.
MODELS = {
    "smollm2-135m": {
        "model_type": "llama", "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "hidden_size": 576, "intermediate_size": 1536,
        "vocab_size": 49_152, "rms_norm_eps": 1e-5, "rope_theta": 100_000,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
        "vocab_size": 151_936, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000,
        "max_position_embeddings": 40_960, "tie_word_embeddings": True,
    },
}
PROGRAMS = ["v11c_llama_weights", "transformers"]
PROMPT_LENGTH = 16  # tokens


@dataclass
class Config:
    """What to measure and how often."""

    model: str = setting("whose sizes", "smollm2-135m", choices=list(MODELS))
    weights: str = setting("dtype of the file", "float32", choices=["float32", "bfloat16"])
    max_new_tokens: int = setting("tokens to generate", 50, least=1)
    rounds: int = setting("turns of each program", 3, least=1)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")


@dataclass
class Turn:
    """What a turn measured: tokens/s, and gigabytes, None on systems that don't count them."""

    tokens_per_second: float
    gigabytes: float | None


def make_folder(folder: Path, config: dict) -> None:
    """Write config.json and model.safetensors with random weights, as transformers does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, config["dtype"])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model.save_pretrained(folder)


def take_turn(program: str, folder: Path, cfg: Config) -> Turn:
    """Load the model in folder with one of the programs, and let it generate."""
    if program == "transformers":
        from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    vocab_size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    idx = torch.randint(vocab_size, (1, PROMPT_LENGTH), device=cfg.device)  # (1, PROMPT_LENGTH)
    before = peak_memory(cfg.device)
    if program == "transformers":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(cfg.device).eval()
        how = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(idx)}

        def generate(n: int) -> torch.Tensor:
            return model.generate(idx, max_new_tokens=n, pad_token_id=0, **how)
    else:
        flags = ["--init_from", str(folder), "--sample_only", "--device", cfg.device]
        settings, _, released = v11c.read_settings([*flags, "--temperature", "0"])
        model = v11c.make_model(settings, released, vocab_size).eval()

        def generate(n: int) -> torch.Tensor:
            return torch.cat([idx, *model.stream(idx, n, settings)], dim=1)  # (1, T + n)

    generate(2)[0, 0].item()  # to warm up
    start = time.perf_counter()
    generate(cfg.max_new_tokens)[0, 0].item()  # which waits for the device
    speed = cfg.max_new_tokens / (time.perf_counter() - start)
    after = peak_memory(cfg.device)
    return Turn(speed, None if after is None else after - before)


def table(turns: dict[str, list[Turn]], n_parameters: int, cfg: Config) -> str:
    """The results in Markdown: how they were measured, then a row for each program."""
    lines = [
        f"{cfg.model}, {n_parameters:,} parameters in {cfg.weights}: {cfg.max_new_tokens} tokens "
        f"after {PROMPT_LENGTH}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"on {cfg.device}. Tokens/s: the median of {cfg.rounds} turns, lowest and highest.",
        "",
        "| program | tokens/s | lowest to highest | memory |",
        "|---|---:|---:|---:|",
    ]
    for program, results in turns.items():
        speeds = [turn.tokens_per_second for turn in results]
        memory = "-"
        if all(turn.gigabytes is not None for turn in results):
            memory = f"{max(turn.gigabytes for turn in results):.2f} GB"
        lines.append(
            f"| `{program}` | {median(speeds):.1f} | {min(speeds):.1f} to {max(speeds):.1f} | "
            f"{memory} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure as the flags in argv say, and print the table."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        turns = {program: [] for program in PROGRAMS}
        with TemporaryDirectory() as name:
            folder = Path(name)
            config = MODELS[cfg.model] | {"dtype": cfg.weights}
            with ProcessPoolExecutor(1, get_context("spawn"), be_quiet) as process:
                process.submit(make_folder, folder, config).result()
            for program in tqdm(PROGRAMS * cfg.rounds, desc="turns"):
                with ProcessPoolExecutor(1, get_context("spawn"), be_quiet) as process:
                    result = process.submit(take_turn, program, folder, cfg).result()
                turns[program].append(result)
            settings, _, released = v11c.read_settings(["--init_from", str(folder)])
        with torch.device("meta"):
            model = v11c.LanguageModel(settings, released["vocab_size"])
        print(table(turns, sum(p.numel() for p in model.parameters()), cfg))


if __name__ == "__main__":
    main()
