"""Staged fits on two CPU processes, or one, run as a script by test_stages_ddp.py: `two_ranks_staged.py DEVICES`."""

import copy
import sys
from pathlib import Path

import torch
from pytorch_lightning import Callback
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).parents[1]))
from fits import PQS, Net, checkpoint, fit, leave, net, rows

from lightning_qnoise import Finetune, Quantize


class Halves(Net):
    """Each rank takes half of every batch of eight."""

    def train_dataloader(self):
        data, ranks = rows().dataset, self.trainer.world_size
        own = Subset(data, range(self.trainer.global_rank, len(data), ranks))
        return DataLoader(own, 8 // ranks)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Spy(Callback):
    """The weights that the last stage held, and the packed ones."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.state = copy.deepcopy(pl_module.state_dict())

    def on_fit_end(self, trainer, pl_module):
        self.packed = copy.deepcopy(pl_module.state_dict())


def run(devices, reassign, ckpt_path=None):
    spy, finetune = Spy(), Finetune(epochs=2, reassign=reassign)
    staged = Quantize(PQS, stages=["fc", "head"], finetune=finetune, path=f"{reassign}.safetensors")
    options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "use_distributed_sampler": False}
    model = net(cls=Halves, seed=9 if ckpt_path else 0)
    keep = checkpoint(dirpath=f"{reassign}", filename="{epoch}")
    made = fit(model, [spy, staged, keep], ckpt_path=ckpt_path, **options)
    metrics = {name: float(value) for name, value in made.callback_metrics.items() if name.startswith("size/")}
    names = [row["name"] for row in staged._record.rows]
    return {"held": spy.state, "packed": spy.packed, "metrics": metrics, "names": names}


def main(devices):
    seen = {reassign: run(devices, reassign) for reassign in (True, False)}
    seen["resumed"] = run(devices, True, "True/epoch=4.ckpt")
    rank = torch.distributed.get_rank() if devices > 1 else 0
    torch.save(seen, f"rank{rank}of{devices}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]))
    leave()
