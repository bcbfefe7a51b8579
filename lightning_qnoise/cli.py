"""The command `lightning-qnoise`: a LightningCLI with our flags, and tools for checkpoints and packed files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.imports import module_available

from lightning_qnoise import commands

_TOOLS = ("size", "quantize", "dequantize", "config")
_EPILOG = "Tools for files, each with its own --help: " + ", ".join(f"lightning-qnoise {tool}" for tool in _TOOLS)


def add_quant_noise_args(parser: Any) -> None:
    """Give a LightningCLI the flags `--quant_noise.*`, `--quantize.*` and `--model_size.*`.

    Call it in `add_arguments_to_parser`. `--quant_noise.policy=ipq` switches noise and packing on; without a policy
    the callbacks do nothing.

    Args:
        parser: The `LightningArgumentParser` of either root of Lightning.

    Example:
        >>> from pytorch_lightning.cli import LightningCLI
        >>> class MyCLI(LightningCLI):
        ...     def add_arguments_to_parser(self, parser):
        ...         add_quant_noise_args(parser)
    """
    from lightning_qnoise.callbacks import ModelSize, Quantize, QuantNoise

    for key, callback in (("quant_noise", QuantNoise), ("quantize", Quantize), ("model_size", ModelSize)):
        parser.add_lightning_class_args(callback, key)
    parser.set_defaults({"quant_noise.policy": None, "model_size.enabled": False})


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; `args` stand in for the command line."""
    words = list(sys.argv[1:] if args is None else args)
    if words and words[0] in _TOOLS:
        _run_tool(words)
    else:
        _run_lightning(args)


def _run_tool(words: list[str]) -> None:
    arguments = _tool_parser().parse_args(words)
    try:
        print(arguments.run(arguments))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"lightning-qnoise {arguments.tool}: {error}")


def _tool_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-qnoise")
    tools = parser.add_subparsers(dest="tool", required=True)

    size = tools.add_parser("size", description="Print the size of every layer of a checkpoint or packed file.")
    size.add_argument("file", type=Path, help="a .ckpt, .pt or .safetensors file")
    size.set_defaults(run=lambda a: commands.file_size(a.file))

    quantize = tools.add_parser("quantize", description="Compress a checkpoint into a packed file, without its code.")
    quantize.add_argument("checkpoint", type=Path)
    quantize.add_argument("out", type=Path, help="the packed file, *.safetensors")
    quantize.add_argument("--policy", required=True, help="a preset (int8, int4, pq, ipq, ipq+int8) or a JSON file")
    quantize.set_defaults(run=lambda a: commands.quantize_file(a.checkpoint, a.out, a.policy))

    dequantize = tools.add_parser("dequantize", description="Write a packed file's weights as a float checkpoint.")
    dequantize.add_argument("file", type=Path, help="a packed file")
    dequantize.add_argument("out", type=Path, help="the checkpoint, *.ckpt")
    dequantize.set_defaults(run=lambda a: commands.dequantize_file(a.file, a.out))

    config = tools.add_parser("config", description="Print a shipped configuration for `lightning-qnoise fit`.")
    config.add_argument("name", help="digits or text")
    config.set_defaults(run=lambda a: commands.shipped_config(a.name).rstrip())
    return parser


def _run_lightning(args: Sequence[str] | None) -> None:
    if not module_available("jsonargparse"):
        sys.exit("this command needs jsonargparse: pip install 'lightning-qnoise[cli]'")
    from pytorch_lightning import LightningModule
    from pytorch_lightning.cli import LightningCLI

    class QuantNoiseCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            add_quant_noise_args(parser)

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except ValueError as error:
                self.parser.error(str(error))

    QuantNoiseCLI(
        LightningModule,
        subclass_mode_model=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"epilog": _EPILOG},
        args=args if args is None else list(args),
    )
