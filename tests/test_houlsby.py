"""Houlsby and Pfeiffer adapters: formulas, starts, where they go, a training in numpy, and what they refuse."""

import math

import numpy as np
import parity
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import houlsby, pfeiffer
from model import Config, Transformer, default_targets

both = pytest.mark.parametrize("method", [houlsby, pfeiffer])


class Toy(nn.Module):
    """One MLP between two norms."""

    def __init__(self, n=6, m=32):
        super().__init__()
        torch.manual_seed(0)
        self.down_proj = nn.Linear(n, m)
        self.norm = nn.LayerNorm(m)
        self.double()

    def forward(self, x):
        return self.norm(self.down_proj(x))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5))


@both
def test_the_adapter_is_added_to_the_layers_output(method):
    model = Toy()
    width = {"bottleneck": 3} if method is houlsby else {"reduction": 10}
    assert method.inject(model, ["down_proj"], **width) == ["down_proj"]
    layer = model.down_proj
    x = torch.randn(4, 6, dtype=torch.float64)
    y = layer.base(x).detach().numpy()
    for p in (layer.W1, layer.b1, layer.W2, layer.b2):
        nn.init.normal_(p)
    W1, b1, W2, b2 = (p.detach().numpy() for p in (layer.W1, layer.b1, layer.W2, layer.b2))
    assert W1.shape == (3, 32) and W2.shape == (32, 3) and b1.shape == (3,) and b2.shape == (32,)
    bend = gelu if method is houlsby else lambda v: np.maximum(v, 0)
    expected = y + bend(y @ W1.T + b1) @ W2.T + b2
    assert np.abs(expected - y).max() > 0.5
    assert np.abs(layer(x).detach().numpy() - expected).max() < 1e-12
    assert layer(input=x).equal(layer(x)), "as nn.Linear's argument is called"


def test_houlsby_starts_truncated_and_nearly_as_it_was():
    model = nn.ModuleDict({"o_proj": nn.Linear(300, 400)})
    torch.manual_seed(0)
    x = torch.randn(5, 300)
    before = model["o_proj"](x)
    houlsby.inject(model, ["o_proj"])
    layer = model["o_proj"]
    for W in (layer.W1, layer.W2):
        assert W.shape in ((64, 400), (400, 64)) and W.abs().max() <= 2e-3 and W.abs().max() > 1.9e-3
        assert abs(W.std().item() / (1e-3 * 0.8796) - 1) < 0.02, "a normal cut at two deviations"
    assert not layer.b1.any() and not layer.b2.any()
    change = (layer(x) - before).abs().max().item()
    print("change of the output at the start", change, "of", before.abs().max().item())
    assert 0 < change < 1e-3


def test_pfeiffer_starts_as_adapter_hub_or_exactly_as_it_was():
    for zero in (False, True):
        model = nn.ModuleDict({"down_proj": nn.Linear(300, 1600)})
        torch.manual_seed(0)
        x = torch.randn(5, 300)
        before = model["down_proj"](x)
        pfeiffer.inject(model, ["down_proj"], zero=zero)
        layer = model["down_proj"]
        assert layer.W1.shape == (100, 1600) and abs(layer.W1.std().item() / 0.02 - 1) < 0.02
        assert layer.W1.abs().max() > 0.06, "not truncated"
        assert torch.equal(layer(x), before) == zero
        assert abs(layer.W2.std().item() / 0.02 - 1) < 0.02 or zero and not layer.W2.any()
        assert not layer.b1.any() and not layer.b2.any()
    model = nn.ModuleDict({"down_proj": nn.Linear(3, 5)})
    pfeiffer.inject(model, ["down_proj"])
    assert model["down_proj"].W1.shape == (1, 5), "at least one"


def test_what_is_trained_and_with_which_decay():
    for method, expected in [(houlsby, {"norm.weight", "norm.bias"}), (pfeiffer, set())]:
        model = Toy()
        method.inject(model, ["down_proj"])
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == expected | {f"down_proj.{name}" for name in ("W1", "b1", "W2", "b2")}
        matrices, vectors = method.param_groups(model, 1e-3, 0.1)
        assert matrices == {"params": [model.down_proj.W1, model.down_proj.W2], "lr": 1e-3, "weight_decay": 0.1}
        assert vectors["weight_decay"] == 0.0 and vectors["lr"] == 1e-3 and len(vectors["params"]) == 2 + len(expected)


def test_where_the_adapters_go_in_our_transformer():
    model = Transformer(Config(40, 16, 2, 2, 24), "classification", 2)
    all_of_them = default_targets(model)
    assert houlsby.inject(model, all_of_them, bottleneck=2) == [
        f"blocks.{i}.{name}" for i in range(2) for name in ("o_proj", "down_proj")
    ]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"norm.weight", "blocks.1.norm2.bias"} <= trained and "head.weight" not in trained
    model = Transformer(Config(40, 16, 2, 2, 24), "classification", 2)
    assert pfeiffer.inject(model, all_of_them) == ["blocks.0.down_proj", "blocks.1.down_proj"]
    model = Transformer(Config(40, 16, 2, 2, 24), "classification", 2)
    assert houlsby.inject(model, ["blocks.1.o_proj", "q_proj"], bottleneck=2) == ["blocks.1.o_proj"], "targets restrict"
    model = Transformer(Config(40, 16, 2, 2, 24), "classification", 2)
    assert pfeiffer.inject(model, all_of_them, places="v_proj, up_proj") == [
        f"blocks.{i}.{name}" for i in range(2) for name in ("v_proj", "up_proj")
    ]


@both
def test_wrong_use_is_refused_in_one_line(method):
    model = Transformer(Config(40, 16, 2, 2, 24), "classification", 2)
    width = "bottleneck" if method is houlsby else "reduction"
    for targets, options, words in [
        (["q_proj"], {}, "no output projection among the targets, none ends in"),
        (["q_proj"], {}, "they end in: q_proj"),
        (["o_proj", "v_proj", "k_proj"], {"places": "proj,  x "}, "none ends in proj, x; they end in: k_proj, o_proj, v_proj"),
        (["o_proj"], {width: 0}, f"{width} 0 is below 1"),
        (["nope"], {}, "target 'nope' matches no nn.Linear"),
    ]:
        with pytest.raises(ValueError) as error:
            method.inject(model, targets, **options)
        assert words in str(error.value) and "\n" not in str(error.value)
        assert all(p.requires_grad for p in model.parameters())
    method.inject(model, ["down_proj"], **{width: 1})
    with pytest.raises(ValueError, match="cannot be merged into the weights"):
        method.merge(model)
    with pytest.raises(ValueError, match="has no factors and cannot be merged"):
        model.blocks[0].down_proj.factors()
    with pytest.raises(ValueError, match="adapted already"):
        method.inject(model, ["o_proj"])


@pytest.mark.parametrize("names", [
    "layers.0.self_attn.o_proj layers.0.mlp.down_proj", "layer.0.attention.output.dense layer.0.output.dense",
    "layer.0.SelfAttention.o layer.1.DenseReluDense.wo", "layer.1.EncDecAttention.o layer.2.DenseReluDense.wo",
    "h.0.attn.c_proj h.0.mlp.c_proj", "layers.0.self_attn.out_proj layers.0.fc2",
])  # fmt: skip
def test_the_output_projections_are_known_by_the_names_of_each_family(names):
    attention, mlp = names.split()
    for method, expected in ((houlsby, {attention, mlp}), (pfeiffer, {mlp})):
        model = nn.Module()
        for name in (attention, mlp, "layers.0.fc1", "embed"):
            place = model
            for part in name.split(".")[:-1]:
                place.register_module(part, getattr(place, part, nn.Module()))
                place = getattr(place, part)
            place.register_module(name.rpartition(".")[2], nn.Linear(24, 32))
        targets = [name.rpartition(".")[2] for name in (attention, mlp, "fc1", "embed")]
        assert set(method.inject(model, targets)) == expected
        wrapped = model.get_submodule(mlp)
        assert (wrapped.in_features, wrapped.out_features) == (24, 32)
        assert wrapped.bias is wrapped.base.bias and wrapped.weight is wrapped.base.weight


def test_pfeiffer_does_not_take_attentions_output_for_the_mlps():
    attention = nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(4, 4)})})
    model = nn.ModuleDict({"attention": attention, "output": nn.ModuleDict({"dense": nn.Linear(8, 4)})})
    with pytest.raises(ValueError, match="only attention's"):
        pfeiffer.inject(model, ["attention.output.dense"])
    assert pfeiffer.inject(model, ["dense"]) == ["output.dense"]


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_on_a_half_precision_base_are_float32_and_compute_in_its_dtype(method, dtype):
    model = nn.ModuleDict({"down_proj": nn.Linear(8, 32).to(dtype)})
    method.inject(model, ["down_proj"])
    y = model["down_proj"](torch.randn(3, 8, dtype=dtype))
    assert y.dtype == dtype and all(p.dtype == torch.float32 for p in parity.trained(model))


@both
def test_losses_equal_a_training_in_numpy(method):
    """Twenty steps of SGD on a squared error, every gradient by hand."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"down_proj": nn.Linear(16, 12).double()})
    method.inject(model, ["down_proj"], **({"bottleneck": 5} if method is houlsby else {"reduction": 2}))
    layer = model["down_proj"]
    for W in (layer.W1, layer.W2):
        nn.init.normal_(W, std=0.3)
    W0, b0 = layer.base.weight.numpy(), layer.base.bias.numpy()
    W1, b1, W2, b2 = (p.detach().clone().numpy() for p in (layer.W1, layer.b1, layer.W2, layer.b2))
    optimizer = torch.optim.SGD(parity.trained(model), lr=0.5)
    ours, theirs = [], []
    for step in range(20):
        x, _ = parity.batch(step, torch.float64)
        target = torch.sin(x.sum(1, keepdim=True) + torch.arange(12))
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours.append(loss.item())
        y = x.numpy() @ W0.T + b0
        u = y @ W1.T + b1
        h = gelu(u) if method is houlsby else np.maximum(u, 0)
        error = y + h @ W2.T + b2 - target.numpy()
        theirs.append((error**2).mean())
        g = 2 * error / error.size
        if method is houlsby:
            slope = gelu(u) / np.where(u == 0, 1, u) + u * np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
        else:
            slope = (u > 0) * 1.0
        d = g @ W2 * slope
        W2, b2, W1, b1 = W2 - 0.5 * g.T @ h, b2 - 0.5 * g.sum(0), W1 - 0.5 * d.T @ y, b1 - 0.5 * d.sum(0)
    parity.assert_equal(ours, theirs, 1e-12)
