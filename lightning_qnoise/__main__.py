"""`python -m lightning_qnoise` is the command `lightning-qnoise`."""

from lightning_qnoise.cli import main

if __name__ == "__main__":
    main()
