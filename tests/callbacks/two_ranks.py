"""A fit on two CPU processes, run as a script by test_ddp.py: `two_ranks.py STRATEGY`; each rank dumps what it saw."""

import sys
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from fits import PQS, Net, leave, net

from lightning_qnoise import Quantize, QuantNoise
from lightning_qnoise.callbacks import report


class Spy(Callback):
    """Collects masks, codebooks and weights of this rank."""

    def setup(self, trainer, pl_module, stage):
        self.seen = {"masks": [], "codebooks": [], "saves": 0}
        self.save = report.write
        report.write = self.count

    def count(self, *args):
        self.seen["saves"] += 1
        return self.save(*args)

    def on_train_batch_end(self, trainer, pl_module, *args):
        noise = trainer.callbacks[0]._noises["fc.weight"]
        self.seen["masks"].append(noise.mask.clone())
        self.seen["codebooks"].append(noise.target.codebook.clone())

    def on_train_end(self, trainer, pl_module):
        self.seen["float"] = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_fit_end(self, trainer, pl_module):
        self.seen["packed"] = pl_module.state_dict()
        self.seen["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save(self.seen, f"rank{trainer.global_rank}.pt")


def main(strategy):
    model = net(cls=Net)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[QuantNoise(PQS, rate=0.5), Spy(), Quantize()],
    )
    trainer.fit(model)
    if trainer.is_global_zero:
        torch.save({"state": model.state_dict(), "layer": type(model.fc).__name__}, "main.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
