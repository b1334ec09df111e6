"""Files are whole or not there; adapters hold what was trained and drawn; damage, kills and other runs are noticed."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from short import TINY, adapter_of, equal, go, rows_of

import tlora
from baselines import lora
from harness import folder, sealed
from harness.run import Run
from harness.stop import Stopped
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


def test_what_does_not_fit_is_refused_in_one_line():
    state = folder.adapter_state(adapted())
    with pytest.raises(ValueError, match="adapter and model do not fit: 1 names differ, such as 0.B"):
        folder.load_adapter_state(adapted(), {k: v for k, v in state.items() if k != "0.B"})
    with pytest.raises(ValueError, match="1 names differ, such as 9.A"):
        folder.load_adapter_state(adapted(), {**state, "9.A": torch.zeros(1)})
    for name in ("float64", "float16", "bfloat16", "int64", "bool", "complex64"):
        with pytest.raises(ValueError, match=f"0.B is torch.{name}, expected torch.float32"):
            folder.load_adapter_state(adapted(), {**state, "0.B": state["0.B"].to(getattr(torch, name))})
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="the adapter's 0.B holds NaN or infinity"):
            folder.load_adapter_state(adapted(), {**state, "0.B": torch.full_like(state["0.B"], value)})
    with pytest.raises(ValueError, match="do not fit: size mismatch for 0.B") as error:
        folder.load_adapter_state(adapted(rank=3), state)
    assert "\n" not in str(error.value)


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


# ------------------------------------------------------------------- damage


def change(value, key, new):
    """`value`, parsed JSON, with the entry at the path `key` replaced, or removed if `new` is ..."""
    *path, last = key
    holder = value
    for part in path:
        holder = holder[part]
    if new is ...:
        del holder[last]
    else:
        holder[last] = new


@pytest.fixture
def finished(csv, tmp_path):
    out = tmp_path / "finished"
    assert go(csv, out, "--method", "lora", "--rank", "2")[0] == 0
    return out


@pytest.mark.parametrize(
    "key,new,words",
    [
        (["settings", "seed"], "0", "config.json: settings: 'seed' is '0', expected int"),
        (["settings", "seed"], True, "'seed' is True, expected int"),
        (["settings", "lr"], math.nan, "'lr' is nan, expected"),
        (["settings", "lr"], ..., "settings: 'lr' is missing"),
        (["settings", "extra"], 1, "settings: 'extra' is unknown"),
        (["settings", "method"], "lorra", "'method' is 'lorra', expected one of triadapt, tlora"),
        (["settings", "options", "alpha"], [], "settings: options: 'alpha' is [], expected float"),
        (["settings", "options", "delta"], 2, "options: 'delta' is unknown"),
        (["settings"], 3, "config.json: 'settings' is 3, expected dict"),
        (["layers"], [1], "'layers' is [1], expected list"),
        (["task", "labels"], ["yes", "no"], "is not what its adapter was trained with: task labels"),
        (["settings", "options", "alpha"], 8.0, "is not what its adapter was trained with: alpha 16.0, now 8.0"),
        (["settings", "seed"], 1, "trained with: seed 0, now 1"),
        (["base"], "0" * 64, "trained with: base None, now 000000000000"),
        (["max_new"], 9, "trained with: max_new 0, now 9"),
        (["layers"], ["blocks.0.q_proj"], "trained with: layers"),
        (["finished", "adapter"], "0" * 64, "is not the one that this run finished with"),
        (["finished"], None, "holds no adapter: the run has not come to its first save"),
    ],
)
def test_a_config_that_was_changed_is_refused_in_one_line(finished, key, new, words):
    path = finished / "config.json"
    config = json.loads(path.read_text())
    change(config, key, new)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        Run.open(str(finished))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_config_that_is_no_json_is_refused_in_one_line(finished):
    path = finished / "config.json"
    broken = {b"{": "config.json line 1: not JSON", b"[" * 99_999: "not JSON (RecursionError)", b"\xff": "UnicodeDecodeError"}
    for content, words in broken.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            Run.open(str(finished))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("more", [["--seed", "1"], ["--max-steps", "5"], ["--width", "16", "--hidden", "32"]])
def test_an_adapter_of_another_seed_step_or_base_is_refused(csv, finished, tmp_path, more):
    other = tmp_path / "other"
    assert go(csv, other, "--method", "lora", "--rank", "2", *more)[0] == 0
    shutil.copy(other / "adapter.safetensors", finished / "adapter.safetensors")
    with pytest.raises(ValueError, match="its adapter.safetensors is not the one that this run finished with"):
        Run.open(str(finished))


def test_a_state_of_another_seed_or_of_other_rows_is_not_gone_on_from(csv, tmp_path, capsys, monkeypatch):
    save = folder.save

    def once(*parts):
        save(*parts)
        raise Stopped(130)

    monkeypatch.setattr(folder, "save", once)
    for seed in "01":
        assert go(csv, tmp_path / seed, "--method", "lora", "--seed", seed, "--save-every", "2")[0] == 130
    monkeypatch.undo()
    shutil.copytree(tmp_path / "0", tmp_path / "mixed")
    shutil.copy(folder.state_path(tmp_path / "1"), tmp_path / "mixed")
    capsys.readouterr()
    assert go(csv, tmp_path / "mixed", "--method", "lora", "--save-every", "2", "--resume")[0] == 2
    assert "holds another run (seed 1, now 0): give the flags it was started with" in capsys.readouterr().err
    with pytest.raises(ValueError, match="config.json is not what its adapter was trained with: seed 1, now 0"):
        folder.read_run(str(tmp_path / "mixed"))
    with open(csv) as f:
        rows = f.read()
    for changed in (
        rows.replace("river", "brook", 1),
        rows + "one more is cold,no\n",
        "\n".join(sorted(rows.split("\n"), reverse=True)),
    ):
        with open(csv, "w") as f:
            f.write(changed)
        assert go(csv, tmp_path / "0", "--method", "lora", "--save-every", "2", "--resume")[0] == 2
        assert "holds another run (rows " in capsys.readouterr().err
    with open(csv, "w") as f:
        f.write(rows)
    assert go(csv, tmp_path / "0", "--method", "lora", "--save-every", "2", "--resume")[0] == 0


def test_one_flipped_bit_in_a_run_is_noticed_or_without_effect(csv, finished):
    """200 random places of config.json and of the adapter; metrics.jsonl is for people alone."""
    rng = random.Random(0)
    expected = folder.read_run(finished)
    for name in ("config.json", "adapter.safetensors"):
        path = finished / name
        good, noticed = path.read_bytes(), 0
        for _ in range(200):
            bad = bytearray(good)
            i = rng.randrange(len(bad))
            bad[i] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            try:
                config, adapter = folder.read_run(finished)
            except ValueError as e:
                assert "\n" not in str(e)
                noticed += 1
            else:
                assert equal(adapter, expected[1])
                same = {"settings", "task", "layers", "max_new", "base", "tokenizer", "rows"}
                kept = [{key: c[key] for key in same} for c in (config, expected[0])]
                for one in kept:  # settings that change no number may differ
                    one["settings"] = {k: v for k, v in vars(one["settings"]).items() if k not in folder.FREE - {"options"}}
                assert kept[0] == kept[1], bad[max(0, i - 40) : i + 40]
        path.write_bytes(good)
        print(name, "noticed", noticed, "of 200")
        assert noticed > 100


def test_two_runs_do_not_share_a_folder(csv, tmp_path):
    out = str(tmp_path / "run")
    with folder.lock(out):
        code, _ = go(csv, out)
        assert code == 2 and os.listdir(out) == []
    assert go(csv, out)[0] == 0  # and the lock leaves nothing behind


# ------------------------------------------------------------------- faults between any two file operations

PROGRAM = """
import json, os, sys
sys.path[:0] = [{root!r}]
import torch
torch.set_num_threads(1)
import torch._dynamo  # the first optimizer imports it: here once, not in every child
import train
FAULTS = ("fsync", "replace", "remove", "makedirs")
def run(stop, flags):  # in a process of its own, which dies at the stop-th file operation
    count = 0
    def counted(f):
        def call(*args, **more):
            nonlocal count
            count += 1
            if count == stop:
                os._exit(9)
            return f(*args, **more)
        return call
    for name in FAULTS:
        setattr(os, name, counted(getattr(os, name)))
    code = train.main(flags)
    sys.stdout.flush()
    os._exit(code if code or stop else 100 + count)
for line in sys.stdin:
    if not (child := os.fork()):
        run(*json.loads(line))
    print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def in_processes():
    """Exit codes of runs [(file operation to die at or 0, flags)]; 100 + the number of operations where none was asked for."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(root=root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(jobs):
            codes = []
            for stop, flags in jobs:
                print(json.dumps([stop, list(map(str, flags))]), file=process.stdin, flush=True)
                codes.append(next(int(line.split()[1]) for line in process.stdout if line.startswith("code ")))
            return codes

        yield run


@pytest.mark.parametrize("method,options", [
    ("triadapt", "--dropout 0.3 --interval 3 --t0 1 --delta 2"), ("task_tlora", ""),
    ("adalora", "--rank 6 --rank-target 3 --t-init 1 --t-final 1 --mask-interval 2"),
])  # fmt: skip
def test_a_kill_at_any_file_operation_leaves_one_step_and_a_run_that_resumes(in_processes, csv, tmp_path, method, options):
    flags = ["--data", csv, *"--text text --label label --batch-size 16 --epochs 2 --save-every 3".split(), *TINY]
    flags += ["--method", method, *options.split(), "--out"]
    whole = tmp_path / "whole"
    (code,) = in_processes([(0, [*flags, whole])])
    expected = rows_of(whole), adapter_of(whole), rows_of(whole, "layers.jsonl")
    changed = [row["step"] for row in expected[2] if "event" in row]  # the ranks: before a save and after it
    assert method == "task_tlora" or changed[0] < 6 < changed[-1]
    outs = [tmp_path / str(i) for i in range(1, code - 100 + 1)]
    assert len(outs) > 15
    assert set(in_processes([(i, [*flags, out]) for i, out in enumerate(outs, 1)])) == {9}
    states, left = 0, {}
    for out in outs:
        steps = set()
        if os.path.exists(folder.state_path(out)):
            steps.add(folder.load_state(out)[2]["step"])
            states += 1
        if (out / "adapter.safetensors").exists():
            steps.add(sealed.read(out / "adapter.safetensors")[1]["step"])
        if (out / "metrics.jsonl").exists():
            steps.add(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"])
        assert len(steps) <= 1, (out.name, steps)
        left[*sorted(os.listdir(out) if out.exists() else []), *steps] = out  # one of those that left the same
    print(f"{method}: killed at {len(outs)} file operations, {len(left)} different folders gone on with")
    assert states > 5 and len(left) > 10
    resume = [[*flags, out, *["--resume"] * os.path.exists(folder.state_path(out))] for out in left.values()]
    assert min(in_processes([(0, again) for again in resume])) >= 100
    for out in left.values():
        assert rows_of(out) == expected[0] and equal(adapter_of(out), expected[1]) and rows_of(out, "layers.jsonl") == expected[2]
        assert (out / "layers.jsonl").read_bytes() == (whole / "layers.jsonl").read_bytes()  # the layers' order, too
        assert not os.path.exists(folder.state_path(out)) and (out / "config.json").read_text().count('"finished": {') == 1
