"""What a weight becomes: one file per scheme, each a frozen dataclass and its packed weight."""

from lightning_qnoise.schemes.base import Scheme, matrix_shape
from lightning_qnoise.schemes.integer import Int, IntWeight
from lightning_qnoise.schemes.kmeans import nearest
from lightning_qnoise.schemes.packed import PackedWeight
from lightning_qnoise.schemes.product import PQ, PQWeight

__all__ = ["PQ", "Int", "IntWeight", "PQWeight", "PackedWeight", "Scheme", "matrix_shape", "nearest"]
