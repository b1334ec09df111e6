"""LoRA+: LoRA's layers, the authors' groups, and PEFT's optimizer on the same weights."""

import parity
import pytest
import torch
import torch.nn as nn

from baselines import lora, lora_plus


def test_the_layers_are_loras_to_the_bit():
    models = [parity.network() for _ in range(2)]
    for method, model in zip((lora, lora_plus), models):
        torch.manual_seed(1)
        method.inject(model, parity.LAYERS, rank=4)
    for a, b in zip(*models):
        assert type(a) is type(b)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters()))
    assert models[1][0].A.any() and models[1][0].lr_ratio == 20.0


def test_every_parameter_is_in_the_group_that_the_authors_rule_gives_it():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))  # a vector that is no bias and no norm's

    model = nn.ModuleDict(
        {"words": nn.Embedding(5, 6), "layer": nn.Linear(6, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 2),
         "scale": Scale()}
    )  # fmt: skip
    assert lora_plus.inject(model, ["layer"], rank=2, lr_ratio=16) == ["layer"]
    for part in ("words", "norm", "head", "scale"):
        model[part].requires_grad_(True)
    names = {p: name for name, p in model.named_parameters()}
    groups = {(g["lr"], g["weight_decay"]): {names[p] for p in g["params"]} for g in lora_plus.param_groups(model, 1e-3, 0.1)}
    assert groups == {
        (1e-3, 0.1): {"layer.A", "head.weight"},
        (1e-6, 0.1): {"words.weight"},
        (16e-3, 0.1): {"layer.B", "scale.gain"},
        (16e-3, 0.0): {"norm.weight", "norm.bias", "head.bias"},
    }
    model.requires_grad_(False)
    model["layer"].B.requires_grad_(True)
    assert len(lora_plus.param_groups(model, 1e-3, 0.1)) == 1, "no empty groups"


def test_a_ratio_that_is_none_is_refused_before_anything_changes():
    model = parity.network()
    for ratio in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"lr_ratio {ratio} is not above 0"):
            lora_plus.inject(model, ["0"], lr_ratio=ratio)
    assert all(p.requires_grad for p in model.parameters()) and type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_losses_equal_those_of_pefts_optimizer_over_twenty_steps(dtype, bound):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    ours, theirs = parity.network(dtype), parity.network(dtype)
    lora_plus.inject(ours, parity.LAYERS, rank=4, alpha=6.0, lr_ratio=5.0)
    ours[4].requires_grad_(True)  # the head, whose bias is a vector
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=parity.LAYERS, modules_to_save=["4"])
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
    for name in parity.LAYERS:
        other = theirs.base_model.model.get_submodule(name)
        other.lora_A.default.weight.data.copy_(ours.get_submodule(name).A.data)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=3e-3, loraplus_lr_ratio=5.0, loraplus_weight_decay=0.1)
    start = parity.network(dtype)[4].bias
    losses = parity.train(ours, torch.optim.AdamW(lora_plus.param_groups(ours, 3e-3, 0.1)), dtype)
    parity.assert_equal(losses, parity.train(theirs, optimizer, dtype), bound)
    assert (ours[4].bias - start).abs().max() > 0.02, "the head's bias went at B's rate"
    plain = parity.network(dtype)
    lora.inject(plain, parity.LAYERS, rank=4, alpha=6.0)
    plain[4].requires_grad_(True)
    others = parity.train(plain, torch.optim.AdamW(lora.param_groups(plain, 3e-3, 0.1)), dtype)
    assert abs(others[-1] - losses[-1]) > 1e-3, "with one rate the losses are others"
