"""The Python language reference as a language-modelling task: real English prose that ships inside CPython.

`pydoc_data.topics` holds what `help("lambda")` shows. Topics quote each other at length, so every paragraph
is kept once only, in the longest topic that has it, and whole topics are assigned to one part: no paragraph of
validation or test is seen in training, at the price of a fifth of the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_qnoise.demos.bpe import BPE

Part = Literal["train", "val", "test"]


class ReferenceText(pl.LightningDataModule):
    """Windows of token ids from the Python language reference, about 80 % train, 10 % validation, 10 % test.

    Batches are `(ids, targets)`: int64 `[batch, context]`, the targets being the ids one token later. The
    tokenizer is trained on the training part alone and kept in `tokenizer`, the ids in `tokens`.

    Args:
        vocab_size: ids of the byte-pair tokenizer, at least 256.
        context: tokens per window.
        batch_size: windows per batch.

    Raises:
        ModuleNotFoundError: in `setup`, if this Python was built without `pydoc_data`.

    Example:
        >>> data = ReferenceText(vocab_size=300, context=16, batch_size=4)
        >>> data.setup("fit")
        >>> ids, targets = next(iter(data.val_dataloader()))
        >>> ids.shape, bool((ids[:, 1:] == targets[:, :-1]).all())
        (torch.Size([4, 16]), True)
    """

    tokenizer: BPE
    tokens: dict[Part, Tensor]

    def __init__(self, vocab_size: int = 1024, context: int = 64, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.vocab_size = vocab_size
        self.context = context
        self.batch_size = batch_size

    def setup(self, stage: str | None = None) -> None:
        """Split and tokenize the text, once per object."""
        if hasattr(self, "tokens"):
            return
        parts = split_topics(load_topics())
        texts: dict[Part, str] = {part: "\n\n".join(topics.values()) for part, topics in parts.items()}
        self.tokenizer = BPE.train(texts["train"], self.vocab_size)
        self.tokens = {part: torch.tensor(self.tokenizer.encode(text)) for part, text in texts.items()}

    def train_dataloader(self) -> DataLoader:
        """Return the training batches, shuffled, each window at a fresh random offset."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Return the test batches."""
        return self._loader("test")

    def _loader(self, part: Part) -> DataLoader:
        train = part == "train"
        windows = Windows(self.tokens[part], self.context, jitter=train)
        return DataLoader(windows, self.batch_size, shuffle=train)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Adjacent windows of a token sequence, with the tokens that follow as targets.

    Args:
        tokens: int64 `[n]`.
        context: tokens per window; window `i` starts at token `i * context`.
        jitter: move each window by a random part of `context`, so that an epoch never repeats another.

    Raises:
        ValueError: if there are too few tokens for one window.

    Example:
        >>> ids, targets = Windows(torch.arange(9), context=4)[1]
        >>> ids.tolist(), targets.tolist()
        ([4, 5, 6, 7], [5, 6, 7, 8])
    """

    def __init__(self, tokens: Tensor, context: int, jitter: bool = False) -> None:
        if len(tokens) <= context:
            raise ValueError(f"{len(tokens)} tokens hold no window of context={context}; pass a smaller one")
        self.tokens = tokens
        self.context = context
        self.jitter = jitter

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        if self.jitter:
            last = len(self.tokens) - self.context - 1
            start = min(start + int(torch.randint(self.context, ())), last)
        window = self.tokens[start : start + self.context + 1]
        return window[:-1], window[1:]


def load_topics() -> dict[str, str]:
    """Return the help topics of the running Python by name.

    Raises:
        ModuleNotFoundError: if this Python was built without `pydoc_data`.

    Example:
        >>> "lambda" in load_topics()
        True
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this Python has no pydoc_data, the text of ReferenceText; use a python.org, conda, uv or Docker build "
            "of CPython, or install your distribution's full standard library (Debian: libpython3-stdlib)"
        ) from error
    return dict(topics)


def split_topics(topics: Mapping[str, str], share: float = 0.1) -> dict[Part, dict[str, str]]:
    """Assign each topic to one part, by the hash of its name, with every paragraph in one topic only.

    Topics that mostly repeat longer ones are left out. Test and validation take topics in hash order as long as
    they fit into `share` of the characters each; one topic may fill half of that, so that no part is one subject.

    Example:
        >>> text = {name: f"The text of topic {name}." for name in map(str, range(30))}
        >>> {part: len(names) for part, names in split_topics(text).items()}
        {'train': 24, 'val': 3, 'test': 3}
    """
    unique = _without_repeats(topics)
    room = share * sum(map(len, unique.values()))
    parts: dict[Part, dict[str, str]] = {"train": {}, "val": {}, "test": {}}
    free: dict[Part, float] = {"test": room, "val": room, "train": float("inf")}
    limits: dict[Part, float] = {"test": room / 2, "val": room / 2, "train": float("inf")}
    for name in sorted(unique, key=lambda name: hashlib.sha256(name.encode()).digest()):
        part = next(part for part in free if len(unique[name]) <= min(free[part], limits[part]))
        parts[part][name] = unique[name]
        free[part] -= len(unique[name])
    return parts


def _without_repeats(topics: Mapping[str, str]) -> dict[str, str]:
    seen: set[str] = set()
    unique: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {" ".join(p.split()): p for p in topics[name].split("\n\n")}
        new = "\n\n".join(p for key, p in paragraphs.items() if key not in seen)
        seen |= paragraphs.keys()
        if 2 * len(new) > len(topics[name]):
            unique[name] = new
    return unique
