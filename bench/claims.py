"""The papers' four headline claims: what each says, what is found here, whether it holds.

    python bench/claims.py T2 --jobs 2     # makes the runs that are missing (hours), then says what they show
    python bench/claims.py T2 --show       # what the kept rows show
    python bench/claims.py pages           # docs/claims.md and README's table, from the rows of bench/sweep.jsonl alone

A method trains at the one rate chosen for it (train.py's default, docs/rates.md), a variant of it (another rank, another mode)
at the same rate, where no other stands. Seeds 0 to 7, on which no rate was chosen; the score is the test split's. Contestants
are paired by seed: the same head, the same order of rows. A difference is a mean over the tasks, seed by seed; its interval and
p are those of a paired t-test, two-sided: they speak of other seeds, not of other tasks or bases. p, not the interval, is
corrected (Holm) for all comparisons of the page that have their runs, so it may still grow. A claim holds, or does not hold
here, at p < 0.01; else it is undecided.
"""

import argparse
import math
import os
import statistics
import sys
import textwrap

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import sweep
import table

from harness.methods import METHODS

PAGE = os.path.join(sweep.ROOT, "docs", "claims.md")
MARKS = ("<!-- made by bench/claims.py -->", "<!-- until here -->")  # in README
LEVEL = 0.01
RATIO, B_TIMES = "4", 8  # TLoRA+'s default ratio, and with it the rate of its B as a multiple of A's
PLAIN = ["--dropout", "0", "--lr", "0.0562"]  # TLoRA without its dropout, at its best rate for all tasks (docs/rates.md)

# Of other ranks, each at its best rate for all tasks (docs/rates.md): rank 8's is too high for TLoRA+ of rank 32, which then
# learns nothing on three of the five.
OF_RANK = [("lora", "3", "0.00316"), ("lora", "32", "0.00562"), ("tlora_plus", "32", "0.001"), ("lora_xs", "32", "0.01")]
OF_RANK += [("lora", "64", "0.00562"), ("tlora_plus", "64", "0.000562"), ("tlora", "64", "0.01")]

# contestant: (method, flags beside the defaults)
CONTESTANTS = {
    **{name: (name, []) for name in METHODS},
    **{f"{name}-r{rank}": (name, ["--rank", rank, "--lr", lr]) for name, rank, lr in OF_RANK},
    "tlora-plain": ("tlora", PLAIN),
    **{f"{name}-small": (name, ["--lr", "0.0003"]) for name in ("lora", "task_tlora")},
    "task_tlora-scaled": ("task_tlora", ["--alpha", "64", "--lr", "0.000445"]),  # four times its scale, a quarter of its rate
    "triadapt-scaled": ("triadapt", ["--alpha", "64", "--lr", "0.00562"]),  # four times its scale, at its best rate for that
    "lora-scaled": ("lora", ["--alpha", "64", "--lr", "0.00178"]),  # likewise
    "triadapt-preserve": ("triadapt", ["--preserve"]),
    "triadapt-identity": ("triadapt", ["--start", "identity", "--lr", "0.01"]),  # MTLoRA's start: T = I, B = 0
    "tlora_plus-identity": ("tlora_plus", ["--init-b", "identity", "--lr", "0.00316"]),  # likewise
    "tlora_plus-no-decay": ("tlora_plus", ["--weight-decay", "0"]),
    "nonlinear": ("triadapt", ["--mode", "nonlinear"]),
    "fixed-k": ("triadapt", ["--mode", "fixed"]),
    **{f"{name}-long": (name, ["--epochs", "12"]) for name in ("lora", "triadapt", "tlora_plus", "task_tlora", "tlora")},
    "tlora-plain-long": ("tlora", [*PLAIN, "--epochs", "12"]),
}  # fmt: skip

# README's table: every method, variants behind their method.
BEHIND = {"tlora": ["tlora-plain"], "tlora_plus": ["tlora_plus-r32"], "lora": ["lora-r3", "lora-r32"], "lora_xs": ["lora_xs-r32"]}
SHOWN = [name for method in METHODS for name in (method, *BEHIND.get(method, []))]
LOST_ON_MATH = ("tlora_plus", "task_tlora")  # most of their distance from LoRA is there

# claim: (paper, its words, questions: (words, one, other, margin): is `one` more than `other` + margin?)
CLAIMS = {
    "T2": (
        "TLoRA, arXiv 2504.18735",
        "TLoRA achieves comparable performance to existing low-rank methods such as LoRA and Adapter-based techniques, while "
        "requiring significantly fewer trainable parameters.",
        [
            ("TLoRA is less than a point below LoRA", "tlora", "lora", -1.0),
            ("TLoRA (rank 32, random outer matrices) is above LoRA-XS (rank 32, those of W0's SVD)", "tlora", "lora_xs-r32", 0.0),
            ("TLoRA without its dropout of 0.5 is above TLoRA with it", "tlora-plain", "tlora", 0.0),
            ("TLoRA without it is above LoRA-XS of rank 32", "tlora-plain", "lora_xs-r32", 0.0),
        ],
    ),
    "P2": (
        "TLoRA+, arXiv 2604.13368",
        "It significantly outperforms TLoRA and even achieves better performance than LoRA. [..] TLoRA consistently "
        "underperforms across all evaluated architectures and rank configurations. [..] our approach achieves its most "
        "significant performance gains at higher ranks.",
        [
            ("TLoRA+ (rank 8) is above TLoRA (rank 32)", "tlora_plus", "tlora", 0.0),
            ("TLoRA+ is above LoRA, both of rank 8", "tlora_plus", "lora", 0.0),
            ("at rank 32 TLoRA+ is above TLoRA", "tlora_plus-r32", "tlora", 0.0),
            ("at rank 64 TLoRA+ is above TLoRA", "tlora_plus-r64", "tlora-r64", 0.0),
            *((f"at rank {r} TLoRA+ is above LoRA", f"tlora_plus-r{r}", f"lora-r{r}", 0.0) for r in (32, 64)),
            ("at rank 32 TLoRA+ is above TLoRA without its dropout", "tlora_plus-r32", "tlora-plain", 0.0),
        ],
    ),
    "K1": (
        "Task-aware TLoRA, arXiv 2604.18124",
        "TLoRA significantly outperforms LoRA and its variants on multiple benchmarks, even with an approximately 50% reduction "
        "in parameter count. (Table 1: 85.96 on average.)",
        [
            ("Task-aware TLoRA is above LoRA, each at the rate chosen for it", "task_tlora", "lora", 0.0),
            ("Task-aware TLoRA is above LoRA, both at 3e-4, its paper's rate", "task_tlora-small", "lora-small", 0.0),
        ],
    ),
    "A1": (
        "TriAdaptLoRA, arXiv 2501.08008",
        "TriAdaptLoRA consistently outperforms existing PEFT methods. [..] particularly under linear threshold-driven rank "
        "growth. (Table I: linear > nonlinear > fixed-k > IncreLoRA > LoRA > AdaLoRA.)",
        [
            (f"{one} is above {other}".replace("triadapt", "linear"), one, other, 0.0)
            for one, other in (
                ("triadapt", "nonlinear"), ("nonlinear", "fixed-k"), ("fixed-k", "increlora"), ("increlora", "lora"),
                ("lora", "adalora"), ("triadapt", "lora"),
            )
        ],
    ),
}  # fmt: skip

# Beside the claims: every method from LoRA, a few with other flags, and those with fewer trained numbers from the LoRA that has
# about as many.
BESIDE = [(name, "lora", 0.0) for name in METHODS if name not in ("lora", "head")]  # the head alone answers no question in words
FURTHER = [("tlora-plain", other, 0.0) for other in ("tlora", "lora", "lora-r3")]
FURTHER += [(name, "lora-r3", 0.0) for name in ("tlora", "task_tlora")]
FURTHER += [(f"{name}-identity", other, 0.0) for name in ("tlora_plus", "triadapt") for other in (name, "lora")]
FURTHER += [("tlora_plus-r32", "lora", 0.0), ("tlora_plus-no-decay", "lora", 0.0), ("triadapt-preserve", "triadapt", 0.0)]
FURTHER += [("triadapt-scaled", "triadapt", 0.0), ("lora-scaled", "lora", 0.0), ("triadapt-scaled", "lora-scaled", 0.0)]


def wanted(rows, claim):
    """Runs of a claim that no row has, seed by seed: dicts for sweep.carry_out."""
    names = list(dict.fromkeys(name for _, *pair, _ in CLAIMS[claim][2] for name in pair))
    runs = []
    for seed in sweep.FRESH:
        for method, flags in map(CONTESTANTS.get, names):
            run = {"study": "compare", "method": method, "k": None, "seed": seed, "flags": flags}
            runs += [{**run, "task": task} for task in sweep.TASKS]
    have = {sweep.key(row) for row in rows}
    return [run for run in runs if sweep.key(run) not in have]


def scores(rows, name):
    """{(seed, task): test score in points of 100} of a contestant; a run that ended in NaN has 0."""
    method, flags = CONTESTANTS[name]
    mine = [row for row in rows if (row["study"], row["method"], row["flags"]) == ("compare", method, flags)]
    return {(row["seed"], row["task"]): 100 * row["test"][sweep.headline(row["task"])] if row["test"] else 0.0 for row in mine}


def differences(rows, one, other, margin=0.0, tasks=sweep.TASKS):
    """One number a seed that both have on every task: the mean over tasks of one - other - margin."""
    a, b = scores(rows, one), scores(rows, other)
    seeds = [seed for seed in sweep.FRESH if all((seed, task) in a and (seed, task) in b for task in tasks)]
    return [statistics.mean(a[seed, task] - b[seed, task] for task in tasks) - margin for seed in seeds]


def two_sided(t, df):
    """P(|T| > |t|) of Student's T with df degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(df))
    c, term, total = math.cos(angle), 1.0, 0.0
    for i in range(df // 2):
        total += term
        term *= c * c * ((2 * i + 2) / (2 * i + 3) if df % 2 else (2 * i + 1) / (2 * i + 2))
    inside = math.sin(angle) * total if df % 2 == 0 else 2 / math.pi * (angle + math.sin(angle) * c * total)
    return max(0.0, 1 - inside)


def quantile(p, df):
    """The t with two_sided(t, df) = p, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, df) > p else (low, middle)
    return low


def paired(values):
    """(mean, half of its 95 % interval, p) of differences; p is 1 where they are all zero, 0 where all are the same."""
    mean, spread, n = statistics.mean(values), statistics.stdev(values), len(values)
    error = spread / math.sqrt(n)
    p = two_sided(mean / error, n - 1) if error else float(mean == 0)
    return mean, quantile(0.05, n - 1) * error, p


def holm(ps):
    """The p values corrected for their number (Holm 1979), in their order."""
    order, corrected, largest = sorted(range(len(ps)), key=lambda i: ps[i]), [0.0] * len(ps), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[i]))
        corrected[i] = largest
    return corrected


def answers(rows):
    """{(one, other, margin): (mean difference, half interval, p by Holm, verdict), or None where seeds lack}, of all the page."""
    asked = [tuple(rest) for *_, questions in CLAIMS.values() for _, *rest in questions]
    found = {}
    for one, other, margin in dict.fromkeys(asked + BESIDE + FURTHER):
        values = differences(rows, one, other, margin)
        found[one, other, margin] = paired(values) if len(values) == len(sweep.FRESH) else None
    done = {}  # one test may stand in two tables, the other way round in one: it counts once
    for key in (key for key, value in found.items() if value):
        done.setdefault((frozenset(key[:2]), key[2]), []).append(key)
    for keys, p in zip(done.values(), holm([found[keys[0]][2] for keys in done.values()])):
        for key in keys:
            mean, half, _ = found[key]
            found[key] = mean + key[2], half, p, verdict(mean, p)
    return found


def verdict(mean, p):
    return "undecided" if p >= LEVEL else "holds" if mean > 0 else "does not hold here"


def summary(rows):
    """README's table: of each contestant the mean ± standard deviation over the fresh seeds, distance from LoRA, trained."""
    lines = ["|method|cola/sst2/qnli/squad|math|from LoRA|trained|", "|---|--:|--:|--:|--:|"]
    for name in SHOWN:
        mine, tasks = scores(rows, name), sweep.tasks_of(name, sweep.TASKS)
        four = [statistics.mean(mine[seed, task] for task in sweep.TASKS[:-1]) for seed in sweep.FRESH]
        on_math = [mine[seed, "math"] for seed in sweep.FRESH if "math" in tasks]
        distance = "–"
        if name != "lora" and on_math:
            mean, half, _ = paired(differences(rows, name, "lora"))
            distance = f"{mean:+.1f}±{half:.1f}"
        cells = table.cell(four), table.cell(on_math), distance, f"{numbers(rows, name, ['cola']):,.0f}"
        lines.append(f"|{name}|{'|'.join(cells)}|")
    return "\n".join(lines)


def readme(rows):
    """What README says below its table, in three sentences. tests/test_claims.py asks whether the words are true of the rows."""
    encoder = sweep.on_encoder(rows)
    names = {
        "LoRA": "lora",
        "TriAdaptLoRA": "triadapt",
        "TLoRA+": "tlora_plus",
        "Task-aware TLoRA": "task_tlora",
        "TLoRA": "tlora",
    }
    real = [f"{words} {statistics.mean(encoder[name, 'cola'][2].values()):.1f}" for words, name in names.items()]
    plain = sweep.on_encoder(rows, ["--dropout", "0"]).get(("tlora", "cola"))
    real[-1] += f" ({statistics.mean(plain[2].values()):.1f} without its dropout)" if plain else ""
    mean, half, _ = paired(differences(rows, "task_tlora-small", "lora-small"))
    long = {name: statistics.mean(differences(rows, f"{name}-long", "lora-long", tasks=["math"])) for name in LOST_ON_MATH}
    return (
        "None of the four is measurably above LoRA, TriAdaptLoRA not below. TLoRA+ and Task-aware TLoRA lose most on `math` "
        f"(with 12 epochs there {long['tlora_plus']:+.1f} and {long['task_tlora']:+.1f}), TLoRA everywhere, mostly by its "
        f"dropout. At its paper's 3e-4, too low for both, Task-aware TLoRA is {mean:+.1f} ± {half:.1f} from LoRA. GLUE's CoLA "
        f"(all-MiniLM-L6-v2, Matthews, development split, five seeds, own rates): {', '.join(real)}."
    )


def write_readme(rows):
    """Put the table and the sentences where README has them."""
    path = os.path.join(sweep.ROOT, "README.md")
    with open(path, encoding="utf-8") as f:
        before, rest = f.read().split(MARKS[0])
    words = "\n".join(textwrap.wrap(readme(rows), 129, break_long_words=False, break_on_hyphens=False))
    after = rest.split(MARKS[1])[1]
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"{before}{MARKS[0]}\n{summary(rows)}\n\n{words}\n{MARKS[1]}{after}")


def shown(rows, found, one, other, margin):
    """The last four columns of a table: difference, 95 %, p, verdict."""
    if found[one, other, margin] is None:
        return f"| | | not yet: {len(differences(rows, one, other))} of {len(sweep.FRESH)} seeds |"
    mean, half, p, word = found[one, other, margin]
    than = f" (wanted: above {margin:g})" if margin else ""
    return f"{mean:+.2f}{than} | ± {half:.2f} | {'< 0.0001' if p < 1e-4 else f'{p:.4f}'} | {word} |"


def section(claim, rows, found):
    """One claim as markdown."""
    paper, words, questions = CLAIMS[claim]
    lines = [f"## {claim}: {paper}", "", f"> {words}", "", f"`python bench/claims.py {claim}`", "",
             "| question | difference, points | 95 % | p (Holm) | verdict |", "|---|--:|--:|--:|---|"]  # fmt: skip
    lines += [f"| {question} | {shown(rows, found, *rest)}" for question, *rest in questions]
    said = SAID[claim](rows, found) if claim in SAID else ""
    return "\n".join(lines + (["", said] if said else []))


def mean_of(rows, name):
    """A contestant's mean over seeds and tasks."""
    return statistics.mean(value for (_, task), value in scores(rows, name).items() if task in sweep.TASKS)


def said_of_T2(rows, found):
    """What TLoRA's dropout costs; empty until all three comparisons are there."""
    keys = ("tlora-plain", "tlora"), ("tlora-plain", "lora_xs-r32"), ("tlora-plain", "lora")
    gain, beside_xs, from_lora = (found[one, other, 0.0] for one, other in keys)
    if not (gain and beside_xs and from_lora):
        return ""
    without_math = paired(differences(rows, "tlora-plain", "lora_xs-r32", tasks=sweep.TASKS[:-1]))
    return (
        f"The dropout of 0.5 on the update, the author's, moves TLoRA by {-gain[0]:+.1f} points here, each at its own rate. "
        f"Without it TLoRA is {from_lora[0]:+.1f} ± {from_lora[1]:.1f} from LoRA, and {beside_xs[0]:+.1f} ± {beside_xs[1]:.1f} "
        f"(without math {without_math[0]:+.1f} ± {without_math[1]:.1f}) from LoRA-XS with as many trained numbers. Both have a "
        f"rate of their own: TLoRA's was searched without the dropout, LoRA-XS's at rank 32.{dropout_on_real(rows)}"
    )


def dropout_on_real(rows):
    """What TLoRA's dropout costs on the real encoder's CoLA; empty until it is measured."""
    found, plain = sweep.on_encoder(rows), sweep.on_encoder(rows, ["--dropout", "0"])
    if ("tlora", "cola") not in plain:
        return ""
    each = [statistics.mean(of["tlora", "cola"][2].values()) for of in (found, plain)]
    return f" On CoLA with a real encoder it has {each[0]:.1f} with the dropout and {each[1]:.1f} without it (above)."


def of_ranks(rows, found):
    """How TLoRA+ and LoRA come through higher ranks, each rank at a rate of its own; of the ranks that are measured."""
    ranks = [r for r in ("", "-r32", "-r64") if found[f"tlora_plus{r}", f"lora{r}", 0.0]]
    if len(ranks) < 2:
        return ""

    def shown(name, tasks):
        of = [[value for (_, task), value in scores(rows, name + r).items() if task in tasks] for r in ranks]
        return ", ".join(f"{statistics.mean(values):.1f}" for values in of)

    words = [f"{name} {shown(of, sweep.TASKS)} (without math {shown(of, sweep.TASKS[:-1])})"
             for name, of in (("TLoRA+", "tlora_plus"), ("LoRA", "lora"))]  # fmt: skip
    names = ", ".join(r[2:] or "8" for r in ranks)
    rate = "Each rank trains at the one rate found for it ([rates.md](rates.md), other flags)."
    return f"{rate} Means at ranks {names}: {'; '.join(words)}.\n\n"


def of_option(rows, method, option, values, default):
    """A method with other values of an option, each at the best rate found for it, in the search for rates; empty below two."""
    each = []
    for value in values:
        found = sweep.table(rows, "rates", [] if value == default else [option, value])
        if (means := sweep.on_all(found, method)) and not sweep.asked_of_all(found, method):
            k = max(means, key=means.get)
            each.append(f"{means[k]:.1f} with {value} (at {sweep.rate(k):g})")
    if len(each) < 2:
        return ""
    beside = "" if method == "lora" else f"; LoRA {max(means_by_rate(rows)['lora'].values()):.1f}"
    return (
        f"(`{option}`), each at the one `--lr` found for it: {', '.join(each)}{beside} (means of the five tasks in the search "
        "for rates, development split, seeds 100 and 101).\n\n"
    )


def of_start(rows, found, method):
    """What MTLoRA's start does to a method; empty until it is measured."""
    name = f"{method}-identity"
    gain, from_lora = found[name, method, 0.0], found[name, "lora", 0.0]
    if not gain or not from_lora:
        return ""
    on_math, others = (paired(differences(rows, name, method, tasks=tasks)) for tasks in (["math"], sweep.TASKS[:-1]))
    return (
        f"The start (`{' '.join(CONTESTANTS[name][1])}`, its rate): with the middle matrix at I and what follows it at "
        f"zero, as LoRA starts and the authors' MTLoRA, it is {gain[0]:+.1f} ± {gain[1]:.1f} points from its paper's start (math "
        f"{on_math[0]:+.1f} ± {on_math[1]:.1f}, the other four {others[0]:+.1f} ± {others[1]:.1f}) and {from_lora[0]:+.1f} ± "
        f"{from_lora[1]:.1f} from LoRA.\n\n"
    )


def said_of_P2(rows, found):
    """What rank does, and the ratio; whose ratio and decay these are, and what the decay costs; each once it is measured."""
    ratios = of_option(rows, "tlora_plus", "--ratio", ("1", "2", "4", "5", "8", "paper", "summed"), RATIO)
    named = "Ratios of the matrices' rates, where `--lr` is A's, with paper and summed B's"
    words = of_ranks(rows, found) + (ratios and f"{named} {ratios}") + of_start(rows, found, "tlora_plus")
    words += "TLoRA+ trains with the default ratio of 4 and its paper's weight decay of 0.1, at rates far above its paper's 1e-4."
    gain = differences(rows, "tlora_plus-no-decay", "tlora_plus")
    if len(gain) < len(sweep.FRESH):
        return words
    mean, half, _ = paired(gain)
    each = {task: paired(differences(rows, "tlora_plus-no-decay", "tlora_plus", tasks=[task])) for task in ("math", "sst2")}
    tasks = ", ".join(f"{task} {value[0]:+.1f} ± {value[1]:.1f}" for task, value in each.items())
    from_lora = found["tlora_plus-no-decay", "lora", 0.0]
    return (
        f"{words} Taking the decay away, at the rate chosen with it, moves TLoRA+ by {mean:+.1f} ± {half:.1f} points ({tasks}): "
        f"{from_lora[0]:+.1f} ± {from_lora[1]:.1f} from LoRA, which has none."
    )


def said_of_K1(rows, found):
    """How much of the margin is the rate; empty until both comparisons are there."""
    own, small = found["task_tlora", "lora", 0.0], found["task_tlora-small", "lora-small", 0.0]
    if not own or not small:
        return ""
    names = ("lora", "lora-small", "task_tlora", "task_tlora-small")
    lora, lora_small, ours, ours_small = (mean_of(rows, name) for name in names)
    return (
        f"At 3e-4 Task-aware TLoRA is {small[0]:+.1f} points from LoRA, at the rates chosen for each {own[0]:+.1f}: the one "
        f"small rate moves LoRA by {lora_small - lora:+.1f} points (from {lora:.1f} to {lora_small:.1f}), Task-aware TLoRA by "
        f"{ours_small - ours:+.1f} (from {ours:.1f} to {ours_small:.1f}).{scale_and_rate(rows)}"
    )


def scale_and_rate(rows):
    """What four times Task-aware TLoRA's scale at a quarter of its rate does; empty until it is measured."""
    moved = differences(rows, "task_tlora-scaled", "task_tlora")
    if len(moved) < 3:
        return ""
    mean, half, _ = paired(moved)
    return (
        "\n\nIts scale needs no search of its own: of its matrices B alone is trained, without decay, and the length of AdamW's "
        "steps does not depend on the gradient's, so the scale and the rate are one setting (but for the clipping). Four times "
        f"the scale at a quarter of the rate (`--alpha 64 --lr 0.000445`) moves it by {mean:+.1f} ± {half:.1f} points on "
        f"{len(moved)} seeds."
    )


def said_of_A1(rows, found):
    """Where linear and nonlinear growth differ; empty until both are there."""
    if not found["triadapt", "nonlinear", 0.0]:
        return ""
    on_math, others = (paired(differences(rows, "triadapt", "nonlinear", tasks=t)) for t in (["math"], sweep.TASKS[:-1]))
    names = (("triadapt", "TriAdaptLoRA"), ("lora", "LoRA"))
    scales = {name: of_option(rows, method, "--alpha", ("4", "16", "64"), "16") for method, name in names}
    modes = of_option(rows, "triadapt", "--mode", ("linear", "nonlinear", "fixed"), "linear")
    words = (modes and f"TriAdaptLoRA's growth {modes}") + "".join(f"{of}'s scale {said}" for of, said in scales.items() if said)
    fresh = {name: found[f"{method}-scaled", method, 0.0] for method, name in names}
    moved = ", ".join(f"{name} {value[0]:+.1f} ± {value[1]:.1f}" for name, value in fresh.items() if value)
    words += f"On the fresh seeds, points of 64 from 16: {moved}.\n\n" if moved else ""
    words += of_start(rows, found, "triadapt")
    return words + (
        f"Linear and nonlinear growth are {on_math[0]:+.1f} ± {on_math[1]:.1f} points apart on math and {others[0]:+.1f} ± "
        f"{others[1]:.1f} on the other four."
    )


def flags_of(name):
    return " ".join(CONTESTANTS[name][1])


def numbers(rows, name, tasks=sweep.TASKS):
    """The mean of the trained numbers of a contestant's runs, the head's too; None without runs."""
    method, flags = CONTESTANTS[name]
    mine = [row for row in rows if (row["study"], row["method"], row["flags"]) == ("compare", method, flags)]
    found = [row["trained"] for row in mine if row["task"] in tasks and row["seed"] in sweep.FRESH and row["trained"]]
    return statistics.mean(found) if found else None


def best_first(found):
    """BESIDE, the best first; those that lack runs last."""
    return sorted(BESIDE, key=lambda key: -found[key][0] if found[key] else math.inf)


def beside(rows, found, pairs):
    """The table of these comparisons, task by task."""
    lines = [
        "| | from | trained numbers, times its | difference, points | 95 % | p (Holm) | verdict | "
        + " | ".join(sweep.TASKS)
        + " |"
    ]
    lines += ["|---|---|--:|--:|--:|--:|---|" + "--:|" * len(sweep.TASKS)]
    for one, other, margin in pairs:
        mine, its = numbers(rows, one), numbers(rows, other)
        share = f"{mine / its:.2f}" if mine and its else ""
        columns = shown(rows, found, one, other, margin).replace("does not hold here", "below").replace("holds", "above")
        each = [differences(rows, one, other, tasks=[task]) for task in sweep.TASKS] if found[one, other, margin] else []
        cells = [f"{statistics.mean(values):+.1f}" for values in each] or [""] * len(sweep.TASKS)
        lines.append(f"| {one} | {other} | {share} | {columns} {' | '.join(cells)} |")
    return "\n".join(lines)


def fallen(rows):
    """The fresh runs more than 20 points below the median that their contestant has on the task, in words."""
    found = []
    for name in CONTESTANTS:
        for task in sweep.TASKS:
            mine = {seed: value for (seed, of), value in scores(rows, name).items() if of == task and seed in sweep.FRESH}
            middle = statistics.median(mine.values()) if mine else 0.0
            found += [f"{name} on {task}, seed {seed}: {value:.1f} of {middle:.1f}"
                      for seed, value in mine.items() if value < middle - 20]  # fmt: skip
    return "; ".join(found) or "none"


def without_math(rows):
    """What the choice of one rate for all five tasks costs a method on the four but math: development means in words."""
    found, each = sweep.table(rows, "rates", []), []
    for method in ("lora", "triadapt", "tlora_plus", "task_tlora", "tlora"):
        for_all, for_four = (sweep.on_all(found, method, tasks) for tasks in (sweep.TASKS, sweep.TASKS[:-1]))
        chosen, best = (max(means, key=means.get) for means in (for_all, for_four))
        each.append(f"{method} {for_four[chosen]:.1f} and {for_four[best]:.1f} (at {sweep.rate(best):g})")
    return ", ".join(each)


def on_real(rows):
    """The table of the real encoder: each method's points from LoRA on the seeds that both have, task by task, and its scores on
    CoLA at each rate."""
    mine, tasks = [row for row in rows if row["study"] == "encoder"], ("cola", "sst2")
    heads = " | ".join(f"{task} ({sweep.headline(task)}) from LoRA" for task in tasks)
    lines, yard = [f"| | {heads} | cola at each rate, seed 100 |", "|---|--:|--:|---|"], sweep.on_encoder(mine)
    for method, more in sweep.contestants(mine):
        found, tried = sweep.on_encoder(mine, more), sweep.table(mine, "encoder", list(more))
        if (method, "cola") not in found:
            continue
        cells = []
        for task in tasks:
            ours, its = (of.get((name, task), (0, 0, {}))[2] for of, name in ((found, method), (yard, "lora")))
            values = [ours[seed] - its[seed] for seed in sorted(ours.keys() & its.keys() - {100})]
            cells.append("–")
            if len(values) > 1 and method != "lora":
                mean, half, p = paired(values)
                cells[-1] = f"{mean:+.1f} ± {half:.1f} (p {p:.3f}, {len(values)} seeds)"
        curve = [f"{sweep.rate(k):g}: {value:.1f}" for (k, seed), value in sorted(tried[method, "cola"].items()) if seed == 100]
        lines.append(f"| {' '.join([method, *more])} | {' | '.join(cells)} | {', '.join(curve)} |")
    return "\n".join(lines)


def longer(rows):
    """The table of `math` after four times the epochs, mean ± standard deviation over the seeds that both schedules have; below
    it the largest distances from LoRA."""
    distances, lines = {}, ["| | seeds | 3 epochs | 12 epochs | from LoRA, 3 | from LoRA, 12 |", "|---|--:|--:|--:|--:|--:|"]
    of = {name: {seed: value for (seed, task), value in scores(rows, name).items() if task == "math"} for name in CONTESTANTS}
    for name in [name for name in CONTESTANTS if name + "-long" in CONTESTANTS and of[name + "-long"]]:
        pairs = of[name], of[name + "-long"]
        seeds = sorted(set.intersection(*map(set, (*pairs, of["lora"], of["lora-long"]))))
        values = [[mine[seed] for seed in seeds] for mine in pairs]
        if len(seeds) > 1:
            cells = [f"{statistics.mean(each):.1f} ± {statistics.stdev(each):.1f}" for each in values]
            for each, its in zip(values, (of["lora"], of["lora-long"])):
                distances[name] = statistics.mean(each) - statistics.mean(its[seed] for seed in seeds)
                cells.append(f"{distances[name]:+.1f}")
            lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")
    last = sorted(distances, key=distances.get)[:2]
    if len(distances) > 2:  # LoRA is one of them
        lines += [
            "",
            f"After 12 epochs {last[0]} is {distances[last[0]]:+.1f} from LoRA, the others {distances[last[1]]:+.1f} at most.",
        ]
    return "\n".join(lines)


SAID = {"T2": said_of_T2, "P2": said_of_P2, "K1": said_of_K1, "A1": said_of_A1}  # below a claim's table


def means_by_rate(rows):
    """Of LoRA and of the two papers that contradict each other {method: {k: mean over the tasks}}, from the search for rates."""
    found = sweep.table(rows, "rates", [])
    return {method: sweep.on_all(found, method) for method in ("lora", "tlora", "tlora_plus")}


def contradiction(means, distances, on_test):
    """TLoRA's paper against TLoRA+'s in five sentences. `means` as means_by_rate gives them, `distances` {task: TLoRA - LoRA};
    `on_test`: the same on the test split at one rate for all tasks, TLoRA with and without its dropout."""
    lora, tlora, plus = means.values()
    best = {method: max(mine, key=mine.get) for method, mine in means.items()}
    low, high = best["tlora_plus"], max(lora.keys() & tlora.keys() & plus.keys(), key=lambda k: tlora[k] - max(lora[k], plus[k]))
    own, shared = max(lora.values()) - max(tlora.values()), lora[low] - tlora[low]
    of_B = B_TIMES * sweep.rate(low)
    tasks = ", ".join(f"{task} {value:+.1f}" for task, value in distances.items())
    score = {method: f"{max(mine.values()):.1f}" for method, mine in means.items()}
    at = {k: f"TLoRA+ {plus[k]:.1f}, LoRA {lora[k]:.1f}" for k in (low, high)}
    return f"""TLoRA's paper finds TLoRA level with LoRA, at a rate of 1e-3; TLoRA+'s finds it behind LoRA and TLoRA+ at every
rank, with all three at 1e-4, a tenth of it. Here (the search for rates: development split, seeds 100 and 101, TLoRA of rank 32,
the others of rank 8), in the mean of five tasks at {sweep.rate(low):g}, the best rate of TLoRA+, TLoRA is last with
{tlora[low]:.1f} ({at[low]}); at {sweep.rate(high):g} it is first with {tlora[high]:.1f} ({at[high]}),
because the others no longer learn on some tasks. So a rate that all share can choose the winner, and it is not even the same
rate: what TLoRA+ calls its own is A's, and its B trains at {B_TIMES:g} times that (ratio 4, the default here; its paper names
none where it compares the three), at its best at {of_B:.3g}, where TLoRA, whose only trained matrix is B,
is best at {sweep.rate(best["tlora"]):g}. With a rate for each,
TLoRA has {score["tlora"]}, TLoRA+ {score["tlora_plus"]} and LoRA {score["lora"]}: it does not reach LoRA, as TLoRA+'s paper says,
but the distance is {own:.1f} points instead of the {shared:.1f} at the best rate of TLoRA+. What is left differs
from task to task ({tasks}, each method at its best rate
on that task), and much of it is the author's dropout of 0.5: on the test split, with one rate for all tasks,
TLoRA is {on_test[0]:+.1f} points from LoRA with it and {on_test[1]:+.1f} without it (below)."""


def picture(means):
    """docs/contradiction.png: the mean over the tasks against the rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 4.2))
    for method, mine in means.items():
        colour, best = sweep.COLOURS[method], max(mine, key=mine.get)
        ax.plot([sweep.rate(k) for k in mine], list(mine.values()), "o-", color=colour, markersize=4, label=method)
        ax.plot(sweep.rate(best), mine[best], "o", color=colour, markersize=9, markerfacecolor="none")
    ax.set_xscale("log")
    ax.set_xlabel(f"learning rate (tlora_plus: of A; its B has {B_TIMES} times that)")
    ax.set_ylabel("mean of five tasks, points")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    ax.set_title("A low rate makes TLoRA the last of three, a high one the first (rings: each at its best)", fontsize=10)
    figure.tight_layout()
    figure.savefig(os.path.join(sweep.ROOT, "docs", "contradiction.png"), dpi=90)
    plt.close(figure)


def changes(rows, found):
    """What a method is compared with beside LoRA: what the names mean, and the table."""
    return f"""Each at the one rate found for it ([rates.md](rates.md), other flags), where no other stands
(`python bench/sweep.py compare --methods METHOD --flags ...`):

- tlora-plain: without the author's dropout of 0.5 (`{flags_of("tlora-plain")}`).
- -identity: the middle matrix starts at I and what follows it at zero, as LoRA and the authors' MTLoRA start
  (`{flags_of("tlora_plus-identity")}`, `{flags_of("triadapt-identity")}`).
- -scaled: four times the scale (`{flags_of("triadapt-scaled")}`, `{flags_of("lora-scaled")}`).
- tlora_plus-r32: rank 32 (`{flags_of("tlora_plus-r32")}`).
- lora-r3: LoRA of rank 3 (`{flags_of("lora-r3")}`) has the trained numbers nearest to TLoRA's and Task-aware TLoRA's.
- tlora_plus-no-decay, triadapt-preserve: `{flags_of("tlora_plus-no-decay")}`, `{flags_of("triadapt-preserve")}`, both at the
  rate chosen without it.

{beside(rows, found, FURTHER)}"""


def text():
    """docs/claims.md."""
    rows = sweep.valid(sweep.read(sweep.ROWS))
    found, searched = answers(rows), sweep.table(rows, "rates", [])
    distances = {task: sweep.best(searched["tlora", task])[1] - sweep.best(searched["lora", task])[1] for task in sweep.TASKS}
    on_test = [statistics.mean(differences(rows, name, "lora")) for name in ("tlora", "tlora-plain")]
    parts = "\n\n".join(section(claim, rows, found) for claim in CLAIMS)
    return f"""# The papers' headline claims

Made by `python bench/claims.py pages` from the rows of `bench/sweep.jsonl`: the generated tasks {", ".join(sweep.TASKS)}, the
tiny base, the same epochs for all. In the tables each method trains at its default, one rate for all tasks
([rates.md](rates.md)), on the seeds 0 to 7 and is scored on the test split.
Weight decay is each paper's (TLoRA+ 0.1, TLoRA and full 0.01, the others 0). The epochs and the head's rate were
chosen with LoRA alone. A mean of five tasks is mostly `math` where a method fails there, so the first table has each
task. An interval is of its comparison alone, p is corrected for all of this page (Holm), and a verdict needs p < 0.01, else it is
"undecided": see the docstring of [bench/claims.py](../bench/claims.py), which takes the claims' names, T2, P2, K1 and A1.

## Is TLoRA as good as LoRA, or does it fail?

{contradiction(means_by_rate(rows), distances, on_test)}

![mean score against learning rate](contradiction.png)

## Every method from LoRA

`python bench/sweep.py compare`. The same epochs for all.

{beside(rows, found, best_first(found))}

The one rate was chosen with `math` among the five. For the other four alone it is too high for some, so what is said without
math favours those that lose least by it: development means of the four at the default, and at the best rate for these four:
{without_math(rows)}.

A single run that does not learn widens an interval. Those more than 20 points below their contestant's median on the task, of
all on this page: {fallen(rows)}.

## What moves them

{changes(rows, found)}

## And on a real encoder?

`python bench/sweep.py encoder --backbone DIR --data GLUE`: all-MiniLM-L6-v2, GLUE's CoLA and 3,000 rows of SST-2, six epochs,
each method at the best of four rates or more on that task ([rates.md](rates.md)), the development split; points ± 95 %, paired
by seed, p not corrected. On CoLA no rate is good for all: at 0.000316 TriAdaptLoRA learns nothing (a Matthews correlation of 0),
at 0.001 the other four, with their defaults, learn nothing.

{on_real(rows)}

## Does a longer schedule close the distance on math?

`python bench/sweep.py compare --methods METHOD --tasks math --seeds 0 1 2 --flags --epochs 12`, the rate as before; test split.

{longer(rows)}

{parts}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=[*CLAIMS, "pages"])
    parser.add_argument("--show", action="store_true", help="make no runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many minutes")
    args = parser.parse_args()
    if args.claim == "pages":
        page = text()
        picture(means_by_rate(sweep.valid(sweep.read(sweep.ROWS))))
        with open(PAGE, "w", encoding="utf-8") as f:
            f.write(page)
        return write_readme(sweep.valid(sweep.read(sweep.ROWS)))
    if not args.show:
        args.rows, args.checkpoint, args.places = sweep.ROWS, sweep.MINILM, lambda task: []
        args.plan = lambda rows: wanted(rows, args.claim)
        sweep.work(args)
    rows = sweep.valid(sweep.read(sweep.ROWS))
    print(section(args.claim, rows, answers(rows)))


if __name__ == "__main__":
    main()
