"""The loop: exact schedules, runs that repeat and resume to the bit, one-line errors."""

import dataclasses
import io
import json
import math
import os
import re

import pytest
import torch
from short import METHODS, TINY, adapter_of, equal, go, rows_of

import data
import predict
import train
from harness import folder, methods
from harness import run as running
from harness.run import Run
from harness.settings import Settings
from harness.stop import Stopped
from model import Config, Transformer, load_base


def test_rate_rises_over_the_warm_up_and_falls_to_zero():
    assert [train.rate(s, 10, 4, "constant") for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [train.rate(s, 10, 5, "linear") for s in (4, 5, 6, 9)] == [1, 1, 0.8, 1 - 4 / 5]
    assert train.rate(5, 10, 0, "cosine") == 0.5 * (1 + math.cos(math.pi / 2))
    assert train.rate(0, 1, 0, "linear") == 1.0
    for kind in ("linear", "cosine"):
        values = [train.rate(s, 100, 10, kind) for s in range(100)]
        assert values[:10] == sorted(values[:10]) and values[10:] == sorted(values[10:], reverse=True)
        assert 0 < values[-1] < 0.02


def test_a_label_that_the_consoles_code_page_lacks_ends_no_run(tmp_path, capsys, monkeypatch):
    rows = ["text,label"] + [f"a {word} is here,{label}" for word in ("tree", "road") * 6 for label in ("été", "中文")]
    (tmp_path / "rows.csv").write_text("\n".join(rows), encoding="utf-8")
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", console)
    assert go(str(tmp_path / "rows.csv"), tmp_path / "run", "--method", "lora")[0] == 0
    console.flush()
    assert "été".encode("cp1252") in (said := console.buffer.getvalue()) and b"\\u4e2d\\u6587" in said


def test_accumulated_batches_give_the_gradient_of_one_large_batch():
    torch.manual_seed(0)
    model = Transformer(Config(30, 16, 1, 2, 16), "classification", 3).double()
    ids, labels = torch.randint(30, (10, 5)), torch.randint(3, (10,))
    parts = [{"input_ids": ids[a:b], "labels": labels[a:b]} for a, b in ((0, 4), (4, 8), (8, 10))]
    task = dataclasses.replace(data.TASKS["mnli"], labels=("a", "b", "c"))
    run = Run(Settings(precision="float32"), task, model, None, "")
    loss = train.backward(run, parts, [4, 4, 2], 10)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    whole = {"input_ids": ids, "labels": labels}
    assert abs(train.backward(run, [whole], [10], 10) - loss) < 1e-6 and abs(run.forward(whole).item() - loss) < 1e-6
    error = max((g - p.grad).abs().max().item() for g, p in zip(grads, (p for p in model.parameters() if p.grad is not None)))
    print("error", error, "largest gradient", max(g.abs().max().item() for g in grads))
    assert error < 1e-7 < max(g.abs().max().item() for g in grads)  # losses are float32


def test_grouped():
    assert list(train.grouped(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    "more,words",
    [
        (["--method", "lora", "--rank", "0"], "rank 0 does not fit layer blocks.0.q_proj (16, 16): allowed are 1 to 16"),
        (["--method", "lora", "--rank", "17"], "rank 17 does not fit layer"),
        (["--method", "triadapt", "--rank", "17"], "rank 17 does not fit layer"),
        (["--targets", "query"], "target 'query' matches no nn.Linear; names end in: down_proj, head"),
        (["--method", "head", "--freeze-head"], "nothing to train"),
        (["--rank", "2", "--targets", "q_proj", "head"], "layer head is part of the task head: leave it out with --exclude head"),
        (["--method", "task_tlora", "--samples", "-5"], "--samples -5 is below 1"),
        (["--base", "nowhere.safetensors"], "--scratch"),
    ],
)
def test_wrong_settings_end_in_one_line_and_leave_nothing(csv, tmp_path, capsys, more, words):
    if "--base" in more:
        code = train.main(["--base", "nowhere.safetensors", "--out", str(tmp_path / "run")])
        words = "nowhere.safetensors: no such file"
    else:
        code, _ = go(csv, tmp_path / "run", *more)
    err = capsys.readouterr().err
    assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text,words",
    [
        (None, "no train.tsv there"),
        ("", "train.tsv:1: the file is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "train.tsv:1: a Git-LFS pointer"),
        ("gj04\t1\t\tfine .\ngj04\t1\tfine .\n", "train.tsv:2: 3 columns, expected 4"),
        ("gj04\t1\t\tfine .\ngj04\t7\t\tfine .\n", "train.tsv:2: label '7' is not one of"),
    ],
)
def test_wrong_files_end_in_one_line_with_file_and_line(tmp_path, capsys, text, words):
    place = tmp_path / "CoLA"
    place.mkdir()
    if text is not None:
        (place / "train.tsv").write_text(text)
    code = train.main(["--task", "cola", "--data", str(place), "--out", str(tmp_path / "run"), *TINY])
    err = capsys.readouterr().err
    assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_its_folder_and_learns(csv, tmp_path, capsys, method):
    out = tmp_path / "run"
    rate = 0.003 if method == "lora_plus" else 0.02
    code, rows = go(csv, out, "--method", method, "--epochs", "12", "--lr", rate, "--head-lr", "0.02")
    assert code == 0 and len(rows) == 12
    made = {"config.json", "metrics.jsonl", "layers.jsonl", "adapter.safetensors"}
    assert set(os.listdir(out)) == made | ({"plan.json"} if hasattr(methods.module(method), "calibrate") else set())
    assert [row["step"] for row in rows] == [2 * (i + 1) for i in range(12)]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    config = folder.read_config(out)
    assert config["settings"].method == method and config["task"]["labels"] == ["no", "yes"]
    assert config["versions"]["torch"] == torch.__version__
    screen = capsys.readouterr().out
    assert re.search(r"[\d,]+ trained of [\d,]+ \([\d.]+ %\)", screen)
    assert "device  cpu (as asked), float32, 1 threads" in screen

    # what was trained and what the method drew is all that a fresh base needs
    model = Run.open(str(out)).model
    state = adapter_of(out)
    assert rows[-1]["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert equal(state, model.state_dict()), "of a model from scratch all is kept"


def test_a_compiled_model_is_compiled_once_and_once_more_for_each_growth(csv, tmp_path, monkeypatch):
    compile, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend="eager", **options))
    torch._dynamo.reset(), counters.clear()
    growth = ["--rank-ref", "4", "--t0", "1", "--interval", "3"]
    code, rows = go(csv, tmp_path / "run", "--method", "triadapt", "--compile", "--epochs", "8", *growth)
    events = [row for row in rows_of(tmp_path / "run", "layers.jsonl") if "event" in row]
    assert code == 0 and len(events) == 2 and not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1 + len(events)
    assert torch._dynamo.config.fail_on_recompile_limit_hit
    plain = go(csv, tmp_path / "plain", "--method", "triadapt", "--no-fast", "--epochs", "8", *growth)[1]
    assert all(abs(a["dev_loss"] - b["dev_loss"]) < 1e-6 for a, b in zip(rows, plain)) and rows[0] != rows[-1]


@pytest.mark.parametrize("method", METHODS)
def test_the_task_head_has_a_rate_of_its_own_and_every_trained_number_one(csv, tmp_path, monkeypatch, method):
    groups, find = [], train.groups_of
    monkeypatch.setattr(train, "groups_of", lambda run: groups.append((run, find(run))) or groups[-1][1])
    assert go(csv, tmp_path / "run", "--method", method, "--epochs", "1", "--lr", "0.5")[0] == 0
    run, found = groups[0]
    rates = {id(p): group["peak"] for group in found for p in group["params"]}
    assert sum(len(group["params"]) for group in found) == len(rates)
    for name, p in run.model.named_parameters():
        if name.startswith("head."):
            assert rates[id(p)] == (0.5 if method == "head" else 1e-3)
        elif p.requires_grad:
            assert rates[id(p)] >= 0.5, name
    go(csv, tmp_path / "other", "--method", method, "--epochs", "1", "--head-lr", "0.25")
    assert {group["peak"] for group in groups[1][1] if any(p.shape[:1] == (2,) for p in group["params"])} >= {0.25}


@pytest.mark.parametrize("method", ["triadapt", "tlora", "task_tlora"])
def test_the_same_seed_gives_the_same_run_to_the_bit_and_another_seed_does_not(csv, tmp_path, method):
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        code, rows = go(csv, tmp_path / name, "--method", method, "--seed", seed)
        runs[name] = rows, adapter_of(tmp_path / name), rows_of(tmp_path / name, "layers.jsonl")
    assert runs["a"][0] == runs["b"][0] and equal(runs["a"][1], runs["b"][1]) and runs["a"][2] == runs["b"][2]
    assert runs["a"][0] != runs["c"][0]


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_resumes_to_the_same_numbers(csv, tmp_path, capsys, monkeypatch, method):
    """Stopped within an epoch, after growth, under dropout: metrics and adapter are those of the whole run."""
    more = ["--method", method, "--batch-size", "8", "--eval-every", "5"]
    if method == "triadapt":
        more += ["--dropout", "0.3", "--interval", "3", "--t0", "1", "--delta", "2"]
    code, whole = go(csv, tmp_path / "whole", *more)
    assert code == 0 and [row["step"] for row in whole] == [5, 10, 15, 20, 21]

    save, saved = folder.save, []

    def killed(run, progress, optimizer):
        save(run, progress, optimizer)
        saved.append(progress.step)
        if progress.step == 10:  # in the middle of the second epoch, before it was evaluated or behind it
            raise Stopped(130)

    monkeypatch.setattr(folder, "save", killed)
    code, part = go(csv, tmp_path / "part", *more)
    assert code == 130 and saved[-1] == 10 and part in (whole[:1], whole[:2])
    assert "with --resume goes on from it" in capsys.readouterr().err
    monkeypatch.undo()
    assert predict.main([str(tmp_path / "part"), csv]) == 0
    assert capsys.readouterr().err.startswith("predict.py: the run has not finished: this is its last saved state\n")
    assert go(csv, tmp_path / "part", *more)[0] == 2, "an unfinished run is not overwritten by accident"
    assert "holds a run that was stopped: --resume goes on, --overwrite starts anew" in capsys.readouterr().err
    assert go(csv, tmp_path / "part", *more, "--resume", "--lr", "0.5")[0] == 2
    assert f"holds another run ({'head_' * (method == 'head')}lr" in capsys.readouterr().err
    code, resumed = go(csv, tmp_path / "part", *more, "--resume")
    assert code == 0 and resumed == whole
    assert equal(adapter_of(tmp_path / "part"), adapter_of(tmp_path / "whole"))
    assert rows_of(tmp_path / "part", "layers.jsonl") == rows_of(tmp_path / "whole", "layers.jsonl")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(csv, tmp_path, capsys, monkeypatch):
    loss_of, calls = running.loss_of, []

    def exploding(*batch):
        calls.append(1)
        return loss_of(*batch) * (float("nan") if torch.is_grad_enabled() and len(calls) > 2 else 1)

    monkeypatch.setattr(running, "loss_of", exploding)
    code, rows = go(csv, tmp_path / "run", "--method", "lora")
    assert code == 1 and len(rows) == 1
    words = r"train.py: loss nan at step \d+: stopped; .* keeps the state after step \d+, the same command with --resume goes on"
    assert re.search(words + r" from it; it would come again: try a --lr below 0\.\d+\n$", capsys.readouterr().err)
    assert all(t.isfinite().all() for t in adapter_of(tmp_path / "run").values())


def test_total_rank_stays_within_the_budget_at_every_evaluation(csv, tmp_path):
    flags = "--method triadapt --rank-ref 3 --interval 1 --t0 0 --delta 2".split()
    code, rows = go(csv, tmp_path / "run", *flags)
    ranks = [row["rank_total"] for row in rows]
    print(ranks)
    assert ranks[-1] == 3 * 6 and max(ranks) <= 18  # six matrices in the one block


def test_growth_is_spread_over_the_run_unless_said_otherwise(csv, tmp_path):
    for more, interval, t0 in (([], None, None), (["--interval", "7", "--t0", "2"], 7, 2)):
        out = tmp_path / f"run{interval}"
        code, rows = go(csv, out, "--method", "triadapt", "--epochs", "20", "--warmup", "0.1", *more)
        total, options = rows[-1]["step"], folder.read_config(out)["settings"].options
        assert code == 0 and total >= 30
        assert (options["interval"], options["t0"]) == (interval or total // 15, t0 or round(0.1 * total))


def test_compare_gives_the_cosine_of_each_layers_update(csv, tmp_path, capsys):
    assert go(csv, tmp_path / "lora", "--method", "lora")[0] == 0
    assert go(csv, tmp_path / "tlora", "--method", "tlora", "--compare", tmp_path / "lora")[0] == 0
    with open(tmp_path / "tlora" / "cosine.json") as f:
        cosine = json.load(f)["cosine"]
    mine, theirs = (Run.open(str(tmp_path / name)).model for name in ("tlora", "lora"))
    for name, value in cosine.items():
        a, b = ((P @ Q).double() for P, Q in (m.get_submodule(name).factors() for m in (mine, theirs)))
        expected = (a.flatten() @ b.flatten() / a.norm() / b.norm()).item()
        assert abs(value - expected) < 1e-5
    assert len(cosine) == 6 and max(map(abs, cosine.values())) > 1e-3
    assert go(csv, tmp_path / "same", "--method", "lora", "--compare", tmp_path / "lora")[0] == 0
    with open(tmp_path / "same" / "cosine.json") as f:
        assert all(abs(v - 1) < 1e-5 for v in json.load(f)["cosine"].values())


def test_a_run_that_cannot_be_compared_with_is_refused_before_the_training(csv, tmp_path, capsys, monkeypatch):
    assert go(csv, tmp_path / "part", "--method", "lora", "--targets", "q_proj")[0] == 0
    assert go(csv, tmp_path / "wide", "--method", "lora", "--width", "32")[0] == 0
    for other, layer in [("part", "blocks.0.k_proj"), ("wide", "blocks.0.q_proj")]:
        capsys.readouterr()
        assert go(csv, tmp_path / "run", "--method", "lora", "--compare", tmp_path / other)[0] == 2
        words = f"--compare {tmp_path / other}: that run has no update like this one's in layer {layer}\n"
        assert capsys.readouterr().err == f"train.py: error: {words}" and not (tmp_path / "run").exists()
    monkeypatch.chdir(tmp_path)
    assert go(csv, "run", "--method", "lora", "--targets", "q_proj", "--compare", "part")[0] == 0
    monkeypatch.chdir("/")
    assert folder.read_config(tmp_path / "run")["settings"].compare == str(tmp_path / "part")


def test_flags_that_matter_at_the_end_are_checked_at_the_start(csv, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for more, words in [
        (["--compare", tmp_path / "nothing"], "is not a run folder"),
        (["--method", "lora", "--compare", tmp_path / "head"], f"--compare {tmp_path}/head: that run has no low-rank update"),
        (["--save-base", tmp_path / "notes.txt"], "notes.txt"),
    ]:
        if not (tmp_path / "run").exists():
            assert go(csv, tmp_path / "run", "--method", "lora")[0] == go(csv, tmp_path / "head", "--method", "head")[0] == 0
            capsys.readouterr()
        assert go(csv, tmp_path / "other", *more)[0] == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and not (tmp_path / "other").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_fails_after_training_can_be_resumed(csv, tmp_path, monkeypatch):
    monkeypatch.setattr(train.modelling, "save_base", lambda model, path: (_ for _ in ()).throw(OSError("disk full")))
    more = ["--method", "full", "--save-base", tmp_path / "base.safetensors"]
    code, rows = go(csv, tmp_path / "run", *more)
    assert code == 2 and (tmp_path / "run" / "state.safetensors").exists()
    monkeypatch.undo()
    assert go(csv, tmp_path / "run", *more, "--resume") == (0, rows)
    assert (tmp_path / "base.safetensors").exists() and not (tmp_path / "run" / "state.safetensors").exists()


def test_a_base_saved_from_an_adapter_run_has_the_update_folded_in(csv, tmp_path):
    base = str(tmp_path / "base.safetensors")
    assert go(csv, tmp_path / "a", "--method", "lora", "--lr", "0.02", "--save-base", base)[0] == 0
    model = Run.open(str(tmp_path / "a")).model
    layer = model.blocks[0].q_proj
    P, Q = layer.factors()
    loaded = load_base(base, "lm")
    merged = layer.base.weight + P @ Q
    error = (loaded.blocks[0].q_proj.weight - merged).abs().max().item()
    bound = 2**-11 * merged.abs().max().item()  # float16 on disk
    print("error", error, "bound", bound)
    assert error <= bound < (P @ Q).abs().max() / 10


def test_no_penalty_is_no_penalty(csv, tmp_path):
    """orth 0 turns the term off, and the loop does not stumble over a constant."""
    more = ["--method", "triadapt", "--lr", "0.02"]
    rows = {orth: go(csv, tmp_path / orth, *more, "--orth", orth)[1] for orth in ("0", "0.5")}
    assert rows["0"] is not None and rows["0"] != rows["0.5"]


def test_a_gradient_that_is_not_finite_stops_the_run(csv, tmp_path, capsys, monkeypatch):
    import triadapt

    penalty = triadapt.penalty
    monkeypatch.setattr(triadapt, "penalty", lambda m: penalty(m) * (float("inf") if len(calls) > 3 else 1))
    calls = []
    rate = train.rate
    monkeypatch.setattr(train, "rate", lambda *a: (calls.append(1), rate(*a))[1])
    code, rows = go(csv, tmp_path / "run", "--method", "triadapt")
    assert code == 1 and "gradient of norm" in capsys.readouterr().err
    assert all(t.isfinite().all() for t in adapter_of(tmp_path / "run").values())


def test_gradient_checkpointing_changes_no_number(csv, tmp_path):
    a = go(csv, tmp_path / "a", "--method", "lora")[1]
    b = go(csv, tmp_path / "b", "--method", "lora", "--gradient-checkpointing")[1]
    assert a == b


def test_a_base_that_is_saved_is_a_base(csv, tmp_path):
    base = str(tmp_path / "base.safetensors")
    assert go(csv, tmp_path / "a", "--method", "full", "--save-base", base)[0] == 0
    argv = ["--data", csv, "--text", "text", "--label", "label", "--base", base, "--out", str(tmp_path / "b"), "--epochs", "1"]
    assert train.main([*argv, "--no-figures", "--threads", "1", "--device", "cpu"]) == 0
