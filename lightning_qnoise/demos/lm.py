"""A causal Transformer language model of half a million parameters, built from torch's own layers.

It has what makes compression interesting: an embedding table tied to the output layer, attention with one
fused projection, and feed-forward layers; at the price of attention over a short, fixed context.
"""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from lightning_qnoise.demos.warmup import warmup_cosine

# A token must be louder than its position, and the tied output small at the start, or the first two hundred
# steps learn nothing but word frequencies. Chosen on the validation part of `ReferenceText`.
EMBED_STD, EMBED_GAIN, POSITION_GAIN = 0.05, 5.0, 0.02


class TransformerLM(pl.LightningModule):
    """A pre-norm Transformer that predicts the next token; the output layer shares the embedding's weight.

    Logs `train_loss`, `val_loss`, `val_perplexity`, `test_loss` and `test_perplexity`.

    Args:
        vocab_size: number of token ids.
        context: longest sequence, in tokens.
        d_model: width of the residual stream; even, and a multiple of `n_heads`.
        n_heads: attention heads.
        n_layers: Transformer layers.
        d_ffn: width of the feed-forward layers.
        dropout: rate of all dropouts.
        lr: peak learning rate of AdamW: a warm-up over a tenth of the steps, then a cosine to zero.
        weight_decay: of AdamW, on matrices only.

    Raises:
        ValueError: if `d_model` is odd or not a multiple of `n_heads`.

    Example:
        >>> lm = TransformerLM(vocab_size=100, context=16, d_model=32, n_heads=2, d_ffn=64)
        >>> lm(torch.zeros(2, 16, dtype=torch.int64)).shape
        torch.Size([2, 16, 100])
    """

    positions: Tensor

    def __init__(
        self,
        vocab_size: int = 1024,
        context: int = 64,
        d_model: int = 128,
        n_heads: int = 4,
        n_layers: int = 2,
        d_ffn: int = 512,
        dropout: float = 0.0,
        lr: float = 8e-3,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        if d_model % 2 or d_model % n_heads:
            raise ValueError(f"d_model={d_model} must be even and a multiple of n_heads={n_heads}; change one")
        self.save_hyperparameters()
        self.context = context
        self.lr = lr
        self.weight_decay = weight_decay
        self.embed = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embed.weight, std=EMBED_STD)
        self.register_buffer("positions", POSITION_GAIN * sinusoids(context, d_model), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d_model, n_heads, d_ffn, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.head.weight = self.embed.weight
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()

    def forward(self, ids: Tensor) -> Tensor:
        """Map int64 ids `[batch, length]` to logits `[batch, length, vocab_size]`.

        Raises:
            ValueError: if `length` is above `context`.
        """
        length = ids.shape[1]
        if length > self.context:
            raise ValueError(f"{length} tokens exceed context={self.context}; shorten the input")
        x = self.dropout(EMBED_GAIN * self.embed(ids) + self.positions[:length])
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch of `(ids, targets)`."""
        ids, targets = batch
        loss = F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `val_loss` and `val_perplexity`."""
        self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `test_loss` and `test_perplexity`."""
        self._evaluate(batch, "test", self.test_perplexity)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW with a linear warm-up and a cosine to zero over the steps of the fit."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, self.lr, betas=(0.9, 0.98), weight_decay=self.weight_decay)
        return warmup_cosine(optimizer, self.trainer, warmup=0.1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, perplexity: Perplexity) -> None:
        ids, targets = batch
        logits = self(ids)
        perplexity(logits, targets)
        self.log(f"{stage}_loss", F.cross_entropy(logits.flatten(0, 1), targets.flatten()), prog_bar=True)
        self.log(f"{stage}_perplexity", perplexity, prog_bar=True)


def sinusoids(length: int, width: int) -> Tensor:
    """Return the sine and cosine position table of Vaswani et al. (2017), float32 `[length, width]`.

    Example:
        >>> sinusoids(3, 4)[0].tolist()
        [0.0, 1.0, 0.0, 1.0]
    """
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
