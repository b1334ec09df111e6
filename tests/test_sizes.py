"""bench/sizes.py: what it calls entering B is what enters B."""

import importlib
import os
import sys

import pytest
import torch
import torch.nn as nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "bench"))

import sizes  # noqa: E402


@pytest.mark.parametrize("name", sizes.NAMES)
def test_B_times_what_enters_it_and_C_if_it_follows_is_the_update(name):
    torch.manual_seed(0)
    module = importlib.import_module("baselines.lora" if name == "lora" else name)
    model = nn.Sequential(nn.Linear(9, 7))
    module.inject(model, ["0"], rank=3)
    layer = model[0]
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
        P, Q = layer.factors()
        found = layer.B @ sizes.entering(layer)
        found = layer.C @ found if hasattr(layer, "C") else found
    error = (found - P @ Q).abs().max().item() / (P @ Q).abs().max().item()
    print("largest difference", error)
    assert error < 1e-6 < (P @ Q).abs().max()


def test_eight_times_what_enters_loras_B_asks_for_an_eighth_of_its_rate():
    every = {(m, task): ((8.0 if m == "task_tlora" else 2.0, 1.0), {}) for m in sizes.NAMES for task in sizes.sweep.TASKS}
    every["lora", "cola"] = every["lora", "math"] = (1.0, 1.0), {}  # a geometric mean of 2^(3/5)
    k, rate = sizes.by_rule(every, 0)["task_tlora"]
    assert k == pytest.approx(8 / 2**0.6) and k * rate == pytest.approx(sizes.RATES["lora"])
    assert sizes.by_rule(every, 1)["task_tlora"] == pytest.approx((1.0, sizes.RATES["lora"]))
    assert sizes.RATES["tlora_plus"] == 8 * 0.00316
