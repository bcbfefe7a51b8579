"""Every notebook runs from top to bottom in a fresh kernel, started from a process that has run nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    copy = tmp_path / path.name
    nbformat.write(notebook, copy)
    command = [sys.executable, "-c", "from nbclient.cli import main; main()", "--inplace", str(copy)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for a busy core make torch many times slower
    log = tmp_path / "log.txt"
    with open(log, "w") as file:  # no pipes: the kernel inherits what it is given
        done = subprocess.run(
            command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=400, check=False
        )
    assert done.returncode == 0, log.read_text()
    notebook = nbformat.read(copy, as_version=4)
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "same logits: True" in printed
