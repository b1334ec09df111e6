"""Files are whole or not there; adapters hold what was trained and drawn, and refuse what does not fit."""

import os
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
from short import adapter_of, equal, go

import tlora
from baselines import lora
from harness import folder
from reading import files


def adapted(module=lora, seed=0, rank=2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    module.inject(model, ["0"], rank=rank)
    model[2].requires_grad_(True)
    return model


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = str(tmp_path / "file.json")
    folder.write_json(path, {"a": 1})

    def half(temporary):
        with open(temporary, "w") as f:
            f.write('{"a": ')
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        files.replace_file(path, half)
    assert open(path).read() == '{\n  "a": 1\n}\n' and os.listdir(tmp_path) == ["file.json"]


def test_adapter_state_is_what_was_trained_and_what_was_drawn():
    assert set(folder.adapter_state(adapted())) == {"0.A", "0.B", "2.weight", "2.bias"}
    state = folder.adapter_state(adapted(tlora))
    assert set(state) == {"0.A", "0.B", "0.C", "0.alpha", "2.weight", "2.bias"}  # A and C are frozen, but drawn


def test_a_frozen_random_head_is_kept_when_asked_for():
    model = adapted()
    model[2].requires_grad_(False)
    assert set(folder.adapter_state(model)) == {"0.A", "0.B"}
    assert set(folder.adapter_state(model, ["2"])) == {"0.A", "0.B", "2.weight", "2.bias"}
    assert set(folder.adapter_state(model, [""])) == set(model.state_dict())


def test_save_and_read_come_back_with_the_metadata(tmp_path):
    path = str(tmp_path / "adapter.safetensors")
    model = adapted()
    model[2].weight = nn.Parameter(torch.randn(5, 3).T)  # not contiguous: safetensors would refuse it
    folder.save_adapter(model, path, {"method": "lora", "options": {"rank": 2}})
    state, metadata = folder.read_adapter(path)
    assert metadata == {"method": "lora", "options": {"rank": 2}}
    expected = folder.adapter_state(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in state)
    other = adapted(seed=1)
    x = torch.randn(4, 6)
    other[0].base.load_state_dict(model[0].base.state_dict())  # the base is not part of an adapter
    assert not torch.equal(other(x), model(x))
    folder.load_adapter_state(other, state)
    assert (other(x) - model(x)).abs().max() < 1e-6  # the same values, in another layout


def test_what_does_not_fit_is_refused_in_one_line():
    state = folder.adapter_state(adapted())
    with pytest.raises(ValueError, match="adapter and model do not fit: 1 names differ, such as 0.B"):
        folder.load_adapter_state(adapted(), {k: v for k, v in state.items() if k != "0.B"})
    with pytest.raises(ValueError, match="1 names differ, such as 9.A"):
        folder.load_adapter_state(adapted(), {**state, "9.A": torch.zeros(1)})
    with pytest.raises(ValueError, match="do not fit: size mismatch for 0.B") as error:
        folder.load_adapter_state(adapted(rank=3), state)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named_in_one_line(tmp_path):
    for name, write, read, words in [
        ("adapter.safetensors", b"not one", folder.read_adapter, "cannot be read as safetensors"),
        ("adapter.safetensors", None, folder.read_adapter, "is missing: the run has not finished"),
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
        folder.read_config(run)
    (run / "config.json").write_text('{\n"a" 1}')
    with pytest.raises(ValueError, match="config.json line 2: not JSON"):
        folder.read_config(run)
    with pytest.raises(ValueError, match="nothing to resume"):
        folder.load_state(run)
    (run / "state.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match="state.pt cannot be read"):
        folder.load_state(run)


def test_random_state_comes_back():
    def draw():
        return torch.randn(5).tolist(), random.random(), np.random.randn(3).tolist()

    folder.seed_everything(3)
    state = folder.rng_state()
    first = draw()
    assert all(a != b for a, b in zip(draw(), first))
    folder.set_rng_state(state)
    assert draw() == first


def test_another_run_is_not_overwritten_by_accident(csv, tmp_path, capsys):
    out = tmp_path / "run"
    assert go(csv, out, "--method", "lora")[0] == 0
    before = adapter_of(out)
    assert go(csv, out, "--method", "lora", "--rank", "3")[0] == 2
    assert f"{out} holds another run (rank 8, now 3): --overwrite replaces it, --out goes elsewhere" in capsys.readouterr().err
    assert equal(adapter_of(out), before)
    assert go(csv, out, "--method", "lora")[0] == 0  # the same run may be run again
    assert go(csv, out, "--method", "lora", "--rank", "3", "--overwrite")[0] == 0
    assert not equal(adapter_of(out), before)
    assert go(csv, tmp_path / "none", "--resume")[0] == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_folder_with_files_of_the_user_is_refused_and_untouched(csv, tmp_path, capsys):
    """--out on somebody's folder lost every .json, .jsonl, .png and .safetensors in it."""
    theirs = {"mine.jsonl": "1", "photo.png": "2", "package.json": "{}"}
    checkpoint_like = {"config.json": '{"model_type": "bert"}', "model.safetensors": "3"}
    for name, given, words in [
        ("theirs", theirs, "is not a run folder: it has no config.json"),
        ("unmarked", {"metrics.jsonl": "{}"}, "is not a run folder: it has no config.json"),
        ("checkpoint", checkpoint_like, "is not a run folder: its config.json was not written by train.py"),
        ("only", {"config.json": "[]"}, "is not a run folder: its config.json was not written by train.py"),
    ]:
        place = tmp_path / name
        place.mkdir()
        for file, text in given.items():
            (place / file).write_text(text)
        for more in ([], ["--overwrite"], ["--resume"]):
            code, _ = go(csv, place, *more)
            err = capsys.readouterr().err
            assert code == 2 and words in err and err.count("\n") == 1, (name, more, err)
            assert {p.name: p.read_text() for p in place.iterdir()} == given
    (tmp_path / "file").write_text("text")
    assert go(csv, tmp_path / "file", "--overwrite")[0] == 2 and "is a file, not a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "text"


def test_a_run_replaces_its_own_files_alone(csv, tmp_path, capsys):
    out = tmp_path / "run"
    assert go(csv, out, "--method", "task_tlora")[0] == 0
    (out / "notes.json").write_text("mine")
    assert go(csv, out, "--method", "lora", "--overwrite")[0] == 2
    assert f"{out} holds notes.json, which no run wrote" in capsys.readouterr().err
    assert (out / "notes.json").read_text() == "mine" and (out / "plan.json").exists()
    (out / "notes.json").unlink()
    (out / "scaling.png").write_text("a heat map of what task_tlora watches")
    assert go(csv, out, "--method", "lora", "--overwrite")[0] == 0
    assert set(os.listdir(out)) == {"config.json", "metrics.jsonl", "layers.jsonl", "adapter.safetensors"}
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json.tmp").write_text("stopped before the first file was whole")
    assert go(csv, empty, "--method", "lora")[0] == 0 and "config.json.tmp" not in os.listdir(empty)
