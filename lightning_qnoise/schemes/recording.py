"""Whether a forward may look at its numbers, and keep what it makes of them."""

from __future__ import annotations

import torch

# bound once, as small layers ask in every forward
_is_tracing, _n_modes = torch._C._is_tracing, torch._C._len_torch_dispatch_stack
_mapped_over = torch._C._functorch.peek_interpreter_stack
_MODES = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


def is_transformed() -> bool:
    """Whether operators are compiled, traced, mapped or without numbers: none can be read, or it would be a constant.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> _ = make_fx(lambda x: print(is_transformed()))(torch.zeros(1))
        True
        >>> is_transformed()
        False
    """
    if torch.compiler.is_compiling() or _is_tracing() or _mapped_over() is not None:
        return True
    return _n_modes() > 0 and any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)


def is_recorded() -> bool:
    """Whether what is computed now goes into a graph, where nothing that was kept belongs."""
    return torch.is_grad_enabled() or is_transformed()
