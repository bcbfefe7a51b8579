"""A small classifier for both roots of Lightning, and a quiet fit of it."""

from importlib import import_module

import lightning.pytorch
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qnoise import PQ

PQS = {"fc": PQ(block_size=8, n_centroids=16), "head": PQ(block_size=8, n_centroids=4)}
ROOTS = ["pytorch_lightning", "lightning.pytorch"]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def rows(n=64, batch_size=8):
    """Four classes that a linear rule separates."""
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(dim=1)), batch_size)


class _Net:
    def __init__(self, dropout=0.0, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        self.fc = nn.Linear(16, 32)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(32, 4)
        self.lr = lr

    def forward(self, x):
        return self.head(self.dropout(F.relu(self.fc(x))))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(dim=1) == batch[1]).float().mean(), prog_bar=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return rows()

    def val_dataloader(self):
        return rows(32)

    def test_dataloader(self):
        return rows(32)


class Net(_Net, pytorch_lightning.LightningModule):
    """For `pytorch_lightning`."""


class LightningNet(_Net, lightning.pytorch.LightningModule):
    """For `lightning.pytorch`."""


class Lazy(Net):
    """Its layers appear in `configure_model`."""

    def __init__(self):
        super().__init__()
        del self.fc

    def configure_model(self):
        if not hasattr(self, "fc"):
            self.fc = nn.Linear(16, 32)


class Manual(Net):
    """Manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class NoValidation(Net):
    """Without a validation loop."""

    val_dataloader = pytorch_lightning.LightningModule.val_dataloader
    validation_step = pytorch_lightning.LightningModule.validation_step


NETS = {"pytorch_lightning": Net, "lightning.pytorch": LightningNet}


def net(root=ROOTS[0], seed=0, cls=None, **kwargs):
    """A fresh model, with the same weights for the same seed."""
    torch.manual_seed(seed)
    return (cls or NETS[root])(**kwargs)


def trainer(callbacks=(), root=ROOTS[0], **kwargs):
    """A trainer that prints and writes nothing unless told to; two epochs of eight batches."""
    options = QUIET | {
        "max_epochs": 2,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    if kwargs.keys() & {"max_steps", "max_time"}:
        options.pop("max_epochs")
    return import_module(root).Trainer(callbacks=list(callbacks), **(options | kwargs))


def fit(model, callbacks=(), root=ROOTS[0], ckpt_path=None, **kwargs):
    """Fit and return the trainer. The global seed is set, so that dropout is the same in every fit."""
    made = trainer(callbacks, root, **kwargs)
    torch.manual_seed(1)
    made.fit(model, ckpt_path=ckpt_path)
    return made


def checkpoint(root=ROOTS[0], **kwargs):
    """A `ModelCheckpoint` that keeps everything in the working directory."""
    options = {"dirpath": "ckpt", "save_top_k": -1, "filename": "{epoch}-{step}"}
    return import_module(root).callbacks.ModelCheckpoint(**(options | kwargs))


def equal(a, b):
    """Whether two state dicts agree bit for bit, in order too."""
    a, b = a.state_dict() if isinstance(a, nn.Module) else a, b.state_dict() if isinstance(b, nn.Module) else b
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def losses(model, loader):
    """Mean loss and accuracy, batch by batch, without a trainer."""
    model.eval()
    with torch.no_grad():
        pairs = [(model(x), y) for x, y in loader]
    loss = torch.stack([F.cross_entropy(logits, y) for logits, y in pairs]).mean()
    accuracy = torch.stack([(logits.argmax(dim=1) == y).float().mean() for logits, y in pairs]).mean()
    return loss.item(), accuracy.item()


def leave():
    """End what a script's ranks share, as threads that still run at exit can end it with an error."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
