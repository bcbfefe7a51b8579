"""Handwritten digits, 8x8 pixels, and a small residual net: the image task that trains in five seconds.

The 1,797 images ship inside scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_qnoise.demos.warmup import warmup_cosine

N_CLASSES = 10


class DigitsData(pl.LightningDataModule):
    """The digits of scikit-learn, split by class into 70 % train, 10 % validation and 20 % test.

    Batches are `(images, labels)`: float32 `[batch, 1, 8, 8]`, standardised by the training mean and
    deviation, and int64 `[batch]`. In training each image is moved by up to `shift` pixels.

    Args:
        batch_size: images per batch.
        shift: largest random translation in pixels, in training only; 0 switches it off.
        seed: of the split alone; the order of the batches follows `seed_everything`.

    Raises:
        ModuleNotFoundError: in `setup`, if scikit-learn is not installed.

    Example:
        >>> data = DigitsData(batch_size=32)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.dtype
        (torch.Size([32, 1, 8, 8]), torch.int64)
    """

    def __init__(self, batch_size: int = 64, shift: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.shift = shift
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Load and split the images; the same whatever the stage."""
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("DigitsData needs scikit-learn: pip install scikit-learn") from error
        pixels, labels = load_digits(return_X_y=True)
        images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
        targets = torch.as_tensor(labels, dtype=torch.int64)
        everything = range(len(labels))
        rest, test = train_test_split(everything, test_size=0.2, stratify=labels, random_state=self.seed)
        train, val = train_test_split(rest, test_size=0.125, stratify=labels[rest], random_state=self.seed)
        std, mean = torch.std_mean(images[train])
        images = (images - mean) / std
        self.background = float(-mean / std)
        self.train, self.val, self.test = (TensorDataset(images[i], targets[i]) for i in (train, val, test))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Shift each image of a training batch by its own random offset."""
        images, labels = batch
        if self.shift and self.trainer is not None and self.trainer.training:
            images = random_shift(images, self.shift, self.background)
        return images, labels

    def train_dataloader(self) -> DataLoader:
        """Return the shuffled training batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Return the validation batches."""
        return DataLoader(self.val, 4 * self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """Return the test batches."""
        return DataLoader(self.test, 4 * self.batch_size)


def random_shift(images: Tensor, shift: int, fill: float) -> Tensor:
    """Return `images` `[batch, channels, height, width]`, each moved by its own offset up to `shift`.

    Example:
        >>> random_shift(torch.ones(4, 1, 8, 8), shift=2, fill=0.0).shape
        torch.Size([4, 1, 8, 8])
    """
    n, _, height, width = images.shape
    offsets = torch.randint(2 * shift + 1, (2, n, 1), device=images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)  # [batch, height]
    columns = offsets[1] + torch.arange(width, device=images.device)  # [batch, width]
    sample = torch.arange(n, device=images.device)[:, None, None]
    padded = F.pad(images, (shift, shift, shift, shift), value=fill).permute(0, 2, 3, 1)
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a 1x1 shortcut where the shape changes.

    Example:
        >>> ResidualBlock(8, 16, stride=2)(torch.zeros(1, 8, 4, 4)).shape
        torch.Size([1, 16, 2, 2])
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, n_in, h, w]` to `[batch, n_out, ceil(h / stride), ceil(w / stride)]`."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class DigitsClassifier(pl.LightningModule):
    """A residual net of three blocks for `DigitsData`: about 223,000 parameters at the default width.

    Logs `train_loss`, `val_loss`, `val_accuracy`, `test_loss` and `test_accuracy`.

    Args:
        width: channels of the first block; the next two have twice and three times as many.
        lr: peak learning rate of AdamW: a warm-up over a fifth of the steps, then a cosine to zero.
        weight_decay: of AdamW.
        label_smoothing: of the training loss; validation and test losses are plain cross-entropies.

    Example:
        >>> DigitsClassifier(width=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, width: int = 32, lr: float = 0.01, weight_decay: float = 0.05, label_smoothing: float = 0.1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, stride=1),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 3 * width, stride=2),
        )
        self.head = nn.Linear(3 * width, N_CLASSES)
        self.val_accuracy = MulticlassAccuracy(N_CLASSES, average="micro")
        self.test_accuracy = MulticlassAccuracy(N_CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map float images `[batch, 1, 8, 8]` to logits `[batch, 10]`."""
        features = self.blocks(F.relu(self.norm(self.stem(images))))
        return self.head(features.mean(dim=(2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the smoothed cross-entropy of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `val_loss` and `val_accuracy`."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `test_loss` and `test_accuracy`."""
        self._evaluate(batch, "test", self.test_accuracy)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW with a linear warm-up and a cosine to zero over the steps of the fit."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return warmup_cosine(optimizer, self.trainer, warmup=0.2)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True)
