"""The packed `nn.Linear`, as a user calls it."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kernel_bench.cases import BLOCK, CODEWORDS, Weights
from kernel_bench.variants import Memory, Variant, n_bytes
from lightning_qnoise import PQ, quantize, save, set_memory


def layers(weights: Weights, x: Tensor) -> list[Variant]:
    """Return the layer of the first copy of a matrix, in either memory."""
    expected = lru_cache(1)(lambda i: x.double() @ weights.matrix(i).t())
    size = len(x) * weights.shape[0] * x.element_size()
    found: list[Variant] = []
    for memory in ("lean", "fast"):
        model, file_bytes = weights.made(memory, lambda memory=memory: packed(weights, memory))
        held = n_bytes(*model.state_dict().values())
        read = n_bytes(weights.dense[0]) if memory == "fast" else held
        found.append(
            Variant(
                f"packed Linear, {memory}",
                [lambda layer=model[0]: layer(x)],
                expected,
                read + n_bytes(x) + size,
                memory=Memory(held, file_bytes, model[0].packed("weight").forget),
                rotates=False,
            )
        )
    return found


@torch.inference_mode(False)
@torch.no_grad()
def packed(weights: Weights, memory: Literal["lean", "fast"]) -> tuple[nn.Sequential, int]:
    """Return a quantized Linear without bias with the first copy's codes and codewords, and the bytes of its file."""
    n_out, n_in = weights.shape
    linear = nn.Linear(n_in, n_out, bias=False, device=weights.device, dtype=weights.dtype)
    dtype = str(weights.dtype).removeprefix("torch.")
    model = quantize(nn.Sequential(linear), PQ(BLOCK, CODEWORDS, codebook_dtype=dtype, n_iter=1))
    weight = model[0].packed("weight")
    weight.write_codes(weights.codes[0].clone())
    weight.write_codebook(weights.codebooks[0].clone())
    with tempfile.TemporaryDirectory() as folder:
        file_bytes = save(model, Path(folder) / "linear.safetensors")
    return set_memory(model.eval(), memory), file_bytes
