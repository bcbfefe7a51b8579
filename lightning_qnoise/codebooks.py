"""Train a packed model: its codebooks become Parameters, and what is stored again."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_qnoise.layers import packed_weights
from lightning_qnoise.schemes import PackedWeight, PQWeight

_Model = TypeVar("_Model", bound=nn.Module)


def train_codebooks(model: _Model, trainable: bool = True, average: bool = False) -> _Model:
    """Make the codebooks of a packed model trainable, or what is stored again, in place, and return the model.

    A trainable codebook is a Parameter `<layer>.weight.codebook`, float32 `[n_centroids, block_size]`, of
    `model.parameters()`: call this before the optimizer is made. Every forward reads it as it will be stored, with a
    straight-through gradient, so that evaluation, `save` and freezing change no value. Codes stay as they are, and a
    codeword of zeros (padding rows, pruned blocks) stays zero. `state_dict` holds float32, for a fit to resume from,
    and loads into a frozen model, too.

    Args:
        model: A packed model; only weights of the scheme `PQ` have a codebook. Tied ones share theirs.
        trainable: Whether they are Parameters. False rounds them to the scheme's `codebook_dtype` or integers.
        average: Let the gradient of a codeword be the mean over its blocks (Stock et al. 2020), not their sum.

    Raises:
        ValueError: No weight of the model has a codebook, or one to be stored as integers holds NaN or Inf.

    Example:
        >>> from lightning_qnoise import PQ, quantize
        >>> model = train_codebooks(quantize(nn.Sequential(nn.Linear(64, 64)), PQ(8, n_centroids=16)))
        >>> [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
        [('0.bias', [64]), ('0.weight.codebook', [16, 8])]
    """
    weights = {packed for _, packed in packed_weights(model) if isinstance(packed, PQWeight)}
    if not weights:
        raise ValueError("no weight of the model has a codebook: quantize it with a PQ scheme, or load a packed file")
    for packed in weights:
        packed.train_codebook(trainable, average)
    return model


def stored_state_dict(module: nn.Module) -> dict[str, Any]:
    """Return the state dict of a module as a file holds it: with trained codebooks as they are stored, tied ones once.

    Example:
        >>> from lightning_qnoise import PQ, quantize
        >>> model = train_codebooks(quantize(nn.Sequential(nn.Linear(64, 64)), PQ(8, n_centroids=16)))
        >>> model.state_dict()["0.weight.codebook"].dtype, stored_state_dict(model)["0.weight.codebook"].dtype
        (torch.float32, torch.float16)
    """
    state = module.state_dict(keep_vars=True)
    stored: dict[PackedWeight, dict[str, Tensor]] = {}
    for prefix, packed in module.named_modules(remove_duplicate=False):
        if isinstance(packed, PackedWeight) and packed.is_trained:
            names = f"{prefix}.".lstrip(".")
            stored[packed] = stored.get(packed) or packed.stored_state()
            del state[f"{names}codebook"]
            state.update({names + key: tensor for key, tensor in stored[packed].items()})
    return state
