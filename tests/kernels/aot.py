"""Compile what a launcher would launch on a GPU, without one; prints the resources as JSON.

Run without TRITON_INTERPRET. Each launch is recorded with its arguments and compiled for the architectures.
"""

import json
import re
import subprocess
import tempfile
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from kernels.random_weights import random_weight
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_qnoise.kernels import (
    assign,
    common,
    decode,
    embedding,
    gemm,
    gemv,
    int_gemm,
    integer_noise,
    noise,
    segment_sum,
    table_gemv,
)
from lightning_qnoise.kernels.layout import segments

OPTIONS = {"num_warps", "num_stages"}
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TYPES |= {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}
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
    kinds = re.findall(r"\b(LDG|LDL|STL|STG|LDGSTS|HGMMA|HMMA)\b((?:\.\w+)*)", sass)
    sizes = [(kind, re.search(r"\.(128|64|[US]8|[US]16|\d+x\d+x\d+)\b", rest)) for kind, rest in kinds]
    instructions = sorted({kind + (size[0] if size else "") for kind, size in sizes})
    halves = len(re.findall(r"FADD \w+, \w+, -?12582912 ", sass))  # to and from 1.5 * 2**23, by which the noise rounds
    return {**used, "SHARED": binary.metadata.shared, "instructions": instructions, "halves": halves}


def dump(option, path):
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout


def launches():
    """The launches that are compiled: a label, the launch, the kernels."""
    half, single = random_weight(1024, 128, 256, dtype=torch.float16), random_weight(1024, 128, 256)
    nine = random_weight(1024, 128, 256, d=9, dtype=torch.float16)
    odd, short = random_weight(1024, 126, 256, dtype=torch.float16), random_weight(1024, 124, 256, dtype=torch.float16)
    large = random_weight(1024, 128, 300, dtype=torch.float16, code_dtype=torch.int16)
    lookup = [(table_gemv, "table_kernel"), (table_gemv, "lookup_kernel"), (common, "sum_splits_kernel")]
    codes = segments(torch.randint(256, (4096,)), 256)

    def product(launcher, rows, weight):
        x = torch.zeros(rows, weight.n_in, dtype=weight.codebook.dtype)
        return lambda: launcher(x, *weight.args, bias=torch.zeros(1024))

    for weight, label in [(half, ""), (nine, " d=9"), (large, " int16")]:
        yield f"decode{label}", partial(decode.pq_decode, *weight.args), [(decode, "decode_kernel")]
    ids = torch.zeros(64, dtype=torch.int64)
    yield "embedding", partial(embedding.pq_embedding, ids, *half.args), [(decode, "decode_kernel")]
    for weight, label in [(half, ""), (single, " fp32"), (nine, " d=9"), (short, " words"), (large, " int16")]:
        yield f"gemv M=4, table{label}:", product(table_gemv.pq_table_gemv, 4, weight), lookup
    tall = random_weight(4096, 48, 256, dtype=torch.float16)
    yield "gemv M=1, tall table:", partial(table_gemv.pq_table_gemv, torch.zeros(1, 384).half(), *tall.args), lookup
    for rows, weight, label in [
        *[(rows, half, "") for rows in (1, 4)],
        (4, single, " fp32"),
        *[(4, weight, label) for weight, label in [(nine, " d=9"), (short, " words"), (odd, " odd")]],
    ]:
        yield f"gemv M={rows}{label}", product(gemv.pq_gemv, rows, weight), [(gemv, "gemv_kernel")]
    four = random_weight(1024, 128, 256, d=4, dtype=torch.float16)
    for rows, weight, label in [
        *[(rows, half, "") for rows in (16, 128)],
        *[(128, weight, label) for weight, label in [(four, " d=4"), (nine, " d=9"), (single, " fp32")]],
    ]:
        yield f"gemm M={rows}{label}", product(gemm.pq_gemm, rows, weight), [(gemm, "gemm_kernel")]
    one = random_weight(1, 1, 1, dtype=torch.float16)  # sizes of 1 are constants to the compiler
    yield "decode one", partial(decode.pq_decode, *one.args), [(decode, "decode_kernel")]
    yield "embedding one", partial(embedding.pq_embedding, ids, *one.args), [(decode, "decode_kernel")]
    for launcher, kernels in [
        (table_gemv.pq_table_gemv, lookup[:2]),
        (gemv.pq_gemv, [(gemv, "gemv_kernel")]),
        (gemm.pq_gemm, [(gemm, "gemm_kernel")]),
    ]:
        yield f"{launcher.__name__} one", partial(launcher, torch.zeros(1, 8).half(), *one.args), kernels
    blocks = torch.zeros(4096, 8)
    yield "segment sum", partial(segment_sum.segment_sum, blocks, *codes), [(segment_sum, "segment_sum_kernel")]
    for d in (8, 9, 24, 64):
        blocks = torch.zeros(4096, d)
        yield f"assign d={d}", partial(assign.pq_assign, blocks, blocks[:256]), [(assign, "assign_kernel")]


def noise_launches():
    """Those of Quant-Noise."""
    seed, rate = torch.zeros(1, dtype=torch.int64), torch.zeros(())
    scale, zero_point = torch.zeros(256, 1), torch.zeros(256, 1, dtype=torch.uint8)
    codes, table = torch.zeros(256, 128, dtype=torch.uint8), torch.zeros(256, 8).half()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight, label = torch.zeros(256, 1024, dtype=dtype), str(dtype).removeprefix("torch.")
        kernel = [(integer_noise, "integer_noise_kernel")]
        for clamp, name in ((False, "int"), (True, "clamped int")):
            arguments = weight, seed, rate, scale, zero_point, 8, clamp
            yield f"noise {name} {label}", partial(integer_noise.integer_noise, *arguments), kernel
        arguments = weight, seed, rate, torch.zeros(256, 8), None, 4, False
        yield f"noise grouped int {label}", partial(integer_noise.integer_noise, *arguments), kernel
        arguments = weight, weight, scale, zero_point, 8
        gradient = [(integer_noise, "integer_grad_kernel")]
        yield f"noise int gradient {label}", partial(integer_noise.integer_grad, *arguments), gradient
        kernel = [(noise, "block_noise_kernel")]
        for name, found in (("pq", (codes, table)), ("mean", (None, weight[:1, :8])), ("zero", (None, None))):
            arguments = weight, seed, rate, 8, *found
            yield f"noise {name} {label}", partial(noise.block_noise, *arguments), kernel
        arguments = torch.zeros(256, 1152, dtype=dtype), seed, rate, 9, codes, torch.zeros(256, 9)
        yield f"noise pq d=9 {label}", partial(noise.block_noise, *arguments), kernel


def int_launches():
    """Products with a weight of packed integers: all that decides about registers."""
    for bits in (4, 8):
        for rows, dtype in [(16, torch.float16), (128, torch.float16), (128, torch.bfloat16), (64, torch.float32)]:
            for groups in (1, 8):
                x, codes = torch.zeros(rows, 1024, dtype=dtype), torch.zeros(1024, 128 * bits, dtype=torch.uint8)
                scale = torch.zeros(1024, groups)
                arguments = x, codes, scale, scale.byte(), bits, torch.zeros(1024)
                label = f"int{bits} M={rows} {str(dtype).removeprefix('torch.')}{' groups' * (groups > 1)}"
                yield label, partial(int_gemm.int_gemm, *arguments), [(int_gemm, "int_gemm_kernel")]


def main():
    found = {}
    for label, launch, kernels in chain(launches(), noise_launches(), int_launches()):
        for (_, name), recorder in zip(kernels, record(launch, *kernels), strict=True):
            key = label if len(kernels) == 1 else f"{label} {name}"
            found[key] = {arch: resources(recorder, arch) for arch in (80, 90)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
