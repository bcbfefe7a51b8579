"""The command line: flags switch callbacks, bad words end with a message, a user's own CLI gets the same flags."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_qnoise import PQ, Int, LinearRate, load
from lightning_qnoise.cli import add_quant_noise_args, main
from lightning_qnoise.commands import file_size, shipped_config
from lightning_qnoise.demos import DigitsClassifier
from lightning_qnoise.policy import as_mapping, to_json

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")

SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "digits.yaml").write_text(shipped_config("digits"))
    return str(tmp_path / "digits.yaml")


def callbacks(*words, root="pytorch_lightning"):
    """The QuantNoise and Quantize that a user's own LightningCLI makes of some words."""
    cli = pytest.importorskip(f"{root}.cli")
    boring = pytest.importorskip(f"{root}.demos.boring_classes")

    class OwnCLI(cli.LightningCLI):
        def add_arguments_to_parser(self, parser):
            add_quant_noise_args(parser)

    made = OwnCLI(boring.BoringModel, args=[*words], run=False, seed_everything_default=0, save_config_callback=None)
    by_name = {type(callback).__name__: callback for callback in made.trainer.callbacks}
    return by_name["QuantNoise"], by_name["Quantize"]


@pytest.mark.parametrize("root", ["pytorch_lightning", "lightning.pytorch"])
def test_flags_of_a_users_own_cli(root):
    noise, quantize = callbacks(
        "--quant_noise.policy=int4", "--quant_noise.rate=0.3", "--quantize.enabled=false", root=root
    )
    assert noise.enabled and noise.policy == "int4" and noise.rate(0.7) == 0.3
    assert not quantize.enabled


def test_without_a_policy_nothing_is_on():
    noise, quantize = callbacks()
    assert not noise.enabled and quantize.policy is None


def test_schedules_and_schemes_as_flags():
    noise, _ = callbacks(
        "--quant_noise.policy=PQ",
        "--quant_noise.policy.block_size=4",
        "--quant_noise.rate=LinearRate",
        "--quant_noise.rate.end=0.4",
        "--quant_noise.refresh=7",
    )
    assert noise.policy == PQ(block_size=4)
    assert noise.rate == LinearRate(end=0.4)
    assert noise.refresh == 7


def test_policy_as_json_mapping():
    scheme = '{"class_path": "Int", "init_args": {"bits": 3}}'
    noise, _ = callbacks(f'--quant_noise.policy={{"layer": {scheme}, "*": null, "type:Conv2d": "ipq"}}')
    assert noise.policy == {"layer": Int(bits=3), "*": None, "type:Conv2d": "ipq"}


def test_policy_as_json_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = {"layer": None, "*": Int(bits=3, activation=Int(8, mode="static")), "head": "ipq"}
    Path("policy.json").write_text(to_json(policy))
    noise, quantize = callbacks("--quant_noise.policy=policy.json", "--quantize.policy=policy.json")
    assert as_mapping(noise.policy) == as_mapping(quantize.policy) == policy


def test_fit_writes_a_file_that_loads(config, tmp_path):
    main(["fit", "--config", config, *SHORT, "--quant_noise.policy=ipq", f"--trainer.default_root_dir={tmp_path}"])
    path = tmp_path / "quantized.safetensors"
    load(DigitsClassifier(), path)
    assert file_size(path).compression > 10


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--quant_noise.policy=int9", "unknown preset 'int9'"),
        ("--quant_noise.rate=1.5", r"rate must lie in \[0, 1\], got 1.5"),
        ("--quant_noise.kind=half", "kind"),
        ("--quant_noise.no_such_flag=1", "no_such_flag"),
    ],
)
def test_wrong_words_end_with_a_message(config, capsys, word, message):
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", config, *SHORT, word])
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_help_names_flags_and_tools():
    command = [sys.executable, "-m", "lightning_qnoise", "fit", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--quant_noise.policy" in text and "codeword" in text and "--quantize.enabled" in text
    text = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, check=True).stdout
    assert "lightning-qnoise size" in text
