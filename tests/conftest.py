import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """Every test starts from the same seed, in a directory of its own, on one thread."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
