"""What the README says is so: its code runs, its commands parse, its table is that of the runs kept."""

import os
import re
import shlex
import subprocess
import sys

from harness.settings import parse

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "bench"))

import claims  # noqa: E402
import sweep  # noqa: E402
import table  # noqa: E402

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
    README = f.read()


def test_the_lines_to_copy_learn_what_is_there_to_learn(tmp_path):
    block, trainer = re.findall(r"```python\n(.*?)```", README, re.S)
    with open(os.path.join(ROOT, "examples", "trainer.py"), encoding="utf-8") as f:
        example = f.read()
    assert trainer.count("\n") >= 10 and all(line.partition("#")[0].strip() in example for line in trainer.splitlines())
    check = (
        "\nassert type(model[0]) is type(model[2]) is torch.nn.Linear\nprint(torch.nn.functional.mse_loss(model(x), y).item())"
    )
    where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": ROOT}}
    result = subprocess.run([sys.executable, "-c", block + check], **where, capture_output=True, text=True)
    *events, last = result.stdout.splitlines()
    print(result.stdout, result.stderr)
    assert events and all(re.fullmatch(r"step \d+: loss \d\.\d{4}, grown to rank \{.+\}", event) for event in events)
    first = float(re.search(r"loss (\S+),", events[0])[1])
    assert float(last) < first / 2


def test_every_train_command_has_flags_that_exist():
    text = README
    for page in ("tiny_world.md", "several_gpus.md"):
        with open(os.path.join(ROOT, "docs", page), encoding="utf-8") as f:
            text += f.read()
    commands = re.findall(r"^(?:torchrun .*)?(?:python )?train\.py (.*?)(?:\.\.\.)?(?:\s+#.*)?$", text, re.M)
    assert len(commands) >= 10
    for command in commands:
        parse(shlex.split(command))


def test_every_file_named_is_there():
    names = set(re.findall(r"\b[\w/-]+\.(?:py|md)\b|docs/\w+\.png", README))
    assert len(names) > 15
    for name in names:
        found = [os.path.join(ROOT, folder, name) for folder in ("", "bench", "docs", "generated", "reading", "examples")]
        assert any(map(os.path.exists, found)), name


def test_the_table_of_ten_tasks_is_made_from_kept_runs_and_says_which_are_older_than_what_it_describes():
    rows = table.read_rows()
    runs = [(row["name"], row["task"], row["seed"]) for row in rows]
    assert len(set(runs)) == len(runs)
    for method, task, _ in runs:  # no mean of fewer
        assert {(method, task, seed) for seed in table.SEEDS} <= set(runs)
    with open(os.path.join(ROOT, "bench", "table.md"), encoding="utf-8") as f:
        report = f.read()
    assert table.table(rows) in report and table.verdicts(rows) in report and table.caption(rows) in report


def test_the_table_and_the_sentences_below_it_are_those_of_the_kept_rows():
    rows = sweep.valid(sweep.read(sweep.ROWS))
    found, words = README.split(claims.MARKS[0])[1].split(claims.MARKS[1])[0].strip().split("\n\n")
    assert found == claims.summary(rows) and " ".join(words.split()) == claims.readme(rows)


def test_the_page_of_rates_is_made_from_the_kept_rows():
    with open(sweep.PAGE, encoding="utf-8") as f:
        assert f.read() == sweep.text()
