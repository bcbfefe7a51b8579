"""The tokenizer against a naive recount of all pairs, and on strings nobody would write."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise

import pytest

from lightning_qnoise.demos.bpe import _WORD, BPE

TEXT = "The lambda expression yields a function object; an object_like __call__ works 42 times.\n\n    aaaaa aaa\n" * 3


def naive_merges(text: str, n_merges: int) -> list[tuple[int, int]]:
    """Recount every pair of every occurrence before every merge."""
    words = [list(word.encode()) for word in _WORD.findall(text)]
    merges = []
    for i in range(n_merges):
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word in words:
            j = 0
            while j < len(word) - 1:
                if (word[j], word[j + 1]) == best:
                    word[j : j + 2] = [256 + i]
                j += 1
    return merges


@pytest.mark.parametrize("seed", range(5))
def test_merges_equal_a_naive_recount(seed: int) -> None:
    rng = random.Random(seed)
    text = TEXT + "".join(rng.choices("ab c", k=400))
    assert list(BPE.train(text, 316).merges) == naive_merges(text, 60)


def test_training_stops_when_every_word_is_one_token() -> None:
    bpe = BPE.train("abc abc", vocab_size=1000)
    assert bpe.vocab_size < 1000
    assert list(bpe.merges) == naive_merges("abc abc", 744)
    assert len(bpe.encode("abc abc")) == 2


@pytest.mark.parametrize("seed", range(20))
def test_round_trip_on_random_unicode(seed: int) -> None:
    rng = random.Random(seed)
    bpe = BPE.train(TEXT, 320)
    codepoints = [*range(0x250), 0x661, 0x3042, 0xD800, 0xDFFF, 0xFFFD, 0x1F600, 0x10FFFF, 0x2028, 0xB2]
    text = "".join(chr(rng.choice(codepoints)) for _ in range(300))
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(0 <= token < bpe.vocab_size for token in ids)


@pytest.mark.parametrize("text", ["", " ", "\n\n  \t x", "a_b__c", "\r\n", "\x00", "\ud800", "e\u0301"])
def test_round_trip_on_corner_cases(text: str) -> None:
    bpe = BPE.train(TEXT, 320)
    assert bpe.decode(bpe.encode(text)) == text


def test_merges_shorten_the_text() -> None:
    bpe = BPE.train(TEXT, 320)
    assert len(bpe.encode(TEXT)) < len(TEXT) / 2
    assert BPE().encode("héllo") == list("héllo".encode())


def test_state_survives_json() -> None:
    bpe = BPE.train(TEXT, 300)
    assert BPE.from_dict(json.loads(json.dumps(bpe.to_dict()))) == bpe


def test_a_cut_character_decodes_to_the_replacement_character() -> None:
    assert BPE().decode("é".encode()[:1]) == "\ufffd"


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="vocab_size=255"):
        BPE.train("a", 255)
    with pytest.raises(ValueError, match="id 256"):
        BPE().decode([256])
    with pytest.raises(ValueError, match=r"merges\[0\]"):
        BPE(((97, 256),))
