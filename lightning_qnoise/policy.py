"""Which weight gets which scheme: globs to schemes, resolved against a model into plain data."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_qnoise.globs import Rule, applies, check_globs, matches
from lightning_qnoise.presets import PRESETS, QUANTIZING_INPUTS
from lightning_qnoise.schemes import Scheme
from lightning_qnoise.weights import Weight, list_weights

Policy = str | Scheme | Mapping[str, str | Scheme | dict[str, Any] | None]
"""A preset's name, one scheme for every layer that can take it, or a mapping glob -> scheme, preset or None.

In a mapping a scheme may be plain data, as in a JSON file.
"""


@dataclass(frozen=True)
class Decision:
    """What a policy says of one weight: a scheme, or the reason why it stays float."""

    weight: Weight
    rule: Rule
    scheme: Scheme | None = None
    reason: str = ""


def resolve(model: nn.Module | Sequence[Weight], policy: Policy) -> dict[str, Scheme]:
    """Return the scheme of every weight that a policy selects: full parameter name -> scheme that fits its shape.

    A glob (`fnmatch`: `*` also crosses dots) matches the full name of a module or of a parameter, never a prefix;
    `type:Conv2d` matches the layers of a class. The first entry that matches a weight under any of its names decides.

    Args:
        model: The model, or its weights as `list_weights` gives them.
        policy: See `Policy`. A preset and a single scheme skip the weights that they cannot take or would not
            shrink; in a mapping such a weight is an error.

    Raises:
        ValueError: A glob matches nothing, a scheme cannot take a layer, or nothing at all is selected.
        TypeError: The policy is none of these.

    Example:
        >>> from lightning_qnoise import Int
        >>> schemes = resolve(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), {"1": None, "*": Int(bits=4)})
        >>> {name: str(scheme) for name, scheme in schemes.items()}
        {'0.weight': "Int(bits=4, granularity='channel')"}
    """
    return {d.weight.name: d.scheme for d in decide(model, policy) if d.scheme is not None}


def decide(model: nn.Module | Sequence[Weight], policy: Policy) -> list[Decision]:
    """Return the decision on every weight, with reasons. Arguments and errors are those of `resolve`."""
    weights = list_weights(model) if isinstance(model, nn.Module) else list(model)
    mapping = as_mapping(policy)
    strict = mapping.get("*") is not policy  # only a bare preset or scheme skips what it cannot take
    entries = list(mapping.items())
    if strict:
        check_globs(entries, weights)
    decisions = []
    for weight in weights:
        rules = [rule for glob, rule in entries if matches(glob, weight) and applies(glob, rule, weight)]
        decisions.append(
            _decide(weight, rules[0], strict) if rules else Decision(weight, None, reason="not in the policy")
        )
    if not any(d.scheme for d in decisions):
        reasons = "; ".join(f"{d.weight.name}: {d.reason}" for d in decisions if d.weight.is_layer_weight)
        raise ValueError(
            f"policy {policy!r} selects no weight of the model ({reasons or 'it has no float layer weights'})"
        )
    _warn_changed(decisions)
    return decisions


def as_mapping(policy: Policy) -> Mapping[str, Rule]:
    """Return a policy as a mapping; the name of a `.json` file is read.

    Raises:
        ValueError: An unknown preset, or a file without a policy.
        TypeError: Neither a name, a scheme nor a mapping of such.
    """
    if isinstance(policy, str) and policy.endswith(".json"):
        try:
            policy = from_json(Path(policy).read_text())
        except ValueError as error:
            raise ValueError(f"{policy!r} holds no policy: {error}") from error
    if not isinstance(policy, str | Scheme | Mapping):
        raise TypeError(f"a policy is a preset's name, a scheme or a mapping glob -> scheme, got {policy!r}")
    mapping = _with_schemes(policy) if isinstance(policy, Mapping) else {"*": policy}
    for glob, rule in mapping.items():
        if isinstance(rule, str) and rule not in PRESETS:
            raise ValueError(f"unknown preset {rule!r}; choose from {', '.join(PRESETS)}, or name a .json file")
        if not isinstance(glob, str) or not (rule is None or isinstance(rule, str | Scheme)):
            raise TypeError(f"a policy maps globs to schemes, presets or None, got {glob!r}: {rule!r}")
    return mapping


def to_json(policy: Mapping[str, Rule]) -> str:
    """Return a policy as JSON, which `from_json` reads."""
    return json.dumps({g: r.to_dict() if isinstance(r, Scheme) else r for g, r in policy.items()})


def from_json(text: str) -> dict[str, Rule]:
    """Return the policy that `to_json` wrote.

    Raises:
        ValueError: Not a JSON object of schemes, presets and nulls.
    """
    data: Any = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError(f"a policy is a JSON object glob -> scheme, got {type(data).__name__}")
    return _with_schemes(data)


def _with_schemes(mapping: Mapping[str, Any]) -> dict[str, Rule]:
    return {glob: Scheme.from_dict(rule) if isinstance(rule, dict) else rule for glob, rule in mapping.items()}


def _decide(weight: Weight, rule: Rule, strict: bool) -> Decision:
    if rule is None:
        return Decision(weight, rule, reason="kept float by the policy")
    try:
        if weight.obstacle:
            raise ValueError(weight.obstacle)
        scheme = PRESETS[rule](weight) if isinstance(rule, str) else rule.adapt(weight.shape)
        scheme = _without_input(weight, scheme, strict and not isinstance(rule, str))
        predicted = sum(b.nbytes for b in scheme.empty(weight.shape, weight.dtype, "meta").buffers())
    except ValueError as error:
        if strict and not isinstance(rule, str):
            raise ValueError(f"layer {weight.name!r}: {error}; or keep it float with None in the policy") from error
        return Decision(weight, rule, reason=str(error))
    if predicted >= weight.nbytes and not (strict and isinstance(rule, Scheme)):
        return Decision(weight, rule, reason=f"would not shrink ({weight.nbytes} to {predicted} bytes)")
    return Decision(weight, rule, scheme)


def _without_input(weight: Weight, scheme: Scheme, strict: bool) -> Scheme:
    """The scheme without its activation where the layer's input cannot be quantized; an embedding has none."""
    if scheme.activation is None or weight.takes_input:
        return scheme
    if strict and not weight.is_embedding:
        raise ValueError(
            "its layer is no plain Linear, convolution or attention, so what enters it cannot be quantized; give it a "
            "scheme with activation=None"
        )
    return replace(scheme, activation=None)  # type: ignore[type-var]


def _warn_changed(decisions: list[Decision]) -> None:
    """Say what became of a rule, at one place, so that the callbacks of a fit, which all resolve it, say it once."""
    reduced = [(d.weight.name, d.scheme) for d in decisions if _n_centroids(d.scheme) < _n_centroids(d.rule)]
    if reduced:
        rows = "; ".join(f"{name}: {scheme}" for name, scheme in reduced)
        warnings.warn(f"fewer blocks than codewords, n_centroids is reduced for {rows}", stacklevel=1)
    kept = [d.weight.name for d in decisions if _lost_activation(d)]
    if kept:
        warnings.warn(
            f"what enters {', '.join(kept)} stays float, since only a plain Linear, a convolution or attention can "
            f"quantize its input; their weights are quantized",
            stacklevel=1,
        )


def _n_centroids(rule: Rule) -> int:
    return getattr(rule, "n_centroids", 0) if isinstance(rule, Scheme) else 0


def _lost_activation(decision: Decision) -> bool:
    """Whether the rule quantizes inputs and the scheme does not, though the layer has any."""
    if decision.scheme is None or decision.weight.is_embedding:
        return False
    rule = decision.rule
    wants = rule.activation is not None if isinstance(rule, Scheme) else rule in QUANTIZING_INPUTS
    return wants and decision.scheme.activation is None
