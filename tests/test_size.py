import pytest
import torch
from torch import nn

from lightning_qnoise import PQ, Int, quantize, size_table
from lightning_qnoise.size import nbytes, packed_entry, stored_tensors

MIB = 2**20


class Band(nn.Module):
    """One band of fairseq's adaptive input and, tied, of its adaptive softmax."""

    def __init__(self, words, dim, d_model):
        super().__init__()
        self.embedding, self.projection = nn.Embedding(words, dim), nn.Linear(dim, d_model, bias=False)
        self.out_projection, self.out_words = nn.Linear(dim, d_model, bias=False), nn.Linear(dim, words, bias=False)
        self.out_projection.weight, self.out_words.weight = self.projection.weight, self.embedding.weight


def wikitext103_lm(final_norm=False):
    """fairseq's WikiText-103 Transformer LM, on `meta`: only what holds parameters."""
    d_model, vocabulary, cutoffs, factor, layers, ffn = 1024, 267_744, [20_000, 60_000], 4, 16, 4096
    edges = [0, *cutoffs, vocabulary]
    with torch.device("meta"):
        bands = [Band(edges[i + 1] - edges[i], d_model // factor**i, d_model) for i in range(3)]
        decoder = [
            nn.ModuleDict(
                {
                    **{name: nn.Linear(d_model, d_model) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
                    **{"attn_norm": nn.LayerNorm(d_model), "ffn_norm": nn.LayerNorm(d_model)},
                    **{"fc1": nn.Linear(d_model, ffn), "fc2": nn.Linear(ffn, d_model)},
                }
            )
            for _ in range(layers)
        ]
        model = nn.ModuleDict({"bands": nn.ModuleList(bands), "layers": nn.ModuleList(decoder)})
        model["class_logits"] = nn.Linear(d_model, 2, bias=False)  # one row for each tail band
        if final_norm:
            model["norm"] = nn.LayerNorm(d_model)
    return model


PAPER = {
    "class_logits": None,
    "*.fc?": PQ(block_size=8, n_centroids=256),
    "*.embedding": PQ(block_size=8, n_centroids=256),
    "*_proj": PQ(block_size=4, n_centroids=256),
    "*.projection": PQ(block_size=4, n_centroids=256),
}


@pytest.mark.parametrize("final_norm, parameters, mib", [(False, 246_933_504, 38.66), (True, 246_935_552, 38.67)])
def test_fairseq_language_model(final_norm, parameters, mib):
    model = wikitext103_lm(final_norm)
    assert sum(p.numel() for p in model.parameters()) == parameters
    table = size_table(model, PAPER)
    packed = [entry for entry in table.entries if entry.scheme]
    assert len(packed) == 3 + 3 + 16 * 6
    codes = 39_400_448  # one byte each
    codebooks = 2 * 256 * sum(entry.scheme.block_size for entry in packed)
    assert codebooks == 2 * 256 * (8 * (32 + 3) + 4 * (64 + 3))
    assert sum(entry.bytes for entry in packed) == codes + codebooks
    assert sum(entry.float_bytes // 4 // entry.scheme.block_size for entry in packed) == codes
    rest = 4 * (16 * (4 * 1024 + 4096 + 1024 + 2 * 2048) + 2 * 1024 + 2048 * final_norm)  # biases, norms, class rows
    assert table.bytes == codes + codebooks + rest
    assert table.bytes / MIB == pytest.approx(mib, abs=0.005)
    assert table.float_bytes == 4 * parameters and round(table.float_bytes / MIB, 2) == 941.98
    assert table.compression == pytest.approx(24.4, abs=0.05)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.embed, self.head = nn.Embedding(100, 16), nn.Linear(16, 100)
        self.head.weight = self.embed.weight
        self.own = nn.Parameter(torch.randn(5))
        self.register_buffer("cache", torch.randn(1000), persistent=False)


@pytest.mark.parametrize("k", [2, 5, 16, 100, 256, 300, 400])
@pytest.mark.parametrize("codebook", ["float16", "float32"])
def test_formula_of_pq(k, codebook):
    bits = next(b for b in range(1, 17) if 2**b >= k)
    expected = -(-100 * 16 // 4 * bits // 8) + k * 4 * {"float16": 2, "float32": 4}[codebook]
    assert nbytes(PQ(4, k, codebook).empty((100, 16), device="meta")) == expected
    assert packed_entry("x", PQ(4, k, codebook), (100, 16), torch.bfloat16).float_bytes == 3200


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity, scales", [("tensor", 1), ("channel", 10), ("group:7", 30)])
@pytest.mark.parametrize("symmetric, width", [(False, 5), (True, 4)])
def test_formula_of_int(bits, granularity, scales, symmetric, width):
    packed = Int(bits, granularity, symmetric).empty((10, 21), device="meta")
    assert nbytes(packed) == -(-210 * bits // 8) + scales * width


@pytest.mark.parametrize("policy", ["int8", "int4", "ipq", {"embed": PQ(8, 10), "conv": Int(3)}])
def test_prediction_equals_the_packed_model(policy):
    model = Small()
    predicted = size_table(model, policy)
    with torch.device("meta"):
        assert size_table(Small(), policy).entries == predicted.entries
    quantize(model, policy)
    table = size_table(model)
    assert sorted(table.entries, key=lambda e: e.name) == sorted(predicted.entries, key=lambda e: e.name)
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    assert table.bytes == sum(t.nbytes for t in tensors.values()) == nbytes(model)


def test_what_is_counted():
    model = Small()
    table = size_table(model)
    floats = 16 * 27 + 16 + 4 * 16 + 1600 + 100 + 5
    assert table.bytes == table.float_bytes == 4 * floats + 8  # the int64 counter; not the cache, the table once
    assert table.compression == 1 and table.total_mb == table.bytes / 1e6
    assert [e.name for e in table.entries] == [k for k in model.state_dict() if k != "head.weight"]
    assert stored_tensors(model)[1] == {"head.weight": "embed.weight"}
    assert size_table(Small().bfloat16()).bytes == 2 * floats + 8
    assert size_table(nn.ReLU()).compression == 1


def test_size_does_not_change_the_model():
    model = Small()
    before = [(n, type(m)) for n, m in model.named_modules()]
    size_table(model, "ipq")
    assert [(n, type(m)) for n, m in model.named_modules()] == before


def test_table_adds_up_and_reads_well():
    table = size_table(Small(), {"embed": PQ(8, 10), "conv": Int(3)})
    layers = table.layers()
    assert list(layers) == ["", "conv", "norm", "embed", "head"]
    assert sum(e.bytes for e in layers.values()) == table.bytes
    assert layers["conv"].float_bytes == 4 * (16 * 27 + 16) and layers["conv"].scheme == Int(3)
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "scheme", "float", "bytes", "bytes", "ratio"]
    assert lines[1].split() == ["(model)", "float", "20", "20", "1.0x"]
    assert lines[4].split() == ["embed", "PQ(block_size=8,", "n_centroids=10)", "6,400", "260", "24.6x"]
    assert lines[-1].split()[:2] == ["total", f"{table.bytes / 1e6:.3f}"] and len(lines) == 7
    assert len({len(line) for line in lines}) == 1
    assert table.metrics == {"size/total_mb": table.total_mb, "size/compression": table.compression}


@pytest.mark.parametrize(
    "policy, message", [("nf4", "unknown preset"), ({"x": Int()}, "'x' in the policy"), ({"own": Int()}, "two dim")]
)
def test_errors_are_those_of_the_policy(policy, message):
    with pytest.raises(ValueError, match=message):
        size_table(Small(), policy)
