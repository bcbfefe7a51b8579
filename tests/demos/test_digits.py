"""The digits task: its split against scikit-learn's own data, its net against what a net must do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fits import QUIET
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_qnoise.demos import DigitsClassifier, DigitsData
from lightning_qnoise.demos.digits import random_shift


def fit(seed: int, **options: Any) -> tuple[pl.Trainer, DigitsClassifier, DigitsData]:
    """Fit a small classifier from one seed."""
    pl.seed_everything(seed, verbose=False)
    model, data = DigitsClassifier(width=8), DigitsData()
    trainer = pl.Trainer(**QUIET, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, data)
    return trainer, model, data


def raw(images: Tensor) -> list[bytes]:
    """Undo the standardisation up to an affine map: the images as comparable bytes."""
    low, high = images.amin(), images.amax()
    return [image.round().to(torch.uint8).numpy().tobytes() for image in (images - low) / (high - low) * 16]


def test_split_is_a_partition_of_the_digits() -> None:
    data = DigitsData()
    data.setup()
    parts = [part.tensors for part in (data.train, data.val, data.test)]
    assert [len(labels) for _, labels in parts] == [1257, 180, 360]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    pixels, targets = load_digits(return_X_y=True)
    expected = [(p.astype("uint8").tobytes(), int(t)) for p, t in zip(pixels, targets, strict=True)]
    assert sorted(zip(raw(images), labels.tolist(), strict=True)) == sorted(expected)


def test_split_is_stratified_standardised_and_fixed() -> None:
    data, again, other = DigitsData(), DigitsData(), DigitsData(seed=1)
    for module in (data, again, other):
        module.setup()
    assert torch.equal(data.test.tensors[0], again.test.tensors[0])
    assert not torch.equal(data.test.tensors[1], other.test.tensors[1])
    counts = data.test.tensors[1].bincount()
    assert counts.min() >= 34 and counts.max() <= 37
    std, mean = torch.std_mean(data.train.tensors[0])
    assert abs(float(mean)) < 1e-4 and abs(float(std) - 1) < 1e-4


def test_random_shift_moves_whole_images_by_at_most_shift() -> None:
    images = torch.rand(64, 1, 8, 8)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-2.0)
    offsets = set()
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # [batch, 1, 3, 3, 8, 8]
    for source, moved in zip(windows, random_shift(images, 1, fill=-2.0), strict=True):
        found = [(r, c) for r in range(3) for c in range(3) if torch.equal(source[:, r, c], moved)]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) == 9


def test_only_training_batches_are_shifted() -> None:
    class Spy(DigitsClassifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            self.seen_train = batch[0]
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.seen_val = batch[0]
            super().validation_step(batch, batch_idx)

    model, data = Spy(width=8), DigitsData()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(**QUIET, fast_dev_run=True).fit(model, data)
    originals = {image.numpy().tobytes() for image in data.train.tensors[0]}
    assert not all(image.numpy().tobytes() in originals for image in model.seen_train)
    assert torch.equal(model.seen_val, data.val.tensors[0][: len(model.seen_val)])


def test_a_short_fit_beats_chance_by_far_and_metrics_equal_a_recount() -> None:
    trainer, model, data = fit(seed=0, max_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logged = trainer.test(model, data, verbose=False)[0]
    model.eval()
    images, labels = data.test.tensors
    with torch.no_grad():
        logits = model(images)
    assert logged["test_accuracy"] > 0.8
    assert logged["test_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    nll = -logits.log_softmax(1).gather(1, labels[:, None]).mean()
    assert logged["test_loss"] == pytest.approx(float(nll), rel=1e-4)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-8)


def test_fit_is_deterministic_under_a_seed() -> None:
    first, second, other = (fit(seed, max_steps=4)[1].head.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_module_rebuilds_from_its_hyper_parameters() -> None:
    model = DigitsClassifier(width=8, lr=0.02)
    clone = DigitsClassifier(**model.hparams)
    clone.load_state_dict(model.state_dict(), strict=True)
    assert clone.hparams == model.hparams
    assert 100_000 < sum(p.numel() for p in DigitsClassifier().parameters()) < 300_000
