"""runs.py: train the scripts for the page, each in a process of its own, and keep their results.

A run is the one that the script's own command makes on a CPU, with the prompt "ROMEO:". Its results
are kept in out/page/, so a second build of the page doesn't train again. A run is repeated when the
script or its settings change; changes in its docstring, its comments, data/, support/ and this file
don't count.
"""

import base64
import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # the scripts are up there

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
from lab.common import generate, load_corpus, train, whole_loss
from lab.ladder import load, part_of, source, split_docstring

# The models that the page brings to life.
LIVE = ["bigram", "v2_single_head", "v3_multi_head", "v4_feedforward", "v5_gpt"]
# These scripts train exactly as another one, so they get its weights instead of training again.
# tests/test_page.py shows that they do.
SAME_TRAINING = {
    "v7a_sampling": "v6d_checkpoints",
    "v7b_kv_cache": "v6d_checkpoints",
    "v8d_gpt2_weights": "v8c_gpt2",
    "v8e_distributed": "v8c_gpt2",
    "v11a_llama": "v9d_gqa",
    "v11b_tokenizer": "v9d_gqa",
    "v11c_llama_weights": "v9d_gqa",
    "v11d_chat": "v9d_gqa",
}
WITH_WEIGHTS = [*LIVE, *sorted(set(SAME_TRAINING.values()))]  # whose weights are kept
SNAPSHOTS = [0, 10, 30, 100, 300, 1000]  # steps after which v5's text is shown
SAMPLE_LENGTH = 300  # characters
# v10c by the clock isn't reproducible. This has the sizes of --minutes 1.59 and the steps that such
# a run took (part6_speedrun/README.md). More loss estimates only make a finer curve.
SPEEDRUN_MINUTES = 1.59
SPEEDRUN = {"max_iters": 1451, "eval_interval": 400}


@dataclass
class Job:
    """A run to make: its name, the script to train, and settings in place of the defaults."""

    name: str
    script: str
    settings: dict[str, Any]


@dataclass
class Result:
    """What a run showed. Losses are in nats per token, seconds include the loss estimates.

    trained_as: the script whose training this is, if it isn't the run's own.
    """

    name: str
    script: str
    fingerprint: str
    settings: dict[str, Any]
    parameters: int
    history: list[tuple[int, float, float]]
    val_loss: float
    characters_per_token: float
    tokens_per_step: int
    seconds: float
    sample: str
    machine: str
    threads: int
    pytorch: str
    trained_as: str = ""

    @property
    def loss_per_character(self) -> float:
        """The loss on the whole validation split in nats per character."""
        return self.val_loss / self.characters_per_token

    @property
    def steps(self) -> int:
        """The number of training steps."""
        return self.history[-1][0]


def jobs_for(scripts: list[str], changes: dict[str, Any]) -> list[Job]:
    """The runs that the page needs of the scripts; changes: settings for all of them."""
    jobs = []
    for script in scripts:
        if part_of(script) == 8:  # learns from conversations, and completes no text
            continue
        settings = {"seed": 1337, "prompt": "ROMEO:"}
        if script == "v10c_speedrun":
            settings.update(load(script).SHORT, **SPEEDRUN)
        jobs.append(Job(script, script, {**settings, **changes}))
        if script == "v5_gpt":
            for steps in SNAPSHOTS:
                if "max_iters" in changes and steps >= changes["max_iters"]:
                    continue  # a run to try the page out is shorter than that
                snapshot = {**settings, **changes, "max_iters": steps}
                jobs.append(Job(f"{script}-{steps}", script, snapshot))
    return jobs


def training_of(job: Job) -> Job | None:
    """The job whose weights this one gets, or None if it trains itself."""
    if job.script not in SAME_TRAINING:
        return None
    other = SAME_TRAINING[job.script]
    return Job(other, other, job.settings)


def fingerprint(job: Job) -> str:
    """A checksum of what a run depends on: the script's code and its settings."""
    settings = json.dumps(job.settings, sort_keys=True)
    parts = f"{code_of(job.script)}\n{settings}"
    training = training_of(job)
    if training is not None:
        parts += fingerprint(training)
    return hashlib.sha256(parts.encode()).hexdigest()


def code_of(script: str) -> str:
    """The code of a script without its docstring, its comments and its empty lines."""
    _, code = split_docstring(script, source(script))
    # A comment is alone in its line or two spaces away from the code.
    lines = [re.sub(r"(^|  )\s*#.*$", "", line) for line in code.splitlines()]
    return "\n".join(line for line in lines if line.strip())


def load_result(job: Job, folder: Path) -> Result | None:
    """The results of an earlier run in folder, or None if there are none of this code."""
    try:
        values = json.loads((folder / f"{job.name}.json").read_text(encoding="utf-8"))
        result = Result(**values)
    except (OSError, ValueError, TypeError):  # not there, not JSON, written by another version
        return None
    if result.fingerprint != fingerprint(job):
        return None
    if job.name in LIVE and not (folder / f"{job.name}.pt").exists():
        return None
    return result


def save_result(result: Result, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the results of a run, and the weights if the page needs them, to folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if result.name in WITH_WEIGHTS:
        torch.save(weights, folder / f"{result.name}.pt")
    # The results come last and appear all at once, so an interrupted run leaves none.
    unfinished = folder / f"{result.name}.unfinished"
    text = json.dumps(dataclasses.asdict(result), indent=1, ensure_ascii=False)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(folder / f"{result.name}.json")


def pack_results(results: list[Result]) -> str:
    """The results as JSON that is safe inside a <script> element."""
    values = [dataclasses.asdict(result) for result in results]
    return json.dumps(values, ensure_ascii=False).replace("<", "\\u003c")


def unpack_page(page: str, jobs: list[Job], folder: Path) -> None:
    """Write the results of jobs that a page was built from to folder, unless it has them.

    page: the text of the page, which has their results and, rounded to float16, their weights.
    """
    packed, weights = json_in(page, "runs"), json_in(page, "live-weights")
    if packed is None or weights is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {job.name: job for job in jobs}
    for values in packed:
        name = values["name"]
        if name not in wanted or values["fingerprint"] != fingerprint(wanted[name]):
            continue  # of other code or with other settings
        if load_result(wanted[name], folder) is not None:
            continue
        (folder / f"{name}.pt").unlink(missing_ok=True)  # the weights of another run
        if name in LIVE:
            state = {}
            for key, tensor in weights["models"][name].items():
                numbers = np.frombuffer(base64.b64decode(tensor["float16"]), dtype="<f2")
                state[key] = torch.tensor(numbers.astype(np.float32)).view(tensor["shape"])
            torch.save(state, folder / f"{name}.pt")
        text = json.dumps(values, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def json_in(page: str, element: str) -> Any:
    """The content of the JSON <script> element with this id, or None if the page has none."""
    found = re.search(rf'<script type="application/json" id="{element}">(.*?)</script>', page)
    if found is None:
        return None
    try:
        return json.loads(found[1])
    except ValueError:  # a damaged page
        return None


def load_config(job: Job) -> Any:
    """The script's Config with its defaults for a CPU and the settings of the job."""
    script = load(job.script)
    return data.read_flags(script.Config, "", ["--device", "cpu"], saved=job.settings)


def load_model(name: str, folder: Path, changes: dict[str, Any]) -> nn.Module:
    """One of the models in LIVE with the weights in folder, in eval mode."""
    [job] = [job for job in jobs_for([name], changes) if job.name == name]
    cfg = load_config(job)
    script = load(name)
    weights = torch.load(folder / f"{name}.pt", weights_only=True)
    vocab_size = len(weights["token_embedding.weight"])
    model = script.LanguageModel(cfg, vocab_size)
    model.load_state_dict(weights)
    return model.eval()


def train_job(job: Job, folder: Path) -> tuple[Result, dict[str, torch.Tensor]]:
    """Train a script as its own main() does, sample from the model, and measure its loss.

    folder: where the weights are if the script trains exactly as another one.
    Returns what it showed, and the weights.
    """
    script = load(job.script)
    cfg = load_config(job)
    tokenizer, train_data, val_data = load_corpus(script, cfg)
    prompt = torch.tensor([tokenizer.encode(cfg.prompt)])  # (1, T)
    val_tokens = val_data[np.arange(len(val_data))]  # (n,), also if val_data is a TokenFile
    token_length = len(tokenizer.decode(val_tokens.tolist())) / len(val_tokens)

    torch.manual_seed(cfg.seed)
    model = script.LanguageModel(cfg, tokenizer.n_vocab)
    training = training_of(job)
    if training is None:
        start = time.perf_counter()
        history = train(script, model, train_data, val_data, cfg)
        seconds = time.perf_counter() - start
    else:
        made = load_result(training, folder)
        history, seconds = made.history, made.seconds
        model.load_state_dict(torch.load(folder / f"{training.name}.pt", weights_only=True))

    model.eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    val_loss = whole_loss(model, val_data, cfg)
    if hasattr(cfg, "sample_only"):  # from v6d on, main() does this before it samples
        torch.manual_seed(cfg.seed)
    n_tokens = round(SAMPLE_LENGTH / token_length)
    sample = generate(script, model, prompt, n_tokens, cfg)  # (1, T + n_tokens)
    result = Result(
        name=job.name,
        script=job.script,
        fingerprint=fingerprint(job),
        settings=job.settings,
        parameters=sum(p.numel() for p in model.parameters()),
        history=history,
        val_loss=val_loss,
        characters_per_token=token_length,
        tokens_per_step=cfg.batch_size * cfg.block_size * getattr(cfg, "grad_accum_steps", 1),
        seconds=seconds,
        sample=tokenizer.decode(sample[0].tolist()),
        machine=machine_name(),
        threads=torch.get_num_threads(),
        pytorch=torch.__version__,
        trained_as=training.name if training is not None else "",
    )
    return result, weights


def machine_name() -> str:
    """The name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def run_all(
    scripts: list[str], changes: dict[str, Any], folder: Path, retrain: bool = False
) -> dict[str, Result]:
    """The results of all runs of the scripts, by name; trains those that folder lacks.

    retrain: train all of them.
    """
    jobs = jobs_for(scripts, changes)
    missing = [job for job in jobs if retrain or load_result(job, folder) is None]
    missing = with_trainings(missing, folder)
    for job in missing:
        load_config(job)  # finds mistakes in the settings before anything is trained
    if missing:
        with tqdm(total=len(missing), desc="runs") as bar:
            for job in missing:
                bar.set_postfix_str(job.name)
                run_in_process(job, folder)
                bar.update()
    return {job.name: load_result(job, folder) for job in jobs}


def with_trainings(jobs: list[Job], folder: Path) -> list[Job]:
    """The jobs, and before each one the job whose weights it gets if folder lacks them."""
    result = []
    for job in jobs:
        training = training_of(job)
        if training is not None and training not in result:
            has_weights = (folder / f"{training.name}.pt").exists()
            if load_result(training, folder) is None or not has_weights:
                result.append(training)
        if job not in result:
            result.append(job)
    return result


def run_in_process(job: Job, folder: Path) -> None:
    """Train in a new process, since some scripts change settings of the whole process.

    Exits with the status of that process if it fails; it has already said why.
    """
    description = json.dumps(dataclasses.asdict(job))
    command = [sys.executable, __file__, description, str(folder.resolve())]
    # Its progress bar belongs below the one of all runs, and leaves nothing behind.
    environment = {**os.environ, "TQDM_POSITION": "1", "TQDM_LEAVE": "0"}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode < 0:
        why = "its process was killed, probably for lack of memory"
        raise data.InputError(f"{job.name}: {why}; close other programs and run this again")
    if done.returncode > 0:
        sys.exit(done.returncode)


def main(argv: list[str]) -> None:
    """Make one run. argv: the job as JSON, and the folder for its results."""
    with data.command_line():
        description, folder = argv
        job = Job(**json.loads(description))
        result, weights = train_job(job, Path(folder))
        save_result(result, weights, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
