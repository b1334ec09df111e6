"""The loop and the command line: exact schedules, runs that repeat and resume to the bit, one-line errors."""

import dataclasses
import json
import math
import os
import re

import pytest
import torch

import checkpoint
import data
import train
from model import Config, Transformer

TINY = "--scratch --width 16 --depth 1 --heads 2 --hidden 16 --threads 1 --device cpu --no-figures".split()
METHODS = list(train.METHODS)


@pytest.fixture
def csv(tmp_path):
    """A table of our own: 60 short sentences of two classes that one word tells apart."""
    words = ["river", "stone", "cloud", "tree", "house"]
    rows = ["text,label"]
    for i in range(60):
        rows.append(f"a {words[i % 5]} is {'warm' if i % 2 else 'cold'} and {words[i // 5 % 5]},{'yes' if i % 2 else 'no'}")
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def go(csv, out, *more):
    """Run train.main on the table; returns (exit code, the rows of metrics.jsonl without times)."""
    argv = ["--data", csv, "--text", "text", "--label", "label", "--out", str(out), "--epochs", "3", *TINY]
    argv += ["--rank", "4"] * ("tlora" in more)  # its default, the author's 32, is more than this width of 16
    argv += map(str, more)
    code = train.main(argv)
    return code, rows_of(out)


def rows_of(out, name="metrics.jsonl"):
    if not os.path.exists(os.path.join(out, name)):
        return None
    with open(os.path.join(out, name)) as f:
        return [{k: v for k, v in json.loads(line).items() if k not in train.TIMES} for line in f]


def adapter_of(out):
    return checkpoint.read_adapter(os.path.join(out, "adapter.safetensors"))[0]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------- small functions


def test_rate_rises_over_the_warm_up_and_falls_to_zero():
    assert [train.rate(s, 10, 4, "constant") for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [train.rate(s, 10, 5, "linear") for s in (4, 5, 6, 9)] == [1, 1, 0.8, 1 - 4 / 5]
    assert train.rate(5, 10, 0, "cosine") == 0.5 * (1 + math.cos(math.pi / 2))
    assert train.rate(0, 1, 0, "linear") == 1.0
    for kind in ("linear", "cosine"):
        values = [train.rate(s, 100, 10, kind) for s in range(100)]
        assert values[:10] == sorted(values[:10]) and values[10:] == sorted(values[10:], reverse=True)
        assert 0 < values[-1] < 0.02


def test_losses_by_hand():
    logits, labels = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2
    assert abs(train.loss_of(logits, labels, "classification").item() - expected) < 1e-6
    assert train.loss_of(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0]), "regression").item() == (1 + 4) / 2
    span = torch.zeros(1, 4, 2)
    span[0, 2, 0], span[0, 3, 1] = 5.0, 7.0
    expected = (math.log(1 + 3 * math.exp(-5)) + math.log(1 + 3 * math.exp(-7))) / 2
    assert abs(train.loss_of(span, torch.tensor([[2, 3]]), "span").item() - expected) < 1e-6
    words = torch.randn(2, 3, 5)
    labels = torch.tensor([[-100, 4, -100], [0, -100, -100]])
    expected = -(words[0, 1].log_softmax(0)[4] + words[1, 0].log_softmax(0)[0]) / 2
    assert abs(train.loss_of(words, labels, "lm").item() - expected.item()) < 1e-6


def test_a_language_models_loss_is_the_same_from_the_labelled_places_alone():
    torch.manual_seed(0)
    model = Transformer(Config(30, 16, 1, 2, 16, causal=True)).double()
    batch = {"input_ids": torch.randint(30, (3, 7)), "attention_mask": torch.ones(3, 7).long()}
    batch["labels"] = torch.where(torch.rand(3, 7) < 0.4, batch["input_ids"], -100)
    whole = torch.nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
    assert (batch["labels"] == -100).any()
    assert abs((train.forward(model, batch, "lm") - whole).item()) < 1e-6


def test_the_labels_of_the_rows_change_no_generated_answer():
    torch.manual_seed(1)
    tokenizer = data.Tokenizer(os.path.join(train.ASSETS, "tokenizer.json"))
    task, rows = data.TASKS["math"], data.load("math", split="dev")[:6]
    model = Transformer(Config(tokenizer.vocab_size, 16, 1, 2, 16, causal=True))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=2.0)  # so that the choice depends on the text
    settings = {"batch_size": 4, "max_length": 128, "max_new": 40, "precision": "float32"}
    device = torch.device("cpu")

    def answers(rows):
        features = data.features(task, rows, tokenizer, 128)
        return train.predict(model, task, features, rows, tokenizer, settings, device, train.autocast_of(settings, device))["answers"]

    known = answers(rows)
    assert len(set(known)) > 1 and max(map(len, known)) > max(len(row.label) for row in rows)
    assert known == answers([dataclasses.replace(row, label=None) for row in rows])


def test_accumulated_batches_give_the_gradient_of_one_large_batch():
    torch.manual_seed(0)
    model = Transformer(Config(30, 16, 1, 2, 16), "classification", 3).double()
    ids, labels = torch.randint(30, (10, 5)), torch.randint(3, (10,))
    parts = [{"input_ids": ids[a:b], "labels": labels[a:b]} for a, b in ((0, 4), (4, 8), (8, 10))]
    assert train.shares(parts, "classification") == [0.4, 0.4, 0.2]
    for part, share in zip(parts, train.shares(parts, "classification")):
        (share * train.forward(model, part, "classification")).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    train.forward(model, {"input_ids": ids, "labels": labels}, "classification").backward()
    error = max((g - p.grad).abs().max().item() for g, p in zip(grads, (p for p in model.parameters() if p.grad is not None)))
    print("error", error, "largest gradient", max(g.abs().max().item() for g in grads))
    assert error < 1e-7 < max(g.abs().max().item() for g in grads)  # losses are float32


def test_grouped():
    assert list(train.grouped(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]


# ------------------------------------------------------------------- the command line


def test_every_option_of_every_method_is_a_flag_with_its_help():
    text = re.sub(r"\s+", " ", train.build_parser().format_help())
    seen = 0
    for method in METHODS:
        for option, (_, default, words) in train.method_options(method).items():
            assert f"--{option.replace('_', '-')}" in text or f"--no-{option.replace('_', '-')}" in text
            assert words and len(words) > 10, (method, option)
            seen += 1
    assert seen > 30
    settings, options, _ = train.parse(["--method", "triadapt", "--delta", "2", "--preserve", "--mode", "nonlinear"])
    assert options["delta"] == 2 and options["preserve"] is True and options["mode"] == "nonlinear"
    assert options["rank_ref"] == train.method_options("triadapt")["rank_ref"][1]


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--method", "lorra"], "argument --method: invalid choice: 'lorra' (choose from"),
        (["--task", "colla"], "argument --task: invalid choice: 'colla' (choose from"),
        (["--metod", "lora"], "unrecognized arguments: --metod lora"),
        (["--method", "lora", "--delta", "3"], "--delta is no option of lora (of: triadapt)"),
        (["--task", "wnli"], "task wnli needs --data DIR (generated are: cola, sst2"),
        (["--epochs", "0"], "0 is not a positive whole number"),
        (["--lr", "nan"], "nan is not a finite number from 0"),
        (["--warmup", "1.5"], "--warmup 1.5 is not below 1"),
        (["--betas", "0.9", "1"], "--betas 1.0 is not below 1"),
        (["--text", "a"], "--text goes with --data FILE and --label COLUMN"),
        (["--label", "a"], "--label and --dev go with --text COLUMN"),
        (["--export-peft", "x"], "--export-peft and --export-merged need --backbone"),
        (["--backbone", "x", "--scratch"], "--backbone is a model of its own"),
        (["--rank", "many"], "argument --rank: invalid int value: 'many'"),
    ],
)
def test_wrong_flags_end_in_one_line_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "more,words",
    [
        (["--method", "lora", "--rank", "0"], "rank 0 does not fit layer blocks.0.q_proj (16, 16): allowed are 1 to 16"),
        (["--method", "lora", "--rank", "17"], "rank 17 does not fit layer"),
        (["--method", "triadapt", "--rank", "17"], "rank 17 does not fit layer"),
        (["--targets", "query"], "target 'query' matches no nn.Linear; names end in: down_proj, head"),
        (["--method", "head", "--freeze-head"], "nothing to train"),
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
    folder = tmp_path / "CoLA"
    folder.mkdir()
    if text is not None:
        (folder / "train.tsv").write_text(text)
    code = train.main(["--task", "cola", "--data", str(folder), "--out", str(tmp_path / "run"), *TINY])
    err = capsys.readouterr().err
    assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_its_folder_and_learns(csv, tmp_path, capsys, method):
    out = tmp_path / "run"
    code, rows = go(csv, out, "--method", method, "--epochs", "12", "--lr", "0.02")
    assert code == 0 and len(rows) == 12
    made = {"config.json", "metrics.jsonl", "layers.jsonl", "adapter.safetensors"}
    assert set(os.listdir(out)) == made | ({"plan.json"} if method == "task_tlora" else set())
    assert [row["step"] for row in rows] == [2 * (i + 1) for i in range(12)]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    config = checkpoint.read_config(out)
    assert config["settings"]["method"] == method and config["task"]["labels"] == ["no", "yes"]
    assert config["versions"]["torch"] == torch.__version__
    screen = capsys.readouterr().out
    assert re.search(r"[\d,]+ trained of [\d,]+ \([\d.]+ %\)", screen)
    assert "device  cpu (as asked), float32, 1 threads" in screen

    # what was trained and what the method drew is all that a fresh base needs
    model, _, task, _ = train.restore(str(out))
    state = adapter_of(out)
    assert rows[-1]["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert equal(state, model.state_dict()), "of a model from scratch all is kept"


def test_figures_are_drawn_for_what_a_method_watches(csv, tmp_path):
    argv = ["--data", csv, "--text", "text", "--label", "label", "--epochs", "3"]
    argv += [flag for flag in TINY if flag != "--no-figures"]
    for method, names in {
        "triadapt": {"ranks.png", "importance.png"},
        "tlora": {"alpha.png", "B_norm.png"},
        "task_tlora": {"ranks.png", "importance.png", "scaling.png", "spectrum.png"},
        "head": set(),
    }.items():
        out = tmp_path / method
        rank = ["--rank", "4"] * (method == "tlora")
        assert train.main([*argv, *rank, "--method", method, "--out", str(out)]) == 0
        made = {name for name in os.listdir(out) if name.endswith(".png")}
        assert names | {"curves.png"} <= made
        assert ("histograms.png" in made) == (method != "head")
        assert all((out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in made)


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

    save_state, saved = checkpoint.save_state, []

    def killed(run, state):
        save_state(run, state)
        saved.append(state["step"])
        if state["step"] == 10:  # in the middle of the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_state", killed)
    code, part = go(csv, tmp_path / "part", *more)
    assert code == 130 and saved == [5, 10] and part == whole[:2]
    assert "--resume goes on from" in capsys.readouterr().err
    monkeypatch.undo()
    assert go(csv, tmp_path / "part", *more)[0] == 2, "an unfinished run is not overwritten by accident"
    assert "holds a run that was stopped: --resume goes on, --overwrite starts anew" in capsys.readouterr().err
    assert go(csv, tmp_path / "part", *more, "--resume", "--lr", "0.5")[0] == 2
    assert "holds another run (lr" in capsys.readouterr().err
    code, resumed = go(csv, tmp_path / "part", *more, "--resume")
    assert code == 0 and resumed == whole
    assert equal(adapter_of(tmp_path / "part"), adapter_of(tmp_path / "whole"))
    assert rows_of(tmp_path / "part", "layers.jsonl") == rows_of(tmp_path / "whole", "layers.jsonl")


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
    for name, files, words in [
        ("theirs", theirs, "is not a run folder: it has no config.json"),
        ("unmarked", {"metrics.jsonl": "{}"}, "is not a run folder: it has no config.json"),
        ("checkpoint", checkpoint_like, "is not a run folder: its config.json was not written by train.py"),
        ("only", {"config.json": "[]"}, "is not a run folder: its config.json was not written by train.py"),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(text)
        for flags in ([], ["--overwrite"], ["--resume"]):
            code, _ = go(csv, folder, *flags)
            err = capsys.readouterr().err
            assert code == 2 and words in err and err.count("\n") == 1, (name, flags, err)
            assert {p.name: p.read_text() for p in folder.iterdir()} == files
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


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(csv, tmp_path, capsys, monkeypatch):
    loss_of, calls = train.loss_of, []

    def exploding(logits, labels, kind):
        calls.append(1)
        return loss_of(logits, labels, kind) * (float("nan") if torch.is_grad_enabled() and len(calls) > 4 else 1)

    monkeypatch.setattr(train, "loss_of", exploding)
    code, rows = go(csv, tmp_path / "run", "--method", "lora")
    assert code == 1 and len(rows) == 1
    assert re.search(r"train.py: loss nan at step \d+: stopped; .* keeps the last evaluated state\n$", capsys.readouterr().err)
    assert all(t.isfinite().all() for t in adapter_of(tmp_path / "run").values())


def test_total_rank_stays_within_the_budget_at_every_evaluation(csv, tmp_path):
    code, rows = go(csv, tmp_path / "run", "--method", "triadapt", "--rank-ref", "3", "--interval", "1", "--t0", "0", "--delta", "2")
    ranks = [row["rank_total"] for row in rows]
    print(ranks)
    assert ranks[-1] == 3 * 6 and max(ranks) <= 18  # six matrices in the one block


def test_growth_is_spread_over_the_run_unless_said_otherwise(csv, tmp_path):
    for flags, interval, t0 in (([], None, None), (["--interval", "7", "--t0", "2"], 7, 2)):
        out = tmp_path / f"run{interval}"
        code, rows = go(csv, out, "--method", "triadapt", "--epochs", "20", "--warmup", "0.1", *flags)
        total, options = rows[-1]["step"], checkpoint.read_config(out)["options"]
        assert code == 0 and total >= 30
        assert (options["interval"], options["t0"]) == (interval or total // 15, t0 or round(0.1 * total))


def test_epochs_are_those_of_the_generated_task_unless_said_otherwise():
    assert [train.parse(argv.split())[0]["epochs"] for argv in (
        "--task rte", "--task cola", "--task rte --epochs 4", "--task rte --data some/folder",
    )] == [train.TASK_EPOCHS["rte"], train.EPOCHS, 4, train.EPOCHS]  # fmt: skip
    assert train.TASK_EPOCHS["rte"] != train.EPOCHS and set(train.TASK_EPOCHS) < set(data.GENERATED)


def test_compare_gives_the_cosine_of_each_layers_update(csv, tmp_path, capsys):
    assert go(csv, tmp_path / "lora", "--method", "lora")[0] == 0
    assert go(csv, tmp_path / "tlora", "--method", "tlora", "--compare", tmp_path / "lora")[0] == 0
    with open(tmp_path / "tlora" / "cosine.json") as f:
        cosine = json.load(f)["cosine"]
    mine, theirs = (train.restore(str(tmp_path / name))[0] for name in ("tlora", "lora"))
    for name, value in cosine.items():
        a, b = ((P @ Q).double() for P, Q in (m.get_submodule(name).factors() for m in (mine, theirs)))
        expected = (a.flatten() @ b.flatten() / a.norm() / b.norm()).item()
        assert abs(value - expected) < 1e-5
    assert len(cosine) == 6 and max(map(abs, cosine.values())) > 1e-3
    assert go(csv, tmp_path / "same", "--method", "lora", "--compare", tmp_path / "lora")[0] == 0
    with open(tmp_path / "same" / "cosine.json") as f:
        assert all(abs(v - 1) < 1e-5 for v in json.load(f)["cosine"].values())


def test_flags_that_matter_at_the_end_are_checked_at_the_start(csv, tmp_path, capsys):
    for more, words in [
        (["--compare", tmp_path / "nothing"], "is not a run folder"),
        (["--method", "head", "--compare", tmp_path / "run"], "method head has no low-rank update"),
    ]:
        if words.startswith("method"):
            assert go(csv, tmp_path / "run", "--method", "lora")[0] == 0
            capsys.readouterr()
        assert go(csv, tmp_path / "other", *more)[0] == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and not (tmp_path / "other").exists()


def test_what_fails_after_training_can_be_resumed(csv, tmp_path, monkeypatch):
    monkeypatch.setattr(train.modelling, "save_base", lambda model, path: (_ for _ in ()).throw(OSError("disk full")))
    more = ["--method", "full", "--save-base", tmp_path / "base.safetensors"]
    code, rows = go(csv, tmp_path / "run", *more)
    assert code == 2 and (tmp_path / "run" / "state.pt").exists()
    monkeypatch.undo()
    assert go(csv, tmp_path / "run", *more, "--resume") == (0, rows)
    assert (tmp_path / "base.safetensors").exists() and not (tmp_path / "run" / "state.pt").exists()


def test_a_base_saved_from_an_adapter_run_has_the_update_folded_in(csv, tmp_path):
    base = str(tmp_path / "base.safetensors")
    assert go(csv, tmp_path / "a", "--method", "lora", "--lr", "0.02", "--save-base", base)[0] == 0
    model = train.restore(str(tmp_path / "a"))[0]
    layer = model.blocks[0].q_proj
    P, Q = layer.factors()
    loaded = train.modelling.load_base(base, "lm")
    merged = layer.base.weight + P @ Q
    error = (loaded.blocks[0].q_proj.weight - merged).abs().max().item()
    bound = 2**-11 * merged.abs().max().item()  # float16 on disk
    print("error", error, "bound", bound)
    assert error <= bound < (P @ Q).abs().max() / 10


def test_a_run_belongs_to_its_base(csv, tmp_path, capsys):
    base = str(tmp_path / "base.safetensors")
    assert go(csv, tmp_path / "a", "--method", "full", "--save-base", base)[0] == 0
    argv = ["--data", csv, "--text", "text", "--label", "label", "--base", base, "--out", str(tmp_path / "b"), "--epochs", "1"]
    argv += ["--no-figures", "--threads", "1", "--device", "cpu", "--method", "lora"]
    assert train.main(argv) == 0
    model, _, _, _ = train.restore(str(tmp_path / "b"))
    assert go(csv, tmp_path / "c", "--method", "full", "--seed", "1", "--save-base", base)[0] == 0
    with pytest.raises(ValueError, match="was trained on another base than what"):
        train.restore(str(tmp_path / "b"))


def test_a_frozen_head_is_frozen_with_every_method(csv, tmp_path):
    for method in METHODS:
        if method == "head":
            continue
        assert go(csv, tmp_path / method, "--method", method, "--freeze-head", "--lr", "0.02")[0] == 0
        before = train.restore(str(tmp_path / method))[0].head.weight
        checkpoint.seed_everything(0)
        task, _, _ = train.load_task(checkpoint.read_config(tmp_path / method)["settings"])
        fresh, _, _ = train.build_model(checkpoint.read_config(tmp_path / method)["settings"], task)
        assert torch.equal(before, fresh.head.weight), method


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
