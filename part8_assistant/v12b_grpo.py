"""v12b_grpo.py: reinforcement learning from answers that can be checked.

Fine-tuning imitates. Half of the demonstrations of a sum give the answer at once, half work it out
first. The model does one or the other; when it answers at once, it's mostly wrong. From here on,
it is shown no answers. For each question, it draws several of its own. A checker gives those with
the right number a reward of 1, and the others 0. Answers with more than the average reward of their
question become more likely:

    advantage = reward - mean reward of the answers to the same question
    loss      = -1/n * sum of advantage * ln p(t | tokens before t), over the n tokens t of answers

That is v12a's loss with the model's own answers, each with a weight that may be negative. Nobody
rewards working a sum out; it wins because it's right more often. The method is group-relative
policy optimisation (Shao et al. 2024, section 4.1). The paper also divides each advantage by the
standard deviation of its group, and takes the mean over the tokens of each answer, then the mean of
these. Two of its parts aren't needed here: clipping, which is for several updates with the same
answers, and a penalty for moving away from the fine-tuned model, in case rewards can be cheated.

New here: advantages_of, grpo_step, and the settings from --sft_iters on.
Run it:   python part8_assistant/v12b_grpo.py
          python part8_assistant/v12b_grpo.py --base out/sums   # a run of v12a --task sums
Expect:   after step 1500, 50% to 82% of the answers to unseen sums are right; after step 1800,
          97% to 98%.
Diff:     git diff --no-index part8_assistant/v12a_sft.py part8_assistant/v12b_grpo.py
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import setting, tasks
from support import answers, batches, checkpoints, hardware, runs
from support.stopwatch import Stopwatch


@dataclass
class Config:
    """The settings. Each one is also a command-line flag with the same name.

    A setting has one default, or one for GPUs and one for the CPU. In shape comments, B is the
    number of windows in a batch, T the number of tokens in a window, and V the size of the
    vocabulary; "()" is a single number, and "(B, T) each" the shape of every tensor on the left.
    """

    batch_size: int = setting("windows in a batch", 64, least=1)
    block_size: int = setting("longest conversation, in tokens", 40, least=1)
    n_embd: int = setting("width of the embeddings", gpu=384, cpu=96, least=1)
    n_head: int = setting("attention heads in a layer", gpu=6, cpu=4, least=1)
    n_layer: int = setting("number of blocks", gpu=6, cpu=3, least=1, most=1000)
    dropout: float = setting("probability of dropping an activation", gpu=0.2, cpu=0.0, below=1)
    learning_rate: float = setting("learning rate", gpu=1e-3, cpu=3e-3, least=1e-9, below=1)
    max_iters: int = setting("training steps, the first sft_iters included", 1800)
    eval_interval: int = setting("steps between loss estimates", 100, least=1)
    eval_iters: int = setting("batches in a loss estimate", 25, least=1)
    seed: int = setting("random seed", 1337)
    device: str = setting("cuda, mps, cpu or any other PyTorch device", gpu="cuda", cpu="cpu")
    data: str = setting("shakespeare, python, or a text file", "shakespeare")
    dtype: str = setting("dtype of matmuls", "auto", choices=["auto", "float32", "bfloat16"])
    compile: bool = setting("use torch.compile", gpu=hardware.can_compile(), cpu=False)
    weight_decay: float = setting("weight decay of matrices and embeddings", gpu=0.1, cpu=0.3)
    warmup_iters: int = setting("steps of linear warm-up", 100)
    out_dir: str = setting("folder of the run, by default a new one in out/", "")
    resume: bool = setting("continue the newest run, or that of --out_dir", False)
    sample_only: bool = setting("only sample, from the best weights of a run", False)
    temperature: float = setting("divides the logits; 0 is greedy", 0.0)
    top_k: int = setting("sample from the k most likely tokens; 0 is off", 0)
    top_p: float = setting("total probability of tokens to choose from; 1 is off", 1.0, most=1)
    repetition_penalty: float = setting("for repeated tokens; 1 is off", 1.0, least=0.01, most=100)
    n_kv_head: int = setting("key/value heads in a layer", 2, least=1)
    task: str = setting("what is asked", "sums", choices=["words", "sums"])
    n_demonstrations: int = setting("conversations to learn from, at most", 40_000, least=1)
    conversations: str = setting("file with a conversation in JSON on each line", "")
    base: str = setting("folder of a run of v12a, instead of supervised fine-tuning", "")
    ask: str = setting("a question to answer, instead of test questions", "")
    sft_iters: int = setting("steps of supervised fine-tuning, before reinforcement", 1500)
    n_answers: int = setting("answers to a question, which are compared", 8, least=2)
    rl_learning_rate: float = setting("learning rate of reinforcement", 1e-4, least=1e-9, below=1)


SIZES = ["n_embd", "n_head", "n_layer", "n_kv_head"]  # a run that is resumed must keep these


class ChatTokenizer(data.CharTokenizer):
    """Characters, and three special tokens: no text is encoded as one of them."""

    name = "chat"  # as a checkpoint says it

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.user, self.assistant, self.end = range(self.n_vocab, self.n_vocab + 3)
        self.n_vocab += 3

    def decode(self, tokens: list[int]) -> str:
        """Token ids to text, without the special tokens."""
        return super().decode([token for token in tokens if token < self.user])


def encode(conversation: list, tokenizer: ChatTokenizer) -> tuple[list[int], list[int]]:
    """The token ids of a conversation, and the same ids as targets, -100 where nothing is learned.

    batches.pad shifts the targets by one. The mean of cross_entropy leaves out those that are -100.
    """
    tokens, targets = [], []
    for message in conversation:
        is_answer = message["role"] == "assistant"
        speaker = tokenizer.assistant if is_answer else tokenizer.user
        content = [*tokenizer.encode(message["content"], flag="--ask"), tokenizer.end]
        tokens += [speaker, *content]
        targets += [-100, *content] if is_answer else [-100] * (1 + len(content))
    return tokens, targets


def choose_dtype(cfg: Config) -> str:
    """Return the dtype of matmuls, "float32" or "bfloat16"; auto means the faster of them.

    Raises data.InputError if --dtype is bfloat16 and the hardware doesn't support it.
    """
    supported = hardware.supports_bfloat16(cfg.device)
    if cfg.dtype == "bfloat16" and not supported:
        why = f"not supported on {cfg.device}; use --dtype float32"
        raise data.InputError(f"--dtype bfloat16: {why}")
    if cfg.dtype != "auto":
        return cfg.dtype
    # On a CPU, converting the numbers costs a narrow model more than the matmuls gain.
    bfloat16_is_slower = cfg.device.startswith("cpu") and cfg.n_embd < 128
    if supported and not bfloat16_is_slower:
        return "bfloat16"
    return "float32"


def autocast(cfg: Config) -> torch.autocast:
    """A context in which matmuls run in cfg.dtype; the weights stay float32."""
    device_type = torch.device(cfg.device).type
    enabled = cfg.dtype == "bfloat16"
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled)


class KVCache:
    """The keys and values of the last block_size tokens that one layer has processed."""

    def __init__(self, cfg: Config, batch_size: int, device: torch.device) -> None:
        shape = (batch_size, cfg.n_kv_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.keys = torch.empty(shape, device=device)  # (B, n_kv_head, block_size, head_size)
        self.values = torch.empty(shape, device=device)  # (B, n_kv_head, block_size, head_size)
        self.length = 0  # the number of tokens so far, including those that were replaced

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add T keys and values, float (B, n_kv_head, T, head_size) each; return all that are kept.

        In a full cache, a token replaces the oldest. The order of the keys doesn't matter: their
        rotation says where they belong.
        """
        block_size = self.keys.shape[2]
        begin = self.length % block_size
        end = begin + key.shape[2]
        self.keys[:, :, begin:end] = key
        self.values[:, :, begin:end] = value
        self.length += key.shape[2]
        n_keys = min(self.length, block_size)
        keys = self.keys[:, :, :n_keys]  # (B, n_kv_head, n_keys, head_size)
        values = self.values[:, :, :n_keys]  # (B, n_kv_head, n_keys, head_size)
        return keys, values


def rotation_angles(positions: torch.Tensor, head_size: int) -> torch.Tensor:
    """The angles of all pairs at positions, int64 (T,): float (T, head_size // 2), in radians."""
    i = torch.arange(0, head_size, 2, device=positions.device)  # (head_size // 2,)
    frequencies = 1 / 10_000 ** (i / head_size)  # (head_size // 2,)
    return positions[:, None] * frequencies  # (T, head_size // 2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys, float (..., T, head_size); cos and sin: (T, head_size // 2) each.

    A pair is a number in the first half of the head and one in the second, as in the library
    transformers.
    """
    a, b = x.chunk(2, dim=-1)  # (..., T, head_size // 2) each
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # (..., T, head_size)
    # With autocast, x may be bfloat16, while cos and sin are float32.
    return rotated.to(x.dtype)  # (..., T, head_size)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight, float (..., size) (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))  # (size,)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.pow(2).mean(dim=-1, keepdim=True)  # (..., 1)
        return x * torch.rsqrt(mean_square + self.eps) * self.weight  # (..., size)


class MultiHeadAttention(nn.Module):
    """n_head heads and a projection of their outputs (Vaswani et al. 2017, section 3.2.2).

    Maps float (B, T, n_embd) to the same shape. Raises data.InputError if the heads can't have the
    same even size, or if n_kv_head doesn't divide n_head.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        if cfg.n_embd % cfg.n_head != 0:
            raise data.InputError(f"--n_embd {cfg.n_embd}: not a multiple of --n_head {cfg.n_head}")
        if cfg.n_embd // cfg.n_head % 2 != 0:
            why = f"not a multiple of 2 * --n_head {cfg.n_head}, but rotation needs pairs"
            raise data.InputError(f"--n_embd {cfg.n_embd}: {why}")
        if cfg.n_head % cfg.n_kv_head != 0:
            why = f"not a multiple of --n_kv_head {cfg.n_kv_head}"
            raise data.InputError(f"--n_head {cfg.n_head}: {why}")
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head
        kv_size = cfg.n_embd // cfg.n_head * cfg.n_kv_head
        self.query = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.key = nn.Linear(cfg.n_embd, kv_size, bias=False)
        self.value = nn.Linear(cfg.n_embd, kv_size, bias=False)
        self.projection = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None = None
    ) -> torch.Tensor:
        B, T, n_embd = x.shape
        query = self.query(x)  # (B, T, n_embd)
        key = self.key(x)  # (B, T, n_kv_head * head_size)
        value = self.value(x)  # (B, T, n_kv_head * head_size)
        # Cut the last dimension into heads, and put the heads next to the batch: attention works on
        # the last two dimensions and treats all those before them as the batch.
        query = query.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head_size)
        key = key.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, n_kv_head, T, head_size)
        value = value.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, n_kv_head, T, head_size)
        query = rotate(query, cos, sin)  # (B, n_head, T, head_size)
        key = rotate(key, cos, sin)  # (B, n_kv_head, T, head_size)
        if cache is not None:
            key, value = cache.append(key, value)  # (B, n_kv_head, n_keys, head_size) each
        # scaled_dot_product_attention is a function, not a module, so model.eval() doesn't switch
        # off its dropout.
        dropout_p = self.dropout.p if self.training else 0.0
        # With is_causal, query 0 only sees key 0. A single new query is query 0, but must see all.
        # With enable_gqa, n_head / n_kv_head neighbouring query heads share a key/value head.
        x = F.scaled_dot_product_attention(  # (B, n_head, T, head_size)
            query, key, value, dropout_p=dropout_p, is_causal=T > 1, enable_gqa=True
        )
        # Put the outputs of the heads side by side again.
        x = x.transpose(1, 2).reshape(B, T, n_embd)  # (B, T, n_embd)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class FeedForward(nn.Module):
    """A gated two-layer network applied to each position separately (Shazeer 2020, section 2).

    Maps float (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        hidden = 8 * math.ceil(cfg.n_embd / 3)  # two thirds of 4 * n_embd, in multiples of 8
        self.gate = nn.Linear(cfg.n_embd, hidden, bias=False)
        self.expansion = nn.Linear(cfg.n_embd, hidden, bias=False)
        self.projection = nn.Linear(hidden, cfg.n_embd, bias=False)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.gate(x)) * self.expansion(x)  # (B, T, hidden)
        return self.dropout(self.projection(x))  # (B, T, n_embd)


class Block(nn.Module):
    """Attention, then a feed-forward network, each with RMSNorm on its input.

    GPT-2 has its LayerNorms in the same place (Radford et al. 2019, section 2.3). Maps float
    (B, T, n_embd) to the same shape.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(cfg.n_embd)
        self.attention = MultiHeadAttention(cfg)
        self.norm_2 = RMSNorm(cfg.n_embd)
        self.feed_forward = FeedForward(cfg)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None = None
    ) -> torch.Tensor:
        # Residual connections: each part adds to x instead of replacing it.
        x = x + self.attention(self.norm_1(x), cos, sin, cache)  # (B, T, n_embd)
        x = x + self.feed_forward(self.norm_2(x))  # (B, T, n_embd)
        return x


class LanguageModel(nn.Module):
    """Predicts the next token at every position of a window."""

    def __init__(self, cfg: Config, vocab_size: int) -> None:
        super().__init__()
        self.block_size = cfg.block_size
        self.head_size = cfg.n_embd // cfg.n_head
        self.token_embedding = nn.Embedding(vocab_size, cfg.n_embd)  # (V, n_embd)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.norm_f = RMSNorm(cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        # Small weights, as in GPT (Radford et al. 2018, section 4.1). RMSNorm's have one dimension,
        # so they keep their initial value, 1.
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits, float (B, T, V), and their mean loss in nats (None without targets).

        idx: token ids, int64 (B, T). targets: the token that follows each of them, int64 (B, T).
        caches: one for each block. They must be empty, unless idx is a single token.
        """
        n_old = 0 if caches is None else caches[0].length
        positions = torch.arange(n_old, n_old + idx.shape[1], device=idx.device)  # (T,)
        angles = rotation_angles(positions, self.head_size)  # (T, head_size // 2)
        cos, sin = angles.cos(), angles.sin()  # (T, head_size // 2) each
        x = self.token_embedding(idx)  # (B, T, n_embd)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, None if caches is None else caches[i])  # (B, T, n_embd)
        # Each block has added to x, so normalise the sum before the last layer reads it.
        x = self.norm_f(x)  # (B, T, n_embd)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # cross_entropy expects the V logits of a prediction in dimension 1; here they are in
        # dimension 2. Each position of each window is a prediction, so make them B * T rows.
        rows = logits.flatten(0, 1)  # (B * T, V)
        loss = F.cross_entropy(rows, targets.flatten())  # ()
        return logits, loss

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, cfg: Config) -> Iterator[torch.Tensor]:
        """Continue idx, int64 (B, T): yield each token, int64 (B, 1), as soon as it is chosen."""
        caches = [KVCache(cfg, len(idx), idx.device) for _ in self.blocks]
        for _ in range(max_new_tokens):
            # The model is trained on block_size positions, so older tokens drop out of view.
            context = idx[:, -self.block_size :]  # (B, min(T, block_size))
            if caches[0].length > 0:
                context = idx[:, -1:]  # (B, 1); the caches have the tokens before it
            logits, _ = self(context, caches=caches)  # (B, context.shape[1], V)
            # Only the last position predicts a token that isn't there yet.
            next_token = choose_token(logits[:, -1], idx, cfg)  # (B, 1)
            idx = torch.cat((idx, next_token), dim=1)  # (B, T + 1)
            yield next_token


def apply_repetition_penalty(logits: torch.Tensor, idx: torch.Tensor, r: float) -> torch.Tensor:
    """Lower the logits, float (B, V), of the tokens in idx, int64 (B, T)."""
    used = logits.gather(1, idx)  # (B, T), the same number each time a token occurs
    # Dividing a negative logit would raise it, so multiply.
    lowered = torch.where(used > 0, used / r, used * r)  # (B, T)
    return logits.scatter(1, idx, lowered)  # (B, V)


def apply_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Set the logits, float (B, V), that are below the k-th largest to -inf."""
    largest, _ = logits.topk(min(k, logits.shape[1]))  # (B, min(k, V))
    return logits.masked_fill(logits < largest[:, -1:], -math.inf)  # (B, V)


def apply_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the most likely tokens until their probabilities reach p; set other logits to -inf.

    logits: float (B, V), as is the result.
    """
    ascending, order = logits.sort(dim=1)  # (B, V) each
    # Drop tokens, the least likely first, while their probabilities add up to at most 1 - p.
    drop_sorted = ascending.softmax(dim=1).cumsum(dim=1) <= 1 - p  # (B, V)
    drop_sorted[:, -1] = False  # the most likely token stays, whatever p is
    drop = torch.zeros_like(drop_sorted).scatter(1, order, drop_sorted)  # (B, V), in order of ids
    return logits.masked_fill(drop, -math.inf)  # (B, V)


def choose_token(logits: torch.Tensor, idx: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Sample a token, int64 (B, 1), from logits, float (B, V). It comes after idx, int64 (B, T).

    Raises data.InputError if the largest logit isn't a finite number.
    """
    if not logits.amax(dim=1).isfinite().all():  # amax is NaN if any logit is
        raise data.InputError("the logits are not finite numbers; the weights may be damaged")
    if cfg.repetition_penalty != 1:
        logits = apply_repetition_penalty(logits, idx, cfg.repetition_penalty)  # (B, V)
    if cfg.temperature < 1e-6:  # 0 is greedy; dividing by nearly 0 could overflow
        return logits.argmax(dim=1, keepdim=True)  # (B, 1)
    logits = logits / cfg.temperature  # (B, V)
    if cfg.top_k > 0:
        logits = apply_top_k(logits, cfg.top_k)  # (B, V)
    if 0 < cfg.top_p < 1:
        logits = apply_top_p(logits, cfg.top_p)  # (B, V)
    probabilities = F.softmax(logits, dim=-1)  # (B, V)
    return torch.multinomial(probabilities, num_samples=1)  # (B, 1)


def answer(model: LanguageModel, chats: list, tokenizer: ChatTokenizer, cfg: Config) -> list[str]:
    """Answer the last question of each conversation, without showing the model the answer to it."""
    torch.manual_seed(cfg.seed)  # so that answers differ only if the weights do
    prompts = []
    for chat in chats:
        tokens, _ = encode(chat[:-1], tokenizer)
        prompts.append([*tokens, tokenizer.assistant])
    replies = answers.complete(model, prompts, tokenizer.end, cfg)
    return [tokenizer.decode(reply) for reply in replies]


@torch.no_grad()
def estimate_loss(model: LanguageModel, tokens: np.ndarray, cfg: Config) -> float:
    """Return the mean loss in nats over eval_iters batches; a single one is noisy.

    They are the same each time, so that a lower loss means better weights, not easier batches.
    """
    model.eval()  # switches off dropout, if the model has any
    losses = torch.zeros(cfg.eval_iters)  # (eval_iters,)
    for i in range(cfg.eval_iters):
        x, y = batches.get_spread_rows(  # (B, T) each
            tokens, i, cfg.eval_iters, cfg.batch_size, cfg.device
        )
        with autocast(cfg):
            _, loss = model(x, y)  # ()
        losses[i] = loss.item()
    model.train()
    return losses.mean().item()


def make_optimizer(model: LanguageModel, cfg: Config) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), with weight decay for matrices and embeddings only."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.99), fused=True)


def learning_rate_at(step: int, cfg: Config) -> float:
    """The learning rate of a step: linear warm-up, then a cosine (Loshchilov and Hutter 2017)."""
    if step >= cfg.sft_iters:  # reinforcement: a straight line to 0
        return cfg.rl_learning_rate * (cfg.max_iters - step) / (cfg.max_iters - cfg.sft_iters)
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    progress = (step - cfg.warmup_iters) / max(1, cfg.sft_iters - cfg.warmup_iters)  # 0 to 1
    return cfg.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tokens: np.ndarray, step: int,
    cfg: Config,
) -> None:
    """Move the weights a little, so that the loss on one random batch falls."""
    # The batch and the dropout of a step depend only on the run's seed and the step's number.
    torch.manual_seed(batches.mix_seed(cfg.seed, step))
    x, y = batches.get_random_rows(tokens, cfg.batch_size)  # (B, T) each
    x, y = hardware.to_device([x, y], cfg.device)  # (B, T) each
    with autocast(cfg):
        _, loss = model(x, y)  # ()
    update(model, optimizer, loss, step, cfg)


def advantages_of(rewards: torch.Tensor) -> torch.Tensor:
    """How much better each answer is than the average answer to its question.

    rewards: float (n_questions, n_answers).
    """
    return rewards - rewards.mean(dim=1, keepdim=True)  # (n_questions, n_answers)


def grpo_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, lessons: list,
    tokenizer: ChatTokenizer, step: int, cfg: Config,
) -> None:
    """Answer questions, several times each, and move the weights towards the better answers."""
    torch.manual_seed(batches.mix_seed(cfg.seed, step))
    n_questions = max(1, cfg.batch_size // cfg.n_answers)
    asked, prompts = [], []
    for row in torch.randint(len(lessons), (n_questions,)).tolist():
        tokens, _ = encode(lessons[row][:-1], tokenizer)
        asked += [lessons[row]] * cfg.n_answers
        prompts += [[*tokens, tokenizer.assistant]] * cfg.n_answers
    replies = answers.complete(model, prompts, tokenizer.end, cfg)  # token ids, with <end>
    right = [tasks.is_right(c, tokenizer.decode(r)) for c, r in zip(asked, replies, strict=True)]
    rewards = torch.tensor(right).float().view(n_questions, -1)  # (n_questions, n_answers)
    advantages = advantages_of(rewards).view(-1, 1)  # (B, 1)
    encoded = [(p + r, [-100] * len(p) + r) for p, r in zip(prompts, replies, strict=True)]
    examples = torch.from_numpy(batches.pad(encoded, cfg.block_size))  # (B, 2, T)
    x, y = examples.unbind(1)  # (B, T) each
    x, y, advantages = hardware.to_device([x, y, advantages], cfg.device)
    model.eval()  # no dropout: the probabilities are those with which the answers were drawn
    with autocast(cfg):
        logits, _ = model(x)  # (B, T, V)
        log_p = -F.cross_entropy(logits.transpose(1, 2), y, reduction="none")  # (B, T); 0 for -100
    loss = -(advantages * log_p).sum() / (y != -100).sum()  # ()
    update(model, optimizer, loss, step, cfg)


def update(
    model: LanguageModel, optimizer: torch.optim.Optimizer, loss: torch.Tensor, step: int,
    cfg: Config,
) -> None:
    """Move the weights a little, so that the loss falls."""
    optimizer.zero_grad()  # backward() adds to the gradients, so clear the last step's
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, cfg)
    optimizer.step()


def compile_model(model: LanguageModel, cfg: Config) -> Callable:
    """Return the model or, with --compile, a faster version of it with the same weights."""
    if not cfg.compile or not hardware.compiler_works(cfg.device):
        return model
    return torch.compile(model)


def checkpoint(model: LanguageModel, optimizer: torch.optim.Optimizer, step: int) -> dict:
    """What training needs to go on from a step; run.save adds the settings and the tokenizer."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],  # AdamW's m, v and step counts, no settings
        "step": step,  # the learning rate and the random numbers follow from it
    }


def restore(model: LanguageModel, optimizer: torch.optim.Optimizer, run: runs.Run) -> int:
    """Load what a checkpoint holds; return the number of the next step, 0 in a new run."""
    if run.is_new:
        return 0
    checkpoints.load_weights(model, run.saved)
    checkpoints.load_averages(optimizer, run.saved)
    return run.saved["step"]


def train(
    model: LanguageModel, train_data: np.ndarray, lessons: list, test: list,
    tokenizer: ChatTokenizer, cfg: Config, run: runs.Run,
) -> dict[int, tuple[float, float]]:
    """Train the model; return {step: (train loss, share of wrong answers)} of each estimate.

    Raises data.InputError if a loss is no longer finite.
    """
    hardware.keep_freed_memory()
    optimizer = make_optimizer(model, cfg)
    # Only for training: loss estimates are in eval mode, which would need a second compilation.
    compiled_model = compile_model(model, cfg)
    stopwatch = Stopwatch(cfg.device)
    first_step = max(restore(model, optimizer, run), cfg.sft_iters if cfg.base else 0)
    with tqdm(total=cfg.max_iters, initial=first_step, desc="training") as bar:
        for step in range(first_step, cfg.max_iters + 1):  # the last round only estimates the loss
            if step % cfg.eval_interval == 0 or step == cfg.max_iters:
                speed = stopwatch.stop() + answers.sampling_speed()  # of training and of drawing
                train_loss = estimate_loss(model, train_data, cfg)
                if not math.isfinite(train_loss):
                    raise data.InputError("the loss is not finite; try a smaller --learning_rate")
                replies = answer(model, test, tokenizer, cfg)
                wrong = tasks.share_wrong(test, replies)
                run.save(checkpoint(model, optimizer, step), train_loss, wrong)  # best: least wrong
                tqdm.write(f"step {step}: train loss {train_loss:.4f}, wrong {wrong:.4f}{speed}")
                tqdm.write(f"{tasks.describe(test, replies)}, {tasks.describe_style(replies)}")
                stopwatch.start()
            if step == cfg.max_iters:
                break
            if run.stop_requested():
                run.save_latest(checkpoint(model, optimizer, step))
                break

            if step < cfg.sft_iters:
                train_step(compiled_model, optimizer, train_data, step, cfg)
            else:
                grpo_step(compiled_model, optimizer, lessons, tokenizer, step, cfg)
            stopwatch.count(cfg.batch_size * cfg.block_size)  # ignores the first step
            bar.update()
    return run.history


def main(argv: list[str] | None = None) -> None:
    """Train a model, then print a sample. argv: the flags, by default those of the command line."""
    with data.command_line():  # a user's mistake prints one line, no traceback
        # saved is latest.pt with --resume, best.pt with --sample_only, and empty in a new run.
        cfg, saved = runs.read_settings(Config, __doc__, argv, SIZES)
        cfg = replace(cfg, dtype=choose_dtype(cfg))  # no longer "auto"
        torch.manual_seed(cfg.seed)

        text, lessons, test = tasks.load_conversations(cfg)  # the words asked about are in text
        tokenizer = ChatTokenizer(saved.get("characters", tasks.alphabet(text, lessons + test)))

        model = LanguageModel(cfg, tokenizer.n_vocab).to(cfg.device)
        n_parameters = sum(p.numel() for p in model.parameters())
        print(f"model: {n_parameters:,} parameters, {cfg.dtype}, on {cfg.device}", file=sys.stderr)
        if not cfg.sample_only:
            run = runs.Run(cfg, __file__, tokenizer, text, saved)  # a folder and its files
            if cfg.base and run.is_new:
                checkpoints.load_base(model, tokenizer, cfg, SIZES)
            train_data = batches.pad([encode(c, tokenizer) for c in lessons], cfg.block_size)
            sizes = f"{len(train_data):,} for training, {len(test):,} for validation"
            print(f"conversations: {sizes}", file=sys.stderr)
            with run:  # in here, Ctrl-C only asks train to stop
                # Here, answers are drawn from the model's own probabilities, in estimates, too.
                plain = replace(cfg, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
                train(model, train_data, lessons, test, tokenizer, plain, run)
        best = saved if cfg.sample_only else run.best()
        checkpoints.load_weights(model, best)

        print(f"sampling with the weights after step {best['step']}", file=sys.stderr)
        torch.manual_seed(cfg.seed)  # so that --sample_only repeats this sample
        asked = tasks.pick(test, cfg.ask)  # the question of --ask, or some of test
        tasks.print_answers(asked, answer(model, asked, tokenizer, cfg))


if __name__ == "__main__":
    main()
