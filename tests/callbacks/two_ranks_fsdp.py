"""Staged fits under FSDP2 on two CPU processes, or plainly on one: `two_ranks_fsdp.py DEVICES`."""

import sys
from pathlib import Path

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from fits import fit, leave, net
from two_ranks_staged import Halves

from lightning_qnoise import PQ, Finetune, Int, Quantize
from lightning_qnoise.sharding import whole

POLICY = {"fc": PQ(block_size=8, n_centroids=16), "odd": PQ(4, 5), "head": Int(bits=4)}


class Sharded(Halves):
    """Sharded where there are two ranks; one layer has an odd number of rows."""

    def __init__(self):
        super().__init__()
        self.odd = nn.Linear(32, 13)
        self.head = nn.Linear(13, 4)

    def forward(self, x):
        return self.head(torch.relu(self.odd(torch.relu(self.fc(x)))))

    def configure_model(self):
        if self.trainer.world_size > 1 and not hasattr(self.fc, "unshard"):
            for module in (self.fc, self.odd, self.head, self):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])


def main(devices):
    for reassign in (True, False):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if devices > 1 else "auto"
        model = net(cls=Sharded)
        finetune = Finetune(epochs=2, reassign=reassign, guidance=None)
        staged = Quantize(POLICY, ["fc", "*"], finetune, path=f"{reassign}.safetensors")
        options = {"accelerator": "auto"} if devices > 1 else {}
        made = fit(model, [staged], devices=devices, strategy=strategy, use_distributed_sampler=False, **options)
        state = {name: whole(value).clone() for name, value in model.state_dict().items()}
        torch.save(state, f"{reassign}-{made.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]))
    leave()
