"""ModelSize against bytes counted by hand."""

import logging

import pytest
from fits import ROOTS, fit, net

from lightning_qnoise import PQ, Int, ModelSize, Quantize, QuantNoise, quantize, size_table

POLICY = {"fc": PQ(8, 16), "head": Int(4)}
# fc: 64 codes of 4 bits, 16 codewords of 8 halves, 32 biases
# head: 128 codes of 4 bits, 4 scales, 4 zero points, 4 biases
FC, HEAD = 32 + 16 * 8 * 2 + 32 * 4, 64 + 4 * 4 + 4 + 4 * 4
FLOAT = (32 * 16 + 32 + 4 * 32 + 4) * 4


@pytest.mark.parametrize("root", ROOTS)
def test_names_and_values(root):
    made = fit(net(root), [ModelSize(), Quantize(POLICY)], root)
    sizes = {name: float(value) for name, value in made.callback_metrics.items() if name.startswith("size/")}
    assert sizes == {
        "size/fc": pytest.approx(FC / 1e6),
        "size/head": pytest.approx(HEAD / 1e6),
        "size/total_mb": pytest.approx((FC + HEAD) / 1e6),
        "size/compression": pytest.approx(FLOAT / (FC + HEAD)),
    }


def test_without_packing_it_is_the_float_size():
    made = fit(net(), [ModelSize()])
    assert float(made.callback_metrics["size/total_mb"]) == pytest.approx(FLOAT / 1e6)
    assert float(made.callback_metrics["size/compression"]) == 1.0
    assert float(made.callback_metrics["size/fc"]) == pytest.approx((32 * 16 + 32) * 4 / 1e6)


@pytest.mark.parametrize(
    "callbacks",
    [
        [ModelSize(), Quantize(POLICY)],
        [Quantize(), ModelSize(), QuantNoise(POLICY)],
        [QuantNoise(POLICY), Quantize(), ModelSize()],
    ],
)
def test_the_tables_of_prediction_and_fact_are_printed_and_agree(callbacks, caplog):
    with caplog.at_level(logging.INFO):
        fit(net(), callbacks)
    found = [r.getMessage() for r in caplog.records]
    expected = str(size_table(quantize(net(), POLICY)))
    assert f"Predicted size after packing:\n{expected}" in found
    assert f"Size:\n{expected}" in found
    assert "PQ(block_size=8, n_centroids=16)" in expected


def test_without_packing_the_table_is_that_of_the_float_model(caplog):
    with caplog.at_level(logging.INFO):
        fit(net(), [ModelSize(), Quantize("int8", enabled=False)])
    found = [r.getMessage() for r in caplog.records]
    assert found.count(f"Size:\n{size_table(net())}") == 2


def test_switched_off_it_says_nothing(caplog):
    with caplog.at_level(logging.INFO):
        made = fit(net(), [ModelSize(enabled=False)])
    assert not [r for r in caplog.records if "Size" in r.getMessage()]
    assert not [name for name in made.callback_metrics if name.startswith("size/")]
