"""`python -m lightning_qnoise.demos` runs the demo, or says what it needs."""

import sys

from lightning_utilities.core.imports import module_available

if __name__ == "__main__":
    missing = [name for name in ("sklearn", "matplotlib", "rich", "jsonargparse") if not module_available(name)]
    if missing:
        sys.exit(f"the demo needs {', '.join(missing)}: pip install 'lightning-qnoise[demos]'")
    from lightning_qnoise.demos.main import main

    main()
