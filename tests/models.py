"""Small models that several tests share, and how to make them noisy."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from lightning_qnoise import PQ, Int
from lightning_qnoise.attach import attach, attach_inputs
from lightning_qnoise.input_noise import InputNoises
from lightning_qnoise.policy import resolve
from lightning_qnoise.weights import list_weights


class Gated(nn.Module):
    """A user's own layer: two matrices under names of their own, read in one expression."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight_value = nn.Parameter(torch.randn(n_out, n_in) / n_in**0.5)
        self.weight_gate = nn.Parameter(torch.randn(n_out, n_in) / n_in**0.5)

    def forward(self, x):
        return (x @ self.weight_value.T) * torch.sigmoid(x @ self.weight_gate.T)


class TiedByName(nn.Module):
    """One table as embedding and output, shared as a Parameter of two layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.embed(ids))


class TiedByRead(nn.Module):
    """The same, read from the embedding by the parent's forward."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)

    def forward(self, ids):
        return F.linear(self.embed(ids), self.embed.weight)


class TiedInContainer(nn.Module):
    """The same through a container, as GPT-2 code has it."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(20, 16)})

    def forward(self, ids):
        table = self.transformer["wte"]
        return F.linear(table(ids), table.weight)


class Recurrent(nn.Module):
    """An LSTM or GRU without the state in its output."""

    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(8, 8, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Attention(nn.Module):
    """Attention without the weights in its output; `kdim` and `vdim` make three projections of the fused one."""

    def __init__(self, batch_first=True, kdim=None):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=batch_first, kdim=kdim, vdim=kdim)
        self.kdim = kdim

    def forward(self, x):
        memory = x if self.kdim is None else x[..., : self.kdim]
        return self.attn(x, memory, memory)[0]


def small_pq(model, n_centroids=8):
    """A policy of PQ for every layer weight, also where the presets find it too small."""
    policy = {}
    for weight in list_weights(model):
        if weight.is_layer_weight:
            cols = math.prod(weight.shape[1:])
            policy[weight.name] = PQ(next(size for size in (9, 8, 4, 2) if cols % size == 0), n_centroids)
    return policy


def noisy(model, policy="pq", rate=0.5, kind="exact", seed=0):
    """Attach noise, draw once, and return the noises; `"pq"` stands for `small_pq`."""
    noises = attach(model, resolve(model, small_pq(model) if policy == "pq" else policy), kind)
    return draw(model, noises, rate, seed)


def noisy_inputs(model, policy, rate=0.5, weights=True, seed=0):
    """Attach noise to inputs, and to weights, and draw both; return the `InputNoises`."""
    schemes = resolve(model, policy)
    generator = torch.Generator().manual_seed(seed)
    if weights:
        for name, noise in attach(model, schemes).items():
            noise.draw(model.get_parameter(name), rate, generator)
    inputs = InputNoises(schemes, {name: model.get_parameter(name).shape for name in schemes})
    attach_inputs(model, inputs.of)
    inputs.draw(rate, generator)
    return inputs


def draw(model, noises, rate=0.5, seed=0):
    """Draw masks for every noise and return the noises."""
    generator = torch.Generator().manual_seed(seed)
    for name, noise in noises.items():
        noise.draw(model.get_parameter(name), rate, generator)
    return noises


def dense(model, noises):
    """A plain copy of the model that holds the noisy weights as its Parameters."""
    twin = copy.deepcopy(model)
    for name, noise in noises.items():
        weight = twin.get_parameter(name)
        blocks = weight.detach().reshape(-1, noise.unit)
        rows = noise.mask.flatten()
        if noise.kind == "zero":
            target = torch.zeros_like(blocks)
        elif noise.kind == "mean":
            target = blocks.mean(dim=0).expand_as(blocks)
        elif isinstance(noise.scheme, Int):
            target = noise.scheme.encode(weight.detach()).decode().reshape(-1, 1)
        else:
            codebook = noise.target.codebook.to(torch.float64)
            nearest = (blocks.double()[:, None] - codebook[None]).square().sum(dim=2).argmin(dim=1)
            target = codebook[nearest].to(blocks.dtype)
        with torch.no_grad():
            weight.copy_(torch.where(rows[:, None], target, blocks).view_as(weight))
    return twin


def mlp():
    """Two layers."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def gradients(model, run):
    """The gradients that a run of the model gives its Parameters."""
    model.zero_grad()
    run().square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]
