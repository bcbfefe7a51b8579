"""Which weights are quantized when: the stages of iterative product quantization, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_qnoise.globs import check_globs, matches
from lightning_qnoise.schemes import Scheme
from lightning_qnoise.weights import Weight, list_weights

Stages = str | Sequence[str | Sequence[str]]
"""A preset's name, or one entry a stage: a glob, or several."""


def _joint(weights: Sequence[Weight]) -> list[list[Weight]]:
    """All weights at once."""
    return [list(weights)]


def _transformer(weights: Sequence[Weight]) -> list[list[Weight]]:
    """Feed-forward layers, then embeddings and what has their shape, then attention (Fan et al. 2021)."""
    tables = {w.shape for w in weights if "Embedding" in w.kinds}

    attention = [w for w in weights if w.is_attention]
    embedding = [w for w in weights if w.shape in tables and w not in attention]
    return [[w for w in weights if w not in attention and w not in embedding], embedding, attention]


def _bottom_up(weights: Sequence[Weight]) -> list[list[Weight]]:
    """Three runs of consecutive weights with about the same number of parameters, from the input on."""
    total = sum(weight.nbytes for weight in weights)
    groups: list[list[Weight]] = [[], [], []]
    behind = 0
    for weight in weights:
        groups[min(2, 3 * behind // total)].append(weight)
        behind += weight.nbytes
    return groups


STAGES = {"joint": _joint, "transformer": _transformer, "bottom-up": _bottom_up}
"""Name -> how the weights of a policy, in the model's order, are divided; an empty stage is left out."""


def check_stages(stages: Stages) -> None:
    """Raise where stages cannot be meant.

    Raises:
        ValueError: An unknown preset, or no stage at all.
        TypeError: Neither a name nor a sequence of globs.
    """
    if isinstance(stages, str):
        if stages not in STAGES:
            raise ValueError(f"unknown stages {stages!r}; choose from {', '.join(STAGES)}, or pass a list of globs")
        return
    if not isinstance(stages, Sequence) or not all(_globs(stage) for stage in stages):
        raise TypeError(f"stages are a preset's name or a list of globs (or of lists of them), got {stages!r}")
    if not stages:
        raise ValueError("stages holds no stage; None packs in one shot")


def plan_stages(model: nn.Module, schemes: Mapping[str, Scheme], stages: Stages) -> list[list[str]]:
    """Divide the weights of a policy into stages.

    Args:
        model: The model.
        schemes: Full parameter name -> scheme, as `resolve` returns it.
        stages: See `Stages`. A weight belongs to the first stage that matches it.

    Returns:
        The weight names of every stage.

    Raises:
        ValueError: A stage matches no weight of the policy, or a weight of the policy is in no stage.

    Example:
        >>> from lightning_qnoise import PQ
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> plan_stages(model, {"0.weight": PQ(), "1.weight": PQ()}, ["1", "*"])
        [['1.weight'], ['0.weight']]
    """
    check_stages(stages)
    weights = [weight for weight in list_weights(model) if weight.name in schemes]
    if isinstance(stages, str):
        return [[w.name for w in stage] for stage in STAGES[stages](weights) if stage]
    left = list(weights)
    plan = []
    for number, stage in enumerate(stages, start=1):
        globs = _globs(stage)
        try:
            check_globs([(glob, None) for glob in globs], weights)
        except ValueError as error:
            raise ValueError(f"stage {number}: {error}") from error
        found = [w for w in left if any(matches(glob, w) for glob in globs)]
        if not found:
            raise ValueError(f"stage {number} {list(globs)} matches only weights that belong to an earlier stage")
        plan.append([w.name for w in found])
        left = [w for w in left if w not in found]
    if left:
        names = ", ".join(w.name for w in left)
        raise ValueError(f"no stage quantizes {names}; add them to a stage, for instance a last one '*'")
    return plan


def _globs(stage: str | Sequence[str]) -> Sequence[str]:
    globs = [stage] if isinstance(stage, str) else stage
    return globs if isinstance(globs, Sequence) and all(isinstance(glob, str) for glob in globs) else ()
