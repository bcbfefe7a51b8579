"""What a weight becomes: one file per scheme, each a frozen dataclass and its packed weight."""

from lightning_qnoise.schemes.activation import dynamic_grid
from lightning_qnoise.schemes.base import Scheme, matrix_shape
from lightning_qnoise.schemes.int_weight import IntWeight
from lightning_qnoise.schemes.integer import Int
from lightning_qnoise.schemes.kmeans import nearest
from lightning_qnoise.schemes.observer import Observer
from lightning_qnoise.schemes.packed import PackedWeight
from lightning_qnoise.schemes.pq_weight import PQWeight
from lightning_qnoise.schemes.product import PQ

__all__ = [
    "PQ",
    "Int",
    "IntWeight",
    "Observer",
    "PQWeight",
    "PackedWeight",
    "Scheme",
    "dynamic_grid",
    "matrix_shape",
    "nearest",
]
