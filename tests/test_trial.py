"""bench/trial.py: its rule by hand, what it measures against a training written out, and that it leaves the model alone."""

import copy
import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "bench"))

import trial  # noqa: E402

import data  # noqa: E402
from harness.run import Run  # noqa: E402
from harness.settings import parse  # noqa: E402


def test_the_rule_takes_the_rate_that_moves_as_far_in_proportion():
    shares = {-14: 0.1, -12: 0.2, -10: 0.9}
    assert [trial.chosen(shares, target) for target in (0.01, 0.14, 0.15, 0.42, 0.43, 5.0)] == [-14, -14, -12, -12, -10, -10]
    assert trial.chosen({-10: 1.0, -12: 1.0}, 1.0) == -12 and trial.chosen({-12: 0.0, -10: 0.1}, 1e-3) == -10


def test_sizes_weigh_every_entry_alike():
    assert trial.size([torch.tensor([3.0]), torch.tensor([[4.0, 0.0], [0.0, 0.0]])]) == pytest.approx((25 / 5) ** 0.5)


@pytest.mark.parametrize("method,task", [("lora", "rte"), ("adalora", "math")])
def test_what_is_measured_equals_twenty_steps_written_out(method, task):
    flags = "--seed 1 --threads 1 --max-length 64 --batch-size 4".split()
    run = Run.start(parse(["--method", method, "--task", task, *flags]))
    run.train = run.train[:200]
    run.adapt()
    run.model.train()
    before = copy.deepcopy(run.model.state_dict())
    shares = {lr: trial.moved(run, lr) for lr in (0.0, 1e-3, 1e-2)}
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())
    assert shares[0.0] == 0.0 < shares[1e-3] < shares[1e-2]

    model, batches = run.model, data.batches(run.train_features, run.task, 4, run.tokenizer.pad_id, shuffle_seed=0)
    batches = [next(batches) for _ in range(24)]

    def read(batch):
        """What the head reads: with the head an identity, what comes out."""
        if task == "math":
            return model.eval()(batch["input_ids"])[batch["labels"] != data.IGNORED]
        bare = copy.deepcopy(model).eval()
        bare.head = torch.nn.Identity()
        return bare(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))

    with torch.no_grad():
        first = torch.cat([read(batch).flatten() for batch in batches[20:]])
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if p.requires_grad and "head" not in name],
                                  lr=1e-2, weight_decay=0.0)  # fmt: skip
    model.train()
    for batch in batches[:20]:
        optimizer.zero_grad()
        loss = run.forward(batch) + (run.method.penalty(model) if method == "adalora" else 0.0)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        last = torch.cat([read(batch).flatten() for batch in batches[20:]])
    expected = ((last - first).norm() / first.norm()).item()
    print("moved by", shares[1e-2], "written out", expected)
    assert shares[1e-2] == pytest.approx(expected, rel=1e-4)


def test_the_page_is_made_from_the_kept_rows():
    with open(trial.PAGE, encoding="utf-8") as f:
        assert f.read() == trial.text()
