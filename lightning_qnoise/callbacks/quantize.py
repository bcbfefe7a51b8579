"""When a model becomes small: at the end of the fit it is packed, measured again and written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_qnoise.callbacks.base import Callback, LightningModule, Trainer, class_names
from lightning_qnoise.callbacks.batch_norm import reestimate
from lightning_qnoise.callbacks.evaluate import validate_again
from lightning_qnoise.callbacks.fit import check_fit, from_rank_zero, log_after_fit
from lightning_qnoise.callbacks.quant_noise import QuantNoise
from lightning_qnoise.convert import dense_state_dict, dequantize, encode, pack
from lightning_qnoise.file import save
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.policy import Policy, as_mapping, resolve
from lightning_qnoise.schemes import Scheme
from lightning_qnoise.size import size_table
from lightning_qnoise.weights import owners

_WRITE_AT_END = {"StochasticWeightAveraging", "WeightAveraging", "ModelPruning"}


class Quantize(Callback):
    """Pack the model at the end of the fit, in one shot: the fit's last weights, encoded by the policy.

    Afterwards the module's selected layers are packed in place, `quantized/<metric>` of one more validation run,
    `size/total_mb` and `size/compression` are logged and in `trainer.callback_metrics`, and the packed file is
    written. Lightning checkpoints stay plain: one that is saved later holds decoded weights under the usual keys, and
    loading a float checkpoint into the packed model (`trainer.test(ckpt_path="best")`) encodes it. Where the ranks are
    spawned (`ddp_spawn`, `ddp_notebook`), the starting process keeps its float model with the decoded weights.

    Args:
        policy: As in `QuantNoise`; None takes the policy of the `QuantNoise` in the same trainer.
        path: The packed file, relative to the logger's folder (or the default root folder). None writes no file.
            Nothing is written in a `fast_dev_run`.
        evaluate: Whether to run validation once more on the packed model.
        batch_norm: Training batches from which BatchNorm statistics are estimated anew after packing; 0 keeps those of
            the float model, which do not fit the packed weights.
        enabled: False makes the callback do nothing.

    Raises:
        ValueError: At the start of a fit: no policy, one that does not fit the model, a sharded strategy, or a
            callback listed later that overwrites the weights at the end. At its end: NaN or Inf in a weight.

    Example:
        >>> Quantize("int8", path="small.safetensors").path
        'small.safetensors'
    """

    def __init__(
        self,
        policy: Policy | None = None,
        path: str | None = "quantized.safetensors",
        evaluate: bool = True,
        batch_norm: int = 100,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if policy is not None:
            as_mapping(policy)
        self.policy = policy
        self.path = path
        if batch_norm < 0:
            raise ValueError(f"batch_norm must be a number of batches >= 0, got {batch_norm}")
        self.evaluate = evaluate
        self.batch_norm = batch_norm
        self.enabled = enabled
        self._pending: dict[str, Scheme] | None = None  # what the end of the fit is to pack

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the policy and refuse what cannot work."""
        if stage != "fit" or not self.enabled:
            return
        if self.find_policy(trainer) is None:
            return
        check_fit(self, trainer, pl_module)
        later = trainer.callbacks[trainer.callbacks.index(self) + 1 :]
        for callback in later:
            if class_names(callback) & _WRITE_AT_END:
                name = type(callback).__name__
                raise ValueError(f"{name} overwrites the weights at the end of the fit: list it before Quantize")

    def find_policy(self, trainer: Trainer) -> Policy | None:
        """Return the own policy or that of the trainer's `QuantNoise` (None where that is switched off by None).

        Raises:
            ValueError: There is neither.
        """
        if self.policy is not None:
            return self.policy
        noises = [callback for callback in trainer.callbacks if isinstance(callback, QuantNoise)]
        if not noises:
            raise ValueError("Quantize() takes its policy from QuantNoise, but the trainer has none; pass a policy")
        return noises[0].policy

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the policy now, not after the training."""
        policy = self.find_policy(trainer) if self.enabled else None
        self._pending = None if policy is None else resolve(pl_module, policy)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalize, on the training's device."""
        if self._pending is not None:
            self._finalize(trainer, pl_module)
            reestimate(trainer, pl_module, self.batch_norm)
            metrics = validate_again(trainer) if self.evaluate else {}
            self._report(trainer, pl_module, {f"quantized/{name}": value for name, value in metrics.items()})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalize a fit that had nothing left to train (a resumed, finished one)."""
        if self._pending is not None:
            self._finalize(trainer, pl_module)
            self._report(trainer, pl_module, {})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model float."""
        self._pending = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand decoded weights back to the process that spawned this one, whose model is still the float one."""
        if stage == "fit" and self.enabled and "_MultiProcessingLauncher" in class_names(trainer.strategy.launcher):
            dequantize(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the user's keys in the checkpoints of a packed model."""
        if next(packed_weights(pl_module), None) is not None:
            checkpoint["state_dict"] = dense_state_dict(pl_module)

    def _finalize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schemes, self._pending = self._pending or {}, None
        weights = {name: parameter for name, _, _, parameter in owners(pl_module) if name in schemes}
        like = {name: (schemes[name], weight) for name, weight in weights.items()}
        pack(pl_module, from_rank_zero(trainer, lambda: encode(pl_module, schemes), like))
        for callback in trainer.callbacks:
            if "WeightAveraging" in class_names(callback):
                callback._average_model = None  # else it swaps its float weights for the packed ones in validation

    def _report(self, trainer: Trainer, pl_module: LightningModule, metrics: dict[str, float]) -> None:
        table = size_table(pl_module)
        log_after_fit(trainer, {**metrics, **table.metrics})
        rank_zero_info(f"Quantize: {table.float_bytes:,} to {table.bytes:,} bytes, {table.compression:.1f}x smaller")
        if self.path is None or trainer.fast_dev_run:
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / self.path
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(pl_module, path)
        rank_zero_info(f"Quantize: wrote {path}")
