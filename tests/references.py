"""Independent NumPy and pure-Python references: written from the formulas, with nothing of the package."""

import numpy as np


def int_reference(
    weight: np.ndarray, bits: int, granularity: str, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[rows, groups, size]`, scale and zero point `[rows, groups]`, and the decoded weight, all float32."""
    rows = weight.reshape(weight.shape[0], -1)
    size = {"tensor": rows.size, "channel": rows.shape[1]}.get(granularity) or int(granularity.split(":")[1])
    groups = rows.reshape(1 if granularity == "tensor" else len(rows), -1, size).astype(np.float32)
    high = np.maximum(groups.max(-1), 0).astype(np.float64)
    low = np.minimum(groups.min(-1), 0).astype(np.float64)
    top = 2**bits - 1
    if symmetric:  # code 2**(b-1) is zero, the largest magnitude takes the last code
        scale = (np.maximum(high, -low) / ((top - 1) / 2)).astype(np.float32)
    else:
        scale = ((high - low) / top).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1))
    zero = np.full_like(scale, 2 ** (bits - 1)) if symmetric else np.rint(-low.astype(np.float32) / scale)
    codes = np.clip(np.rint(groups / scale[..., None]) + zero[..., None], 0, top)  # rint: half to even
    decoded = ((codes - zero[..., None]) * scale[..., None]).reshape(weight.shape)
    return codes, scale, zero, decoded


def pack_reference(codes: list[int], bits: int) -> bytes:
    """Codes as one long binary number, the first code lowest."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


def unpack_reference(data: bytes, bits: int, n: int) -> list[int]:
    number = int.from_bytes(data, "little")
    return [(number >> (bits * i)) & (2**bits - 1) for i in range(n)]


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """`[n, k]` float64."""
    return np.stack([np.square(points.astype(np.float64) - c).sum(-1) for c in centroids.astype(np.float64)], axis=1)


def inertia(points: np.ndarray, centroids: np.ndarray) -> float:
    return float(squared_distances(points, centroids).min(axis=1).sum())


def pq_reference(codes: np.ndarray, codebook: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Write codeword `codes[row, block]` into every place of a weight, one block at a time."""
    block = codebook.shape[1]
    weight = np.empty((shape[0], int(np.prod(shape[1:]))), codebook.dtype)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            weight[row, column * block : (column + 1) * block] = codebook[codes[row, column]]
    return weight.reshape(shape)
