"""Only a process of its own may import the simulated device, not one that looks for examples in docstrings."""

import os

if "SIMULATED_DEVICE" not in os.environ:
    collect_ignore_glob = ["simulated.py", "*_cases.py"]
