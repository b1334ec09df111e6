"""Files are whole or not there; adapters hold what was trained and drawn, and refuse what does not fit."""

import os
import random

import numpy as np
import pytest
import torch
import torch.nn as nn

import checkpoint
import tlora
from baselines import lora


def adapted(module=lora, seed=0, rank=2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    module.inject(model, ["0"], rank=rank)
    model[2].requires_grad_(True)
    return model


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = str(tmp_path / "file.json")
    checkpoint.write_json(path, {"a": 1})

    def half(temporary):
        with open(temporary, "w") as f:
            f.write('{"a": ')
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        checkpoint.replace_file(path, half)
    assert open(path).read() == '{\n  "a": 1\n}\n' and os.listdir(tmp_path) == ["file.json"]


def test_adapter_state_is_what_was_trained_and_what_was_drawn():
    assert set(checkpoint.adapter_state(adapted())) == {"0.A", "0.B", "2.weight", "2.bias"}
    state = checkpoint.adapter_state(adapted(tlora))
    assert set(state) == {"0.A", "0.B", "0.C", "0.alpha", "2.weight", "2.bias"}  # A and C are frozen, but drawn


def test_a_frozen_random_head_is_kept_when_asked_for():
    model = adapted()
    model[2].requires_grad_(False)
    assert set(checkpoint.adapter_state(model)) == {"0.A", "0.B"}
    assert set(checkpoint.adapter_state(model, ["2"])) == {"0.A", "0.B", "2.weight", "2.bias"}
    assert set(checkpoint.adapter_state(model, [""])) == set(model.state_dict())


def test_save_and_read_come_back_with_the_metadata(tmp_path):
    path = str(tmp_path / "adapter.safetensors")
    model = adapted()
    model[2].weight = nn.Parameter(torch.randn(5, 3).T)  # not contiguous: safetensors would refuse it
    checkpoint.save_adapter(model, path, {"method": "lora", "options": {"rank": 2}})
    state, metadata = checkpoint.read_adapter(path)
    assert metadata == {"method": "lora", "options": {"rank": 2}}
    expected = checkpoint.adapter_state(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in state)
    other = adapted(seed=1)
    x = torch.randn(4, 6)
    other[0].base.load_state_dict(model[0].base.state_dict())  # the base is not part of an adapter
    assert not torch.equal(other(x), model(x))
    checkpoint.load_adapter_state(other, state)
    assert (other(x) - model(x)).abs().max() < 1e-6  # the same values, in another layout


def test_what_does_not_fit_is_refused_in_one_line():
    state = checkpoint.adapter_state(adapted())
    with pytest.raises(ValueError, match="adapter and model do not fit: 1 names differ, such as 0.B"):
        checkpoint.load_adapter_state(adapted(), {k: v for k, v in state.items() if k != "0.B"})
    with pytest.raises(ValueError, match="1 names differ, such as 9.A"):
        checkpoint.load_adapter_state(adapted(), {**state, "9.A": torch.zeros(1)})
    with pytest.raises(ValueError, match="do not fit: size mismatch for 0.B") as error:
        checkpoint.load_adapter_state(adapted(rank=3), state)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named_in_one_line(tmp_path):
    for name, write, read, words in [
        ("adapter.safetensors", b"not one", checkpoint.read_adapter, "cannot be read as safetensors"),
        ("adapter.safetensors", None, checkpoint.read_adapter, "is missing: the run has not finished"),
    ]:
        path = tmp_path / name
        path.unlink(missing_ok=True)
        if write is not None:
            path.write_bytes(write)
        with pytest.raises(ValueError, match=words) as error:
            read(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match="is not a run folder: it has no config.json"):
        checkpoint.read_config(run)
    (run / "config.json").write_text('{\n"a" 1}')
    with pytest.raises(ValueError, match="config.json line 2: not JSON"):
        checkpoint.read_config(run)
    with pytest.raises(ValueError, match="nothing to resume"):
        checkpoint.load_state(run)
    (run / "state.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match="state.pt cannot be read"):
        checkpoint.load_state(run)


def test_random_state_comes_back():
    def draw():
        return torch.randn(5).tolist(), random.random(), np.random.randn(3).tolist()

    checkpoint.seed_everything(3)
    state = checkpoint.rng_state()
    first = draw()
    assert all(a != b for a, b in zip(draw(), first))
    checkpoint.set_rng_state(state)
    assert draw() == first
