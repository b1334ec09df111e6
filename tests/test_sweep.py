"""bench/sweep.py: which runs its rule asks for, what the best rate is, and what makes a row's fingerprint."""

import os
import sys
from types import SimpleNamespace

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "bench"))

import sweep  # noqa: E402


def carried_out(peak, first, study):
    """Every run of the rule where the score falls from quarter decade `peak`: [(k, seed)] in order, until nothing is asked."""
    scores, order = {}, []
    while wanted := sweep.asked(scores, first, study):
        order += wanted
        scores |= {(k, seed): -abs(k - peak) + seed / 1000 for k, seed in wanted}
    return order, scores


@pytest.mark.parametrize("peak", [-17, -16, -10, -9, -3])
def test_the_best_quarter_decade_is_found_and_both_neighbours_are_tried(peak):
    order, scores = carried_out(peak, -10, "rates")
    assert len(set(order)) == len(order)
    assert {(k, seed) for k in (peak - 1, peak, peak + 1) for seed in (100, 101, 102)} <= set(order)
    assert sweep.best(scores)[0] == peak and sweep.best(scores)[2] == 3
    halves = [k for k, seed in order if seed == 100 and k % 2 == 0]
    assert halves[:3] == [-10, -12, -8] and max(halves) - min(halves) <= abs(peak + 10) + 5


def test_on_the_encoder_one_seed_chooses_and_five_others_are_run_at_the_best():
    order, _ = carried_out(-14, -12, "encoder")
    assert order == [(-12, 100), (-14, 100), (-10, 100), (-16, 100), *[(-14, seed) for seed in range(5)]]
    order, _ = carried_out(-12, -12, "encoder")  # inside at once: a fourth rate all the same
    assert order == [(-12, 100), (-14, 100), (-10, 100), (-16, 100), *[(-12, seed) for seed in range(5)]]


def test_the_real_encoders_table_has_the_fresh_seeds_at_the_best_rate_and_where_they_ran():
    def row(method, task, k, seed, score, hardware):
        dev = {sweep.headline(task): score / 100}
        return {"study": "encoder", "method": method, "task": task, "k": k, "seed": seed, "flags": [], "dev": dev,
                "hardware": hardware}  # fmt: skip

    made = [row("lora", "cola", k, 100, score, "A GPU") for k, score in ((-14, 30.0), (-12, 20.0), (-16, 10.0))]
    made += [row("lora", "cola", -14, seed, score, "A CPU, 1 thread") for seed, score in ((0, 22.0), (1, 24.0), (2, 26.0))]
    made += [row("lora", "cola", -12, 0, 99.0, "A CPU, 1 thread")]
    made += [row("tlora", "cola", k, 100, 10.0 + k, "A GPU") for k in (-10, -8)]
    made += [row("tlora", "sst2", -10, 100, 80.0, "A GPU")]
    found = sweep.on_encoder(made)
    assert found["lora", "cola"] == (-14, False, {0: 22.0, 1: 24.0, 2: 26.0})
    assert found["tlora", "cola"] == (-8, True, {100: 2.0})
    plain = {**row("tlora", "cola", -10, 100, 60.0, "A CPU"), "flags": ["--lr", "0.00316", "--fast", "--dropout", "0"]}
    made += [plain, {**plain, "seed": 0}, {**plain, "k": -12, "dev": {"matthews": 0.5}}]
    assert sweep.on_encoder(made)["tlora", "cola"] == (-8, True, {100: 2.0}), "other flags are another contestant's"
    assert sweep.on_encoder(made, ["--dropout", "0"])["tlora", "cola"] == (-10, True, {0: 60.0})
    assert sweep.encoder(made).splitlines()[2:] == [
        "| tlora | 0.01 (edge): 2.0 (one seed) | 0.00316 (edge): 80.0 (one seed) | A GPU |",
        "| tlora --dropout 0 | 0.00316 (edge): 60.0 (one seed) | – | A CPU |",
        "| lora | 0.000316: 24.0 ± 2.0 (3 seeds) | – | A GPU, A CPU |",
    ]


def test_another_checkpoint_of_a_real_encoder_has_rows_of_its_own(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_text(folder.name)
    one, two = (sweep.checkpoint_of(str(folder)) for folder in folders)
    assert one != two and len(one) == len(two) == len(sweep.MINILM) == 16
    assert sweep.checkpoint_of("roberta-base") == "roberta-base"
    args = SimpleNamespace(study="encoder", methods=["lora"], tasks=["cola"], first=None, flags=[], checkpoint=one)
    asked = sweep.plan([], args)
    row = {**asked[0], "dev": {"matthews": 0.5}, "fingerprint": sweep.fingerprint(asked[0])}
    assert row["checkpoint"] == one and sweep.valid([row], one) == [row] and sweep.valid([row], two) == sweep.valid([row]) == []
    assert sweep.plan([row], args) != asked == sweep.plan(sweep.valid([row], two), args)


def test_a_best_at_the_end_of_the_scale_ends_the_search():
    order, _ = carried_out(99, -4, "rates")
    assert max(k for k, _ in order) == 0


@pytest.mark.parametrize("peak", [-13, -9, -6])
def test_one_rate_for_all_tasks_has_the_best_mean_and_both_neighbours_tried(peak):
    def value(task, k, seed):  # tasks differ in where they are best, their mean is best at `peak`
        return -((k - peak - sweep.TASKS.index(task) + 2) ** 2) + (seed - 100) / 10

    found = {("lora", task): {(k, seed): value(task, k, seed) for k in (-10, -8) for seed in (100, 101)} for task in sweep.TASKS}
    assert sweep.on_all({}, "lora") == {} == dict(sweep.asked_of_all({}, "lora"))
    assert sweep.on_all(found, "lora") == pytest.approx({k: 0.05 - 2 - (k - peak) ** 2 for k in (-10, -8)})
    while wanted := sweep.asked_of_all(found, "lora"):
        for task, (k, seed) in wanted:
            assert (k, seed) not in found["lora", task]
            found["lora", task][k, seed] = value(task, k, seed)
    means = sweep.on_all(found, "lora")
    assert max(means, key=means.get) == peak and {peak - 1, peak + 1} <= set(means)
    del found["lora", "math"][peak, 101]  # a rate counts where every task has both seeds
    assert peak not in sweep.on_all(found, "lora")
    others = {("head", task): found["lora", task] for task in sweep.TASKS if task != "math"}  # nothing of `head` is trained there
    assert peak in sweep.on_all(others, "head") and "math" not in dict(sweep.asked_of_all(others, "head"))


def test_level_rates_give_the_middle_one_and_rates_read_as_they_are_typed():
    assert sweep.best({(k, 100): 5.0 for k in (-12, -10, -8)}) == (-10, 5.0, 1)
    scores = {(-12, 100): 9.0, (-10, 100): 8.0, (-10, 101): 12.0, (-8, 100): 7.0, (-8, 101): 12.0}
    assert sweep.best(scores) == (-10, 10.0, 2)  # of those with two seeds: -12 is ahead on one
    assert sweep.best({**scores, (-12, 101): 12.0}) == (-12, 10.5, 2)
    assert sweep.best({(-12, 100): 9.0, (-10, 100): 8.0, (-10, 101): 12.0}) == (-12, 9.0, 1)  # by the seed that they share
    assert sweep.best({(-12, 100): 5.0, (-10, 101): 6.0}) == (-10, 6.0, 1)  # they share none
    third = {(-10, 102): 1.0, (-8, 102): 7.0}
    assert sweep.best({**scores, **third}) == (-8, 26 / 3, 3)  # of those with three seeds
    assert [sweep.rate(k) for k in (-12, -11, -10, -4)] == [1e-3, 1.78e-3, 3.16e-3, 0.1]
    assert sweep.start("lora") == -10 and sweep.start("lora", first=1e-3) == -12  # next to 5.62e-3, to 1e-3
    assert sweep.start("lora", {(-14, 100): 1.0, (-13, 100): 9.0, (-12, 100): 2.0, (-6, 101): 9.0}) == -12


def test_a_fingerprint_follows_what_the_numbers_depend_on_and_nothing_else(monkeypatch):
    def mark(*flags, task="cola", method="lora", study="rates"):
        return sweep.fingerprint({"study": study, "method": method, "task": task, "flags": list(flags)})

    first = mark("--lr", "0.01")
    assert mark("--lr", "0.01", "--threads", "2", "--no-figures") == first
    others = [mark("--lr", "0.02"), mark("--lr", "0.01", "--no-fast"), mark("--lr", "0.01", task="sst2"), mark(method="tlora"),
              mark("--lr", "0.01", study="encoder")]  # fmt: skip
    assert len({first, *others}) == 6
    assert sweep.imported("baselines/corda.py") == [f"baselines/{name}.py" for name in ("corda", "lora", "pissa", "start")]
    assert sweep.imported("tlora.py") == ["tlora.py"] and "baselines/houlsby.py" in sweep.imported("baselines/pfeiffer.py")
    whole = sweep.code
    monkeypatch.setattr(sweep, "code", lambda path: whole(path) + "x" * (path == "model.py"))
    assert mark("--lr", "0.01") != first


def test_docstrings_and_what_no_training_calls_are_no_part_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "ROOT", str(tmp_path))
    variants = ['"""A."""\ndef f(x):\n    """B."""\n    return x\n\ndef merge():\n    return 1\n',
                '"""C."""\ndef f(x):  # D\n    """E."""\n    return (x)\n\ndef merge():\n    return 2\n',
                '"""A."""\ndef f(x):\n    """B."""\n    return -x\n\ndef merge():\n    return 1\n']  # fmt: skip
    codes = []
    for i, text in enumerate(variants):
        (tmp_path / f"{i}.py").write_text(text)
        codes.append(sweep.code(f"{i}.py"))
    assert codes[0] == codes[1] != codes[2]


def test_runs_with_other_flags_are_a_table_of_their_own():
    row = {"study": "rates", "method": "tlora_plus", "task": "cola", "k": -10, "seed": 100, "dev": {"matthews": 0.5}}
    rows = [{**row, "flags": ["--lr", "0.003"]}, {**row, "flags": ["--lr", "0.003", "--ratio", "8"], "dev": {"matthews": 0.7}}]
    assert sweep.table(rows, "rates", []) == {("tlora_plus", "cola"): {(-10, 100): 50.0}}
    assert sweep.table(rows, "rates", ["--ratio", "8"]) == {("tlora_plus", "cola"): {(-10, 100): 70.0}}
    assert "| tlora_plus | `--ratio 8` | 70.0 (1) at 0.00316 (edge) | – | – | – | – | – |" in sweep.options(rows)
    assert "70" not in sweep.generated(rows) and "50.0 (1)" in sweep.generated(rows)


def test_a_comparison_with_flags_asks_for_runs_of_its_own():
    args = SimpleNamespace(study="compare", methods=["lora"], tasks=["cola"], seeds=[0, 1], flags=["--rank", "3"])
    rows = [{"study": "compare", "method": "lora", "task": "cola", "k": None, "seed": seed, "flags": flags, "dev": None}
            for seed, flags in [(0, []), (1, []), (1, ["--rank", "3"])]]  # fmt: skip
    assert [(run["seed"], run["flags"]) for run in sweep.plan(rows, args)] == [(0, ["--rank", "3"])]
    assert sweep.plan(rows, SimpleNamespace(**{**vars(args), "flags": []})) == []


def test_what_a_run_says_is_all_but_its_times():
    row = {"trained": 3, "dev": {"em": 0.5, "seconds": 1.0}, "test": {"em": 0.25}, "seconds": 9.0, "hardware": "here",
           "curve": [{"epoch": 1.0, "seconds": 1.0, "em": 0.5}]}  # fmt: skip
    again = {**row, "dev": {"em": 0.5, "seconds": 2.0}, "curve": [{"epoch": 1.0, "seconds": 3.0, "em": 0.5}], "seconds": 1.0}
    assert sweep.numbers(row) == sweep.numbers(again) and sweep.numbers({**row, "dev": None, "curve": []})[1] is None
    for other in ({"trained": 4}, {"dev": {"em": 0.51, "seconds": 1.0}}, {"test": None}, {"curve": []}):
        assert sweep.numbers({**row, **other}) != sweep.numbers(row)


def test_rows_that_count_as_todays_say_with_which_code_they_were_made():
    kept = [row for row in sweep.read(sweep.ROWS) if "made_with" in row]
    assert kept and all(row["made_with"] != row["fingerprint"] for row in kept)


class InThisProcess:
    """A pool of processes that is none."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return SimpleNamespace(map=map)

    def __exit__(self, *_):
        pass


def test_rows_count_as_todays_where_the_method_gives_the_same_numbers_again(tmp_path, monkeypatch, capsys):
    """Of each method one compare row a task is made again; of another processor's that differ, with the older code too."""
    row = {"study": "compare", "task": "rte", "k": None, "seed": 0, "flags": [], "fingerprint": "old", "trained": 1,
           "dev": {"accuracy": 0.5}, "test": None, "curve": [], "hardware": "here"}  # fmt: skip
    rows = [{**row, "method": method} for method in ("lora", "dora", "pissa", "olora")]
    rows += [{**row, "method": "lora", "study": "rates", "k": -4, "flags": ["--lr", "0.1"], "made_with": "oldest"},
             {**row, "method": "lora", "fingerprint": "older"}, {**row, "method": "tlora", "fingerprint": "today"}]  # fmt: skip
    rows[2]["hardware"] = rows[3]["hardware"] = "elsewhere"
    # dora, pissa and olora give other numbers today; pissa's are those of the older code on this processor
    now = lambda run: {**row, **run, "dev": {"accuracy": 0.5 if run["method"] == "lora" else 0.6}}  # noqa: E731
    before = lambda run: {**row, "dev": {"accuracy": 0.6 if run["method"] == "pissa" else 0.7}}  # noqa: E731

    def asked_of(folder, what, given):
        assert folder == "checkout"
        return sweep.json.dumps(["old"] * len(given) if "fingerprint_of" in what else before(given))

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(sweep.json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sweep, "ROWS", str(path))
    monkeypatch.setattr(sweep, "fingerprint_of", lambda *_: "today")
    monkeypatch.setattr(sweep, "asked_of", asked_of)
    monkeypatch.setattr(sweep, "carry_out", now)
    monkeypatch.setattr(sweep.concurrent.futures, "ProcessPoolExecutor", InThisProcess)
    sweep.repeat(SimpleNamespace(before="checkout", tasks=["rte"], jobs=1))
    count = {("lora", "old"), ("pissa", "old"), ("lora", "oldest")}  # the last keeps the code that made it first
    for was, found in zip(rows, sweep.read(path), strict=True):
        made = was.get("made_with", was["fingerprint"])
        today = {"fingerprint": "today", "made_with": made} if (was["method"], made) in count else {}
        assert found == {**was, **today}
    assert capsys.readouterr().out.splitlines()[-1] == "3 of 5 rows count as today's"
