"""The README's Python runs as it stands, block after block, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_qnoise.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning", "ignore:.*tensorboard")
def test_python_blocks_run():
    class Model(BoringModel):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(32, 512)
            self.head = torch.nn.Linear(512, 32)

        def forward(self, x):
            return self.layer(self.head(self.encoder(x)))

    names = {"Model": Model, "loader": DataLoader(torch.randn(64, 32), batch_size=8)}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_config_commands_exist():
    for name in re.findall(r"lightning-qnoise config (\w+)", README):
        main(["config", name])


def test_picture_exists():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (Path(__file__).parents[1] / path).is_file(), path
