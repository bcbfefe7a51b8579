"""A fit on two CPU processes that ends with static activations, run as a script by test_integer_fits.py."""

import sys
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from fits import QUIET, Net, leave, net

from lightning_qnoise import Int, Quantize, QuantNoise


class Dump(Callback):
    """Writes what this rank ends with."""

    def on_fit_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    policy = Int(8, activation=Int(8, mode="static", range="mse"))
    callbacks = [QuantNoise(policy, 0.5), Quantize(), Dump()]
    trainer = Trainer(**QUIET, strategy="ddp", devices=2, max_epochs=1, callbacks=callbacks)
    trainer.fit(net(cls=Net))
    leave()
