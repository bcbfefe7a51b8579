"""On a device that is not the CPU and need not be there. In a process of its own, as torch keeps a device for good."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IS_KNOWN = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not IS_KNOWN, reason="this torch has no devices written in Python")]


@pytest.mark.parametrize("with_kernels", [False, True], ids=["references", "kernels"])
@pytest.mark.parametrize("cases", sorted(HERE.glob("*_cases.py")), ids=lambda path: path.stem)
def test_on_a_simulated_device(cases, with_kernels):
    """The operators by their references; and as on CUDA, by kernels in triton's interpreter, but for large layers."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON", "PYTEST"))}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE.parent)]), "SIMULATED_DEVICE": "1"}
    if with_kernels:
        pytest.importorskip("triton")
        command, env = [*command, "-k", "not large"], {**env, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
