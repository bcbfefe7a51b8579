"""When a model becomes small: at the end of the fit it is finetuned in stages or packed in one shot, and written."""

from __future__ import annotations

from typing import Any, Literal

from lightning_qnoise.callbacks import origin
from lightning_qnoise.callbacks.again import Limits
from lightning_qnoise.callbacks.base import Callback, LightningModule, Trainer, class_names
from lightning_qnoise.callbacks.batch_norm import reestimate
from lightning_qnoise.callbacks.evaluate import validate_again
from lightning_qnoise.callbacks.finetune import Finetune
from lightning_qnoise.callbacks.fit import check_fit, check_later
from lightning_qnoise.callbacks.quant_noise import QuantNoise
from lightning_qnoise.callbacks.record import Record, log_quantized, report, write
from lightning_qnoise.callbacks.staged import StagedFinetuning, check_optimizers
from lightning_qnoise.convert import dense_state_dict, dequantize
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.policy import Policy, as_mapping, resolve
from lightning_qnoise.size import size_table
from lightning_qnoise.stages import Stages, check_stages, plan_stages


class Quantize(Callback):
    """Compress the model at the end of the fit: in one shot, or stage by stage with finetuning (iPQ).

    After the user's own epochs, however they ended, every stage puts its weights on their codebooks and runs the fit
    loop again: with a fresh optimizer, guided by the float model, seen by loggers, progress bars and checkpoints, and
    not by early stopping or weight averaging. Then the selected layers are packed in place, `quantized/<metric>` of one
    more validation run, `size/total_mb` and `size/compression` are logged (after every stage, too) and in
    `trainer.callback_metrics`, and the packed file is written.

    Lightning checkpoints stay plain: they hold decoded weights under the usual keys, and loading a float checkpoint
    into the packed model (`trainer.test(ckpt_path="best")`) encodes it. A fit resumes from within a stage and from
    between two. Where the ranks are spawned (`ddp_spawn`, `ddp_notebook`), the starting process keeps its float model
    with the decoded weights.

    Args:
        policy: As in `QuantNoise`; None takes the policy of the `QuantNoise` in the same trainer.
        stages: Which weights are quantized when: `"joint"` (all at once), `"transformer"`, `"bottom-up"`, or a list
            with a glob or several for every stage. None is `"joint"` for the policy `"ipq"`, one shot for all others.
        finetune: How the stages are trained.
        start: Whether quantization starts from the `"last"` weights or from the `"best"` of the trainer's
            `ModelCheckpoint`, which chooses anew among the checkpoints of each stage.
        path: The packed file, relative to the logger's folder (or the default root folder). None writes no file.
            Nothing is written in a `fast_dev_run`.
        evaluate: Whether to run validation on the model before, between and after the stages.
        batch_norm: Training batches from which BatchNorm statistics are estimated anew after packing; 0 keeps those of
            the float model, which do not fit the packed weights.
        enabled: False makes the callback do nothing.

    Raises:
        ValueError: At the start of a fit: no policy, one that does not fit the model, stages that do not fit the
            policy, a sharded strategy, or a callback listed later that overwrites the weights at the end. In its first
            step: a teacher that cannot guide. At its end: NaN or Inf in a weight.

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
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if policy is not None:
            as_mapping(policy)
        if stages is not None:
            check_stages(stages)
        if start not in ("last", "best"):
            raise ValueError(f"start must be 'last' or 'best', got {start!r}")
        if batch_norm < 0:
            raise ValueError(f"batch_norm must be a number of batches >= 0, got {batch_norm}")
        self.policy = policy
        self.stages = stages
        self.finetune = finetune
        self.start = start
        self.path = path
        self.evaluate = evaluate
        self.batch_norm = batch_norm
        self.enabled = enabled
        self._work: StagedFinetuning | None = None  # what the end of the fit is to do
        self._record = Record()
        self._restored: dict[str, Any] = {}
        self._at_end = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the policy and refuse what cannot work."""
        if stage != "fit" or not self.enabled:
            return
        self._restored, self._record, self._at_end = {}, Record(), False
        if self.find_policy(trainer) is None:
            return
        check_fit(self, trainer, pl_module)
        check_later(self, trainer)
        if self.start == "best":
            origin.check_best(trainer)
        if self.find_stages(trainer) and self.finetune.guidance and not pl_module.automatic_optimization:
            raise ValueError("a teacher cannot guide manual optimization: pass Finetune(guidance=None)")

    def find_policy(self, trainer: Trainer) -> Policy | None:
        """Return the own policy or that of the trainer's `QuantNoise` (None where that is switched off by None)."""
        if self.policy is not None:
            return self.policy
        noise = next((callback for callback in trainer.callbacks if isinstance(callback, QuantNoise)), None)
        if noise is None:
            raise ValueError("Quantize() takes its policy from QuantNoise, but the trainer has none; pass a policy")
        return noise.policy

    def find_stages(self, trainer: Trainer) -> Stages | None:
        """Return the own stages, or those that the policy implies: `"joint"` where it says `"ipq"`, else None."""
        policy = self.find_policy(trainer)
        if self.stages is not None or policy is None:
            return self.stages
        return "joint" if "ipq" in as_mapping(policy).values() else None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find out where a fit resumes: before, within or at the end of a stage."""
        if trainer.state.fn != "fit" or not self.enabled or not self.find_stages(trainer):
            return
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        self._at_end = Limits.of(trainer, state).reached_in(checkpoint)
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
        self._work = StagedFinetuning(schemes, plan, self.finetune)
        if self.finetune.optimizer is None and plan:
            check_optimizers(trainer.optimizers, self.finetune.reassign)
        if self._restored.get("stage"):
            self._work.go_on(trainer, pl_module, self._restored, self._at_end)
        elif not self._restored:
            self._at_end = Limits.of(trainer).reached(0, 0)  # max_epochs=0: all there is to do is to quantize
        if self._at_end and not self._work.are_over:
            self._work.expect(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a stage where the fit resumes between two, and take its weights from the noise."""
        if self._work is None or not self._work.plan:
            return
        if self._at_end:
            self._at_end = False
            self._prepare(trainer, pl_module)
            self._work.begin_resumed(trainer, pl_module)
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
        self._work.finish(trainer, pl_module)
        self._work = None
        reestimate(trainer, pl_module, self.batch_norm)
        report(trainer, pl_module, self._record, validate_again(trainer) if self.evaluate else {})
        write(trainer, pl_module, self.path)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finalize a fit that had nothing left to train (a resumed, finished one)."""
        if self._work is not None:
            self._work.finish(trainer, pl_module)
            self._work = None
            report(trainer, pl_module, self._record, {})
            write(trainer, pl_module, self.path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a plain model: float, or with quantized values in plain Parameters."""
        if self._work is not None:
            self._work.stop(trainer)
        self._work = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand decoded weights back to the process that spawned this one, whose model is still the float one."""
        if stage == "fit" and self.enabled and "_MultiProcessingLauncher" in class_names(trainer.strategy.launcher):
            dequantize(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the user's keys in the checkpoints of a packed model."""
        if next(packed_weights(pl_module), None) is not None:
            checkpoint["state_dict"] = dense_state_dict(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs to go on bit-equally: the stage, and what is held in it."""
        if self._work is None or not self._work.current:
            return {"stage": 0}
        return {**self._work.state_dict(), "record": self._record.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._restored = state_dict
        self._record = Record(list(state_dict.get("record", [])))

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What comes before a stage: the best weights before the first, a row of the record before each."""
        assert self._work is not None
        if not self._work.current and self.start == "best":
            origin.load_best(trainer, pl_module)
        self._note(trainer, pl_module)

    def _note(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what the model is between two stages, and log it after each."""
        assert self._work is not None
        table = size_table(pl_module, self._work.quantized() or None)
        metrics = validate_again(trainer) if self.evaluate else {}
        stage = self._work.current
        self._record.add(f"stage {stage}" if stage else "float", table, metrics)
        if stage:
            log_quantized(trainer, table, metrics)
