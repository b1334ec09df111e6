"""Many training runs, each kept as a row: the instrument behind docs/rates.md.

    python bench/sweep.py head --jobs 2                 # the task head's own rate, with LoRA: once, for all methods
    python bench/sweep.py rates --minutes 50            # the best rate of each method on each task; go on another day
    python bench/sweep.py rates --methods lora tlora --tasks cola sst2
    python bench/sweep.py compare --methods lora tlora  # with the defaults: fresh seeds, scored on the test split too
    python bench/sweep.py encoder --backbone DIR --data GLUE   # rates on a real encoder, with real files
    python bench/sweep.py repeat --before DIR           # after a change that should move no number: does it?
    python bench/sweep.py pages                         # docs/rates.md, from the rows alone

A row is one `python train.py` with the flags that stand in it: the scores after the last epoch, the curve, seconds, the
hardware, and a fingerprint of all that the numbers depend on. What is kept in bench/sweep.jsonl is not run again; rows
of another fingerprint are left where they are and do not count. `repeat` makes of each method one row a task of --tasks again
that was made with the code in DIR (and, where another processor made it, with that code too): where all are the same to the
last digit, the method's rows of that code count as today's, those of other flags and of the encoder too, and keep the older
fingerprint as `made_with`. Several of these commands may run at once, on one machine or on many: `--rows FILE` writes
elsewhere, and joining the files joins the rows.
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a run, many runs at a time
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]

import speed  # noqa: E402
import torch  # noqa: E402
from source import bare  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from harness import metrics  # noqa: E402
from harness.methods import METHODS  # noqa: E402
from harness.run import Run, base_of  # noqa: E402
from harness.settings import Settings, parse  # noqa: E402
from reading.files import write_text  # noqa: E402

ROWS = os.path.join(ROOT, "bench", "sweep.jsonl")
TASKS = ["cola", "sst2", "qnli", "squad", "math"]  # where methods and ranks differ
ALL_TASKS = [name for name in data.GENERATED if not data.TASKS[name].pretraining]
FRESH = range(8)  # seeds to compare with, on which no rate was chosen
HEAD = [-14, -12, -10, -8, -6]  # the head's rates that are tried, in quarter decades
PAGE = os.path.join(ROOT, "docs", "rates.md")
MACHINE = ("--fast", "--precision", "bf16")  # flags of where a run goes, not of what it asks
MINILM = "53aa51172d142c89"  # all-MiniLM-L6-v2's weights: the checkpoint whose rows the pages show


def rate(k):
    """The k-th quarter decade, to three digits: 10^(k/4)."""
    return float(f"{10 ** (k / 4):.3g}")


def start(method, scores=(), first=None):
    """Where the search begins: the best half decade so far on its first seed, without one that next to the rate `first` or
    to the default."""
    tried = {k: scores[k, seed] for k, seed in scores if seed == SEEDS["rates"][0][0] and k % 2 == 0}
    return max(tried, key=tried.get) if tried else 2 * round(2 * math.log10(first or METHODS[method][2]))


# ----------------------------------------------------------------------- which runs are asked for


# study: seeds of the half decades, of the quarter decades and of the rate that was chosen
SEEDS = {"rates": ((100, 101), (100, 101, 102), ()), "encoder": ((100,), (), range(5))}


def asked(scores, first, study="rates", lowest=-24, highest=0):
    """What the rule of docs/rates.md asks for next, [(k, seed)], empty when the choice is made.

    `scores` {(k, seed): score} of one method on one task. Half decades around `first` until the best is inside, then
    the quarter decades beside the best until the best is inside, then the best on more seeds; each where it has seeds.
    Without quarter decades four rates at least.
    """
    halves, quarters, chosen = SEEDS[study]
    ks, step, seeds = [first, first - 2, first + 2], 2, halves[:1]  # one seed finds the place, where the others look
    while True:
        if lacking := [(k, seed) for k in ks for seed in seeds if (k, seed) not in scores]:
            return lacking
        best = max(ks, key=lambda k: statistics.mean(scores[k, seed] for seed in seeds))
        beside = [k for k in (best - step, best + step) if k not in ks and lowest <= k <= highest]
        if beside:
            ks += beside
        elif seeds == halves[:1] != halves:
            seeds = halves
        elif not quarters and len({k for k, _ in scores}) < 4:
            ks.append(min(ks) - step)
        elif step == 2 and quarters:
            ks, step, seeds = [k for k in (best, best - 1, best + 1) if lowest <= k <= highest], 1, quarters
        else:
            return [(best, seed) for seed in chosen if (best, seed) not in scores]


def best(scores):
    """(k, mean, seeds) of the best rate: of those with three seeds once two have them, till then of those with two, then of
    all, by the seeds that they share, if any. The middle one of the best if several are level."""
    seeds = {k: {seed for other, seed in scores if other == k} for k, _ in scores}
    least = next((n for n in (3, 2) if sum(len(found) >= n for found in seeds.values()) > 1), 1)
    fair = [k for k in seeds if len(seeds[k]) >= least]
    shared = set.intersection(*(seeds[k] for k in fair)) or set.union(*seeds.values())
    means = {k: statistics.mean(scores[k, seed] for seed in seeds[k] & shared) for k in fair}
    level = sorted(k for k, mean in means.items() if mean == max(means.values()))
    k = level[len(level) // 2]
    return k, statistics.mean(scores[k, seed] for seed in seeds[k]), len(seeds[k])


def tasks_of(method, tasks):
    """Those where the method has something to train: `head` has not where the base's own output gives the answers."""
    return [task for task in tasks if method != "head" or data.TASKS[task].kind != "lm"]


def on_all(found, method, tasks=TASKS, study="rates"):
    """{k: mean over its tasks} of the rates that were tried on all of them, by the seeds of the half decades."""
    every = [found.get((method, task), {}) for task in tasks_of(method, tasks)]
    ks = set.intersection(*({k for k, _ in scores} for scores in every))
    runs = {k: [scores.get((k, seed)) for scores in every for seed in SEEDS[study][0]] for k in sorted(ks)}
    return {k: statistics.mean(values) for k, values in runs.items() if None not in values}


def asked_of_all(found, method, tasks=TASKS, study="rates"):
    """What lacks to choose one rate for all tasks, [(task, (k, seed))]: the quarter decades beside the best mean so far (real
    encoder: the half decades)."""
    if not (means := on_all(found, method, tasks, study)):
        return []
    best, step = max(means, key=means.get), 1 if study == "rates" else 2
    wanted = itertools.product(tasks_of(method, tasks), itertools.product((best - step, best + step), SEEDS[study][0]))
    return [(task, run) for task, run in wanted if run not in found[method, task]]


def headline(task):
    return data.TASKS[task].metrics[0]


def score(row):
    """The row's headline metric on the development split, in points of 100; a run that ended in NaN has 0."""
    return 0.0 if row["dev"] is None else 100 * row["dev"][headline(row["task"])]


def own(flags):
    """The flags that are part of the question: without MACHINE's."""
    return [flag for flag in flags if flag not in MACHINE]


def table(rows, study, more=None):
    """{(method, task): {(k, seed): score}} of the runs whose flags, beside the rate and MACHINE's, are `more`; None: of all."""
    found = {}
    for row in rows:
        if row["study"] == study and more in (None, own(row["flags"][2:])):
            found.setdefault((row["method"], row["task"]), {})[row["k"], row["seed"]] = score(row)
    return found


def plan(rows, args):
    """Runs that are asked for now, the most urgent first: dicts with study, method, task, k, seed and flags."""
    study = args.study
    found, runs = table(rows, study, own(args.flags) if study in ("rates", "encoder") else None), []
    done = set(map(key, rows))
    for i, method in enumerate(args.methods):
        of_all = {"rates": TASKS, "encoder": args.tasks}.get(study)
        for_all = asked_of_all(found, method, of_all, study) if of_all else []
        for task in tasks_of(method, args.tasks):
            have = found.get((method, task), {})
            if study == "head":
                wanted = [(k, seed) for k in HEAD for seed in SEEDS["rates"][0] if (k, seed) not in have]
            elif study == "compare":
                wanted = [(None, seed) for seed in args.seeds if (study, method, task, None, seed, *args.flags) not in done]
            else:
                wanted = asked(have, start(method, have, args.first) - 2 * (study == "encoder" and not have), study)
            urgent = [run for other, run in for_all if other == task]
            for k, seed in dict.fromkeys(urgent + wanted):
                flags = [] if k is None else ["--lr", f"{rate(k):g}"]
                if study == "head":
                    flags = ["--head-lr", f"{rate(k):g}", "--lr", "0.004"]
                run = {"study": study, "method": method, "task": task, "k": k, "seed": seed, "flags": flags + args.flags}
                run |= {"checkpoint": args.checkpoint} if study == "encoder" else {}
                runs.append(((k, seed) not in urgent, len(have) >= 6, seed, i, run))
    return [run for *_, run in sorted(runs, key=lambda entry: entry[:-1])]


# ----------------------------------------------------------------------------------- the runs


ROWS_FROM = ["generated/world.py", "generated/suite.py"]

# What a method file does when no training goes on.
AFTERWARDS = "merge save load write_adapter read_adapter find_saved place_saved own_state running_statistics".split()
AFTERWARDS += ["check_mergeable", "describe", "main"]


@functools.cache
def code(path):
    """A file's program without comments, docstrings, types and layout, and without the functions that no training calls."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        tree = ast.parse(f.read())
    tree.body = [node for node in tree.body if getattr(node, "name", None) not in AFTERWARDS]
    return ast.dump(bare(tree))


@functools.cache
def digest(*paths):
    found = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            found.update(f.read())
    return found.hexdigest()


@functools.cache
def imported(path):
    """A method's file and, of a baseline, those that it builds on: baselines/lora.py and what else it imports of them."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        lines = [node for node in ast.parse(f.read()).body if isinstance(node, ast.ImportFrom) and node.module == "baselines"]
    names = [f"baselines/{alias.name}.py" for line in lines for alias in line.names]
    more = ["baselines/lora.py"] * path.startswith("baselines/") + [file for name in names for file in imported(name)]
    return list(dict.fromkeys([path, *more]))


def fingerprint(run):
    """What the run's numbers depend on: base, tokenizer, the code of the rows, model, method and fast path, settings."""
    s = parse(["--method", run["method"], "--task", run["task"], *run["flags"]])
    files = ["model.py", "fast.py", *imported(METHODS[s.method][0].replace(".", "/") + ".py")]
    left_out = ("seed", "out", "base", "data", "backbone", "threads", "device", "no_figures", "eval_every", "save_every")
    default = vars(Settings())  # a flag that is added later changes nothing where it is not given
    settings = {key: value for key, value in vars(s).items() if value != default[key] and key not in left_out}
    own = []
    if run["study"] != "encoder":
        own, files = [digest(base_of(s), os.path.join(ROOT, "assets", "tokenizer.json"))], files + ROWS_FROM
    parts = [*own, *map(code, files), json.dumps(settings, sort_keys=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def carry_out(run, places=()):
    """Train as the run says, in this process; returns its row. `places`, flags that name folders, are not kept in it."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        out = os.path.join(folder, "run")
        argv = ["--method", run["method"], "--task", run["task"], "--seed", str(run["seed"]), "--out", out, "--no-figures"]
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            ended = train.main([*argv, *run["flags"], *places])
        curve, test = [], None
        if ended == 0:
            with open(os.path.join(out, "metrics.jsonl")) as f:
                curve = [json.loads(line) for line in f]
            if run["study"] == "compare":
                opened, examples = Run.open(out), data.load(run["task"], split="test")
                test = metrics.score(opened.task, examples, opened.predict(examples)["answers"])
        elif ended != 1:  # 1: a loss that is no number, which is a result
            raise RuntimeError(f"{argv + run['flags']} ended with {ended}")
    dropped = ("step", "trained", "rank_total", "tokens_per_s")
    scores = [{key: round(value, 5) for key, value in row.items() if key not in dropped} for row in curve]
    last = curve[-1] if curve else {}
    hardware = speed.hardware("cuda" if torch.cuda.is_available() and "cpu" not in run["flags"] else "cpu")
    return {**run, "fingerprint": fingerprint(run), "trained": last.get("trained"), "dev": scores[-1] if scores else None,
            "test": test, "curve": scores, "seconds": round(time.perf_counter() - begun, 1), "hardware": hardware,
            "torch": torch.__version__}  # fmt: skip


def checkpoint_of(backbone):
    """What tells real encoders apart in the rows: a digest of the weights in a folder, else the name on the Hub."""
    weights = sorted(glob.glob(os.path.join(glob.escape(backbone), "*.safetensors")))
    return digest(*weights)[:16] if weights else backbone


def places(backbone, glue, task):
    """The flags for a checkpoint and for a task's folder among GLUE's."""
    folders = {"cola": "CoLA", "sst2": "SST-2", "rte": "RTE", "mrpc": "MRPC", "stsb": "STS-B"}
    return ["--backbone", backbone, "--data", os.path.join(glue, folders[task])]


def prepare():
    """In a worker: rows are generated and read once, not once a run."""
    data.load = functools.cache(data.load)
    torch.set_num_threads(1)


def read(path):
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f]


def key(run):
    return run["study"], run["method"], run["task"], run["k"], run["seed"], *run["flags"]


@functools.cache
def fingerprint_of(*parts):
    study, method, task, _, _, *flags = parts
    return fingerprint({"study": study, "method": method, "task": task, "flags": flags})


def valid(rows, checkpoint=MINILM):
    """The rows of today's code, a real encoder's those of one checkpoint."""

    def of_today(row):
        mark = fingerprint_of(row["study"], row["method"], row["task"], None, None, *row["flags"])
        return row["fingerprint"] == mark and row.get("checkpoint", checkpoint) == checkpoint

    return list(filter(of_today, rows))


def work(args):
    """Keep `jobs` runs going until args.plan(rows) asks for none or the time is up; each is written down as it ends."""
    rows = valid([row for path in {ROWS, args.rows} for row in read(path)], args.checkpoint)
    deadline = time.monotonic() + 60 * args.minutes
    running = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context, prepare) as pool, open(args.rows, "a") as file:
        while True:
            busy = set(map(key, running.values()))
            for run in args.plan(rows) if time.monotonic() < deadline else []:
                if len(running) < args.jobs and key(run) not in busy:
                    busy.add(key(run))
                    running[pool.submit(carry_out, run, args.places(run["task"]))] = run
            if not running:
                return
            for done in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                del running[done]
                row = done.result()
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                what = f"{row['study']:8s} {row['method']:11s} {row['task']:6s} {' '.join(row['flags'][:2]):18s}"
                print(f"{what} seed {row['seed']:3d}  {score(row):6.2f}  {row['seconds']} s", flush=True)


def numbers(row):
    """What a row says, without the times."""
    timeless = lambda point: point and {name: value for name, value in point.items() if name != "seconds"}  # noqa: E731
    return row["trained"], timeless(row["dev"]), row["test"], [timeless(point) for point in row["curve"]]


def compared(row, before):
    """Whether today's code gives the row's numbers. Another processor rounds otherwise: where the numbers differ from a row
    of another, the code in `before` makes it again here."""
    run = {name: row[name] for name in ("study", "method", "task", "k", "seed", "flags")}
    again = json.loads(json.dumps(carry_out(run)))
    if numbers(row) != numbers(again) and row["hardware"] != again["hardware"]:
        row = json.loads(asked_of(before, "sweep.carry_out(json.load(sys.stdin))", run))
    return numbers(row) == numbers(again)


def asked_of(before, what, given):
    """The JSON that the checkout `before` gives for `what`, with `given` as JSON on its standard input."""
    script = f"import json, sys, sweep; print(json.dumps({what}))"
    folder = os.path.join(before, "bench")
    return subprocess.run([sys.executable, "-c", script], cwd=folder, input=json.dumps(given), capture_output=True, text=True,
                          check=True).stdout  # fmt: skip


def repeat(args):
    """Let rows of the code in args.before count as today's where today's gives the same numbers."""
    rows = read(ROWS)
    parts = [(row["study"], row["method"], row["task"], None, None, *row["flags"]) for row in rows]
    answer = asked_of(args.before, "[sweep.fingerprint_of(*each) for each in json.load(sys.stdin)]", parts)
    stale = [(row, fingerprint_of(*part)) for row, part, before in zip(rows, parts, json.loads(answer))
             if row["fingerprint"] == before != fingerprint_of(*part)]  # fmt: skip
    samples = {(row["method"], row["task"]): row for row, _ in stale if row["study"] == "compare" and row["task"] in args.tasks}
    context, differ = multiprocessing.get_context("spawn"), set()
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context, prepare) as pool:
        found = pool.map(compared, samples.values(), itertools.repeat(args.before))
        for row, same in zip(samples.values(), found):
            differ |= set() if same else {row["method"]}
            print(
                f"{row['method']:11s} {row['task']:6s} {' '.join(row['flags'])} {'the same' if same else 'differs'}", flush=True
            )
    checked = {method for method, _ in samples} - differ
    for row, today in stale:
        if row["method"] in checked:
            row["made_with"], row["fingerprint"] = row.get("made_with", row["fingerprint"]), today
    write_text(ROWS, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{sum(row['method'] in checked for row, _ in stale)} of {len(stale)} rows count as today's")


# ----------------------------------------------------------------------------------- the pages


def cells(scores):
    """One method on one task: the best rate's mean and spread, its seeds, and whether it is inside the grid."""
    k, mean, seeds = best(scores)
    found = [value for (other, _), value in scores.items() if other == k]
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    tried = sorted({other for other, _ in scores})
    edge = "" if min(tried) < k < max(tried) else " (edge)"
    return f"{mean:.1f}{spread} ({seeds}) at {rate(k):g}{edge}"


def across(found, method):
    """The cells of a method's row, a task each."""
    return " | ".join(cells(found[method, task]) if (method, task) in found else "–" for task in TASKS)


HEADS = " | ".join(f"{task} ({headline(task)})" for task in TASKS)


def generated(rows):
    """The table of the generated tasks: the best rate of each method on each."""
    found = table(rows, "rates", [])
    lines = [f"| method | {HEADS} | default |", "|---|" + "--:|" * (len(TASKS) + 1)]
    for method in [m for m in METHODS if any(method == m for method, _ in found)]:
        lines.append(f"| {method} | {across(found, method)} | {METHODS[method][2]:g} |")
    return "\n".join(lines)


def one_for_all(rows):
    """The table of the rates that were tried on all tasks, of the methods whose search for it is over."""
    found = table(rows, "rates", [])
    lines = ["| method | default | mean of the five tasks (head: four) at each rate |", "|---|--:|---|"]
    for method in METHODS:
        if (means := on_all(found, method)) and not asked_of_all(found, method):
            shown = ", ".join(f"{rate(k):g}: {mean:.1f}" for k, mean in means.items())
            lines.append(f"| {method} | {rate(max(means, key=means.get)):g} | {shown} |")
    return "\n".join(lines)


def options(rows):
    """The table of runs with other flags: the best rate of each on each task, and the one rate for all, where that is found."""
    lines = [f"| method | flags | {HEADS} | one rate for all |", "|---|---|" + "--:|" * (len(TASKS) + 1)]
    for more in sorted({tuple(row["flags"][2:]) for row in rows if row["study"] == "rates"} - {()}):
        found = table(rows, "rates", list(more))
        for method in dict.fromkeys(method for method, _ in found):
            means, one = on_all(found, method), "–"
            if means and not asked_of_all(found, method):
                k = max(means, key=means.get)
                one = f"{means[k]:.1f} at {rate(k):g}"
            lines.append(f"| {method} | `{' '.join(more)}` | {across(found, method)} | {one} |")
    return "\n".join(lines) if lines[2:] else "None yet."


def on_encoder(rows, more=()):
    """{(method, task): (k of the best rate, whether it is the last tried, {seed: score there})} of the real encoder with the
    flags `more`, of the seeds that chose nothing, or where none is there yet of the one that chose."""
    found = {}
    for pair, scores in table(rows, "encoder", list(more)).items():
        chosen = {k: value for (k, seed), value in scores.items() if seed == 100}
        k = max(chosen, key=chosen.get)
        fresh = {seed: value for (other, seed), value in scores.items() if other == k and seed != 100}
        found[pair] = k, k in (min(chosen), max(chosen)), fresh or {100: chosen[k]}
    return found


def encoder(rows):
    """The table of the real encoder."""
    mine = [row for row in rows if row["study"] == "encoder"]
    tasks = [task for task in ALL_TASKS if any(task == row["task"] for row in mine)]
    heads = " | ".join(f"{task} ({headline(task)}): best rate, scores there" for task in tasks)
    lines = [f"| method | {heads} | hardware |", "|---|" + "--:|" * len(tasks) + "---|"]
    for method, more in contestants(mine):
        found, cells = on_encoder(mine, more), []
        for task in tasks:
            k, edge, by_seed = found.get((method, task), (None, False, {}))
            values = by_seed.values()
            shown = f" ± {statistics.stdev(values):.1f} ({len(values)} seeds)" if len(values) > 1 else " (one seed)"
            cells.append(f"{rate(k):g}{' (edge)' * edge}: {statistics.mean(values):.1f}{shown}" if values else "–")
        of = [row for row in mine if (row["method"], own(row["flags"][2:])) == (method, list(more))]
        machines = ", ".join(dict.fromkeys(row["hardware"].split(",")[0] for row in of))
        lines.append(f"| {' '.join([method, *more])} | {' | '.join(cells)} | {machines} |")
    return "\n".join(lines)


def contestants(rows):
    """[(method, flags beside the rate)] of the rows, in METHODS' order, those without flags first."""
    found = {(row["method"], tuple(own(row["flags"][2:]))) for row in rows}
    return sorted(found, key=lambda pair: (list(METHODS).index(pair[0]), pair[1]))


def head(rows):
    """The scores of LoRA at each rate of the head."""
    found = table(rows, "head")
    tasks = list(dict.fromkeys(task for _, task in found))
    heads = " | ".join(f"{task} ({headline(task)})" for task in tasks)
    lines = [f"| `--head-lr` | {heads} | mean |", "|--:|" + "--:|" * (len(tasks) + 1)]
    for k in HEAD:
        cells = [[value for (other, _), value in found["lora", task].items() if other == k] for task in tasks]
        means = [statistics.mean(cell) for cell in cells if cell]
        shown = [f"{statistics.mean(cell):.1f} ({len(cell)})" if cell else "–" for cell in cells]
        lines.append(f"| {rate(k):g} | " + " | ".join(shown) + f" | {statistics.mean(means):.1f} |")
    return "\n".join(lines)


def lacking(rows):
    """What the rule of the page's first table still asks for, in words, by method."""
    args = argparse.Namespace(study="rates", methods=list(METHODS), tasks=TASKS, first=None, flags=[])
    each = collections.Counter(run["method"] for run in plan(rows, args))
    if not each:
        return "The rule below asks for no more."
    named = ", ".join(f"{name} {n}" for name, n in each.items())
    return f"The rule below asks for {each.total()} more ({named}):\n`python bench/sweep.py rates` goes on where it stopped."


def text():
    """docs/rates.md."""
    rows = valid(read(ROWS))
    return f"""# Learning rates, method by method

Made by `python bench/sweep.py pages` from the {len(rows)} runs in `bench/sweep.jsonl`.
{lacking(rows)}

## The generated tasks

`python bench/sweep.py rates`: mean ± standard deviation of the development metric after the last epoch, in points of 100, at the
best rate. Half decades on seeds 100 and 101 until the best is inside the grid, then quarter decades beside it on seeds 100 to
102. In brackets the best rate's seeds so far: once two rates of a task have three (or two) seeds, only those compete, on the
seeds that they share. "(edge)" stands where the best is the last that was tried.

{generated(rows)}

![score against rate](rates.png)

![learning curves](curves.png)

## One rate for all tasks

A method's default in `train.py` is the rate with the best mean over the five tasks on seeds 100 and 101, with both quarter
decades beside it tried on all five.

{one_for_all(rows)}

What twenty steps say of a method's best rate if LoRA's is known: [trial.md](trial.md). Whether it follows from the size of what
enters B: [bench/sizes.md](../bench/sizes.md).

## Other flags

`python bench/sweep.py rates --methods METHOD --flags ...`: the same with other ranks, TLoRA's dropout off and the like.

{options(rows)}

## The task head

`python bench/sweep.py head`: LoRA at 4e-3, the head at a rate of its own; in brackets the seeds. One rate for all methods: 1e-3.

{head(rows)}

## A real encoder

`python bench/sweep.py encoder --backbone DIR --data GLUE` on all-MiniLM-L6-v2, GLUE's own files (of SST-2 the first 3,000 rows),
six epochs, bf16 with `--flags --fast`, and `--precision bf16` on a CPU: half decades on seed 100, four or more, then seeds 0 to
4 at the best.
The development split, whose rows chose the rate too: GLUE keeps the answers of its test split. The default with `--backbone` is
the rate with the best mean of both tasks on seed 100, to one digit.

{encoder(rows)}
"""


COLOURS = {"lora": "#000000", "tlora": "#D55E00", "tlora_plus": "#E69F00", "task_tlora": "#0072B2", "triadapt": "#009E73"}


def legend(ax):
    """The methods' colours, in a panel of their own."""
    for method, colour in COLOURS.items():
        ax.plot([], [], "o-", color=colour, label=method)
    ax.legend(loc="center", frameon=False)
    ax.axis("off")


def picture(rows):
    """docs/rates.png: score against learning rate, a line per method, its lowest and highest seed as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("rates", task, f"{task} ({headline(task)}), tiny base") for task in TASKS]
    panels += [("encoder", task, f"{task} ({headline(task)}), all-MiniLM-L6-v2") for task in ("cola", "sst2")]
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.5))
    for ax, (study, task, title) in zip(axes.flat, panels):
        found = table(rows, study, [])
        for method, colour in COLOURS.items():
            scores = found.get((method, task), {})
            ks = sorted({k for k, _ in scores})
            each = [[value for (other, _), value in scores.items() if other == k] for k in ks]
            if ks:
                rates = [rate(k) for k in ks]
                ax.fill_between(rates, [min(v) for v in each], [max(v) for v in each], color=colour, alpha=0.15, linewidth=0)
                ax.plot(rates, [statistics.mean(v) for v in each], "o-", color=colour, markersize=3, linewidth=1.2, label=method)
        ax.set_xscale("log")
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    axes[1, 0].set_xlabel("learning rate")
    axes[0, 0].set_ylabel("development score")
    legend(axes.flat[-1])
    figure.suptitle(
        "The best learning rates differ: one rate for all methods would choose the winner (bands: lowest to highest seed)"
    )
    figure.tight_layout()
    figure.savefig(os.path.join(ROOT, "docs", "rates.png"), dpi=90)
    plt.close(figure)


def curves(rows):
    """docs/curves.png: score against epoch, each method at the best rate that it has on the task, the mean of its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = table(rows, "rates", [])
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5))
    for ax, task in zip(axes.flat, TASKS):
        for method, colour in COLOURS.items():
            if (method, task) in found:
                k, *_ = best(found[method, task])
                mine = [row for row in rows if (row["study"], row["method"], row["task"], row["k"]) == ("rates", method, task, k)]
                each = [row["curve"] for row in mine if row["curve"] and not row["flags"][2:]]
                epochs = [point["epoch"] for point in each[0]]
                means = [statistics.mean(100 * point[headline(task)] for point in points) for points in zip(*each, strict=True)]
                ax.plot(epochs, means, "o-", color=colour, markersize=4, linewidth=1.2)
        ax.set_title(f"{task} ({headline(task)})", fontsize=10)
        ax.set_xticks(epochs)
        ax.grid(alpha=0.3)
    axes[1, 0].set_xlabel("epoch")
    axes[0, 0].set_ylabel("development score")
    legend(axes.flat[-1])
    figure.suptitle("How fast each method learns at its own best rate on each task (tiny base, mean of the seeds)")
    figure.tight_layout()
    figure.savefig(os.path.join(ROOT, "docs", "curves.png"), dpi=90)
    plt.close(figure)


def pages(_):
    rows = valid(read(ROWS))
    picture(rows)
    curves(rows)
    page = text()
    with open(PAGE, "w") as f:
        f.write(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("head", "rates", "compare", "encoder", "repeat", "pages"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all (head: lora)")
    parser.add_argument(
        "--tasks", nargs="+", choices=[*ALL_TASKS, "all"], help=f"default: {' '.join(TASKS)} (encoder: cola sst2)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=FRESH, help="compare: 0 to 7")
    parser.add_argument("--first", type=float, metavar="LR", help="rates: where to begin (default: at the method's default)")
    parser.add_argument("--backbone", help="encoder: a Hugging Face checkpoint")
    parser.add_argument("--data", help="encoder: a folder with GLUE's folders CoLA, SST-2, ...")
    parser.add_argument("--before", metavar="DIR", help="repeat: a checkout of the code that the rows were made with")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: more flags for train.py")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many minutes")
    parser.add_argument("--rows", default=ROWS, help="where new rows are written (default bench/sweep.jsonl)")
    args = parser.parse_args()
    if args.study == "pages":
        return pages(args)
    args.methods = args.methods or (["lora"] if args.study == "head" else list(METHODS))
    args.tasks = args.tasks or (["cola", "sst2"] if args.study == "encoder" else TASKS)
    args.tasks = ALL_TASKS if args.tasks == ["all"] else args.tasks
    if args.study == "encoder" and not (args.backbone and args.data):
        parser.error("encoder needs --backbone and --data")
    args.checkpoint = checkpoint_of(args.backbone) if args.study == "encoder" else MINILM
    args.places = lambda task: places(args.backbone, args.data, task) if args.study == "encoder" else []
    args.plan = lambda rows: plan(rows, args)
    (repeat if args.study == "repeat" else work)(args)


if __name__ == "__main__":
    main()
