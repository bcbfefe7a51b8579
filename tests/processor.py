"""What the processor that runs the tests can do."""

import pytest
import torch

_CODES = torch.full((32, 64), 127, dtype=torch.int8)
HAS_INT8 = bool((torch._int_mm(_CODES, _CODES.t().contiguous()) == 64 * 127**2).all())  # be it slow
needs_int8 = pytest.mark.skipif(not HAS_INT8, reason="this processor has no exact int8 products")
