"""The text task: the split against the raw topics, the model against hand-written sums."""

from __future__ import annotations

import builtins
import math
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET

from lightning_qnoise.demos import BPE, ReferenceText, TransformerLM
from lightning_qnoise.demos.lm import sinusoids
from lightning_qnoise.demos.text import Windows, load_topics, split_topics

SMALL: dict[str, Any] = {"vocab_size": 300, "context": 16, "d_model": 32, "n_heads": 2, "d_ffn": 64}


@pytest.fixture(scope="module")
def data() -> ReferenceText:
    module = ReferenceText(vocab_size=300, context=16, batch_size=64)
    module.setup()
    return module


def paragraphs(topics: dict[str, str]) -> list[str]:
    """All paragraphs with their white space normalised."""
    return [" ".join(p.split()) for text in topics.values() for p in text.split("\n\n") if p.strip()]


def test_parts_share_no_topic_and_no_paragraph() -> None:
    parts = split_topics(load_topics())
    names = [name for topics in parts.values() for name in topics]
    assert len(names) == len(set(names))
    everything = [p for topics in parts.values() for p in paragraphs(topics)]
    assert len(everything) == len(set(everything))
    assert set(everything) <= set(paragraphs(load_topics()))


def test_parts_have_their_share() -> None:
    sizes = {part: sum(map(len, topics.values())) for part, topics in split_topics(load_topics()).items()}
    total = sum(sizes.values())
    assert total > 250_000
    assert 0.78 < sizes["train"] / total < 0.85
    assert 0.07 < sizes["val"] / total <= 0.1 and 0.07 < sizes["test"] / total <= 0.1


def test_a_quoted_topic_is_left_out() -> None:
    body = [f"paragraph number {i}" for i in range(20)]
    parts = split_topics({"long": "\n\n".join(body), "quote": "\n\n".join(body[3:6])})
    assert [list(topics) for topics in parts.values() if topics] == [["long"]]


def test_tokens_are_the_text_and_the_tokenizer_saw_the_training_part_only(data: ReferenceText) -> None:
    for part, topics in split_topics(load_topics()).items():
        text = "\n\n".join(topics.values())
        assert data.tokenizer.decode(data.tokens[part].tolist()) == text
        if part == "train":
            assert BPE.train(text, 300) == data.tokenizer


def test_targets_are_the_inputs_one_token_later(data: ReferenceText) -> None:
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        ids, targets = next(iter(loader))
        assert ids.shape == targets.shape == (64, 16) and ids.dtype == targets.dtype == torch.int64
        assert torch.equal(ids[:, 1:], targets[:, :-1])


def test_windows_cover_the_tokens_once() -> None:
    windows = Windows(torch.arange(35), context=8)
    assert torch.cat([windows[i][1] for i in range(len(windows))]).tolist() == list(range(1, 33))
    jittered = Windows(torch.arange(35), context=8, jitter=True)
    starts = {int(jittered[3][0][0]) for _ in range(50)}
    assert starts == {24, 25, 26}
    with pytest.raises(ValueError, match="context=35"):
        Windows(torch.arange(35), context=35)


def test_missing_pydoc_data_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_pydoc(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pydoc_data"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pydoc)
    with pytest.raises(ModuleNotFoundError, match="install your distribution's full standard library"):
        load_topics()


@pytest.mark.parametrize("training", [True, False])
def test_a_later_token_never_changes_earlier_logits(training: bool) -> None:
    model = TransformerLM(**SMALL).train(training)
    ids = torch.randint(300, (3, 16))
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 300
    with torch.set_grad_enabled(training):
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_head_is_the_embedding() -> None:
    model = TransformerLM(**SMALL)
    assert model.head.weight is model.embed.weight
    assert "positions" not in model.state_dict()
    clone = TransformerLM(**model.hparams)
    clone.load_state_dict(model.state_dict(), strict=True)
    ids = torch.randint(300, (2, 16))
    assert torch.equal(clone.eval()(ids), model.eval()(ids))
    assert 500_000 < sum(p.numel() for p in TransformerLM().parameters()) < 700_000


def test_sinusoids_equal_the_formula() -> None:
    table = sinusoids(50, 8)
    for t, i in [(0, 0), (7, 2), (49, 6)]:
        angle = t / 10_000 ** (i / 8)
        assert float(table[t, i]) == pytest.approx(math.sin(angle), abs=1e-5)
        assert float(table[t, i + 1]) == pytest.approx(math.cos(angle), abs=1e-5)


def test_bad_arguments_raise() -> None:
    with pytest.raises(ValueError, match="n_heads=3"):
        TransformerLM(d_model=128, n_heads=3)
    with pytest.raises(ValueError, match="context=16"):
        TransformerLM(**SMALL)(torch.zeros(1, 17, dtype=torch.int64))


def fit(data: ReferenceText, seed: int, **options: Any) -> tuple[pl.Trainer, TransformerLM]:
    """Fit a small model from one seed."""
    pl.seed_everything(seed, verbose=False)
    model, trainer = TransformerLM(**SMALL), pl.Trainer(**QUIET, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, data)
    return trainer, model


@pytest.mark.filterwarnings("ignore")
def test_a_short_fit_lowers_the_perplexity_and_it_equals_a_hand_computed_one(data: ReferenceText) -> None:
    trainer, model = fit(data, 0, max_steps=40, limit_val_batches=0)
    logged = trainer.test(model, data, verbose=False)[0]
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, targets in data.test_dataloader():
            probabilities = model(ids).double().softmax(-1)
            total -= float(probabilities.gather(-1, targets[..., None]).log().sum())
            count += targets.numel()
    assert logged["test_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert logged["test_loss"] == pytest.approx(total / count, rel=1e-4)
    assert logged["test_perplexity"] < 200


def test_fit_is_deterministic_under_a_seed(data: ReferenceText) -> None:
    first, second, other = (fit(data, seed, fast_dev_run=3)[1].embed.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
