"""bench/claims.py: the statistics against tables and by hand, and what it says of rows that are made up."""

import os
import statistics
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "bench"))

import claims  # noqa: E402
import sweep  # noqa: E402

import tlora_plus  # noqa: E402
from harness import methods  # noqa: E402
from harness.methods import METHODS  # noqa: E402
from harness.settings import parse  # noqa: E402


# of a printed table of Student's t, two-sided
@pytest.mark.parametrize("df,p,t", [(1, 0.05, 12.706), (2, 0.05, 4.303), (4, 0.01, 4.604), (7, 0.05, 2.365), (7, 0.01, 3.499),
                                    (10, 0.001, 4.587), (30, 0.05, 2.042)])  # fmt: skip
def test_students_t_is_that_of_the_tables(df, p, t):
    assert abs(claims.two_sided(t, df) - p) < 2e-4 * p / 0.05 + 1e-5 and claims.two_sided(-t, df) == claims.two_sided(t, df)
    assert abs(claims.quantile(p, df) - t) < 6e-4
    assert claims.two_sided(0.0, df) == 1.0


def test_a_paired_difference_by_hand():
    mean, half, p = claims.paired([1.0, 2.0, 3.0])  # standard error 1 / sqrt(3)
    assert mean == 2.0 and abs(half - 4.3027 / 3**0.5) < 1e-3 and abs(p - 0.0742) < 1e-4
    assert claims.paired([0.0, 0.0])[2] == 1.0 and claims.paired([1.0, 1.0]) == (1.0, 0.0, 0.0)


def test_holm_by_hand():
    assert claims.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert claims.holm([0.9, 0.8]) == [1.0, 1.0] and claims.holm([]) == []


def rows(**means):
    """Rows of contestants whose test score is as given, a little more with the seed; every task counts the same."""
    made = []
    for name, mean in means.items():
        method, flags = claims.CONTESTANTS[name.replace("_r", "-r")]
        for seed in sweep.FRESH:
            for task in sweep.TASKS:
                test = {sweep.headline(task): (mean + seed / 100 * (1 + (name != "lora") / 10)) / 100}
                made.append(
                    {"study": "compare", "method": method, "task": task, "k": None, "seed": seed, "flags": flags, "test": test,
                     "trained": 1000 if name == "lora" else 300}
                )  # fmt: skip
    return made


def test_verdicts_of_made_up_rows():
    found = claims.answers(rows(lora=80.0, tlora=79.5, tlora_plus=79.5))
    within = found["tlora", "lora", -1.0]
    above, better = found["tlora_plus", "lora", 0.0], found["tlora_plus", "tlora", 0.0]
    assert within[3] == "holds" and abs(within[0] + 0.5) < 0.01 and 0 < within[1] < 0.01
    assert above[3] == "does not hold here" and above[0] == pytest.approx(within[0])
    assert better[3] == "undecided" and better[0] == 0 and better[2] == 1.0
    assert found["task_tlora", "lora", 0.0] is None
    one_way, back = (rows(lora=80.0, adalora=79.998, tlora=79.9975), [("adalora", "lora", 0.0), ("lora", "adalora", 0.0)])
    found, ps = claims.answers(one_way), [claims.paired(claims.differences(one_way, *key))[2] for key in back]
    others = [claims.paired(claims.differences(one_way, "tlora", "lora", m))[2] for m in (-1.0, 0.0)]
    both = claims.holm([ps[0], *others])[0]  # a test that stands on the page in both directions counts once
    assert ps[0] == pytest.approx(ps[1]) and 0 < both < 1 and [found[key][2] for key in back] == [both, both]
    assert both != claims.holm([*ps, *others])[0] and found["adalora", "lora", 0.0][0] == -found["lora", "adalora", 0.0][0]
    missing = [row for row in rows(lora=80.0, tlora=80.0) if (row["seed"], row["task"]) != (3, "math")]
    assert len(claims.differences(missing, "tlora", "lora")) == 7
    assert claims.answers(missing)["tlora", "lora", -1.0] is None


def test_what_is_said_of_tloras_dropout():
    made = rows(lora=90.0, tlora=70.0)
    assert claims.said_of_T2(made, claims.answers(made)) == ""
    made += rows(**{"tlora-plain": 81.0, "lora_xs-r32": 79.0})
    words = claims.said_of_T2(made, claims.answers(made))
    assert "moves TLoRA by -11.0 points here, each at its own rate. Without it TLoRA is -9.0 ± 0.0" in words
    assert " from LoRA, and +2.0 ± 0.0 (without math +2.0 ± 0.0) from LoRA-XS with as many trained numbers." in words
    assert words.endswith("LoRA-XS's at rank 32.")
    real = {
        "study": "encoder",
        "method": "tlora",
        "task": "cola",
        "k": -10,
        "dev": {"matthews": 0.09},
        "flags": ["--lr", "x", "--fast"],
    }
    made += [{**real, "seed": seed} for seed in (100, 0)]
    made += [{**row, "flags": [*row["flags"], "--dropout", "0"], "dev": {"matthews": 0.22}} for row in made[-2:]]
    words = claims.said_of_T2(made, claims.answers(made))
    assert words.endswith("On CoLA with a real encoder it has 9.0 with the dropout and 22.0 without it (above).")


def test_what_is_said_of_tlora_pluss_decay():
    made = rows(lora=90.0, tlora_plus=70.0)
    assert claims.said_of_P2(made, claims.answers(made)).endswith("weight decay of 0.1, at rates far above its paper's 1e-4.")
    made += rows(**{"tlora_plus-no-decay": 72.0})
    words = claims.said_of_P2(made, claims.answers(made))
    assert "moves TLoRA+ by +2.0 ± 0.0 points (math +2.0 ± 0.0, sst2 +2.0 ± 0.0): " in words
    assert words.endswith("-18.0 ± 0.0 from LoRA, which has none.")
    assert float(METHODS["tlora_plus"][3]) == 0.1 and METHODS["lora"][3] == 0 and methods.options("tlora_plus")["ratio"][1] == "4"


def test_what_is_said_of_higher_ranks():
    made = rows(lora=90.0, tlora_plus=70.0)
    assert claims.of_ranks(made, claims.answers(made)) == ""
    made += rows(**{"lora-r32": 91.0, "tlora_plus-r32": 75.0})
    for row in made:  # rank 32 is worse on math than elsewhere
        row["test"] = {k: v - 0.5 * (row["task"] == "math" and "--rank" in row["flags"]) for k, v in row["test"].items()}
    words = claims.of_ranks(made, claims.answers(made))
    means = "TLoRA+ 70.0, 65.0 (without math 70.0, 75.0); LoRA 90.0, 81.0 (without math 90.0, 91.0).\n\n"
    assert words.endswith(f"Means at ranks 8, 32: {means}")


def searched(method, more, scores):
    row = {"study": "rates", "method": method}
    return [{**row, "task": task, "k": k, "seed": seed, "flags": ["--lr", "0.1", *more], "dev": {sweep.headline(task): value}}
            for k, value in scores.items() for task in sweep.TASKS for seed in (100, 101)]  # fmt: skip


def test_what_is_said_of_ratios_and_of_scales():
    said = {"--ratio": ("tlora_plus", "4", "8", claims.said_of_P2), "--alpha": ("triadapt", "16", "64", claims.said_of_A1)}
    for option, (method, default, other, words) in said.items():
        made = searched("lora", [], {-10: 0.9}) + searched(method, [], {-11: 0.5, -10: 0.75, -9: 0.7})
        made += rows(lora=90.0, triadapt=80.0, nonlinear=78.0)
        assert option not in words(made, claims.answers(made))  # the default alone
        made += searched(method, [option, other], {-12: 0.5, -11: 0.65})
        assert option not in words(made, claims.answers(made))  # a search that is not over: the next rate may be better
        made += searched(method, [option, other], {-10: 0.6})
        found = f": 75.0 with {default} (at 0.00316), 65.0 with {other} (at 0.00178); LoRA 90.0 ("
        assert f"(`{option}`)" in words(made, claims.answers(made)) and found in words(made, claims.answers(made))
        assert float(methods.options(method)[option[2:]][1]) == float(default)


@pytest.mark.parametrize("method", ["triadapt", "tlora_plus"])
def test_what_is_said_of_the_start(method):
    name = f"{method}-identity"
    made = rows(**{"lora": 90.0, method: 70.0, "nonlinear": 60.0})
    assert claims.of_start(made, claims.answers(made), method) == ""
    for row in rows(**{name: 72.0}):
        made.append({**row, "test": {k: v + 0.1 * (row["task"] == "math") for k, v in row["test"].items()}})
    words = claims.of_start(made, claims.answers(made), method)  # 2 points on four tasks, 12 on the fifth
    assert "it is +4.0 ± 0.0 points from its paper's start (math +12.0 ± 0.0, the other four +2.0 ± 0.0)" in words
    assert words.endswith(" and -16.0 ± 0.0 from LoRA.\n\n")
    said = {"triadapt": claims.said_of_A1, "tlora_plus": claims.said_of_P2}[method]
    assert words in said(made, claims.answers(made))


OWN = [name for name, (_, flags) in claims.CONTESTANTS.items() if "--lr" in flags and not name.endswith(("-small", "-long"))]


@pytest.mark.parametrize("name", sorted({*OWN, "nonlinear", "fixed-k"} - {"task_tlora-scaled"}))
def test_a_variant_with_a_rate_of_its_own_has_the_one_found_for_it(name):
    method, flags = claims.CONTESTANTS[name]
    more = flags[: flags.index("--lr")] + flags[flags.index("--lr") + 2 :] if "--lr" in flags else flags
    found = sweep.table(sweep.valid(sweep.read(sweep.ROWS)), "rates", more)
    means = sweep.on_all(found, method)
    assert more and means and not sweep.asked_of_all(found, method)  # the search is over
    own = float(flags[flags.index("--lr") + 1]) if "--lr" in flags else METHODS[method][2]
    assert own == sweep.rate(max(means, key=means.get))


def test_what_is_said_of_one_small_rate_for_both():
    made = rows(lora=90.0, task_tlora=80.0)
    assert claims.said_of_K1(made, claims.answers(made)) == ""
    made += [{**row, "flags": ["--lr", "0.0003"], "test": {k: v - (0.4 if row["method"] == "lora" else 0.2)
              for k, v in row["test"].items()}} for row in made]  # fmt: skip
    words = claims.said_of_K1(made, claims.answers(made))
    assert "At 3e-4 Task-aware TLoRA is +10.0 points from LoRA, at the rates chosen for each -10.0:" in words
    assert "moves LoRA by -40.0 points (from 90.0 to 50.0), Task-aware TLoRA by -20.0 (from 80.0 to 60.0)." in words
    assert "`--alpha" not in words
    made += [row for row in rows(**{"task_tlora-scaled": 81.0}) if row["seed"] < 3]
    words = claims.said_of_K1(made, claims.answers(made))
    assert words.endswith("(`--alpha 64 --lr 0.000445`) moves it by +1.0 ± 0.0 points on 3 seeds.")
    alpha, rate = methods.options("task_tlora")["alpha"][1], METHODS["task_tlora"][2]
    assert (4 * alpha, rate / 4, METHODS["task_tlora"][3]) == (64, 0.000445, 0.0)


def test_what_is_said_of_where_the_modes_differ():
    made = rows(lora=90.0, triadapt=80.0)
    assert claims.said_of_A1(made, claims.answers(made)) == ""
    for row in rows(nonlinear=78.0):
        made.append({**row, "test": {k: v - 0.2 * (row["task"] == "math") for k, v in row["test"].items()}})
    words = claims.said_of_A1(made, claims.answers(made))
    assert words.startswith("Linear and nonlinear growth are +22.0 ± 0.0 points apart on math and +2.0 ± 0.0 on the other four.")


def test_a_longer_schedule_is_compared_on_the_seeds_that_both_have():
    made = rows(lora=80.0, tlora_plus=60.0)
    made += [row for row in rows(**{"lora-long": 90.0, "tlora_plus-long": 85.0}) if row["task"] == "math" and row["seed"] < 2]
    lora, plus = (
        "| lora | 2 | 80.0 ± 0.0 | 90.0 ± 0.0 | +0.0 | +0.0 |",
        "| tlora_plus | 2 | 60.0 ± 0.0 | 85.0 ± 0.0 | -20.0 | -5.0 |",
    )
    assert claims.longer(made).splitlines()[2:] == [plus, lora]
    more = [row for row in rows(**{"tlora": 30.0, "tlora-long": 40.0}) if row["task"] == "math" and row["seed"] < 2]
    words = "After 12 epochs tlora is -50.0 from LoRA, the others -5.0 at most."
    assert claims.longer(made + more).splitlines()[-2:] == ["", words] and plus in claims.longer(made + more)
    assert claims.longer(made[:-1]).splitlines()[2:] == [lora]  # one seed is none


def test_runs_that_do_not_learn_are_named_and_others_are_not():
    made = rows(lora=90.0, tlora=70.0)
    assert claims.fallen(made) == "none"
    for row in made:
        if (row["method"], row["task"], row["seed"]) in (("lora", "cola", 3), ("tlora", "math", 0)):
            row["test"] = {metric: value - 0.3 for metric, value in row["test"].items()}
    assert claims.fallen(made) == "tlora on math, seed 0: 40.0 of 70.0; lora on cola, seed 3: 60.0 of 90.0"
    assert claims.fallen([{**row, "seed": row["seed"] + 8} for row in made]) == "none", "fresh seeds alone"


def test_on_the_real_encoder_the_seeds_that_both_have_are_paired():
    scores = {("lora", "cola"): {100: 50.0, 0: 20.0, 1: 22.0, 2: 24.0}, ("lora", "sst2"): {100: 90.0},
              ("tlora", "cola"): {100: 9.0, 0: 11.0, 1: 12.0, 2: 13.0, 3: 0.0}, ("tlora", "sst2"): {100: 80.0}}  # fmt: skip
    made = [{"study": "encoder", "method": method, "task": task, "k": -10, "seed": seed, "flags": [],
             "dev": {sweep.headline(task): value / 100}}
            for (method, task), values in scores.items() for seed, value in values.items()]  # fmt: skip
    assert claims.on_real(made).splitlines()[2:] == [
        "| tlora | -10.0 ± 2.5 (p 0.003, 3 seeds) | – | 0.00316: 9.0 |",  # -9, -10, -11
        "| lora | – | – | 0.00316: 50.0 |",
    ]


def test_what_one_rate_costs_without_math_is_from_the_four_tasks_means():
    high = {-10: 90.0, -9: 70.0}  # math is best at the higher rate, the four at the lower; the mean of all at the higher
    made = [{"study": "rates", "method": method, "task": task, "k": k, "seed": seed, "flags": ["--lr", "x"],
             "dev": {sweep.headline(task): (high[k] if task != "math" else 100 * (k == -9)) / 100 + (seed - 100) / 50}}
            for method in ("lora", "triadapt", "tlora_plus", "task_tlora", "tlora")
            for task in sweep.TASKS for k in high for seed in (100, 101)]  # fmt: skip
    assert claims.without_math(made).startswith("lora 71.0 and 91.0 (at 0.00316), triadapt 71.0 and 91.0 (at 0.00316), ")


def test_the_table_of_all_methods_best_first_each_once():
    made = rows(lora=80.0, tlora=70.0, tlora_plus=90.0, task_tlora=80.0, lora_r3=75.0)
    found = claims.answers(made)
    lines = claims.beside(made, found, claims.best_first(found) + claims.FURTHER).splitlines()[2:]
    names = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines]
    assert names[:3] == [("tlora_plus", "lora"), ("task_tlora", "lora"), ("tlora", "lora")] and len(set(names)) == len(names)
    assert {name for name, other in names if other == "lora"} == METHODS.keys() - {"lora", "head"} | {
        "tlora-plain",
        "tlora_plus-no-decay",
        "tlora_plus-r32",
        "lora-scaled",
        "triadapt-identity",
        "tlora_plus-identity",
    }
    assert lines[0].startswith("| tlora_plus | lora | 0.30 | +10.00 | ± 0.0")
    assert lines[0].endswith("| < 0.0001 | above |" + " +10.0 |" * 5) and lines[2].endswith("| below |" + " -10.0 |" * 5)
    assert lines[3].endswith("| not yet: 0 of 8 seeds |" + "  |" * 5)
    by_names = dict(zip(names, lines))
    assert by_names["tlora", "lora-r3"].startswith("| tlora | lora-r3 | 1.00 | -5.00 |")
    assert by_names["task_tlora", "lora-r3"].startswith("| task_tlora | lora-r3 | 1.00 | +5.00 |")


def test_readmes_table_by_hand():
    made = rows(**dict.fromkeys((name for name in claims.SHOWN if name != "lora"), 70.0), lora=80.0)
    made = [row for row in made if (row["method"], row["task"]) != ("head", "math")]
    for row in made:  # math is ten points worse, LoRA's seed 0 on it another eight
        row["test"] = {k: v - 0.1 * (row["task"] == "math") for k, v in row["test"].items()}
        if (row["method"], row["flags"], row["task"], row["seed"]) == ("lora", [], "math", 0):
            row["test"] = {k: v - 0.08 for k, v in row["test"].items()}
    lines = {line.split("|")[1]: line for line in claims.summary(made).splitlines()[2:]}
    assert list(lines) == claims.SHOWN and {"tlora-plain", "lora-r3", "head"} < lines.keys() and len(claims.SHOWN) == 24
    assert lines["head"] == "|head|70.0±0.0|–|–|300|"
    assert lines["lora"] == "|lora|80.0±0.0|69.0±2.8|–|1,000|"  # 62 once, 70 else: sd 8 / sqrt(8)
    assert lines["tlora-plain"] == "|tlora-plain|70.0±0.0|60.0±0.0|-9.8±0.5|300|"  # -8.4 once, -10 else: 2.365 * 1.6 / 8


def test_the_words_below_readmes_table_are_true_of_the_rows():
    kept = sweep.valid(sweep.read(sweep.ROWS))
    found = claims.answers(kept)
    from_lora = {name: found[name, "lora", 0.0] for name in ("triadapt", "tlora_plus", "task_tlora", "tlora")}
    assert [value[3] for value in from_lora.values()] == ["undecided"] + ["does not hold here"] * 3
    for name in claims.LOST_ON_MATH:  # the five tasks' points lost, and math's
        lost = [statistics.mean(claims.differences(kept, name, "lora", tasks=[task])) for task in sweep.TASKS]
        assert lost[-1] < 0.5 * sum(lost) < 0
    assert all(claims.paired(claims.differences(kept, "tlora", "lora", tasks=[t]))[0] < -3 for t in sweep.TASKS)
    assert claims.mean_of(kept, "tlora-plain") - claims.mean_of(kept, "tlora") > -0.5 * from_lora["tlora"][0]
    assert found["task_tlora-small", "lora-small", 0.0][3] == "holds" and from_lora["task_tlora"][0] < 0
    for name in ("task_tlora", "lora"):
        assert claims.mean_of(kept, f"{name}-small") < claims.mean_of(kept, name) - 10  # 3e-4 is too low
    encoder = sweep.on_encoder(kept)
    assert {len(encoder[name, "cola"][2]) for name in (*from_lora, "lora")} == {5}


@pytest.mark.parametrize("claim", claims.CLAIMS)
def test_each_claim_asks_for_runs_that_parse_and_for_none_twice(claim):
    runs = claims.wanted([], claim)
    assert len({sweep.key(run) for run in runs}) == len(runs) and {run["seed"] for run in runs} == set(range(8))
    for run in {tuple(run["flags"]): run for run in runs}.values():
        parse(["--method", run["method"], "--task", run["task"], *run["flags"]])
    assert claims.wanted([dict(run, test=None) for run in runs[1:]], claim) == runs[:1]


def test_the_words_about_the_contradiction_are_true_of_the_rows():
    lora, tlora, plus = claims.means_by_rate(sweep.valid(sweep.read(sweep.ROWS))).values()
    low = max(plus, key=plus.get)
    high = max(lora.keys() & tlora.keys() & plus.keys(), key=lambda k: tlora[k] - max(lora[k], plus[k]))
    assert tlora[low] < min(lora[low], plus[low]) and tlora[high] > max(lora[high], plus[high]) and high > low
    assert max(lora[high], plus[high]) < 0.7 * min(max(lora.values()), max(plus.values()))  # they no longer learn there
    assert max(tlora.values()) < max(lora.values()) and max(lora.values()) - max(tlora.values()) < lora[low] - tlora[low]
    made_up = {"lora": {-12: 80.0, -10: 90.0, -8: 20.0}, "tlora": {-12: 40.0, -10: 50.0, -8: 70.0, -6: 75.0},
               "tlora_plus": {-12: 70.0, -10: 85.0, -8: 30.0}}  # fmt: skip
    words = " ".join(claims.contradiction(made_up, {"cola": -1.26}, (-16.66, -7.14)).split())
    assert "at 0.00316, the best rate of TLoRA+, TLoRA is last with 50.0 (TLoRA+ 85.0, LoRA 90.0); at 0.01 it is first" in words
    assert "its B trains at 8 times that (ratio 4, " in words
    assert "at its best at 0.0253, where TLoRA, whose only trained matrix is B, is best at 0.0316" in words
    assert "TLoRA is -16.7 points from LoRA with it and -7.1 without it" in words
    assert claims.B_TIMES == tlora_plus.rate_ratios(float(methods.options("tlora_plus")["ratio"][1]), 2, 3, 4, 5)[1]
    assert "distance is 15.0 points instead of the 40.0" in words and "(cola -1.3, " in words
    with open(claims.PAGE, encoding="utf-8") as f:
        assert f.read() == claims.text()
