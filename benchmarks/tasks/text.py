"""WikiText-2 (the small split) in 1,024 BPE tokens and a two-layer Transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qnoise import PQ
from tasks.task import Batch, Batches, TaskModule

CONTEXT, VOCABULARY, BATCH = 64, 1024, 8


class Attention(nn.Module):
    """Causal self-attention with four projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (
            f(x).view(n, length, self.heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(n, length, width))


class Layer(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.norm1(x)))
        return x + self.dropout(self.fc2(F.relu(self.fc1(self.norm2(x)))))


class GPT(nn.Module):
    """658,944 parameters at width 128 and two layers; sinusoidal positions, untied output."""

    def __init__(self, width: int = 128, layers: int = 2, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.embed_tokens = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width, heads, 4 * width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output_proj = nn.Linear(width, VOCABULARY, bias=False)
        self.dropout = nn.Dropout(dropout)
        angles = torch.arange(CONTEXT)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], 1), persistent=False)
        nn.init.normal_(self.embed_tokens.weight, 0, width**-0.5)
        nn.init.normal_(self.output_proj.weight, 0, width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.embed_tokens(ids) * self.width**0.5 + self.positions[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return self.output_proj(self.norm(x))


class TextModule(TaskModule):
    """Language modelling; `test/metric` is the perplexity per token."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def on_test_start(self) -> None:
        self.nats, self.n_tokens = 0.0, 0

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        self.nats += F.cross_entropy(self(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        self.n_tokens += y.numel()

    def on_test_epoch_end(self) -> None:
        self.log("test/metric", math.exp(min(self.nats / self.n_tokens, 60.0)))


class Text:
    """Data and settings. 1 epoch, 640 steps of finetuning."""

    name, metric, higher_is_better = "text", "token perplexity", False
    epochs, finetune_steps = 1, 640
    noise_rate, refresh = 0.05, 100

    def __init__(self, root: Path, work: Path) -> None:
        cache = work / "tokens.pt"  # the trainer of the tokenizer breaks ties anew in every process
        if not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            torch.save(_tokens(root / "wikitext-2"), cache)
        self.train, self.test = torch.load(cache, weights_only=True)

    def module(self, width: int = 1) -> TextModule:
        return TextModule(GPT(width=128 * width, heads=4 * width), lr=6e-3, weight_decay=0.01)

    def train_batches(self, seed: int) -> Batches:
        return Batches(self._epoch, (len(self.train) - CONTEXT) // CONTEXT // BATCH, seed)

    def test_batches(self) -> Batches:
        n = (len(self.test) - 1) // CONTEXT * CONTEXT
        x, y = self.test[:n].view(-1, CONTEXT).split(64), self.test[1 : n + 1].view(-1, CONTEXT).split(64)
        return Batches(lambda _: iter(zip(x, y, strict=True)), len(x), 0)

    def _epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        n = (len(self.train) - 1 - offset) // CONTEXT
        x = self.train[offset : offset + n * CONTEXT].view(n, CONTEXT)
        y = self.train[offset + 1 : offset + 1 + n * CONTEXT].view(n, CONTEXT)
        n_batches = (len(self.train) - CONTEXT) // CONTEXT // BATCH
        for chosen in torch.randperm(n, generator=generator)[: n_batches * BATCH].split(BATCH):
            yield x[chosen], y[chosen]

    @staticmethod
    def pq(size: str) -> dict[str, PQ | None]:
        """The reference's block sizes and centroids, a quarter of them for "S"."""
        k = {"L": 256, "S": 64, "XS": 16}[size]
        return {"*.fc?": PQ(8, k), "*": PQ(4, k)}


def _tokens(folder: Path) -> tuple[Tensor, Tensor]:
    """Train and test ids int64 `[n]` under a BPE of 1,024 tokens that is trained on the training text."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the text task needs tokenizers: pip install tokenizers") from error
    texts = [(folder / f"small_{part}.txt").read_text(encoding="utf8").split("\n")[:-1] for part in ("train", "eval")]
    tokenizer = Tokenizer(models.BPE(unk_token="<?>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<?>", "<unk>", "<eos>"],
        end_of_word_suffix="_",
        limit_alphabet=200,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[0], trainer)
    end = tokenizer.token_to_id("<eos>")
    train, test = (
        torch.tensor([i for encoding in tokenizer.encode_batch(lines) for i in (*encoding.ids, end)]) for lines in texts
    )
    return train, test
