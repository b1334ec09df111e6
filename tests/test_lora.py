"""LoRA: its formula, its initial values, and PEFT's on the same weights."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines import bitfit, full, head
from baselines.lora import inject, param_groups
from model import Config, Transformer, head_modules


def test_forward_is_w0x_plus_alpha_over_r_b_a_x():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5).double())
    inject(model, ["0"], rank=3, alpha=6.0)
    layer = model[0]
    nn.init.normal_(layer.B)
    x = torch.randn(4, 7, dtype=torch.float64)
    expected = x @ (layer.base.weight + 6.0 / 3 * layer.B @ layer.A).T + layer.base.bias
    assert (expected - layer.base(x)).abs().max() > 0.1
    assert (model(x) - expected).abs().max() < 1e-12


def test_a_is_uniform_within_one_over_root_n_and_b_is_the_zero_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300))
    inject(model, ["0"], rank=100)
    A, bound = model[0].A, 1 / math.sqrt(400)
    assert not model[0].B.any()
    assert A.abs().max() <= bound and A.abs().max() > 0.999 * bound
    assert abs(A.std().item() / (bound / math.sqrt(3)) - 1) < 0.02


def test_trained_numbers_are_r_times_m_plus_n():
    model = nn.Sequential(nn.Linear(7, 5))
    inject(model, ["0"], rank=3)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (7 + 5)


def test_param_groups_hold_every_trained_parameter_once():
    model = Transformer(Config(20, 16, 2, 2, 24), "classification", 2)
    for method in ("lora", "full", "bitfit", "head"):
        module = {"full": full, "bitfit": bitfit, "head": head}.get(method)
        m = copy.deepcopy(model)
        (module.inject if module else inject)(m, ["q_proj"])
        m.head.requires_grad_(True)
        groups = (module.param_groups if module else param_groups)(m, 1e-3, 0.1)
        ids = [id(p) for group in groups for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in m.parameters() if p.requires_grad)
        assert all(group["lr"] == 1e-3 for group in groups)


def test_what_the_yardsticks_train():
    model = Transformer(Config(20, 16, 2, 2, 24), "classification", 2)
    total = sum(p.numel() for p in model.parameters())

    def trained(module):
        m = copy.deepcopy(model)
        module.inject(m, ["q_proj"])
        for name in head_modules(m):
            m.get_submodule(name).requires_grad_(True)
        return {name: p for name, p in m.named_parameters() if p.requires_grad}

    assert sum(p.numel() for p in trained(full).values()) == total
    assert set(trained(head)) == {"head.weight", "head.bias"}
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert set(trained(bitfit)) == biases | {"head.weight"} and len(biases) == 2 * (2 + 6) + 1 + 1
    with pytest.raises(ValueError, match="BitFit trains biases"):
        bitfit.inject(nn.Sequential(nn.Linear(3, 3, bias=False)), [])


def test_weight_decay_spares_biases_and_norms_of_full_fine_tuning():
    model = Transformer(Config(20, 16, 1, 2, 24), "classification", 2)
    full.inject(model, [])
    decayed, spared = full.param_groups(model, 1e-3, 0.1)
    assert decayed["weight_decay"] == 0.1 and all(p.dim() == 2 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0 and len(spared["params"]) == 6 + 6 + 1  # linears, norms, head


def test_losses_equal_pefts_over_twenty_steps():
    """Same weights, same batches, AdamW: equal to 1e-6 in float32 and much closer in float64."""
    peft = pytest.importorskip("peft")
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)).to(dtype)
        ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
        inject(ours, ["0", "2"], rank=4, alpha=6.0)
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], lora_dropout=0.0)
        theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
        for name in ("0", "2"):
            layer = theirs.base_model.model.get_submodule(name)
            layer.lora_A.default.weight.data.copy_(ours.get_submodule(name).A.data)
            assert not layer.lora_B.default.weight.any()
        losses = [[], []]
        optimizers = [
            torch.optim.AdamW(param_groups(ours, 1e-2, 0.1)),
            torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1),
        ]
        for step in range(20):
            torch.manual_seed(100 + step)
            x, y = torch.randn(32, 16, dtype=dtype), torch.randint(3, (32,))
            for model, optimizer, kept in zip((ours, theirs), optimizers, losses):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                kept.append(loss.item())
        error = max(abs(a - b) for a, b in zip(*losses))
        print(dtype, "largest difference of 20 losses", error, "losses", losses[0][0], losses[0][-1])
        assert losses[0][0] != losses[0][-1] and ours[0].B.abs().max() > 1e-2
        assert error < bound
