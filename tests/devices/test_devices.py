"""On CUDA, or on a device that is not there. In processes of their own, as torch keeps a device for good."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HAS_DEVICE = torch.cuda.is_available() or hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_DEVICE, reason="this torch cannot simulate a device")]


@pytest.mark.parametrize("with_kernels", [False, True], ids=["references", "kernels"])
@pytest.mark.parametrize("cases", sorted(HERE.glob("*_cases.py")), ids=lambda path: path.stem)
def test_on_a_device(cases, with_kernels):
    """The operators by their references, and by kernels: in triton's interpreter, and then no large layers."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON", "PYTEST"))}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE.parent)]), "DEVICE_CASES": "1"}
    if with_kernels:
        pytest.importorskip("triton")
    if not torch.cuda.is_available():
        command += ["-k", "not large"] if with_kernels else []
        env |= {"TRITON_INTERPRET": "1"} if with_kernels else {}
    elif not with_kernels:
        env["LIGHTNING_QNOISE_TRITON"] = "0"
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
