"""Globs over the names and classes of weights: what matches, and what to say where nothing does."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from lightning_qnoise.schemes import Scheme
from lightning_qnoise.weights import Weight

Rule = str | Scheme | None
"""What a policy says of a glob: a preset's name, a scheme, or None to keep float."""


def matches(glob: str, weight: Weight) -> bool:
    """Whether a glob matches a weight under any of its names, a layer that owns it, or (`type:`) its class."""
    if glob.startswith("type:"):
        return any(fnmatchcase(kind, glob[5:]) for kind in weight.kinds)
    return any(fnmatchcase(name, glob) for name in weight.names + weight.layers)


def applies(glob: str, rule: Rule, weight: Weight) -> bool:
    """Norms, biases and Parameters that are no layer's weight are taken only when named in full."""
    return rule is None or weight.is_layer_weight or glob in weight.names or bool(weight.obstacle and not weight.shape)


def check_globs(entries: list[tuple[str, Rule]], weights: list[Weight]) -> None:
    """Raise a ValueError for a glob that matches nothing, with what it may have meant."""
    for glob, rule in entries:
        matched = [w for w in weights if matches(glob, w)]
        if not matched:
            raise ValueError(f"{glob!r} in the policy matches no layer or parameter{_suggestion(glob, weights)}")
        if rule is not None and not any(applies(glob, rule, w) for w in matched):
            names = ", ".join(w.name for w in matched[:5])
            raise ValueError(f"{glob!r} in the policy matches no layer weight, only {names}; name one in full")


def _suggestion(glob: str, weights: list[Weight]) -> str:
    if glob.startswith("type:"):
        kinds = sorted(set().union(*(w.kinds for w in weights)) - {"Module", "object"})
        return f"; layer classes are {', '.join(kinds)}"
    if any(name.startswith(f"{glob}.") for w in weights for name in w.names):
        return f"; a glob is no prefix, did you mean {glob + '.*'!r}?"
    names = sorted({layer for w in weights for layer in w.layers + w.names if layer})
    close = difflib.get_close_matches(glob, names, n=3, cutoff=0.4) or names[:5]
    return f"; close names are {', '.join(map(repr, close))}"
