"""When a model becomes small: at the end of the fit it is finetuned in stages or packed in one shot, and written."""

from __future__ import annotations

from typing import Any, Literal

from lightning_qnoise.callbacks import learn, origin
from lightning_qnoise.callbacks.base import Callback, LightningModule, Trainer, class_names
from lightning_qnoise.callbacks.batch_norm import reestimate
from lightning_qnoise.callbacks.evaluate import validate_again
from lightning_qnoise.callbacks.finetune import Finetune
from lightning_qnoise.callbacks.fit import check_fit, check_later, is_sharded_fit
from lightning_qnoise.callbacks.limits import Limits
from lightning_qnoise.callbacks.optimizers import check_optimizers
from lightning_qnoise.callbacks.quant_noise import policy_of
from lightning_qnoise.callbacks.record import Record
from lightning_qnoise.callbacks.report import note, report, write_file
from lightning_qnoise.callbacks.staged import StagedFinetuning
from lightning_qnoise.convert import dense_state_dict, dequantize
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.policy import Policy, as_mapping, resolve
from lightning_qnoise.schemes import PackedWeight
from lightning_qnoise.stages import Stages, check_stages, plan_stages


class Quantize(Callback):
    """Compress the model at the end of the fit: in one shot, or stage by stage with finetuning (iPQ).

    After the user's own epochs, however they ended, every stage quantizes its weights and runs the fit loop again: with
    a fresh optimizer, guided by the float model, seen by loggers, progress bars and checkpoints, and not by early
    stopping or weight averaging. Then layers are packed in place, the packed file is written, and `size/total_mb`,
    `size/compression` and `quantized/<metric>` are logged (after every stage, too) and in `trainer.callback_metrics`.

    Checkpoints stay plain, with decoded weights under the usual keys; the packed model encodes a float one that it
    loads. A model that is sharded in rows (FSDP2) keeps decoded weights, and only the file is packed.

    Args:
        policy: As in `QuantNoise`; None takes the policy of the `QuantNoise` in the same trainer.
        stages: Which weights are quantized when: `"joint"` (all at once), `"transformer"`, `"bottom-up"`, or a list
            with a glob or several for every stage. None is `"joint"` for the policy `"ipq"`, one shot for all others.
        finetune: How the stages are trained.
        start: Start from the `"last"` weights or from the `"best"` of the trainer's `ModelCheckpoint`, which then
            chooses anew within each stage.
        path: The packed file, relative to the logger's folder (or the default root folder); None writes none.
        evaluate: Whether to run validation on the model before, between and after the stages.
        batch_norm: Training batches from which BatchNorm statistics are estimated anew, after packing and before the
            float model becomes a teacher; 0 keeps those of the training, which fit neither after noise.
        calibration: Training batches that show packing the inputs of layers (static activations, `rounding="gptq"`).
        enabled: False makes the callback do nothing.

    Raises:
        ValueError: At the start of a fit: no policy, one that does not fit the model, stages that do not fit it, or a
            later callback that overwrites weights. In the first step: a teacher that cannot guide. At the end: NaN.

    Example:
        >>> Quantize("ipq", stages=["*fc*", "*"], finetune=Finetune(steps=100)).stages
        ['*fc*', '*']
    """

    def __init__(
        self,
        policy: Policy | None = None,
        stages: Stages | None = None,
        finetune: Finetune = Finetune(),  # noqa: B008 - frozen
        start: Literal["last", "best"] = "last",
        path: str | None = "quantized.safetensors",
        evaluate: bool = True,
        batch_norm: int = 100,
        calibration: int = 8,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if policy is not None:
            as_mapping(policy)
        if stages is not None:
            check_stages(stages)
        if start not in ("last", "best"):
            raise ValueError(f"start must be 'last' or 'best', got {start!r}")
        for name, n_batches in (("batch_norm", batch_norm), ("calibration", calibration)):
            if n_batches < 0:
                raise ValueError(f"{name} must be a number of batches >= 0, got {n_batches}")
        self.policy, self.stages = policy, stages
        self.finetune, self.start = finetune, start
        self.path, self.evaluate, self.enabled = path, evaluate, enabled
        self.batch_norm, self.calibration = batch_norm, calibration
        self._work: StagedFinetuning | None = None  # what the end of the fit is to do
        self._record = Record()
        self._restored: dict[str, Any] = {}
        self._left: dict[str, Any] = {"stage": 0}  # the state when there is no more work
        self._at_end = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the policy and refuse what cannot work."""
        if stage != "fit" or not self.enabled:
            return
        self._restored, self._record, self._at_end, self._left = {}, Record(), False, {"stage": 0}
        if self.find_policy(trainer) is None:
            return
        check_fit(self, trainer, pl_module, takes_rows=True)
        check_later(self, trainer)
        origin.check_start(trainer, self.start)
        if self.find_stages(trainer) and self.finetune.guidance:
            origin.check_teacher(trainer, pl_module)

    def find_policy(self, trainer: Trainer) -> Policy | None:
        """Return the own policy or that of the trainer's `QuantNoise` (None: it is switched off)."""
        return policy_of(trainer) if self.policy is None else self.policy

    def find_stages(self, trainer: Trainer) -> Stages | None:
        """Return the own stages, or those that the policy implies: `"joint"` where it says `"ipq"` or `"ipq+int8"`."""
        policy = self.find_policy(trainer)
        rules = as_mapping(policy).values() if policy is not None else ()
        implied = "joint" if "ipq" in rules or "ipq+int8" in rules else None
        return implied if self.stages is None else self.stages

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find out where a fit resumes."""
        if trainer.state.fn != "fit" or not self.enabled or not self.find_stages(trainer):
            return
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        self._at_end = Limits.of(trainer, state).reached_in(checkpoint)
        if is_sharded_fit(trainer) and (self._at_end or state.get("stage")):
            raise ValueError("a sharded fit cannot resume in its stages; take a checkpoint of the training before")
        if self._at_end:
            checkpoint["optimizer_states"] = checkpoint["lr_schedulers"] = []  # the next stage has its own

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve policy and stages now, not after the training; go on where a checkpoint was saved in a stage."""
        self._work = None
        policy = self.find_policy(trainer) if self.enabled else None
        if policy is None:
            return
        schemes, stages = resolve(pl_module, policy), self.find_stages(trainer)
        plan = plan_stages(pl_module, schemes, stages) if stages else []
        learn.check_data(trainer, pl_module, schemes, bool(plan), self.calibration)
        self._work = StagedFinetuning(schemes, plan, self.finetune)
        if self.finetune.optimizer is None and plan:
            check_optimizers(trainer.optimizers, self.finetune.reassign)
        if plan and self._restored.get("stage"):
            self._work.go_on(trainer, pl_module, self._restored, self._at_end)
        elif not self._restored:
            self._at_end = Limits.of(trainer).reached(0, 0)  # max_epochs=0: all there is to do is to quantize
        if self._at_end and plan:
            self._work.expect(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a stage where the fit resumes between two, and take its weights from the noise."""
        if self._work is None or not self._work.plan:
            return
        if self._at_end and not self._work.are_over:
            self._prepare(trainer, pl_module)
        if self._at_end:
            self._work.begin_resumed(trainer, pl_module)
        self._at_end = False
        self._work.start_run(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the stage in logs and progress bar."""
        if self._work is not None:
            self._work.tell(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Turn the gradients of quantized weights into those of their codewords."""
        if self._work is not None:
            self._work.held.before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put weights back whose step was skipped (non-finite gradients under mixed precision)."""
        if self._work is not None:
            self._work.held.after_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalize, on the training's device."""
        if self._work is None:
            return
        self.__dict__["on_train_end"] = None  # the runs below would call it again
        try:
            while not self._work.are_over:
                self._prepare(trainer, pl_module)
                self._work.run_next(trainer, pl_module)
        finally:
            del self.__dict__["on_train_end"]
        if self._work.plan:
            self._note(trainer, pl_module)
        elif self.start == "best":
            origin.load_best(trainer, pl_module)
        moments = learn.input_moments(trainer, pl_module, self._work.schemes, self.calibration)
        encoded = self._finish(trainer, pl_module, moments)
        learn.adjust(trainer, pl_module, self.batch_norm, self.calibration)
        self._left["ranges"] = learn.get_ranges(pl_module)
        report(trainer, pl_module, self._record, encoded, validate_again(trainer) if self.evaluate else {})
        write_file(trainer, pl_module, self.path, encoded)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalize a fit that had nothing left to train (a resumed, finished one)."""
        if self._work is not None:
            encoded = self._finish(trainer, pl_module, {})  # its decoded weights round to themselves
            learn.set_ranges(pl_module, self._restored.get("ranges", {}))
            report(trainer, pl_module, self._record, encoded, {})
            write_file(trainer, pl_module, self.path, encoded)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a plain model, with float or quantized values."""
        if self._work is not None:
            self._left = self.state_dict()
            self._work.stop(trainer)
            self._work = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand decoded weights back to the process that spawned this one, whose model is still the float one."""
        if stage == "fit" and self.enabled and "_MultiProcessingLauncher" in class_names(trainer.strategy.launcher):
            dequantize(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the user's keys in the checkpoints of a packed model."""
        if self.enabled and next(packed_weights(pl_module), None) is not None:
            checkpoint["state_dict"] = dense_state_dict(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs to go on bit-equally: the stage, and what is held in it."""
        if self._work is None or not self._work.current:
            return self._left
        return {**self._work.state_dict(), "record": self._record.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._restored = state_dict
        self._record = Record(list(state_dict.get("record", [])))

    def _finish(self, trainer: Trainer, pl_module: LightningModule, moments: Any) -> dict[str, PackedWeight]:
        assert self._work is not None
        encoded = self._work.finish(trainer, pl_module, moments)
        self._work, self._left = None, self.state_dict()
        return encoded

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._work is not None
        if not self._work.current and self.start == "best":
            origin.load_best(trainer, pl_module)
        if not self._work.current and self.finetune.guidance:
            reestimate(trainer, pl_module, self.batch_norm)  # noise leaves statistics that spoil the teacher
        self._note(trainer, pl_module)

    def _note(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._work
        metrics = validate_again(trainer) if self.evaluate else {}
        note(trainer, pl_module, self._record, self._work.current, self._work.quantized(), metrics)
