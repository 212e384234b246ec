"""v6d_checkpoints.py: training runs that can be stopped, killed and resumed.

A checkpoint holds everything that the rest of a run depends on: the weights, the optimizer's
averages, the number of steps taken (which sets the learning rate) and the state of the random
number generator (which draws the batches and the dropout). A run that continues from there takes
exactly the steps that it would have taken: on a CPU, the weights are the same to the last bit. (On
a GPU, sums are rounded in a varying order, and the GPU's own generator for dropout isn't saved.)

By default, each run gets a new folder in out/. A checkpoint also holds the settings and the
characters, so --resume and --sample_only need no other flags.

    latest.pt    the state after the last loss estimate, or when the run was stopped with Ctrl-C
    best.pt      the state with the lowest validation loss; the sample comes from it
    log.jsonl    one line of JSON for each loss estimate

A file is replaced once the new one is complete, so a crash or a full disk can't harm the old one.

New here: save_checkpoint, --out_dir, --resume, --sample_only, Ctrl-C that saves.
Run it:   python part2_training/v6d_checkpoints.py
          python part2_training/v6d_checkpoints.py --resume    # after Ctrl-C, or with more steps
          python part2_training/v6d_checkpoints.py --sample_only --prompt "ROMEO:"
Expect:   a validation loss of about 1.59 with the CPU defaults, as in v6c_recipe.py.
Diff:     git diff --no-index part2_training/v6c_recipe.py part2_training/v6d_checkpoints.py
"""

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import setting
from support import checkpoints, hardware, runs


@dataclass
class Config:
    """The settings. Each one is also a command-line flag with the same name.

    In shape comments, B is the number of windows in a batch, T the number of tokens in a window,
    and V the size of the vocabulary.
    """

    batch_size: int = setting("windows in a batch", gpu=64, cpu=24, least=1)
    block_size: int = setting("longest context, in tokens", gpu=256, cpu=64, least=1)
    n_embd: int = setting("width of the embeddings", gpu=384, cpu=96, least=1)
    n_head: int = setting("attention heads in a layer", gpu=6, cpu=4, least=1)
    n_layer: int = setting("number of blocks", gpu=6, cpu=3, least=1, most=1000)
    dropout: float = setting("probability of dropping an activation", gpu=0.2, cpu=0.0, below=1)
    learning_rate: float = setting("learning rate", gpu=1e-3, cpu=3e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps", gpu=5000, cpu=3600)
    eval_interval: int = setting("steps between loss estimates", gpu=500, cpu=400, least=1)
    eval_iters: int = setting("maximum batches in a loss estimate", gpu=200, cpu=75, least=1)
    seed: int = setting("random seed", 1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, or a text file", "shakespeare")
    prompt: str = setting("text that the sample starts with", "\n")
    max_new_tokens: int = setting("tokens to generate after the prompt", 500)
    dtype: str = setting("dtype of matmuls", "auto", choices=["auto", "float32", "bfloat16"])
    compile: bool = setting("use torch.compile", gpu=hardware.has_triton(), cpu=False)
    weight_decay: float = setting("weight decay of matrices and embeddings", gpu=0.1, cpu=0.3)
    warmup_iters: int = setting("steps of linear warm-up", 100)
    out_dir: str = setting("folder of the run, by default a new one in out/", "")
    resume: bool = setting("continue the newest run, or that of --out_dir", False)
    sample_only: bool = setting("only sample, from the best weights of a run", False)


# The settings that determine the shapes of the weights.
SIZES = ["block_size", "n_embd", "n_head", "n_layer"]


def choose_dtype(cfg: Config) -> torch.dtype:
    """The dtype for matmuls, torch.float32 or torch.bfloat16, as --dtype says.

    Raises data.InputError if --dtype is bfloat16 and the hardware doesn't support it.
    """
    supported = hardware.supports_bfloat16(cfg.device)
    if cfg.dtype == "bfloat16" and not supported:
        why = f"not supported on {cfg.device}; use --dtype float32"
        raise data.InputError(f"--dtype bfloat16: {why}")
    if cfg.dtype == "auto" and supported:
        # On a CPU, converting the numbers costs a narrow model more than the matmuls gain.
        is_narrow = cfg.device.startswith("cpu") and cfg.n_embd < 128
        return torch.float32 if is_narrow else torch.bfloat16
    return torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32


def autocast(cfg: Config) -> torch.autocast:
    """A context in which matmuls run in the dtype of choose_dtype; the weights stay float32."""
    device_type = torch.device(cfg.device).type
    enabled = choose_dtype(cfg) == torch.bfloat16
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled)


class MultiHeadAttention(nn.Module):
    """n_head heads and a projection of their outputs (Vaswani et al. 2017, section 3.2.2).

    Maps float (B, T, n_embd) to the same shape. Raises data.InputError if n_head doesn't divide
    n_embd.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        if cfg.n_embd % cfg.n_head != 0:
            raise data.InputError(f"--n_embd {cfg.n_embd}: not a multiple of --n_head {cfg.n_head}")
        self.n_head = cfg.n_head
        self.query_key_value = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.projection = nn.Linear(cfg.n_embd, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, n_embd = x.shape
        query, key, value = self.query_key_value(x).split(n_embd, dim=-1)  # (B, T, n_embd) each
        # Cut the last dimension into heads, and put the heads next to the batch: attention works on
        # the last two dimensions and treats all those before them as the batch.
        query = query.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        key = key.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        value = value.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        # The call below is a function, so model.eval() doesn't switch off its dropout.
        dropout_p = self.dropout.p if self.training else 0.0
        x = F.scaled_dot_product_attention(  # (B, n_head, T, head_size)
            query, key, value, dropout_p=dropout_p, is_causal=True
        )
        # Put the outputs of the heads side by side again.
        x = x.transpose(1, 2).reshape(B, T, n_embd)  # (B, T, n_embd)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class FeedForward(nn.Module):
    """A two-layer network applied to each position separately (Vaswani et al. 2017, section 3.3).

    Maps float (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.expansion = nn.Linear(cfg.n_embd, 4 * cfg.n_embd)
        self.projection = nn.Linear(4 * cfg.n_embd, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.expansion(x))  # (B, T, 4 * n_embd)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class Block(nn.Module):
    """Attention, then a feed-forward network, each with LayerNorm on its input.

    LayerNorm has the same place as in GPT-2 (Radford et al. 2019, section 2.3). Maps float
    (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd)
        self.attention = MultiHeadAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd)
        self.feed_forward = FeedForward(cfg)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Residual connections: each part adds to x instead of replacing it.
        x = x + self.attention(self.ln_1(x))  # (B, T, n_embd)
        x = x + self.feed_forward(self.ln_2(x))  # (B, T, n_embd)
        return x


class LanguageModel(nn.Module):
    """Predicts the next token at every position of a window."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.block_size = cfg.block_size
        self.token_embedding = nn.Embedding(vocab_size, cfg.n_embd)  # (V, n_embd)
        self.position_embedding = nn.Embedding(cfg.block_size, cfg.n_embd)  # (block_size, n_embd)
        self.blocks = nn.Sequential(*[Block(cfg) for _ in range(cfg.n_layer)])
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, vocab_size)
        # Small weights and zero biases, as in GPT (Radford et al. 2018, section 4.1). LayerNorm's
        # weights have one dimension, so they keep PyTorch's initial value, 1.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits, float (B, T, V), and their mean loss in nats, or None without targets.

        idx: token ids, int64 (B, T). targets: the token that follows each of them, int64 (B, T).
        """
        positions = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, n_embd)
        x = self.blocks(x)  # (B, T, n_embd)
        # Each block has added to x, so normalise the sum before the last layer reads it.
        x = self.ln_f(x)  # (B, T, n_embd)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # cross_entropy expects the V logits of a prediction in dimension 1; here they are in
        # dimension 2. Each position of each window is a prediction, so make them B * T rows.
        rows = logits.flatten(0, 1)  # (B * T, V)
        loss = F.cross_entropy(rows, targets.flatten())  # ()
        return logits, loss

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Append max_new_tokens sampled tokens to idx, int64 (B, T) -> (B, T + max_new_tokens)."""
        for _ in tqdm(range(max_new_tokens), desc="generating", delay=1, leave=False):
            # There are embeddings for block_size positions only, so older tokens drop out of view.
            context = idx[:, -self.block_size :]  # (B, min(T, block_size))
            logits, _ = self(context)  # (B, min(T, block_size), V)
            # Only the last position predicts a token that isn't there yet.
            probabilities = F.softmax(logits[:, -1], dim=-1)  # (B, V)
            next_token = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
            idx = torch.cat((idx, next_token), dim=1)  # (B, T + 1)
        return idx


def get_batch(tokens: np.ndarray, cfg: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random windows and their targets, int64 (B, T) each, without making a GPU wait."""
    x, y = data.get_batch(tokens, cfg.batch_size, cfg.block_size, "cpu")  # (B, T) each
    if cfg.device.startswith("cuda"):
        # From pinned memory, the GPU fetches a contiguous tensor itself while Python goes on.
        x = x.contiguous().pin_memory()  # (B, T)
        y = y.contiguous().pin_memory()  # (B, T)
    x = x.to(cfg.device, non_blocking=True)  # (B, T)
    y = y.to(cfg.device, non_blocking=True)  # (B, T)
    return x, y


@torch.no_grad()
def estimate_loss(model: LanguageModel, tokens: np.ndarray, cfg: Config) -> float:
    """Return the mean loss in nats over the same windows each time, to make estimates comparable.

    The windows lie side by side and cover the split or, if it is larger than eval_iters batches,
    are spread evenly over it.
    """
    model.eval()  # switches off dropout, which v5 introduces
    n_windows = (len(tokens) - 1) // cfg.block_size
    n_chosen = min(n_windows, cfg.eval_iters * cfg.batch_size)
    # The numbers of the windows, evenly spread; all of them if n_chosen is n_windows.
    chosen = np.arange(n_chosen) * n_windows // n_chosen  # (n_chosen,)
    starts = chosen * cfg.block_size  # (n_chosen,)
    total = 0.0
    for i in range(0, n_chosen, cfg.batch_size):
        if runs.stop_requested():
            raise KeyboardInterrupt  # train catches it and saves
        batch = starts[i : i + cfg.batch_size]
        x, y = data.get_windows(tokens, batch, cfg.block_size, cfg.device)  # (B, T) each
        with autocast(cfg):
            _, loss = model(x, y)  # ()
        total += loss.item() * len(batch)  # the last batch may be smaller
    model.train()
    return total / n_chosen


def make_optimizer(model: LanguageModel, cfg: Config) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019) of matrices and embeddings."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.99), fused=True)


def learning_rate_at(step: int, cfg: Config) -> float:
    """The learning rate of a step: linear warm-up, then a cosine (Loshchilov and Hutter 2017)."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    progress = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)  # 0 to 1
    return cfg.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def shorten_warmup(cfg: Config) -> Config:
    """Cut a warm-up that would take more than half of the run down to a tenth of the run."""
    if cfg.warmup_iters <= cfg.max_iters / 2 or cfg.max_iters == 0:
        return cfg
    n = cfg.max_iters // 10
    why = f"a warm-up of {cfg.warmup_iters} steps would take up most of a run of {cfg.max_iters}"
    print(f"notice: {why}, so --warmup_iters is {n}", file=sys.stderr)
    return replace(cfg, warmup_iters=n)


def save_checkpoint(
    name: str, model: LanguageModel, optimizer: torch.optim.AdamW, step: int, log: list[dict],
    run: dict | None,
) -> None:
    """Write the state between two steps to the folder of the run; without a run, do nothing."""
    if run is None:
        return
    state = {
        **run,  # the folder, the script, the settings, the characters, a checksum of the text
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],  # the averages
        "step": step,
        "random_state": torch.get_rng_state(),
        "log": log,
    }
    checkpoints.write_checkpoint(state, Path(run["folder"], name))


def wait_for(device: str) -> None:
    """Wait until a GPU has finished everything that is queued on it; Python runs ahead of it."""
    torch.zeros(1, device=device).item()  # can't be read before the work ahead of it is done


def train(
    model: LanguageModel, train_data: np.ndarray, val_data: np.ndarray, cfg: Config,
    run: dict | None = None, state: dict | None = None,
) -> list[tuple[int, float, float]]:
    """Train the model; return the history as (step, train loss, validation loss), in nats.

    Raises data.InputError if a loss is no longer finite. run: what checkpoints say about the run;
    without it, nothing is saved. state: the checkpoint to continue from.
    """
    hardware.keep_freed_memory()
    cfg = shorten_warmup(cfg)
    optimizer = make_optimizer(model, cfg)
    if cfg.compile:
        hardware.check_compiler(cfg.device)
    compiled_model = torch.compile(model) if cfg.compile else model  # with the same weights
    history = []
    first_step, log = 0, []
    if state is not None:
        checkpoints.load_averages(optimizer, state)
        torch.set_rng_state(state["random_state"])
        first_step, log = state["step"], state["log"]
        history = [(entry["step"], entry["train_loss"], entry["val_loss"]) for entry in log]
    warming_up = True
    clock_step, clock_start = 0, time.perf_counter()
    with tqdm(total=cfg.max_iters, initial=first_step, desc="training") as bar:
        for step in range(first_step, cfg.max_iters + 1):  # the last round only estimates the loss
            if runs.stop_requested():
                save_checkpoint("latest.pt", model, optimizer, step, log, run)
                raise KeyboardInterrupt
            is_known = len(log) > 0 and log[-1]["step"] == step  # from the checkpoint
            if not is_known and (step % cfg.eval_interval == 0 or step == cfg.max_iters):
                speed = 0.0  # tokens/s, unknown before the second step
                if not warming_up and step > clock_step:
                    wait_for(cfg.device)
                    seconds = time.perf_counter() - clock_start
                    speed = (step - clock_step) * cfg.batch_size * cfg.block_size / seconds
                try:
                    train_loss = estimate_loss(model, train_data, cfg)
                    val_loss = estimate_loss(model, val_data, cfg)
                except KeyboardInterrupt:
                    save_checkpoint("latest.pt", model, optimizer, step, log, run)
                    raise
                history.append((step, train_loss, val_loss))
                report = f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
                if speed > 0:
                    report += f", {speed:,.0f} tokens/s"
                tqdm.write(report)
                if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                    raise data.InputError("the loss is not finite; try a smaller --learning_rate")
                is_best = all(val_loss < entry["val_loss"] for entry in log)
                losses = {"step": step, "train_loss": train_loss, "val_loss": val_loss}
                log.append({**losses, "tokens_per_second": speed})
                save_checkpoint("latest.pt", model, optimizer, step, log, run)
                if is_best:
                    save_checkpoint("best.pt", model, optimizer, step, log, run)
                if run is not None:
                    checkpoints.write_log(log, Path(run["folder"], "log.jsonl"))
                clock_step, clock_start = step, time.perf_counter()
            if step == cfg.max_iters:
                break

            x, y = get_batch(train_data, cfg)  # (B, T) each
            with autocast(cfg):
                _, loss = compiled_model(x, y)  # ()
            optimizer.zero_grad()  # backward() adds to the gradients, so clear the last step's
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, cfg)
            optimizer.step()
            bar.update()
            if warming_up:  # the first step compiles the model, so the clock starts after it
                wait_for(cfg.device)
                clock_step, clock_start = step + 1, time.perf_counter()
                warming_up = False
    return history


def in_units(loss: float) -> str:
    """Return a loss, in nats per character, also in bits per character and as perplexity.

    Perplexity is exp(loss): the model is as unsure as if it guessed among that many characters.
    """
    perplexity = math.exp(min(loss, 700))  # more would overflow
    bits = loss / math.log(2)
    return f"{loss:.4f} nats per character, {bits:.3f} bits, perplexity {perplexity:.4g}"


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():
        cfg = data.read_flags(Config, __doc__, argv)
        state = None
        if cfg.resume or cfg.sample_only:
            state = runs.find_checkpoint(cfg)
            # Now its settings take the place of the defaults.
            cfg = data.read_flags(Config, __doc__, argv, saved=state["config"], fixed=SIZES)
        torch.manual_seed(cfg.seed)

        text = "" if cfg.sample_only else data.load_text(cfg.data)
        tokenizer = data.CharTokenizer(text if state is None else state["characters"])
        start = cfg.prompt if cfg.prompt else "\n"  # generation needs a token to start from
        prompt = torch.tensor([tokenizer.encode(start)], device=cfg.device)  # (1, T)

        model = LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"model: {n_parameters:,} parameters, on {cfg.device}", file=sys.stderr)
        if state is not None:
            checkpoints.load_weights(model, state)
        if not cfg.sample_only:
            run = runs.describe_run(cfg, __file__, tokenizer, text, state)
            train_data, val_data = data.split(tokenizer.encode(text), cfg.block_size, cfg.data)
            sizes = f"{len(train_data):,} for training, {len(val_data):,} for validation"
            print(f"tokens: {sizes}", file=sys.stderr)
            with runs.running(run):
                train(model, train_data, val_data, cfg, run, state)
            state = checkpoints.read_checkpoint(Path(run["folder"], "best.pt"))
            checkpoints.load_weights(model, state)
            val_loss = state["log"][-1]["val_loss"]  # the best one: best.pt's log ends there
            print(f"validation loss {in_units(val_loss)}")

        print(f"sampling with the weights after step {state['step']}", file=sys.stderr)
        torch.manual_seed(cfg.seed)  # so that --sample_only repeats this sample
        model.eval()
        sample = model.generate(prompt, cfg.max_new_tokens)  # (1, T + max_new_tokens)
        print(tokenizer.decode(sample[0].tolist()))


if __name__ == "__main__":
    main()
