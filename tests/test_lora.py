"""LoRA: its formula, its initial values, and PEFT's on the same weights."""

import copy
import math
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fast
from baselines import bitfit, full, head, lora, pissa
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


# ------------------------------------------------------------------ what no wrong line may pass


def test_the_defaults_are_rank_8_alpha_16_and_no_dropout():
    model = nn.Sequential(nn.Linear(40, 50))
    inject(model, ["0"])
    layer = model[0]
    assert (layer.rank, layer.alpha, layer.scaling, layer.dropout) == (8, 16.0, 2.0, 0.0)
    assert layer.A.shape == (8, 40) and layer.B.shape == (50, 8)


def test_ranks_from_one_to_the_smaller_side_are_allowed_and_others_refused_in_words():
    for rank in (1, 5):
        model = nn.Sequential(nn.Linear(12, 5))
        assert inject(model, ["0"], rank=rank) == ["0"] and model[0].rank == rank
    for options, message in [
        ({"rank": 0}, r"rank 0 does not fit layer 0 \(5, 12\): allowed are 1 to 5"),
        ({"rank": 6}, r"rank 6 does not fit layer 0 \(5, 12\): allowed are 1 to 5"),
        ({"rank": 2, "dropout": 1.0}, r"dropout 1.0 is not in \[0, 1\)"),
        ({"rank": 2, "dropout": -0.1}, r"dropout -0.1 is not in \[0, 1\)"),
    ]:
        model = nn.Sequential(nn.Linear(12, 5))
        with pytest.raises(ValueError, match=message):
            inject(model, ["0"], **options)
        assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_dropout_falls_on_the_adapters_input_in_training_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 5).double())
    inject(model, ["0"], rank=3, alpha=6.0, dropout=0.75)
    layer = model[0]
    nn.init.normal_(layer.B)
    x = torch.randn(1, 400, dtype=torch.float64)
    torch.manual_seed(1)
    update = layer(x) - layer.base(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.75)
    assert 250 < (dropped == 0).sum() < 350 and update.abs().max() > 0.1
    assert (update - dropped @ (2 * layer.B @ layer.A).T).abs().max() < 1e-12
    layer.eval()
    assert (layer(x) - layer.base(x) - x @ (2 * layer.B @ layer.A).T).abs().max() < 1e-12


def test_the_demo_learns_a_shift_of_its_own_rank_and_merges_it(capsys):
    lora.main()
    shown = capsys.readouterr().out
    words = re.findall(r"^  (\S+) +(\(.*\)) +(\w+)$", shown, re.M)
    assert sorted(words) == [
        ("0.A", "(4, 64)", "trained"), ("0.B", "(48, 4)", "trained"),
        ("0.base.bias", "(48,)", "frozen"), ("0.base.weight", "(48, 64)", "frozen"),
    ]  # fmt: skip
    rows = re.findall(r"^  step +(\d+)  loss ([\d.]+)$", shown, re.M)
    losses = [float(loss) for _, loss in rows]
    assert "output unchanged at the start: True" in shown and [int(step) for step, _ in rows] == [0, 100, 200, 300]
    # A sum of 64 times 4 products of normal numbers, divided by 16, is a normal number: its square is 1 on average.
    assert 0.7 < losses[0] < 1.3 and losses[-1] < 1e-4
    merged, difference = re.search(r"^merged into (.*): largest difference (\S+)$", shown, re.M).groups()
    assert merged == "Linear(in_features=64, out_features=48, bias=True)" and 0 < float(difference) < 1e-5


def test_biases_of_other_names_are_biases_to_bitfit_too():
    model = nn.TransformerEncoderLayer(8, 2, 8)
    bitfit.inject(model)
    assert model.self_attn.in_proj_bias.requires_grad and not model.self_attn.in_proj_weight.requires_grad


def test_what_builds_on_lora_is_not_saved_as_a_lora(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    pissa.inject(model, ["0"], rank=2)
    with pytest.raises(ValueError, match="layer 0 is of baselines.pissa, which builds on LoRA: keep its state_dict instead"):
        lora.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    model = nn.Sequential(nn.Linear(8, 8))
    lora.inject(model, ["0"], rank=2)
    fast.speed_up(model)
    lora.save(model, tmp_path / "adapter")
    assert lora.load(nn.Sequential(nn.Linear(8, 8)), tmp_path / "adapter") == ["0"]
