"""Stand-ins for packed weights, one for each scheme: traced, they compute what the exported graph is to hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qnoise.export.graph_weight import GraphWeight, Shelf
from lightning_qnoise.export.operators import cast_to_int8, dequantize, quantize, quantize_dynamically
from lightning_qnoise.schemes import PQ, Int, IntWeight, PackedWeight, PQWeight
from lightning_qnoise.schemes.bits import unpack_bits


class GraphInt(GraphWeight):
    """Integers of the weight's shape, `[rows, groups, size]` with a scale per group.

    They are dequantized by DequantizeLinear for an integer kernel, which finds them by it. Everywhere else by a
    product, which a runtime computes once, when it loads the file: ONNX Runtime would do DequantizeLinear in every run.
    The same goes for the input. Without an integer weight it must not be one of DequantizeLinear: behind that, ONNX
    Runtime quantizes a float weight once more, of its own accord.
    """

    scheme: Int

    def __init__(self, packed: IntWeight, shelf: Shelf) -> None:
        super().__init__(packed, shelf)
        bits, (rows, groups) = packed.scheme.bits, packed.scale.shape
        self.is_grouped = groups > 1
        self.axis = None if packed.scheme.granularity == "tensor" else 0
        shape: Sequence[int] = (rows, groups, -1) if self.is_grouped else packed.shape
        grid = (rows, groups) if self.is_grouped else (rows,) if self.axis == 0 else ()
        middle = 2 ** (bits - 1)  # becomes 0, the zero point that fast kernels expect of symmetric ranges
        codes = unpack_bits(packed.codes, bits, packed.shape.numel()) - middle
        shelf.put("codes", codes.to(torch.int8).view(shape), bits)
        shelf.put("scale", packed.scale.view(grid))
        shelf.put("zero_point", (packed.zeros - middle).to(torch.int8).view(grid), bits)

    @property
    def has_static_integers(self) -> bool:
        """Whether QuantizeLinear does what the activation asks for, and an integer kernel can follow."""
        activation = self.scheme.activation
        if activation is None or self.is_grouped:
            return False
        return activation.mode == "static" and activation.bits == 8

    @property
    def has_dynamic_integers(self) -> bool:
        """The same of DynamicQuantizeLinear."""
        activation = self.scheme.activation
        if activation is None or self.is_grouped or activation.per_token:
            return False
        return activation.mode == "dynamic" and activation.bits == 8 and not activation.symmetric

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return an input of the layer as the scheme quantizes it, in its own shape and dtype."""
        if not self.has_static_integers:
            return super().quantize_input(x)
        grid = self.shelf.get("input_scale"), self.shelf.get("input_zero_point")
        return dequantize(quantize(x.float(), *grid), *grid).to(x.dtype)

    def decode(self) -> Tensor:
        """Return the weight, of `shape` and `dtype`; that of a convolution perhaps for an integer kernel."""
        if self.has_static_integers and len(self.shape) > 2:
            return self._for_integers()
        codes, scale, zero_point = map(self.shelf.get, ("codes", "scale", "zero_point"))
        grid = (*scale.shape, *[1] * (codes.ndim - scale.ndim))
        values = (codes.float() - zero_point.float().view(grid)) * scale.view(grid)
        return values.view(self.shape).to(self.dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `quantize_input(x) @ decode().T + bias`, `[..., out]`, as a product of integers where it is one."""
        if not (self.has_static_integers or self.has_dynamic_integers):
            return super().linear(x, bias)
        rows = x[None] if x.ndim == 2 else x  # ONNX Runtime has integer kernels for MatMul, not for Gemm with a bias
        if self.has_dynamic_integers:
            rows = dequantize(*quantize_dynamically(rows.float())).to(x.dtype)
        else:
            rows = self.quantize_input(rows)
        product = rows @ self._for_integers().t()
        product = product.squeeze(0) if x.ndim == 2 else product
        return product if bias is None else product + bias

    def _for_integers(self) -> Tensor:
        codes, zero_point = self.shelf.get("codes"), self.shelf.get("zero_point")
        if self.scheme.bits <= 4:
            codes, zero_point = cast_to_int8(codes), cast_to_int8(zero_point)
        return dequantize(codes, self.shelf.get("scale"), zero_point, self.axis).to(self.dtype)


class GraphPQ(GraphWeight):
    """Gather of codewords, with codes of half a byte, a byte or two bytes."""

    scheme: PQ

    def __init__(self, packed: PQWeight, shelf: Shelf) -> None:
        super().__init__(packed, shelf)
        bits = packed.scheme.bits
        shelf.put("codes", packed.indices().to(torch.uint8 if bits <= 8 else torch.int16), bits)
        self.codebook: GraphInt | None = None
        codebook = packed.stored_codebook()
        if isinstance(codebook, IntWeight):
            inner = Shelf(shelf.layer, f"{shelf.prefix}codebook_", shelf.names, shelf.narrow)
            self.codebook = GraphInt(codebook, inner)
        else:
            shelf.put("codebook", codebook)

    def decode(self) -> Tensor:
        """Return the weight, of `shape` and `dtype`."""
        return self._codewords(self._codes()).view(self.shape).to(self.dtype)

    def embedding(self, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        """Return the rows `ids`, `[*ids.shape, dim]`: only those are decoded."""
        return self._codewords(F.embedding(ids, self._codes())).flatten(-2).to(self.dtype)

    def _codes(self) -> Tensor:
        """Int32 `[rows, cols // block_size]`."""
        codes = self.shelf.get("codes").int()
        return codes % 2**16 if self.scheme.bits == 16 else codes  # int16 has gone below zero

    def _codewords(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.shelf.get("codebook") if self.codebook is None else self.codebook.decode())


def stand_in(packed: PackedWeight, shelf: Shelf) -> GraphWeight:
    """Return the stand-in for a packed weight.

    Raises:
        ValueError: There is none for its scheme, or its activation cannot be exported.
    """
    if isinstance(packed, IntWeight):
        return GraphInt(packed, shelf)
    if isinstance(packed, PQWeight):
        return GraphPQ(packed, shelf)
    raise ValueError(f"{type(packed.scheme).__name__} has no form in ONNX; use Int or PQ, or dequantize(model) first")
