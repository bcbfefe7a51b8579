"""When noise is on: attached for the fit, masks drawn before every batch, codebooks refreshed every epoch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_qnoise.attach import attach, attach_inputs, detach
from lightning_qnoise.callbacks.base import Callback, LightningModule, Trainer
from lightning_qnoise.callbacks.fit import check_fit, from_rank_zero
from lightning_qnoise.callbacks.progress import is_bounded, progress
from lightning_qnoise.input_noise import InputNoises
from lightning_qnoise.noise import Kind, WeightNoise, check_kind
from lightning_qnoise.policy import Policy, as_mapping, resolve
from lightning_qnoise.schedules import ConstantRate, RateSchedule, check_rate
from lightning_qnoise.weights import owners


class QuantNoise(Callback):
    """Train with quantization noise (Fan, Stock et al., "Training with Quantization Noise", ICLR 2021).

    In every training forward each block of the selected weights reads as its quantized value with probability `rate`,
    with a straight-through gradient, and so does each element of what enters the layer, where its scheme has an
    activation. Rate 1 is quantization-aware training. Parameters, state dict, optimizer and
    everything outside a training forward stay as they are without the callback. Logs `quant_noise/rate`.

    Args:
        policy: Which layers become what: a preset (`"int8"`, `"int4"`, `"pq"`, `"ipq"`, `"ipq+int8"`), one scheme, a
            mapping from globs to schemes, or the path of a JSON policy. None switches the callback off.
        rate: Probability that a block is distorted: a number in [0, 1], a schedule, or any function of the
            training's progress in [0, 1]. The paper uses 0.05 to 0.2 for PQ and 0.5 for int8 and int4.
        kind: What a distorted block of PQ becomes: `"exact"` its codeword, `"zero"` zeros, `"mean"` the mean block.
        refresh: When PQ codebooks are clustered and integer ranges other than min-max are fitted anew: every `"epoch"`,
            or every so many batches. Blocks are assigned to the nearest codeword of the moment in every batch.
        seed: Seed of the masks. Ranks draw different masks; the global random state is not touched.
        enabled: False makes the callback do nothing.

    Raises:
        ValueError: An argument is out of range; at the start of a fit also a policy that does not fit the model, a
            sharded strategy, or a schedule in a fit without end.

    Example:
        >>> QuantNoise("ipq", rate=0.1).kind
        'exact'
    """

    def __init__(
        self,
        policy: Policy | None = "ipq",
        rate: float | RateSchedule | Callable[[float], float] = 0.1,
        kind: Literal["exact", "zero", "mean"] = "exact",
        refresh: Literal["epoch"] | int = "epoch",
        seed: int = 0,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if policy is not None:
            as_mapping(policy)
        check_kind(kind)
        if refresh != "epoch" and (not isinstance(refresh, int) or refresh < 1):
            raise ValueError(f"refresh must be 'epoch' or a number of batches >= 1, got {refresh!r}")
        self.policy = policy
        self.rate: Callable[[float], float] = rate if callable(rate) else ConstantRate(rate)
        self.kind: Kind = kind
        self.refresh = refresh
        self.seed = seed
        self.enabled = enabled and policy is not None
        self._batches = 0  # training batches seen in this and earlier runs; seeds the masks
        self._logged = -1.0
        self._is_over = False
        self._noises: dict[str, WeightNoise] = {}
        self._weights: dict[str, Tensor] = {}
        self._inputs = InputNoises({}, {})
        self._restored: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew, and refuse what cannot work."""
        if stage != "fit" or not self.enabled:
            return
        self._batches, self._restored, self._is_over = 0, {}, False
        check_fit(self, trainer, pl_module)
        if not isinstance(self.rate, ConstantRate) and not is_bounded(trainer):
            raise ValueError(f"{self.rate!r} needs the length of the training: set max_epochs or max_steps")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the noise, after `configure_model`."""
        if not self.enabled:
            return
        assert self.policy is not None
        schemes = resolve(pl_module, self.policy)
        self._noises = attach(pl_module, schemes, self.kind)
        self._weights = {name: parameter for name, _, _, parameter in owners(pl_module) if name in schemes}
        self._inputs = InputNoises(schemes, {name: weight.shape for name, weight in self._weights.items()})
        attach_inputs(pl_module, self._inputs.of)
        elements = sum(weight.numel() for weight in self._weights.values())
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        rank_zero_info(f"QuantNoise: {len(schemes)} weights with {elements:,} of {total:,} parameters are noised")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the codebooks and running ranges of a checkpoint."""
        for name, state in self._restored.get("targets", {}).items():
            if name not in self._noises:
                continue
            weight = self._weights[name]
            target = self._noises[name].scheme.empty(weight.shape, weight.dtype, weight.device)
            if _shapes(state) == _shapes(target.state_dict()):  # otherwise the checkpoint is of another policy
                target.load_state_dict(state)
                self._noises[name].target = target
        self._inputs.load_state_dict(self._restored.get("inputs", {}), pl_module.device)
        self._restored = {}  # this hook runs again in every finetuning stage

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Cluster the codebooks anew where that is due, and draw the masks of this batch."""
        if not self._noises:
            return
        # on_train_epoch_start would not do: Lightning skips it after resuming from an epoch's last batch
        if (batch_idx if self.refresh == "epoch" else self._batches % self.refresh) == 0:
            self._refresh(trainer)
        rate = check_rate(self.rate(1.0 if self._is_over else progress(trainer, batch_idx)))
        generator = torch.Generator(next(iter(self._weights.values())).device)
        generator.manual_seed(zlib.crc32(f"{self.seed}/{trainer.global_rank}/{self._batches}".encode()))
        for name, noise in self._noises.items():
            noise.draw(self._weights[name], rate, generator)
        self._inputs.draw(rate, generator)
        self._batches += 1
        if (
            batch_idx == 0 or rate != self._logged
        ):  # the trainer keeps the value; telling it again costs half a millisecond
            pl_module.log("quant_noise/rate", rate)
            self._logged = rate

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave no noise for forwards that are not of a training batch."""
        for noise in self._noises.values():
            noise.active = False
        self._inputs.stop()

    @property
    def is_training_quantized(self) -> bool:
        """Whether the training ends with every block quantized in every forward (QAT)."""
        return self.enabled and self.kind == "exact" and self.rate(1.0) >= 1

    def finish(self, names: Iterable[str]) -> None:
        """From now on the schedule stands at its end, and the named weights are left alone (they are quantized)."""
        self._is_over = True
        for name in names:
            if name in self._noises:
                self._noises.pop(name).active = False
                self._inputs.of.pop(name, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach the noise; no other hook runs after an exception."""
        self._detach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach the noise: what else happens at the end of the fit may need it until now."""
        self._detach(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs to go on bit-equally: batches seen, codebooks and ranges."""
        targets = {name: noise.target for name, noise in self._noises.items() if noise.is_fitted}
        current = {name: dict(target.state_dict()) for name, target in targets.items() if target is not None}
        targets, inputs = self._restored.get("targets", {}) | current, self._inputs.state_dict()
        return {"batches": self._batches, "targets": targets, "inputs": self._restored.get("inputs", {}) | inputs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._batches = state_dict["batches"]
        self._restored = {"targets": state_dict["targets"], "inputs": state_dict.get("inputs", {})}

    def _refresh(self, trainer: Trainer) -> None:
        noises = {name: noise for name, noise in self._noises.items() if noise.is_fitted}
        like = {name: (noise.scheme, self._weights[name]) for name, noise in noises.items()}
        targets = from_rank_zero(
            trainer,
            lambda: {name: noise.encode(self._weights[name]) for name, noise in noises.items()},
            like,
        )
        for name, noise in noises.items():
            noise.target = targets[name]

    def _detach(self, pl_module: LightningModule) -> None:
        detach(pl_module)
        self._restored = self.state_dict()  # for a checkpoint that is saved after the fit
        self._noises, self._weights, self._inputs = {}, {}, InputNoises({}, {})


def policy_of(trainer: Trainer) -> Policy | None:
    """Return the policy of the trainer's `QuantNoise` (None: it is switched off).

    Raises:
        ValueError: The trainer has none.
    """
    noise = next((callback for callback in trainer.callbacks if isinstance(callback, QuantNoise)), None)
    if noise is None:
        raise ValueError("Quantize() takes its policy from QuantNoise, but the trainer has none; pass a policy")
    return noise.policy


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
