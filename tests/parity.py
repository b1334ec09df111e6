"""Twenty steps of AdamW on the same weights and batches, ours and another implementation's."""

import torch
import torch.nn as nn
import torch.nn.functional as F

LAYERS = ["0", "2"]


def network(dtype=torch.float32):
    """m > n, m = n and a head; the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)).to(dtype)


def batch(step, dtype):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(32, 16, generator=generator, dtype=torch.float64).to(dtype)
    return x, x[:, :3].argmax(1)


def adamw(groups, lr=1e-2):
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.1)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, dtype, penalty=None, before=None, after=None, steps=20):
    """The losses. `penalty()` is added to the loss, before(step) and after(step) stand around the optimizer's step."""
    losses = []
    for step in range(1, steps + 1):
        x, y = batch(step, dtype)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        (loss + (penalty() if penalty else 0)).backward()
        if before:
            before(step)
        optimizer.step()
        if after:
            after(step)
        losses.append(loss.item())
    return losses


def assert_equal(ours, theirs, bound):
    error = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"largest difference of {len(ours)} losses {error:.2e}, bound {bound:g}; losses {ours[0]} to {ours[-1]}")
    assert ours[-1] < ours[0] - 1e-2, "it learns, so that equal means something"
    assert error < bound
