"""harness/parallel.py: several processes train what one trains, grow alike, deal out the evaluation, and end together."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings

import pytest
from short import METHODS, TINY, adapter_of, rows_of

import train
from harness import folder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = {**os.environ, "PYTHONPATH": ROOT}
ALIKE = 1e-5
# What a case adds: growth and masking within 30 steps; the last batch of an epoch has one row, so one process has none.
MORE = {
    "triadapt": "--t0 5 --interval 5 --delta 1 --rank-ref 3",
    "adalora": "--rank 6 --rank-target 3 --t-init 5 --t-final 10 --mask-interval 5",
    "increlora": "--rank-target 3 --t0 5 --interval 5 --top 2",
    "tlora": "--rank 4 --dropout 0",
    "lora_ga": "--rank 4 --samples 8",
    "corda": "--rank 4 --samples 8",
    "task_tlora": "--rank 4 --samples 8",
}
CASES = {method: ["--method", method, *MORE.get(method, "").split()] for method in METHODS}
CASES["accumulated"] = [*CASES["triadapt"], "--accumulate", "2", "--epochs", "9"]
CASES["answers"] = ["--method", "lora"]  # of a decoder: texts of different lengths, so processes have different numbers of labels


ROWS = ["--rows", "33", "--batch-size", "8", "--epochs", "6", "--eval-every", "1"]


def torchrun(*command, processes=2, within=None):
    """torchrun, ended. Now and then a process aborts, nobody knows why: a warning says where, and it runs again, with the folder
    `within` as it was."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *map(str, command)]
    with tempfile.TemporaryDirectory() as before:
        if within:
            shutil.copytree(within, before, dirs_exist_ok=True)
        for last in (False, False, True):
            result = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, env={**ENV, "PYTHONFAULTHANDLER": "1"})
            if "SIGABRT" not in result.stderr or last:
                return result
            warnings.warn(result.stderr[:5000], stacklevel=2)
            if within:
                shutil.rmtree(within)
                shutil.copytree(before, within)


def argv_of(csv, out, *more):
    flags = ["--data", csv, "--text", "text", "--label", "label", *ROWS]
    if os.path.basename(out) == "answers":
        flags = [
            "--data",
            csv.replace("rows.csv", "answers.jsonl"),
            "--task",
            "sft",
            "--prompt",
            "say",
            "--answer",
            "answer",
            *ROWS,
        ]
    return [*flags, *TINY, "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    words = ["river", "stone", "cloud", "tree", "house"]
    rows = [
        f"a {words[i % 5]} is {'warm' if i % 2 else 'cold'} and {words[i // 5 % 5]},{'yes' if i % 2 else 'no'}" for i in range(60)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    answers = [{"say": f"count to {i % 7}", "answer": " ".join(map(str, range(1, i % 7 + 1)))} for i in range(60)]
    (path.parent / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return str(path)


def together(todo, folder, *more):
    """Runs of two processes, by their argument lists."""
    (folder / "todo.json").write_text(json.dumps(todo))
    return torchrun("tests/several.py", folder / "todo.json", *more, within=folder)


@pytest.fixture(scope="module")
def both(table, tmp_path_factory):
    """{case: (folder of one process, folder of two)}"""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    result = together([argv_of(table, two / case, *flags, "--overwrite") for case, flags in CASES.items()], two)
    assert result.returncode == 0, result.stderr[:3000]
    for case, flags in CASES.items():
        assert train.main(argv_of(table, one / case, *flags)) == 0
    return {case: (one / case, two / case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(both, case):
    one, two = both[case]
    rows, others = rows_of(one), rows_of(two)
    assert len(rows) == len(others) == (27 if case == "accumulated" else 30)
    apart = max(abs(a["train_loss"] - b["train_loss"]) for a, b in zip(rows, others))
    apart = max(apart, *(abs(a["dev_loss"] - b["dev_loss"]) for a, b in zip(rows, others)))
    moved = max(abs(a["train_loss"] - b["train_loss"]) for a, b in itertools.pairwise(rows))
    mine, theirs = adapter_of(one), adapter_of(two)
    assert mine.keys() == theirs.keys()
    noise = ("k_proj.bias",)  # no loss depends on it: its gradient is rounding, which AdamW makes a whole step of
    far = {name: (t.double() - theirs[name].double()).abs().max().item() for name, t in mine.items() if not name.endswith(noise)}
    print(f"{case}: losses {apart:.1e} apart, which move by {moved:.1e}; adapters {max(far.values()):.1e}")
    assert apart < ALIKE < 1e-3 < moved and max(far.values()) < ALIKE
    events, same = ([row for row in rows_of(folder, "layers.jsonl") if "event" in row] for folder in (one, two))
    ranks = [[row["event"].get("grown", row["event"].get("ranks")) for row in found] for found in (events, same)]
    assert ranks[0] == ranks[1]
    assert bool(events) == (case in ("triadapt", "adalora", "increlora", "accumulated"))


DEALT = """
import json, os, sys
sys.path.insert(0, os.getcwd())
import data
from harness import parallel
from harness.run import Run, modelling

parallel.start()
run = Run.open(sys.argv[1])
rows, seen = [], []
for i in range(37):
    rows.append(data.Example(str(i), (f"a tree is {'warm' if i % 3 else 'cold'} and {'river ' * (i % 5)}",), i % 2))
logits = modelling.logits
modelling.logits = lambda model, batch, *more: seen.append(len(batch["input_ids"])) or logits(model, batch, *more)
run.settings.batch_size = 1  # batches of eight rows
found = run.predict(rows)
with open(f"{sys.argv[2]}/{parallel.number()}.json", "w") as f:
    json.dump([found, sum(seen)], f)
"""


def test_the_evaluation_is_dealt_out_and_every_row_comes_back_once(table, tmp_path):
    assert train.main(argv_of(table, tmp_path / "run", "--method", "lora")) == 0
    (tmp_path / "dealt.py").write_text(DEALT)
    command = tmp_path / "dealt.py", tmp_path / "run", tmp_path
    result = torchrun(*command, processes=3)
    assert result.returncode == 0, result.stderr[:2000]
    said = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(3)]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, env=ENV)
    alone, seen = json.loads((tmp_path / "0.json").read_text())
    assert [n for _, n in said] == [16, 13, 8] and seen == 37 and len(set(map(str, alone["probabilities"]))) > 5
    for found, _ in said:
        assert found["answers"] == alone["answers"] and found["probabilities"] == alone["probabilities"]
        assert abs(found["loss"] - alone["loss"]) < 1e-12


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_process_ends_the_run_in_one_line_and_any_number_resumes(table, tmp_path, dies):
    argv = argv_of(table, tmp_path / "run", *CASES["triadapt"], "--save-every", "4", "--dropout", "0.1" if dies else "0")
    result = together([argv], tmp_path, 14, dies)
    said = result.stderr.count("train.py: ")  # torchrun's own lines may come before the end of a line
    assert result.returncode == 1 and "Traceback" not in result.stderr.partition("elastic")[0]
    if dies:
        assert said == 1 and "train.py: another process of this training has ended (" in result.stderr
        kept = f"): stopped; {tmp_path / 'run'} keeps the state after step 13, the same command with --resume goes on from it"
        assert kept in result.stderr
    assert folder.load_state(tmp_path / "run")[2]["step"] == 13  # evaluated, and saved, after each step
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    other = argv_of(table, tmp_path / "whole", *argv[argv.index("--out") + 2 :])
    if dies:  # two again, with dropout: to the bit
        assert together([[*argv, "--resume"], other], tmp_path).returncode == 0
    else:  # one goes on
        assert train.main([*argv, "--resume"]) == 0 == train.main(other)
    a, b = adapter_of(tmp_path / "run"), adapter_of(tmp_path / "whole")
    apart = max((t - b[name]).abs().max().item() for name, t in a.items())
    print(f"adapters {apart:.1e} apart")
    assert apart == 0 if dies else 0 < apart < ALIKE
    assert len(rows_of(tmp_path / "run")) == 30


DDP = """
import json, os, sys
sys.path.insert(0, os.getcwd())
import torch, torch.nn as nn
from harness import parallel
import triadapt

parallel.start()
torch.manual_seed(parallel.number())  # each draws what grows by itself
model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) ** 3)
triadapt.inject(model, ["0", "2", "4"], rank_ref=4, delta=1, t0=1, interval=3)
for layer in triadapt.wrapped_layers(model).values():
    for p in layer.parameters():
        torch.distributed.broadcast(p.data, 0)
optimizer = torch.optim.AdamW(triadapt.param_groups(model, 1e-2, 0.0))
wrap = lambda: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
ddp = wrap()
try:
    triadapt.after_step(ddp, optimizer, 1, 20)
except ValueError as e:
    refused = str(e)
data = torch.Generator().manual_seed(100 + parallel.number())
for step in range(1, 21):
    x = torch.randn(4, 8, generator=data)
    loss = (ddp(x) - x.roll(1, -1)).square().mean() + triadapt.penalty(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if triadapt.after_step(model, optimizer, step, 20) and "anew" in sys.argv:
        ddp = wrap()
mine = [p.detach() for p in model.parameters()]
for other in parallel.gather(mine):
    assert all(torch.equal(a, b) for a, b in zip(mine, other))
with open(f"{sys.argv[1]}/{parallel.number()}.json", "w") as f:
    json.dump([refused, [layer.rank for layer in triadapt.wrapped_layers(model).values()]], f)
"""


def test_under_distributed_data_parallel_growth_is_the_same_or_refused(tmp_path):
    (tmp_path / "ddp.py").write_text(DDP)
    result = torchrun(tmp_path / "ddp.py", tmp_path, "anew")
    assert result.returncode == 0, result.stderr[:2000]
    one, other = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert one == other and one[0].startswith("DistributedDataParallel would not train what grows") and sum(one[1]) == 12
    result = torchrun(tmp_path / "ddp.py", tmp_path)
    assert result.returncode == 1 and "the processes have drifted apart" in result.stderr


SHARDED = """
import os, sys
sys.path.insert(0, os.getcwd())
import torch, torch.nn as nn
from torch.distributed.fsdp import fully_shard
from harness import parallel
import task_tlora, tlora_plus, triadapt
from baselines import lora

parallel.start()
for method, options in ((lora, {}), (tlora_plus, {}), (task_tlora, {}), (triadapt, {"rank_ref": 4, "orth": 0.0})):
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)], nn.Linear(16, 4))
        method.inject(model, ["0.0", "1.0", "2.0"], rank=4, **options)
        for module in [*model, model] if sharded else []:
            fully_shard(module)
        optimizer, losses = torch.optim.AdamW(method.param_groups(model, 1e-2, 0.0)), []
        for step in range(10):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step % 2))
            x = x[parallel.number() :: 2] if sharded else x
            loss = (model(x) - x[:, :4]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(sum(parallel.gather(loss.item())) / 2)
        found.append(losses)
    path = os.path.join(os.path.dirname(__file__), f"{method.__name__}.{parallel.number()}")
    method.save(model, path)  # every process: the whole is put together from all
    try:
        method.merge(model)
    except ValueError as error:
        assert "is in shards: save in every process, load on a whole base, and merge there" in str(error)
    else:
        raise AssertionError("merged shards")
    torch.manual_seed(0)
    whole = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)], nn.Linear(16, 4))
    before = whole(x)
    method.load(whole, path)
    assert (whole(x) - model(x)).abs().max() < 1e-6 < 1e-3 < (whole(x) - before).abs().max(), method
    apart = max(abs(a - b) for a, b in zip(*found))
    assert apart < 1e-6 and found[0][0] - found[0][-2] > 1e-2, (method, apart, found)
"""


def test_method_files_train_alike_under_fully_sharded_data_parallel(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    result = torchrun(tmp_path / "sharded.py")
    assert result.returncode == 0, result.stderr[:3000]
