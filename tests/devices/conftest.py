"""Only a process of its own may import a simulated device, not one that looks for examples in docstrings."""

import os

if "DEVICE_CASES" not in os.environ:
    collect_ignore_glob = ["device.py", "simulated.py", "*_cases.py"]
