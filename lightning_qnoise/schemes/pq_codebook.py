"""`CodebookWeight`: what a weight of product quantization does with its codebook, stored or in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qnoise.schemes.int8_products import Int8Products
from lightning_qnoise.schemes.int_weight import IntWeight

if TYPE_CHECKING:
    from lightning_qnoise.schemes.product import PQ


class CodebookWeight(Int8Products):
    """A packed weight with a codebook; what its codes mean is a subclass's.

    Attributes:
        codebook: `[n_centroids, block_size]` in the scheme's `codebook_dtype`, or an `IntWeight` of that shape. While
            it is trained, a float32 Parameter of that shape, which is read as it will be stored.
        average: Whether a codeword's gradient is the mean over its blocks, not the sum.
    """

    scheme: PQ
    codebook: Tensor | IntWeight
    average = False

    def codewords(self) -> Tensor:
        """Return the codebook as it decodes, float32 `[n_centroids, block_size]`; a trained one with its gradient."""
        return self._table().float()

    def stored_codebook(self) -> Tensor | IntWeight:
        """Return the codebook as a file holds it.

        Raises:
            ValueError: It is trained, and NaN or Inf cannot become integers.
        """
        if isinstance(self.codebook, IntWeight) or not self.is_trained:
            return self.codebook
        if self.scheme.codebook is not None:
            return self.scheme.codebook.encode(self.codebook)
        return self.codebook.detach().to(getattr(torch, self.scheme.codebook_dtype), copy=True)

    def stored_state(self) -> dict[str, Tensor]:
        """Return what a file holds of it."""
        state, codebook = super().stored_state(), self.stored_codebook()
        if isinstance(codebook, IntWeight):
            state.pop("codebook", None)
            return state | {f"codebook.{key}": tensor for key, tensor in codebook.state_dict(keep_vars=True).items()}
        return state | {"codebook": codebook}

    def train_codebook(self, trainable: bool = True, average: bool = False) -> None:
        """Make the codebook a float32 Parameter, or what is stored again; see `train_codebooks`.

        Raises:
            ValueError: NaN or Inf cannot become integers.
        """
        if trainable and self.is_trained:
            self.requires_grad_()
        else:
            self._hold(nn.Parameter(self.codewords().clone()) if trainable else self.stored_codebook())
        self.is_trained, self.average = trainable, trainable and average

    def write_codebook(self, codewords: Tensor) -> None:
        """Take other codewords `[n_centroids, block_size]`."""
        self.forget()
        if isinstance(self.codebook, IntWeight):
            self.codebook.load_state_dict(self.codebook.scheme.encode(codewords.detach().float()).state_dict())
        else:
            self.codebook.detach().copy_(codewords.detach())

    def _hold(self, codebook: Tensor | IntWeight) -> None:
        self.forget()
        if hasattr(self, "codebook"):
            del self.codebook
        if isinstance(codebook, IntWeight | nn.Parameter):
            self.codebook = codebook
        else:
            self.register_buffer("codebook", codebook)

    def _table(self, dtype: torch.dtype | None = None) -> Tensor:
        """The codewords as they are stored, rounded to `dtype`.

        A trained codebook stays float32 on the way, so that its gradient is neither rounded nor overflows. A codeword
        of zeros, which padding rows and pruned blocks read, gets none.
        """
        if isinstance(self.codebook, IntWeight):
            value = self.codebook.decode()
        elif not self.is_trained:
            value = self.codebook
        elif self.scheme.codebook is not None:
            value = self.scheme.codebook.fake_quantize(self.codebook)
        else:
            value = self.codebook.detach().to(getattr(torch, self.scheme.codebook_dtype))
        value = value.to(dtype or value.dtype)
        if not self.is_trained:
            return value
        assert isinstance(self.codebook, Tensor)
        moving = torch.where(self.codebook.any(dim=1, keepdim=True), self.codebook, 0.0)
        return moving - moving.detach() + value  # the difference is exactly zero; it carries the gradient

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a trained codebook for a stored one, and the other way round."""
        name, integers = f"{prefix}codebook", self.scheme.codebook
        if name in state_dict and isinstance(self.codebook, IntWeight) and integers is not None:
            encoded = integers.encode(state_dict.pop(name)).state_dict()
            state_dict.update({f"{name}.{key}": tensor for key, tensor in encoded.items()})
        elif name in state_dict and isinstance(self.codebook, Tensor):
            state_dict[name] = state_dict[name].to(self.codebook.dtype)  # also where it is assigned, not copied
        elif self.is_trained and integers is not None:
            packed = integers.empty((self.scheme.n_centroids, self.scheme.block_size))
            names = {key: f"{name}.{key}" for key in packed.state_dict()}
            if set(names.values()) <= state_dict.keys():
                packed.load_state_dict({key: state_dict.pop(full) for key, full in names.items()})
                state_dict[name] = packed.decode()
        super()._load_from_state_dict(state_dict, prefix, *args)
