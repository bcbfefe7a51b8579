"""Compile what a launcher would launch on a GPU, without one; prints the resources as JSON.

Run without TRITON_INTERPRET. Each launch is recorded with its arguments and compiled for the architectures.
"""

import json
import re
import subprocess
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from kernels.random_weights import random_weight
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_qnoise.kernels import assign, common, decode, gemm, gemv, segment_sum, table_gemv
from lightning_qnoise.kernels.layout import segments

OPTIONS = {"num_warps", "num_stages"}
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Recorder:
    """Stands for a kernel: `recorder[grid](...)` keeps the arguments as triton specializes them."""

    def __init__(self, kernel):
        self.kernel, self.source, self.options = kernel, None, {}

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, **kwargs):
        self.options = {name: kwargs.pop(name) for name in OPTIONS & set(kwargs)}
        arguments = {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            value, parameter = arguments[name], self.kernel.params[i]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[(i,)] = "constexpr", value
                continue
            tensor = isinstance(value, torch.Tensor)
            signature[name] = TYPES[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
            if tensor or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        self.source = ASTSource(self.kernel, signature, constants, attributes)


def record(launch, *kernels):
    """Run a launcher on CPU tensors with the kernels, (module, name), recorded, and return the recorders."""
    with ExitStack() as stack:
        for module in {module for module, _ in kernels}:
            stack.enter_context(patch.object(module, "check_device", lambda *args: None))
        recorders = [Recorder(getattr(*kernel)) for kernel in kernels]
        stack.enter_context(patch.object(common, "sum_splits_kernel", Recorder(common.sum_splits_kernel)))
        for (module, name), recorder in zip(kernels, recorders, strict=True):
            stack.enter_context(patch.object(module, name, recorder))
        launch()
    return recorders


def resources(recorder, arch):
    """Compile and return registers, bytes of stack, local and shared memory, and the instructions by kind."""
    binary = triton.compile(recorder.source, target=GPUTarget("cuda", arch, 32), options=recorder.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (dump(option, file.name) for option in ("--dump-resource-usage", "--dump-sass"))
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    kinds = re.findall(r"\b(LDG|LDL|STL|STG|LDGSTS|HGMMA|HMMA)((?:\.\w+)*)", sass)
    sizes = [(kind, re.search(r"\.(128|64|[US]8|[US]16|\d+x\d+x\d+)\b", rest)) for kind, rest in kinds]
    instructions = sorted({kind + (size[0] if size else "") for kind, size in sizes})
    return {**used, "SHARED": binary.metadata.shared, "instructions": instructions}


def dump(option, path):
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout


def launches():
    """The launches that are compiled: a label, the launch, the kernels."""
    half, single = random_weight(1024, 1024, 256, dtype=torch.float16), random_weight(1024, 1024, 256)
    cut = random_weight(1024, 1152, 256, d=9, dtype=torch.float16)
    lookup = [(table_gemv, "table_kernel"), (table_gemv, "lookup_kernel"), (common, "sum_splits_kernel")]
    codes = segments(torch.randint(256, (4096,)), 256)

    def product(launcher, rows, weight):
        x = torch.zeros(rows, weight.n_in, dtype=weight.codebook.dtype)
        return lambda: launcher(x, weight.words, weight.codebook, weight.block_size, bias=torch.zeros(1024))

    yield "decode", lambda: decode.pq_decode(*half.args), [(decode, "decode_kernel")]
    yield "decode d=9", lambda: decode.pq_decode(*cut.args), [(decode, "decode_kernel")]
    yield "gemv M=4, table:", product(table_gemv.pq_table_gemv, 4, half), lookup
    for rows, weight, label in [(1, half, ""), (4, half, ""), (4, cut, " d=9")]:
        yield f"gemv M={rows}{label}", product(gemv.pq_gemv, rows, weight), [(gemv, "gemv_kernel")]
    for rows, weight, label in [(16, half, ""), (128, half, ""), (64, single, " fp32")]:
        yield f"gemm M={rows}{label}", product(gemm.pq_gemm, rows, weight), [(gemm, "gemm_kernel")]
    blocks = torch.zeros(4096, 8)
    yield "segment sum", partial(segment_sum.segment_sum, blocks, *codes), [(segment_sum, "segment_sum_kernel")]
    yield "assign", partial(assign.pq_assign, blocks, blocks[:256]), [(assign, "assign_kernel")]


def main():
    found = {}
    for label, launch, kernels in launches():
        for (_, name), recorder in zip(kernels, record(launch, *kernels), strict=True):
            key = label if len(kernels) == 1 else f"{label} {name}"
            found[key] = {arch: resources(recorder, arch) for arch in (80, 90)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
