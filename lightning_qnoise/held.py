"""Weights that are trained while they are quantized: each tied to its codebook, or latent behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_qnoise.input_noise import InputNoise
from lightning_qnoise.latent import LatentWeight
from lightning_qnoise.learned_scale import LearnedScale
from lightning_qnoise.schemes import IntWeight, PackedWeight, PQWeight
from lightning_qnoise.tied import TiedWeight

_ENDS = "input_ends"  # of the running range of a static activation


class HeldWeights:
    """The weights of a model that show their quantized values while an optimizer trains them.

    Args:
        reassign: Whether blocks may change their codeword (`LatentWeight`) or not (`TiedWeight`, for schemes with a
            codebook).

    Attributes:
        inputs: What quantizes the inputs of the layers of these weights, by weight name; in eval mode, too.
    """

    def __init__(self, reassign: bool) -> None:
        self._reassign = reassign
        self._held: dict[str, TiedWeight | LatentWeight] = {}
        self.inputs: dict[str, InputNoise] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def add(self, name: str, parameter: nn.Parameter, packed: PackedWeight) -> None:
        """Quantize a Parameter from now on, starting from its encoding."""
        self._held[name] = self._hold(name, parameter, packed)
        self._held[name].start()

    def restore(self, name: str, parameter: nn.Parameter, empty: PackedWeight, state: Mapping[str, Tensor]) -> None:
        """Go on with a Parameter from its entry in `state_dict`."""
        self._held[name] = self._hold(name, parameter, empty)
        self._held[name].load_state_dict({key: value for key, value in state.items() if key != _ENDS})
        if _ENDS in state:
            self.inputs[name].ends = state[_ENDS].to(parameter.device)

    def codebooks(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """Yield every Parameter that has a codebook to be trained beside it, and that codebook."""
        for held in self._held.values():
            if held.codebook is not None:
                yield held.parameter, held.codebook

    def before_step(self) -> None:
        """Called with all gradients ready, before they are clipped."""
        for held in self._held.values():
            held.before_step()

    def after_step(self) -> None:
        """Called after an optimizer's step and after a batch; a second call does nothing."""
        for held in self._held.values():
            held.after_step()
        for noise in self.inputs.values():
            noise.follow()

    def pack(self) -> dict[str, PackedWeight]:
        """Return the encoding of every weight."""
        return {name: held.pack() for name, held in self._held.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return weight name -> what `restore` needs to go on bit-equally."""
        state = {name: dict(held.state_dict()) for name, held in self._held.items()}
        for name, noise in self.inputs.items():
            if noise.ends is not None:
                state[name][_ENDS] = noise.ends
        return state

    def _hold(self, name: str, parameter: nn.Parameter, packed: PackedWeight) -> TiedWeight | LatentWeight:
        if packed.scheme.activation is not None:
            self.inputs[name] = InputNoise(packed.scheme.activation, packed.shape, name, in_eval=True)
        if isinstance(packed, PQWeight) and not self._reassign:
            return TiedWeight(parameter, packed)
        if isinstance(packed, IntWeight) and packed.scheme.range == "lsq":
            return LearnedScale(parameter, packed)
        return LatentWeight(parameter, packed)
