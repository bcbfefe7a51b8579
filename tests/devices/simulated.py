"""A device that is not there: its tensors compute on the CPU and refuse, as those of a GPU do, to be mixed with others.

With TRITON_INTERPRET=1 the operators of lightning_qnoise run as on CUDA, their kernels in triton's interpreter.
Importing this registers the device `"gpu"` for good, so that it needs a process of its own.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("gpu")
GPU = torch.device("gpu", 0)
MAY_MIX = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}  # as on CUDA
WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2"}  # the host reads what was computed
COPIES = {"_to_copy", "copy_"}  # from device to device the host waits, too
torch.__future__.set_overwrite_module_params_on_conversion(True)  # `module.to` cannot change a tensor's class
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
log: list[str] = []  # every operator for which the host had to wait


class OnDevice(Tensor):
    """A tensor of the device; `host` has its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> OnDevice:
        options = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, host.shape, device=GPU, **options)
        tensor.host = host
        return tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what `nn.Parameter` passes, too."""

    def tolist(self) -> Any:
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Simulation(TorchDispatchMode):
    """While it is entered, tensors can be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Accelerator(CPUAccelerator):
    """Takes the device as it is."""

    def setup_device(self, device: torch.device) -> None:
        pass


class Strategy(SingleDeviceStrategy):
    """For `Trainer(strategy=Strategy())`."""

    def __init__(self) -> None:
        super().__init__(GPU, accelerator=Accelerator())


class Generator(torch.Generator):
    """A generator of any device, with the numbers of the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self._device


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors: list[Tensor] = []
    apply_to_collection((args, kwargs), Tensor, tensors.append)
    is_ours = any(isinstance(tensor, OnDevice) for tensor in tensors)
    others = [tensor for tensor in tensors if tensor.ndim and not isinstance(tensor, OnDevice)]
    if is_ours and others and name not in MAY_MIX:
        raise RuntimeError(f"{func} got tensors of several devices: {[(t.device, [*t.shape]) for t in tensors]}")
    if kwargs.get("device") is not None:
        is_ours = torch.device(kwargs["device"]).type == "gpu"
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif tensors and name.endswith("_"):
        is_ours = isinstance(tensors[0], OnDevice)
    of_host = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, OnDevice)}
    args, kwargs = apply_to_collection((args, kwargs), OnDevice, lambda tensor: tensor.host)
    crosses = name in COPIES and isinstance(tensors[-1], OnDevice) != is_ours
    has_mask = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors[1:])
    if crosses or (of_host and (has_mask or name in WAITS)):
        log.append(name)
    runs_kernels = is_ours and func.namespace == "lightning_qnoise" and "TRITON_INTERPRET" in os.environ
    with torch.no_grad():
        out = func.redispatch(CUDA, *args, **kwargs) if runs_kernels else func(*args, **kwargs)
    if not is_ours:
        return out
    return apply_to_collection(out, Tensor, lambda host: of_host[id(host)] if id(host) in of_host else OnDevice(host))


def _made_by(make: Any) -> Any:
    """`torch.tensor` and `torch.as_tensor` copy to a device where no mode sees them."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        tensor = data if isinstance(data, OnDevice) else make(data, *args, **kwargs)
        return tensor if device is None else tensor.to(device)

    return made


torch.tensor, torch.as_tensor, torch.Generator = _made_by(torch.tensor), _made_by(torch.as_tensor), Generator
