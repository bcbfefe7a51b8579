"""Train for a while without dropout."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

_ATTRIBUTES: tuple[tuple[type[nn.Module], str], ...] = (
    (_DropoutNd, "p"),
    (nn.MultiheadAttention, "dropout"),
    (nn.RNNBase, "dropout"),
)


class NoDropout:
    """Sets the rate of every dropout layer of a model to zero until `undo`; a model's own `F.dropout` is not reached.

    Example:
        >>> layer = nn.Dropout(0.1)
        >>> off = NoDropout(layer)
        >>> layer.p
        0.0
        >>> off.undo()
        >>> layer.p
        0.1
    """

    def __init__(self, model: nn.Module) -> None:
        self._rates: list[tuple[nn.Module, str, float]] = []
        for module in model.modules():
            for kind, attribute in _ATTRIBUTES:
                if isinstance(module, kind):
                    self._rates.append((module, attribute, getattr(module, attribute)))
                    setattr(module, attribute, 0.0)

    def undo(self) -> None:
        """Give every layer its own rate back."""
        while self._rates:
            module, attribute, rate = self._rates.pop()
            setattr(module, attribute, rate)
