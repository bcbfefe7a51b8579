"""What compression learns from data without training: ranges of static activations, second moments of inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_qnoise.layers import calling_projections, input_names, packed_weights
from lightning_qnoise.moments import InputMoment
from lightning_qnoise.schemes import Observer, PackedWeight, Scheme
from lightning_qnoise.weights import owners

_Model = TypeVar("_Model", bound=nn.Module)
_ATTENTION = (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)


def calibrate(model: _Model, loader: Iterable[Any], batches: int = 8) -> _Model:
    """Fix the ranges of a packed model's static activations from data, in place, and return the model.

    The model runs in eval mode on `batches` batches, with inputs unquantized. Ranges are buffers: a file and a
    checkpoint hold them, and nothing else moves them.

    Args:
        model: A packed model; one without static activations is left as it is.
        loader: Batches for `model(batch)`; of a tuple or list the first element, as in `torch.optim.swa_utils`.
        batches: Most batches to look at.

    Raises:
        ValueError: The loader is empty, or no finite input reached a layer; nothing is changed.

    Example:
        >>> from lightning_qnoise import Int, quantize
        >>> policy = Int(8, activation=Int(8, mode="static"))
        >>> model = quantize(nn.Sequential(nn.Linear(8, 4)), policy)
        >>> calibrate(model, [torch.linspace(-1, 1, 16).view(2, 8)])[0].packed("weight").input_zero_point
        tensor(127, dtype=torch.uint8)
    """
    with observing(model) as observed:
        if observed:
            _run(model, loader, batches)
    return model


@contextmanager
def observing(model: nn.Module) -> Iterator[list[str]]:
    """Let static activations see the inputs that pass, and fix their ranges at the end, all or none.

    Yields:
        The names of their weights.

    Raises:
        ValueError: At the end, no finite input has reached a layer.
    """
    packed = {weight: name for name, weight in packed_weights(model) if is_static(weight.scheme)}
    for weight in packed:
        activation = weight.scheme.activation
        assert activation is not None
        weight.observer = Observer(activation.bits, activation.symmetric, activation.range)
    try:
        yield list(packed.values())
        ranges = {weight: _range(name, weight) for weight, name in packed.items()}
    finally:
        for weight in packed:
            weight.observer = None
    for weight, ends in ranges.items():
        weight.set_input_range(*ends)


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and back into its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def first_batches(loader: Iterable[Any], batches: int) -> Iterator[Any]:
    """Return the first batches of a loader.

    Raises:
        ValueError: Less than one is asked for.
    """
    if batches < 1:
        raise ValueError(f"batches must be >= 1, got {batches}")
    return islice(loader, batches)


def is_static(scheme: Scheme) -> bool:
    """Whether a scheme needs calibration."""
    return scheme.activation is not None and scheme.activation.mode == "static"


def input_moments(
    model: nn.Module, schemes: Mapping[str, Scheme], loader: Iterable[Any] | None, batches: int = 8
) -> dict[str, Tensor]:
    """Return the second moment of the inputs of every weight whose scheme needs it: name -> float32.

    Args:
        model: A float model; it runs in eval mode.
        schemes: Weight name -> scheme.
        loader: As in `calibrate`.
        batches: Most batches to look at.

    Raises:
        ValueError: There is no loader and a scheme needs one, a layer is none that this is known for, or no input
            reached it.
    """
    with collecting(model, schemes) as moments:
        if moments and loader is None:
            raise ValueError(f"layer {next(iter(moments))!r}: rounding='gptq' needs data: quantize(..., loader=...)")
        if moments and loader is not None:
            _run(model, loader, batches)
    return {name: moment.mean(name) for name, moment in moments.items()}


@contextmanager
def collecting(model: nn.Module, schemes: Mapping[str, Scheme]) -> Iterator[dict[str, InputMoment]]:
    """Let the layers whose schemes need it collect the second moment of what enters them."""
    needed = {name for name, scheme in schemes.items() if scheme.needs_inputs}
    moments: dict[str, InputMoment] = {}
    first = {id(parameter): name for name, _, _, parameter in reversed(list(owners(model)))}
    inputs = input_names(model)
    with ExitStack() as stack:
        for name, module, attribute, parameter in owners(model):
            if first[id(parameter)] in needed and not isinstance(module, nn.Embedding | nn.EmbeddingBag):
                if isinstance(module, _ATTENTION) and (module, attribute) not in inputs:
                    raise ValueError(
                        f"layer {name!r}: rounding='gptq' knows no input of an attention with its own forward"
                    )
                moment = moments.setdefault(first[id(parameter)], InputMoment())
                hook = moment.hook(name, inputs.get((module, attribute), ("input",)))
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if moments:
            stack.enter_context(calling_projections(model))
        yield moments


def _range(name: str, weight: PackedWeight) -> tuple[Tensor, Tensor]:
    assert weight.observer is not None
    try:
        return weight.observer.find_range()
    except RuntimeError as error:
        raise ValueError(
            f"layer {name!r}: its input cannot be calibrated, {error}; use it in the model's forward, or give it a "
            f"dynamic activation"
        ) from error


@torch.no_grad()
def _run(model: nn.Module, loader: Iterable[Any], batches: int) -> None:
    device = next((t.device for t in model.state_dict().values() if isinstance(t, Tensor)), torch.device("cpu"))
    with in_eval(model):
        for batch in first_batches(loader, batches):
            model(_first(batch, device))


def _first(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, list | tuple):
        batch = batch[0]
    return batch.to(device) if isinstance(batch, Tensor) else batch
