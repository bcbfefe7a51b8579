"""Exchange Parameters for packed weights and back, in place on a model; no Trainer needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_qnoise.attach import detach
from lightning_qnoise.calibrate import calibrate, first_batches, input_moments, is_static
from lightning_qnoise.contents import weight_name
from lightning_qnoise.layers import (
    PackedLayer,
    input_names,
    pack_layer,
    packed_names,
    packed_weights,
    settle_attention,
    unpack_layer,
)
from lightning_qnoise.policy import Policy, resolve
from lightning_qnoise.schemes import PackedWeight, Scheme
from lightning_qnoise.sharding import is_sharded
from lightning_qnoise.weights import owners

_Model = TypeVar("_Model", bound=nn.Module)


def quantize(model: _Model, policy: Policy, loader: Iterable[Any] | None = None, batches: int = 8) -> _Model:
    """Compress the weights that a policy selects, in place, and return the model.

    Tied weights are encoded once and stay tied. Nothing is changed if anything raises.

    Args:
        model: Any module; already packed layers are left as they are.
        policy: See `lightning_qnoise.policy.resolve`.
        loader: Data for schemes that need it: `calibrate` follows for static activations (without a loader it is
            yours to call), and `rounding="gptq"` reads the layers' inputs. See `calibrate`.
        batches: Most batches of it to look at.

    Raises:
        ValueError: The policy does not fit the model, a selected weight holds NaN or Inf, or data are missing.

    Example:
        >>> model = quantize(nn.Sequential(nn.Linear(64, 64)), "int4")
        >>> model[0].weight.shape, type(model[0]).__name__
        (torch.Size([64, 64]), 'PackedLinear')
    """
    schemes = resolve(model, policy)
    data = None
    if loader is not None and any(scheme.needs_inputs or is_static(scheme) for scheme in schemes.values()):
        data = list(first_batches(loader, batches))  # looked at twice
    moments = input_moments(model, schemes, data, batches)
    weights = {name: parameter.detach() for name, _, _, parameter in owners(model) if name in schemes}
    before = list(owners(model))
    pack(model, encode_weights(weights, schemes, moments))
    try:
        return model if data is None else calibrate(model, data, batches)
    except BaseException:
        for _, module, attribute, parameter in before:
            if module._parameters[attribute] is None:
                unpack_layer(module, attribute, parameter)
        settle_attention(model)
        raise


def encode_weights(
    weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], moments: Mapping[str, Tensor] | None = None
) -> dict[str, PackedWeight]:
    """Encode weights, each by the scheme of its name, and return them.

    Args:
        weights: Name -> weight.
        schemes: Name -> scheme, of some of them.
        moments: Name -> second moment of its layer's inputs, see `Scheme.encode`.

    Raises:
        ValueError: A weight holds NaN or Inf, or its scheme cannot take it.
    """
    for name in schemes:
        check_finite(name, weights[name])
    packed = {}
    for name, scheme in schemes.items():
        try:
            packed[name] = scheme.encode(weights[name], moment=(moments or {}).get(name))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    return packed


def pack(model: _Model, packed: Mapping[str, PackedWeight]) -> _Model:
    """Exchange the named Parameters, under all of their names, for packed weights, in place; return the model."""
    detach(model)
    entries = list(owners(model))
    if any(is_sharded(parameter) for *_, parameter in entries):
        raise ValueError("the model is sharded over ranks (DTensor), so that no rank can pack it; gather it first")
    parameters = {name: parameter for name, _, _, parameter in entries}
    of_parameter = {id(parameters[name]): weight for name, weight in packed.items()}
    takers = input_names(model)
    for name, module, attribute, parameter in entries:
        scheme = of_parameter[id(parameter)].scheme if id(parameter) in of_parameter else None
        is_table = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if scheme and scheme.activation and not is_table and (module, attribute) not in takers:
            raise ValueError(
                f"layer {name!r}: what enters it cannot be quantized; give it a scheme without activation, and write "
                f"a file again by such a policy"
            )
    done = set()
    for _, module, attribute, parameter in entries:
        if id(parameter) in of_parameter and (module, attribute) not in done:
            done.add((module, attribute))
            pack_layer(module, attribute, of_parameter[id(parameter)])
    settle_attention(model)
    return model


def dequantize(model: _Model) -> _Model:
    """Exchange every packed weight for a Parameter with its decoded value, in place, and return the model.

    Example:
        >>> model = quantize(nn.Sequential(nn.Linear(64, 64)), "int4")
        >>> type(dequantize(model)[0]).__name__
        'Linear'
    """
    parameters = {packed: nn.Parameter(packed.decode()) for packed in _distinct(model)}
    for module in list(model.modules()):
        if isinstance(module, PackedLayer):
            for name in packed_names(module):
                unpack_layer(module, name, parameters[module.packed(name)])
    settle_attention(model)
    return model


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the state dict that the model had before packing, with decoded weights (tied ones share memory)."""
    decoded = {packed: packed.decode().detach() for packed in _distinct(model)}
    weights = dict(packed_weights(model))
    state: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        name = weight_name(key, weights)
        if name in weights:
            state[name] = decoded[weights[name]]
        else:
            state[key] = value
    order = {name: place for place, name in enumerate(_slots(model))}
    return dict(sorted(state.items(), key=lambda item: order.get(item[0], len(order))))


def _distinct(model: nn.Module) -> set[PackedWeight]:
    """The packed weights of a model, tied ones once."""
    return {packed for _, packed in packed_weights(model)}


def _slots(model: nn.Module) -> Iterator[str]:
    """Names of parameters and buffers in state-dict order, packed weights in the place of their Parameters."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute in (*module._parameters, *module._buffers, "_extra_state"):
            yield f"{prefix}.{attribute}" if prefix else attribute


def check_finite(name: str, weight: Tensor) -> None:
    """Raise a ValueError that names the weight if it holds NaN or Inf."""
    bad = int((~torch.isfinite(weight.detach())).sum())
    if bad:
        raise ValueError(
            f"layer {name!r}: {bad} of {weight.numel()} values are NaN or Inf, so it cannot be quantized; the training "
            f"has diverged, lower the learning rate or start from an earlier checkpoint"
        )
