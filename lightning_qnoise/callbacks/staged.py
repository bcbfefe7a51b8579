"""Iterative quantization inside a fit: stage after stage, weights are put on their codebooks and finetuned there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_qnoise.attach import attach_inputs
from lightning_qnoise.callbacks import origin
from lightning_qnoise.callbacks.again import UsersEpochs, forget_best, run_again, start_new_epoch
from lightning_qnoise.callbacks.base import LightningModule, Trainer, class_names
from lightning_qnoise.callbacks.dropout import NoDropout
from lightning_qnoise.callbacks.finetune import Finetune
from lightning_qnoise.callbacks.fit import from_rank_zero, is_sharded_fit
from lightning_qnoise.callbacks.limits import Limits, n_steps
from lightning_qnoise.callbacks.optimizers import add_codebooks, check_optimizers, set_optimizers, set_schedule
from lightning_qnoise.callbacks.quant_noise import QuantNoise
from lightning_qnoise.convert import encode_weights, pack
from lightning_qnoise.distill import Guide, Rehearsal
from lightning_qnoise.held import HeldWeights
from lightning_qnoise.schemes import PackedWeight, Scheme
from lightning_qnoise.sharding import local, local_rows, whole
from lightning_qnoise.weights import owners


class StagedFinetuning:
    """The stages of one fit: which has come, what is held on its codebook, and who guides.

    Args:
        schemes: Weight name -> scheme.
        plan: The weight names of every stage; none for a model that is packed in one shot.
        finetune: How each is finetuned.

    Attributes:
        current: The stage that runs or ran last, from 1; 0 during the user's own epochs.
        held: The weights quantized so far.
    """

    def __init__(self, schemes: Mapping[str, Scheme], plan: list[list[str]], finetune: Finetune) -> None:
        finetune.check_stages(len(plan))
        self.schemes = schemes
        self.plan = plan
        self.finetune = finetune
        self.current = 0
        self.held = HeldWeights(finetune.reassign)
        self._limits = Limits(-1, -1)
        self._n_steps = 0
        self._is_told = True
        self._guidance = finetune.guidance
        self._guide: Guide | None = None
        self._teacher_file: str | None = None
        self._no_dropout: NoDropout | None = None
        self._left: UsersEpochs | None = None

    @property
    def are_over(self) -> bool:
        """Whether no stage is left to begin."""
        return self.current == len(self.plan)

    def quantized(self) -> dict[str, Scheme]:
        """Return the schemes of the weights of all stages up to the current one."""
        return {name: self.schemes[name] for stage in self.plan[: self.current] for name in stage}

    def run_next(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the next stage and train it to its end."""
        self._leave_users_epochs(trainer)
        self.begin(trainer, pl_module)
        run_again(trainer)

    def expect(self, trainer: Trainer) -> None:
        """Let a run of the trainer's own that would find nothing left to do start nevertheless; it will `begin`."""
        self._leave_users_epochs(trainer)
        Limits(-1, -1).apply(trainer)

    def begin_resumed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the next stage in the run that was made possible by `expect`, or end it where there is none."""
        if self.are_over:
            self._limits.apply(trainer)
            return
        start_new_epoch(trainer)
        self.begin(trainer, pl_module)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the weights of the next stage, and make the trainer ready to train it."""
        forget_best(trainer)
        if not self.current:
            self._find_teacher(trainer, pl_module)
        index, self.current = self.current, self.current + 1
        epochs, steps = self.finetune.epochs_of(index), self.finetune.steps_of(index)
        if trainer.fast_dev_run:
            epochs, steps = 1, None
        self._n_steps = n_steps(trainer, epochs) if steps is None else steps
        self._limits = Limits.after(trainer, epochs, steps)
        self._quantize(trainer, pl_module, {name: self.schemes[name] for name in self.plan[index]})
        self._make_ready(trainer, pl_module)
        length = f"{epochs} epochs" if steps is None else f"{steps} steps"
        weights = len(self.plan[index])
        rank_zero_info(f"Quantize: stage {self.current} of {len(self.plan)}, {weights} weights, {length}")

    def go_on(self, trainer: Trainer, pl_module: LightningModule, state: Mapping[str, Any], at_end: bool) -> None:
        """Make the trainer ready to resume from what `state_dict` returned.

        Args:
            trainer: A trainer at the start of a fit.
            pl_module: Its module, with the weights of the checkpoint.
            state: The state.
            at_end: Whether the stage had come to its end.

        Raises:
            ValueError: The checkpoint is of other stages.
        """
        self.current, self._n_steps = state["stage"], state["n_steps"]
        if self.current > len(self.plan) or not state["held"].keys() <= self.quantized().keys():
            raise ValueError(f"the checkpoint was saved in stage {self.current} of other stages: resume it with those")
        self._leave_users_epochs(trainer)
        self._limits = Limits(*state["limits"])
        self._teacher_file = state["teacher"]
        for name, parameter in _parameters(pl_module, state["held"]).items():
            empty = self.schemes[name].empty(parameter.shape, parameter.dtype, parameter.device)
            self.held.restore(name, parameter, empty, state["held"][name])
        self._guidance = self.finetune.guidance if state["is_guided"] else None
        if self._guidance and not (at_end and self.are_over):
            self._guide = Guide(pl_module, origin.restore_teacher(pl_module, self._teacher_file), self._guidance)
        self._make_ready(trainer, pl_module)

    def start_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a run of the fit loop starts: noise goes on in the weights that are not quantized yet."""
        self._is_told = not self.current
        noises = [callback for callback in trainer.callbacks if isinstance(callback, QuantNoise)]
        if not self.current and any(noise.is_training_quantized for noise in noises):
            self._guidance = None
            rank_zero_info("Quantize: noise at rate 1 leaves no float model, so that none will guide the finetuning")
        if not self.current and self._guidance:
            self._guide = Rehearsal(pl_module, self._guidance)
        for noise in noises if self.current else []:
            noise.finish(self.quantized())
        attach_inputs(pl_module, self.held.inputs)

    def tell(self, pl_module: LightningModule) -> None:
        """Show the stage in logs and progress bar, once a run: the trainer keeps it."""
        if not self._is_told:
            pl_module.log("quantize/stage", float(self.current), prog_bar=True)
            self._is_told = True

    def finish(
        self, trainer: Trainer, pl_module: LightningModule, moments: Mapping[str, Tensor]
    ) -> dict[str, PackedWeight]:
        """Exchange the weights of the whole policy for packed ones, the same on every rank.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            moments: Second moments of inputs, see `Scheme.encode`.

        Returns:
            Nothing; of a sharded module, whose weights stay Parameters and only take the decoded values, the encodings.
        """
        if not self.are_over:
            rank_zero_warn("Quantize: the fit ended before its first step, so the stages were not finetuned")
        rest = {name: scheme for name, scheme in self.schemes.items() if name not in self.held}
        weights = _parameters(pl_module, self.schemes)
        like = {name: (self.schemes[name], weight) for name, weight in weights.items()}
        held, others = self.held.pack(), {name: whole(weights[name].detach()) for name in rest}
        packed = from_rank_zero(trainer, lambda: held | encode_weights(others, rest, moments), like)
        self.stop(trainer)
        if is_sharded_fit(trainer):
            for name, weight in weights.items():
                local(weight).detach().copy_(local_rows(packed[name].decode(), weight))
            return packed
        pack(pl_module, packed)
        for callback in trainer.callbacks:
            if "WeightAveraging" in class_names(callback):
                callback._average_model = None  # else it swaps its float weights for the packed ones in validation
        return {}

    def stop(self, trainer: Trainer) -> None:
        """Let go of weights, teacher and trainer; the Parameters keep their quantized values."""
        self.held.after_step()
        for noise in self.held.inputs.values():
            noise.active = False
        self.held = HeldWeights(self.finetune.reassign)
        self._dismiss()
        if self._left is not None:
            self._left.come_back(trainer)
            self._left = None
            if self._no_dropout is not None:
                self._no_dropout.undo()

    def state_dict(self) -> dict[str, Any]:
        """Return plain data from which `go_on` goes on bit-equally."""
        return {
            "stage": self.current,
            "limits": [self._limits.epoch, self._limits.step],
            "n_steps": self._n_steps,
            "is_guided": self._guidance is not None,
            "teacher": self._teacher_file,
            "held": self.held.state_dict(),
        }

    def _find_teacher(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._dismiss()
        if self._guidance:
            teacher, self._teacher_file = origin.make_teacher(trainer, pl_module)
            self._guide = Guide(pl_module, teacher, self._guidance)

    def _dismiss(self) -> None:
        if self._guide is not None:
            self._guide.detach()
            self._guide = None

    def _leave_users_epochs(self, trainer: Trainer) -> None:
        if self._left is None:
            self._left = UsersEpochs(trainer)
            self._no_dropout = None if self.finetune.dropout else NoDropout(trainer.lightning_module)

    def _quantize(self, trainer: Trainer, pl_module: LightningModule, schemes: Mapping[str, Scheme]) -> None:
        weights = _parameters(pl_module, schemes)
        like = {name: (schemes[name], weight) for name, weight in weights.items()}
        values = {name: whole(weight.detach()) for name, weight in weights.items()}
        packed = from_rank_zero(trainer, lambda: encode_weights(values, schemes), like)
        for name, weight in weights.items():
            self.held.add(name, weight, packed[name])

    def _make_ready(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._limits.apply(trainer)
        settings, total = self.finetune, self._n_steps

        def factor(step: int) -> float:
            return settings.schedule(min(1.0, (step + 1) / (total + 1)))

        set_optimizers(trainer, pl_module, settings.optimizer, settings.lr)
        check_optimizers(trainer.strategy.optimizers, settings.reassign)
        is_manual = not pl_module.automatic_optimization
        add_codebooks(trainer, list(self.held.codebooks()), settings.codebook_rate, has_schedule=is_manual)
        if not is_manual:
            set_schedule(trainer, factor)
        for optimizer in trainer.strategy.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.held.after_step())


def _parameters(pl_module: LightningModule, names: Iterable[str]) -> dict[str, nn.Parameter]:
    return {name: parameter for name, _, _, parameter in owners(pl_module) if name in names}
