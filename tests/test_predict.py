"""predict.py from a run folder alone: the run's own metric to the last bit, and every way in and out."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import pytest

import data
import predict
import train
from harness import metrics
from harness.run import Run

TINY = "--scratch --width 16 --depth 1 --heads 2 --hidden 16 --threads 1 --device cpu --no-figures --epochs 4".split()


class Input:
    def __init__(self, text):
        self.buffer = io.BytesIO(text.encode())


def metrics_of(out):
    with open(out / "metrics.jsonl") as f:
        return [json.loads(line) for line in f][-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trained runs: classes of a file of our own, pairs in GLUE's layout, and scores."""
    root = tmp_path_factory.mktemp("runs")
    words = ["river", "stone", "cloud", "tree", "house", "field", "road"]
    for split, n in (("train", 48), ("dev", 21)):
        rows = ["text,mood"] + [f"a {words[i % 7]} is {'warm' if i % 2 else 'cold'},{'yes' if i % 2 else 'no'}" for i in range(n)]
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
        (root / "RTE").mkdir(exist_ok=True)
        rows = ["index\tsentence1\tsentence2\tlabel"]
        for i in range(n):
            label = "entailment" if i % 3 else "not_entailment"
            rows.append(f"{i}\ta {words[i % 7]} .\ta {words[i * (1 if i % 3 else 2) % 7]} .\t{label}")
        (root / "RTE" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
        rows = ["text,score"] + [f"{words[i % 7]} " * (1 + i % 5) + f",{i % 5}.5" for i in range(n)]
        (root / f"{split}-score.csv").write_text("\n".join(rows) + "\n")
    table = ["--data", str(root / "train.csv"), "--dev", str(root / "dev.csv"), "--text", "text", "--label", "mood"]
    learns = "--method triadapt --lr 0.02 --epochs 25".split()
    assert train.main([*table, "--out", str(root / "classes"), *TINY, *learns]) == 0
    pairs = ["--task", "rte", "--data", str(root / "RTE")]
    assert train.main([*pairs, "--method", "task_tlora", "--lr", "0.02", "--out", str(root / "pairs"), *TINY]) == 0
    table = ["--data", str(root / "train-score.csv"), "--dev", str(root / "dev-score.csv"), "--text", "text", "--label", "score"]
    assert train.main([*table, "--method", "lora", "--lr", "0.02", "--out", str(root / "scores"), *TINY]) == 0
    return root


@pytest.mark.parametrize("run,file", [("classes", "dev.csv"), ("pairs", "RTE/dev.tsv"), ("scores", "dev-score.csv")])
def test_the_runs_development_metric_is_reproduced_exactly(runs, capsys, run, file):
    assert predict.main([str(runs / run), str(runs / file)]) == 0
    screen = capsys.readouterr()
    config = json.loads((runs / run / "config.json").read_text())
    expected = metrics_of(runs / run)
    again = Run.open(str(runs / run))
    examples = data.load(again.task, runs / file, "test")
    found = again.predict(examples)
    for name, value in metrics.score(again.task, examples, found["answers"]).items():
        assert value == expected[name]
        assert f"{name} {value:.6f}" in screen.err
    assert found["loss"] == expected["dev_loss"]
    assert len(screen.out.splitlines()) == 1 + len(examples) == 22
    assert config["settings"]["method"] == again.settings.method


def test_tsv_and_jsonl_hold_class_names_and_probabilities(runs, capsys):
    predict.main([str(runs / "classes"), str(runs / "dev.csv")])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out), delimiter="\t"))
    predict.main([str(runs / "classes"), str(runs / "dev.csv"), "--format", "jsonl"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(lines) == 21 and list(rows[0]) == ["id", "prediction", "p(no)", "p(yes)"]
    for row, line in zip(rows, lines):
        assert row["prediction"] == line["prediction"] in ("no", "yes")
        p = [line["p(no)"], line["p(yes)"]]
        assert abs(sum(p) - 1) < 2e-6 and line["prediction"] == ("no", "yes")[p[1] > p[0]]
    assert {line["prediction"] for line in lines} == {"no", "yes"}, "it has learned to tell them apart"
    predict.main([str(runs / "scores"), str(runs / "dev-score.csv"), "--format", "jsonl"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(set(line) == {"id", "prediction"} and isinstance(line["prediction"], float) for line in lines)


def test_standard_input_gives_what_the_file_gives(runs, capsys, monkeypatch):
    predict.main([str(runs / "pairs"), str(runs / "RTE/dev.tsv"), "--format", "jsonl"])
    expected = capsys.readouterr().out
    texts = [line.split("\t")[1:3] for line in (runs / "RTE/dev.tsv").read_text().splitlines()[1:]]
    monkeypatch.setattr(sys, "stdin", Input("".join("\t".join(pair) + "\n" for pair in texts)))
    assert predict.main([str(runs / "pairs"), "-", "--format", "jsonl"]) == 0
    assert capsys.readouterr().out == expected


def test_a_test_file_without_labels_gives_glues_submission(runs, capsys, tmp_path):
    rows = (runs / "RTE/dev.tsv").read_text().splitlines()
    test = tmp_path / "test.tsv"
    test.write_text("\n".join(row.rpartition("\t")[0] for row in rows) + "\n")
    assert predict.main([str(runs / "pairs"), str(test), "--submission", str(tmp_path / "RTE.tsv")]) == 0
    assert capsys.readouterr().err == ""
    lines = (tmp_path / "RTE.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 22
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}
    predict.main([str(runs / "pairs"), str(test)])
    plain = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("\t")[1] for line in plain] == [line.split("\t")[1] for line in lines[1:]]


def test_mistakes_end_in_one_line(runs, capsys, tmp_path, monkeypatch):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for argv, words in [
        ([str(tmp_path), "x"], "is not a run folder"),
        ([str(runs / "classes"), str(tmp_path / "none.csv")], "none.csv"),
        ([str(runs / "classes"), str(tmp_path / "other.csv")], "no column 'text'"),
        ([str(runs / "classes"), str(runs / "dev.csv"), "--submission", "x"], "GLUE takes no submission"),
        ([str(runs / "pairs"), str(runs / "RTE/dev.tsv"), "--submission", "x", "--format", "tsv"], "--format do not go with"),
    ]:
        assert predict.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("predict.py: error: ") and words in err and err.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", Input("one text\tand another\nonly one\n"))
    assert predict.main([str(runs / "pairs"), "-"]) == 2
    assert "<stdin>:2: 1 texts, expected two texts with a tab between them" in capsys.readouterr().err
    opened = SimpleNamespace(task=data.TASKS["clm"], settings=SimpleNamespace(threads=None))
    monkeypatch.setattr(Run, "open", lambda *_: opened)
    assert predict.main(["run", "-"]) == 2
    assert "task clm is text to train on: there is nothing to predict" in capsys.readouterr().err
