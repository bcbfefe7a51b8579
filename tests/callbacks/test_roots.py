"""Importing our callbacks must not redirect the messages of the Lightning that the user works with."""

import subprocess
import sys

import pytest

SCRIPT = """
import {root}
from lightning_utilities.core import rank_zero
before = rank_zero.log
from lightning_qnoise import QuantNoise
assert rank_zero.log is before, rank_zero.log.name
assert isinstance(QuantNoise("int8"), {root}.Callback)
"""


@pytest.mark.parametrize("root", ["pytorch_lightning", "lightning.pytorch"])
def test_messages_stay_with_the_users_root(root):
    pytest.importorskip(root)
    subprocess.run([sys.executable, "-c", SCRIPT.format(root=root)], check=True)
