"""ONNX files against our own packed models: logits in ONNX Runtime on the CPU, and bytes."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from lightning_qnoise import PQ, Int, quantize, size_table
from lightning_qnoise.calibrate import calibrate
from lightning_qnoise.export import export_onnx
from lightning_qnoise.layers import packed_weights
from lightning_qnoise.schemes import PackedWeight

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
if not hasattr(torch.onnx, "ops"):
    pytest.skip("export_onnx needs torch 2.8", allow_module_level=True)

BATCH = ({0: torch.export.Dim("batch")},)
STATIC, PER_TENSOR = Int(8, mode="static"), Int(8, per="tensor")
OVERHEAD = 300  # bytes of graph a node: its name, operator, output and that output's shape
EXACT = 3e-6  # of the largest logit: float32 sums in another order


class ConvNet(nn.Module):
    """A stem, a grouped convolution, a shortcut around a third, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(12, 24, 3, groups=3, bias=False), nn.BatchNorm2d(24, affine=False))
        self.inner = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24))
        self.up = nn.ConvTranspose2d(24, 6, 2)
        self.head = nn.Linear(6 * 16, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(nn.functional.relu(self.grouped(self.stem(x))), 2)
        x = nn.functional.relu(x + self.inner(x))
        return self.head(self.up(x).flatten(1))


class LM(nn.Module):
    """Transformer layers between an embedding and an output that share their table."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(48, 24)
        self.layer = nn.TransformerEncoderLayer(24, 2, 40, 0.0, batch_first=True, norm_first=True)
        self.out = nn.Linear(24, 48, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.layer(self.embed(ids)))


def convnet():
    """A ConvNet with statistics of its own in the norms, some of whose channels change their sign."""
    model = ConvNet()
    with torch.no_grad():
        for norm in (model.stem[1], model.inner[1]):
            norm.weight.uniform_(-1, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    for _ in range(5):
        model(torch.randn(8, 3, 8, 8))
    return model.eval()


def images(n):
    return torch.randn(n, 3, 8, 8)


def run(path, x, level="ENABLE_ALL", precision="1"):
    """The logits of ONNX Runtime, and the operators that it ran."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    options.optimized_model_filepath = "ran.onnx"
    options.add_session_config_entry("session.x64quantprecision", precision)  # see `export_onnx`
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(logits), Counter(node.op_type for node in onnx.load("ran.onnx").graph.node)


def export(model, x):
    """Export, check the file by the rules of ONNX and of this module, and return its graph."""
    n_bytes = export_onnx(model, (x,), "model.onnx", dynamic_shapes=BATCH)
    proto = onnx.load("model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    floats = {tuple(t.dims) for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    assert not floats & {tuple(weight.shape) for _, weight in packed_weights(model)}
    assert n_bytes <= size_table(model).bytes + OVERHEAD * len(proto.graph.node) + stored_wider(model)
    return proto.graph


def stored_wider(model):
    """Bytes that codes of 2, 3, 5, 6, 7 bits (and PQ codes of other than 4, 8, 16) take in ONNX's 4, 8 and 16."""
    extra = 0
    for weight in {weight for _, weight in packed_weights(model)}:
        bits = weight.scheme.bits
        n_codes = weight.codes.numel() * 8 // bits
        extra += n_codes * (next(width for width in (4, 8, 16) if width >= bits) - bits) // 8
    return extra


def logits(model, x):
    with torch.no_grad():
        return model(x)


def relative(a, b):
    """Mean and largest absolute difference, in units of the largest logit."""
    difference = (a - b).abs() / b.abs().max()
    return difference.mean().item(), difference.max().item()


MIXED = {
    "stem.*": Int(8),
    "grouped.*": Int(4),
    "inner.*": Int(3, symmetric=True),
    "up": Int(5, granularity="tensor"),
    "head": Int(4, granularity="group:8"),
}
BLOCKS = {
    "stem.*": PQ(3, 16),
    "grouped.*": PQ(9, 30, codebook=Int(8, granularity="tensor")),
    "inner.*": PQ(2, 300),
    "up": PQ(4, 16, codebook=Int(4, granularity="group:2")),
    "head": PQ(8, 100, codebook_dtype="bfloat16"),
}


@pytest.mark.parametrize("policy", [MIXED, BLOCKS, {"*": Int(8, symmetric=True)}], ids=["Int", "PQ", "int8"])
def test_weights_decode_in_the_graph(policy):
    model = quantize(convnet(), policy)
    export(model, images(2))
    x = images(5)
    found, operators = run("model.onnx", x)
    assert relative(found, logits(model, x))[1] < EXACT
    assert operators["BatchNormalization"] == operators["DequantizeLinear"] == operators["Gather"] == 0


@pytest.mark.parametrize("scheme", [Int(8), PQ(4, 128)], ids=str)
def test_tied_weights_are_stored_once(scheme):
    model = quantize(LM().eval(), {"embed": scheme, "*": scheme})
    graph = export(model, torch.randint(48, (2, 7)))
    assert sum("codes" in tensor.name and 48 in tensor.dims for tensor in graph.initializer) == 1
    ids = torch.randint(48, (5, 7))
    assert relative(run("model.onnx", ids)[0], logits(model, ids))[1] < EXACT


def static_error(model, policy, x, n_exact):
    """Export a model with static inputs and return what ONNX Runtime ran.

    Without optimization it computes what torch does, but for a value now and then that lies between two levels and is
    rounded the other way. Its integer kernels round a convolution's bias to a multiple of the two scales, so that there
    are more of these, each of one level of a layer's input; what they make of the logits must be small beside what
    quantization does.
    """
    full = logits(model, x)
    packed = quantize(copy.deepcopy(model), policy)
    calibrate(packed, [(x, x)], batches=1)
    export(packed, x[:2])
    ours = logits(packed, x)
    quantization = relative(full, ours)
    exact, _ = run("model.onnx", x, "DISABLE_ALL")
    assert ((exact - ours).abs() < EXACT * ours.abs().max()).float().mean() > n_exact
    found, operators = run("model.onnx", x)
    error = relative(found, ours)
    assert error[0] < 0.25 * quantization[0] and error[1] < quantization[1]
    return operators


@pytest.mark.parametrize("weight", [Int(8, symmetric=True, activation=STATIC), Int(4, activation=STATIC)], ids=str)
def test_static_activations_run_as_integers(weight):
    operators = static_error(convnet(), {"*": weight}, images(32), n_exact=0.9)
    assert operators["QLinearConv"] == 1  # the other two feed a sum of floats
    assert operators["MatMulIntegerToFloat"] == 1
    assert operators["BatchNormalization"] == 0


def test_static_activations_of_an_mlp():
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 8))
    operators = static_error(model, {"*": Int(8, granularity="tensor", activation=STATIC)}, torch.randn(32, 32), 0.9)
    assert operators["MatMulIntegerToFloat"] + operators["QLinearMatMul"] + operators["QGemm"] == 3


class Attending(nn.Module):
    """Masked self-attention, then attention to a memory."""

    def __init__(self):
        super().__init__()
        self.own, self.other = (nn.MultiheadAttention(24, 2, batch_first=True) for _ in range(2))

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y = self.own(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return self.other(y, x, x)[0]


def test_static_activations_of_attention():
    """Both projections of the first and `out_proj` of the second; what multiplies a memory is in floats."""
    operators = static_error(Attending().eval(), {"*": Int(8, activation=STATIC)}, torch.randn(32, 5, 24), 0.9)
    assert operators["MatMulIntegerToFloat"] + operators["QLinearMatMul"] == 3


def test_weights_with_equal_zero_points():
    """ONNX Runtime rewrites zero points, each by its name, and fails where two weights share one."""
    layers = [nn.Linear(16, 16) for _ in range(3)]
    static_error(nn.Sequential(*layers), {"*": Int(8, symmetric=True, activation=STATIC)}, torch.randn(32, 16), 0.9)
    zeros = [node.input[2] for node in onnx.load("model.onnx").graph.node if "codes" in node.input[0]]
    assert len(set(zeros)) == len(zeros) == 3


def test_seven_bits_are_exact_everywhere():
    """Without the exact mode, too: codes of 64 at most do not saturate."""
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(32, 32)
    quantize(model, {"*": Int(7, activation=STATIC)}, [x])
    export(model, x[:2])
    found, operators = run("model.onnx", x, precision="0")
    assert operators["MatMulIntegerToFloat"] + operators["QLinearMatMul"] + operators["QGemm"] == 2
    assert ((found - logits(model, x)).abs() < 1e-5).float().mean() > 0.9


class Repeated(nn.Module):
    """Layers that are used more than once, on inputs of three dimensions."""

    def __init__(self):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(24, 2, batch_first=True), nn.Linear(24, 24)

    def forward(self, x):
        for _ in range(3):
            x = torch.relu(self.fc(self.attn(x, x, x)[0]))
        return x


@pytest.mark.parametrize("activation", [STATIC, PER_TENSOR], ids=str)
def test_layers_that_are_used_more_than_once(activation):
    model, x = quantize(Repeated().eval(), {"*": Int(8, activation=activation)}), torch.randn(16, 5, 24)
    calibrate(model, [(x, x)], batches=1)
    graph = export(model, x[:2])
    assert sum("codes" in tensor.name for tensor in graph.initializer) == 3
    found, operators = run("model.onnx", x)
    assert ((found - logits(model, x)).abs() < 1e-5).float().mean() > 0.9
    assert operators["MatMulIntegerToFloat"] + operators["QLinearMatMul"] + operators["DynamicQuantizeMatMul"] == 9


def test_dynamic_activations():
    policy = {
        "0": Int(8, activation=PER_TENSOR),
        "2": Int(8, activation=Int(8)),
        "4": PQ(8, 16, activation=Int(8, mode="static")),
        "6": Int(8, activation=Int(4, mode="static")),
    }
    layers = (nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    model = quantize(nn.Sequential(*layers, nn.Linear(32, 8)).eval(), policy)
    x = torch.randn(16, 32)
    calibrate(model, [(x, x)], batches=1)
    export(model, x[:2])
    found, operators = run("model.onnx", x)
    assert operators["DynamicQuantizeMatMul"] == 1
    assert ((found - logits(model, x)).abs() < 1e-5).float().mean() > 0.9


def test_the_model_is_left_alone():
    model = quantize(convnet().train(), {"*": Int(8)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, (images(2),), "model.onnx", input_names=["image"], output_names=["logits"])
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    graph = onnx.load("model.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["image", "logits"]


def test_uncalibrated():
    model = quantize(nn.Sequential(nn.Linear(16, 8)), {"*": Int(8, activation=STATIC)})
    with pytest.raises(ValueError, match=r"layer '0.weight': .* call calibrate\(model, loader\) first"):
        export_onnx(model, (torch.randn(2, 16),), "model.onnx")


def test_a_range_that_takes_a_search():
    model = quantize(nn.Sequential(nn.Linear(16, 8)), {"*": Int(8, activation=Int(8, range="histogram"))})
    with pytest.raises(ValueError, match=r"layer '0.weight': .*range='histogram'.* use range='minmax'"):
        export_onnx(model, (torch.randn(2, 16),), "model.onnx")


def test_a_scheme_without_a_form(monkeypatch):
    class Other(PackedWeight):
        pass

    model = quantize(nn.Sequential(nn.Linear(16, 8)), {"*": Int(8)})
    monkeypatch.setattr(model[0]._modules["weight"], "__class__", Other)
    with pytest.raises(ValueError, match=r"layer '0.weight': Int has no form in ONNX"):
        export_onnx(model, (torch.randn(2, 16),), "model.onnx")


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_missing_packages(monkeypatch, name):
    find = "lightning_qnoise.export.onnx.find_spec"
    monkeypatch.setattr(find, lambda asked: None if asked == name else object())
    with pytest.raises(ModuleNotFoundError, match=rf"needs {name}: pip install 'lightning-qnoise\[onnx\]'"):
        export_onnx(nn.Linear(2, 2), (torch.randn(1, 2),), "model.onnx")
