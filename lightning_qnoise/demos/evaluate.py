"""Test packed files: `python -m lightning_qnoise.demos.evaluate TASK FOLDER` prints JSON file -> metric.

The demo starts it as a process of its own, so that nothing but the files can carry the result.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytorch_lightning as pl

from lightning_qnoise import load
from lightning_qnoise.demos.compare import TASKS, quiet


def evaluate(task_name: str, folder: Path) -> dict[str, float]:
    """Return the test metric of every packed file in a folder, each loaded into a newly built model."""
    task = TASKS[task_name]
    data = task.data()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    metrics = {}
    for path in sorted(folder.glob("*.safetensors")):
        (result,) = trainer.test(load(task.model(), path), datamodule=data, verbose=False)
        metrics[path.name] = result[task.metric]
    return metrics


def evaluate_elsewhere(task_name: str, folder: Path) -> dict[str, float]:
    """Return `evaluate(task_name, folder)` of a new Python process.

    Raises:
        RuntimeError: The process failed; the message holds what it printed.
    """
    command = [sys.executable, "-m", "lightning_qnoise.demos.evaluate", task_name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    quiet()
    print(json.dumps(evaluate(sys.argv[1], Path(sys.argv[2]))))
