"""Byte-pair encoding in plain Python: lossless on every string, at the price of a slow `encode`.

Text is cut into words (a run of letters, digits, punctuation or white space, with its leading space), words
become UTF-8 bytes, and the most frequent pair of neighbours is merged until the vocabulary is full. Pairs
never cross a word, so `train` counts each distinct word once and a merge touches only the words that hold it.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

Pair = tuple[int, int]

N_BYTES = 256
_WORD = re.compile(r" ?[^\W\d_]+| ?\d+| ?(?:_|[^\w\s])+|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class BPE:
    """A trained byte-pair tokenizer.

    Ids 0 to 255 are the bytes; id `256 + i` is the concatenation of the two ids in `merges[i]`.

    Args:
        merges: the pairs in the order in which they were learnt.

    Raises:
        ValueError: if a merge refers to an id that does not exist yet.

    Example:
        >>> bpe = BPE.train("low lower lowest", vocab_size=258)
        >>> bpe.merges
        ((108, 111), (256, 119))
        >>> bpe.encode("slow")
        [115, 257]
        >>> bpe.decode([115, 257])
        'slow'
    """

    merges: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        for i, pair in enumerate(self.merges):
            if len(pair) != 2 or not all(0 <= token < N_BYTES + i for token in pair):
                raise ValueError(f"merges[{i}]={pair}: a merge joins two ids in [0, {N_BYTES + i})")

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BPE:
        """Learn the merges of `text`; among equally frequent pairs the one with the smallest ids comes first.

        Args:
            text: the training text.
            vocab_size: number of ids, at least 256. Fewer are learnt if every word has become one token.

        Raises:
            ValueError: if `vocab_size` is below 256.
        """
        if vocab_size < N_BYTES:
            raise ValueError(f"vocab_size={vocab_size} is below the {N_BYTES} bytes; pass {N_BYTES} or more")
        counts = Counter(_WORD.findall(text))
        words = [list(_to_bytes(word)) for word in counts]
        return cls(tuple(_learn(words, list(counts.values()), vocab_size - N_BYTES)))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return N_BYTES + len(self.merges)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; `decode` gives back exactly `text`."""
        known: dict[str, list[int]] = {}
        ids: list[int] = []
        for word in _WORD.findall(text):
            if word not in known:
                known[word] = self._encode_word(word)
            ids += known[word]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not valid UTF-8 (a character cut in two) become U+FFFD.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        ids = list(ids)
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"id {token} is outside the vocabulary of {self.vocab_size} ids")
        data = b"".join(self._table[token] for token in ids)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        """Return the tokenizer as JSON-ready data."""
        return {"merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> BPE:
        """Rebuild a tokenizer from `to_dict`."""
        return cls(tuple((int(left), int(right)) for left, right in state["merges"]))

    @cached_property
    def _ranks(self) -> dict[Pair, int]:
        return {pair: N_BYTES + i for i, pair in enumerate(self.merges)}

    @cached_property
    def _table(self) -> list[bytes]:
        table = [bytes([i]) for i in range(N_BYTES)]
        for left, right in self.merges:
            table.append(table[left] + table[right])
        return table

    def _encode_word(self, word: str) -> list[int]:
        ids = list(_to_bytes(word))
        unmerged = self.vocab_size
        while len(ids) > 1:
            pair = min(pairwise(ids), key=lambda p: self._ranks.get(p, unmerged))
            if pair not in self._ranks:
                break
            ids = _merge(ids, pair, self._ranks[pair])
        return ids


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _merge(ids: list[int], pair: Pair, token: int) -> list[int]:
    merged: list[int] = []
    i = 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            merged.append(token)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def _learn(words: list[list[int]], counts: list[int], n_merges: int) -> list[Pair]:
    pairs: Counter[Pair] = Counter()
    holders: defaultdict[Pair, set[int]] = defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += counts[w]
            holders[pair].add(w)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < n_merges:
        count, best = heapq.heappop(heap)
        if count == 0 or -count != pairs[best]:  # an outdated entry: the pair's count has changed since
            continue
        changed: set[Pair] = set()
        for w in holders.pop(best):
            before, after = words[w], _merge(words[w], best, N_BYTES + len(merges))
            words[w] = after
            for pair in pairwise(before):
                pairs[pair] -= counts[w]
                changed.add(pair)
            for pair in pairwise(after):
                pairs[pair] += counts[w]
                holders[pair].add(w)
                changed.add(pair)
        merges.append(best)
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
    return merges
