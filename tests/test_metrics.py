"""harness/metrics.py: predictions from logits, and metrics against hand-computed values and naive references."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

import data
from data import TASKS, Example
from harness import metrics

TEXTS = [
    "the cat sees the dog .",
    "two big dogs bought seven apples in the old museum yesterday .",
    "the film was long , dull and without charm .",
    "who sold the small red boat to the farmer ?",
]


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS * 3, 350)


# ------------------------------------------------------------------------- predictions


def test_class_and_score_predictions_are_the_largest_logit_and_the_value():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    for given in (logits, logits.bfloat16(), logits.numpy()):
        assert metrics.predictions(TASKS["mnli"], [None, None], given)[0] == [1, 0]
    assert metrics.predictions(TASKS["stsb"], [None, None], torch.tensor([1.5, -2.0]))[0] == [1.5, -2.0]
    with pytest.raises(ValueError, match="task math generates text"):
        metrics.predictions(TASKS["math"], [None], logits)


def test_probabilities_are_those_of_the_logits_in_float32():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    want = np.exp(logits.double().numpy())
    want /= want.sum(1, keepdims=True)
    for given in (logits, logits.bfloat16()):
        p = metrics.predictions(TASKS["mnli"], [None, None], given)[1]
        error = np.abs(np.array(p) - want).max()
        print("error", error)
        assert error < 1e-7


def test_a_spans_probability_and_when_there_is_no_answer():
    example = Example("0", ("who", "ab cd"), ())
    row = {"offsets": [None, None, (0, 2), (3, 5), None]}
    starts, ends = [1.0, 0.5, 0.0, 4.0, 0.25], [0.0, 2.0, 5.0, 1.5, 0.75]
    for first, offsets, answer, span in [
        ((1.0, 0.0), row["offsets"], "cd", (3, 3)),  # 4 + 1.5 beats 1 + 0
        ((3.0, 2.75), row["offsets"], "", (0, 0)),  # 3 + 2.75 beats it, its half would not
        ((3.0, 2.5), row["offsets"], "", (0, 0)),  # level
        ((-9.0, -9.0), [None] * 5, "", (0, 0)),  # no token of the context
    ]:
        logits = torch.tensor([[first[0], *starts[1:]], [first[1], *ends[1:]]]).T[None]  # (1, 5, 2)
        answers, p = metrics.predictions(TASKS["squad"], [({"offsets": offsets}, example)], logits)
        e = np.exp(logits[0].double().numpy())
        e /= e.sum(0)
        assert answers == [answer] and abs(p[0] - e[span[0], 0] * e[span[1], 1]) < 1e-7, (answers, p)


def test_an_answer_has_30_tokens_at_most_as_in_berts_code():
    assert metrics.MAX_ANSWER == 30


def test_span_labels_point_at_the_answer_and_predictions_give_its_text_back(tokenizer):
    rng, cut, found = random.Random(4), 0, 0
    for _ in range(200):
        words = rng.choices(["the", "cat", "museum", "Zoë", "1,000", "日本", "(sold)", "dog."], k=rng.randint(1, 25))
        context, a = " ".join(words), rng.randrange(len(words))
        b = min(len(words), a + rng.randint(1, 4))
        answer = " ".join(words[a:b])
        start = len(" ".join(words[:a])) + (a > 0)
        question = "who sold " * rng.choice([1, 30])
        example = Example("0", (question, context), ((answer, start), ("other", 0)))
        row = data.features(TASKS["squad"], [example], tokenizer, 48)[0]
        first, last = row["labels"]
        logits = torch.zeros(1, len(row["input_ids"]), 2)
        if (first, last) == (0, 0):
            cut += 1
            assert row["offsets"][-2][1] < start + len(answer)
            assert metrics.predictions(TASKS["squad"], [(row, example)], logits)[0] == [""]
            continue
        found += 1
        logits[0, first, 0] = logits[0, last, 1] = 1.0
        expected = answer if last - first < metrics.MAX_ANSWER else ""
        assert metrics.predictions(TASKS["squad"], [(row, example)], logits)[0] == [expected]
        logits[0, 0] = 2.0  # now [CLS] wins
        assert metrics.predictions(TASKS["squad"], [(row, example)], logits)[0] == [""]
    assert cut > 20 and found > 100
    assert data.features(TASKS["squad"], [Example("0", ("who ?", "a b"), ())], tokenizer, 48)[0]["labels"] == (0, 0)


def test_an_answer_without_spaces_around_it_does_not_take_its_neighbours(tokenizer):
    tight = Example("0", ("who ?", "a (x) b"), (("x", 3),))
    row = data.features(TASKS["squad"], [tight], tokenizer, 48)[0]
    assert [row["offsets"][t] for t in row["labels"]] == [(3, 4), (3, 4)]


def test_a_predicted_span_has_at_most_max_answer_tokens(tokenizer):
    example = Example("0", ("who sold ?", "x" * 60), ())
    row = data.features(TASKS["squad"], [example], tokenizer, 128)[0]
    first = next(t for t, place in enumerate(row["offsets"]) if place)
    for length, allowed in [(metrics.MAX_ANSWER, True), (metrics.MAX_ANSWER + 1, False)]:
        logits = torch.zeros(1, len(row["input_ids"]), 2)
        logits[0, 0] = 0.6  # no answer: 1.2, below the full span's 2 and above any other's 1
        logits[0, first, 0] = logits[0, first + length - 1, 1] = 1.0
        (answer,) = metrics.predictions(TASKS["squad"], [(row, example)], logits)[0]
        start, end = row["offsets"][first][0], row["offsets"][first + length - 1][1]
        assert answer == ("x" * (end - start) if allowed else "")


def test_a_predicted_span_is_the_best_allowed_one(tokenizer):
    rng = np.random.default_rng(0)
    example = Example("0", ("who sold ?", " ".join(f"{i}" for i in range(45))), ())
    row = data.features(TASKS["squad"], [example], tokenizer, 128)[0]
    tokens = [t for t, place in enumerate(row["offsets"]) if place]
    for _ in range(20):
        logits = rng.normal(size=(len(row["input_ids"]), 2))
        logits[0] -= 20
        best = max((logits[i, 0] + logits[j, 1], i, j) for i in tokens for j in tokens if 0 <= j - i < metrics.MAX_ANSWER)
        text = example.text[1][row["offsets"][best[1]][0] : row["offsets"][best[2]][1]]
        assert metrics.predictions(TASKS["squad"], [(row, example)], logits[None])[0] == [text.strip()]


# ----------------------------------------------------------------------------- metrics


def test_metrics_have_hand_computed_values():
    assert metrics.accuracy([1, 0, 2, 1], [1, 0, 1, 1]) == 0.75
    assert metrics.f1([1, 1, 1, 0], [1, 0, 1, 0]) == 0.8  # precision 1, recall 2/3
    assert metrics.matthews([1, 1, 1, 0], [1, 0, 1, 0]) == 2 / math.sqrt(12)
    assert metrics.matthews([1, 0, 1, 0], [1, 0, 1, 0]) == 1.0 and metrics.matthews([1, 0], [0, 1]) == -1.0
    assert metrics.macro_f1([0, 1, 2, 2], [0, 1, 1, 2]) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3, abs=1e-15)
    assert metrics.pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8, abs=1e-15)
    assert metrics.spearman([1, 2, 3, 4], [10, 1000, 100, 1e9]) == pytest.approx(0.8, abs=1e-15)
    assert metrics.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5), abs=1e-15)


def test_correlations_of_negative_numbers_of_float32_and_of_a_line_without_overshooting():
    assert metrics.pearson([-3.0, -2.0, -1.0], [1.0, 2.0, 3.0]) == pytest.approx(1.0, abs=1e-15)
    assert metrics.pearson([1.0, 2.0, 3.0], [-3.0, -2.0, -1.0]) == pytest.approx(1.0, abs=1e-15)
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 50)).astype(np.float32)
    error = abs(metrics.pearson(x, y) - np.corrcoef(x.astype(np.float64), y.astype(np.float64))[0, 1])
    print("error", error)
    assert error < 1e-14
    beyond = set()
    for _ in range(300):
        x = rng.random(7)
        for sign in (1, -1):
            a, b = x - x.mean(), sign * (x / 3 - (x / 3).mean())
            beyond.add(bool(abs(a @ b / math.sqrt((a @ a) * (b @ b))) > 1))
            assert abs(metrics.pearson(x, sign * x / 3)) <= 1
    assert beyond == {True, False}  # rounding alone would give more than 1 now and then


def test_degenerate_metrics_are_zero_and_never_nan():
    for y, p in [
        ([1, 1, 1], [1, 0, 1]),
        ([0, 0, 0], [0, 0, 0]),
        ([1, 0, 1], [1, 1, 1]),
        ([0], [0]),
        ([1, 0], [0, 0]),
    ]:
        assert metrics.matthews(y, p) == 0.0
    assert metrics.f1([0, 0], [0, 0]) == metrics.f1([1, 0], [0, 0]) == metrics.f1([0, 0], [1, 0]) == 0.0
    assert metrics.macro_f1([0, 0], [0, 0]) == 1.0 and metrics.macro_f1([0, 0], [1, 1]) == 0.0
    for metric in (metrics.pearson, metrics.spearman):
        assert metric([2.5, 2.5, 2.5], [1, 2, 3]) == metric([1, 2, 3], [0.1, 0.1, 0.1]) == metric([1], [2]) == 0.0
        assert metric([1e200, 2e200, 4e200], [1e-300, 2e-300, 4e-300]) == pytest.approx(1.0, abs=1e-12)
        assert metric([1e9 + 1, 1e9 + 2, 1e9 + 3], [3, 2, 1]) == pytest.approx(-1.0, abs=1e-12)


def test_class_metrics_equal_a_naive_reference_on_all_small_cases():
    compared = 0
    for n in range(1, 6):
        for y, p in itertools.product(itertools.product((0, 1), repeat=n), repeat=2):
            pairs = Counter(zip(y, p))
            tp, fn, fp, tn = pairs[1, 1], pairs[1, 0], pairs[0, 1], pairs[0, 0]
            assert metrics.accuracy(y, p) == (tp + tn) / n
            precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
            f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
            assert metrics.f1(y, p) == pytest.approx(f1, abs=1e-15)
            var_y, var_p = sum(y) * (n - sum(y)), sum(p) * (n - sum(p))  # n^2 times the variances
            phi = (n * tp - sum(y) * sum(p)) / math.sqrt(var_y * var_p) if var_y * var_p else 0
            assert metrics.matthews(y, p) == pytest.approx(phi, abs=1e-15)
            compared += phi not in (-1, 0, 1)
    assert compared > 100


def test_correlations_equal_a_naive_reference():
    def rank(values):  # how many are smaller, and half of how many are equal
        return [sum(v < x for v in values) + (1 + sum(v == x for v in values)) / 2 for x in values]

    def correlation(x, y):
        mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
        xy, xx, yy = (
            math.fsum((a - m) * (b - k) for a, b in zip(u, v)) for u, v, m, k in ((x, y, mx, my), (x, x, mx, mx), (y, y, my, my))
        )
        return xy / math.sqrt(xx * yy) if xx * yy else 0.0

    rng, worst = random.Random(0), 0.0
    for _ in range(300):
        n = rng.randint(2, 30)
        draw = rng.choice([rng.random, lambda: rng.randrange(4), lambda: rng.gauss(1e3, 1)])
        x, y = [draw() for _ in range(n)], [draw() for _ in range(n)]
        worst = max(
            worst,
            abs(metrics.pearson(x, y) - correlation(x, y)),
            abs(metrics.spearman(x, y) - correlation(rank(x), rank(y))),
        )
    print("largest difference", worst)
    assert worst < 1e-11


def test_squad_metrics_equal_the_official_definition():
    assert metrics.normalize_answer(" The  Cat's, an apple-tree! ") == "cats appletree"
    assert metrics.normalize_answer("thea an a the") == "thea"
    gold = [
        Example("0", ("q", "c"), (("the Denver Broncos", 0), ("Broncos", 11))),
        Example("1", ("q", "c"), ()),
    ]
    for predictions, expected in [
        (["denver broncos!", ""], {"f1": 1.0, "em": 1.0}),
        (["Broncos", ""], {"f1": 1.0, "em": 1.0}),
        (["the Broncos of Denver", "x"], {"f1": 0.4, "em": 0.0}),  # 2 of 3 and 2 words in common: F1 0.8
        (["", "the"], {"f1": 0.5, "em": 0.5}),  # an article alone is no answer
    ]:
        assert metrics.score(TASKS["squad"], gold, predictions) == pytest.approx(expected, abs=1e-15)

    bare = [Example("0", ("q", "c"), (("the", 0), ("Broncos", 11)))]  # "the" is left out of the answers
    assert metrics.score(TASKS["squad"], bare, [""]) == {"f1": 0.0, "em": 0.0}

    def official(gold, answer):  # precision and recall as in the official script
        gold, answer = gold.split(), answer.split()
        same = sum((Counter(gold) & Counter(answer)).values())
        if not gold or not answer:
            return float(gold == answer)
        precision, recall = same / len(answer), same / len(gold)
        return 2 * precision * recall / (precision + recall) if same else 0.0

    rng = random.Random(0)
    for _ in range(300):
        a, b = (" ".join(rng.choices(["x", "y", "z"], k=rng.randrange(5))) for _ in range(2))
        assert metrics.answer_f1(a, b) == pytest.approx(official(a, b), abs=1e-15)
        assert metrics.answer_em(a, b) == (a == b)


def test_math_is_scored_by_the_number_after_the_marks():
    gold = "1,000 + 1\n#### 1,001"
    for answer, right in [
        ("#### 1001", 1), ("so\n#### 1,001 apples", 1), ("#### 1001 #### 7", 1), ("1001", 0), ("####1001", 0),
        ("#### -1001", 0), ("#### 1001.0", 0), ("", 0),
    ]:  # fmt: skip
        assert metrics.score(TASKS["math"], [Example("0", ("q",), gold)], [answer]) == {"em": right}
    assert metrics.final_number("#### -3.5") == "-3.5" and metrics.final_number("none") is None


def test_math_and_macro_f1_are_means_over_rows_and_classes():
    rows = [Example(str(i), ("q",), f"so #### {i}") for i in range(4)]
    assert metrics.score(TASKS["math"], rows, ["#### 0", "#### 7", "no", "#### 3"]) == {"em": 0.5}
    task = data.Task("own", "classification", ("a", "b"), ("macro_f1",))
    rows = [Example(str(i), ("q",), label) for i, label in enumerate([0, 0, 1, 1])]
    assert metrics.score(task, rows, [0, 0, 1, 0]) == {"macro_f1": pytest.approx((4 / 5 + 2 / 3) / 2)}


def test_score_gives_the_tasks_metrics_headline_first_and_refuses_what_it_cannot_score():
    for name, headline in [
        ("cola", "matthews"),
        ("mrpc", "accuracy"),
        ("stsb", "pearson"),
        ("mnli", "accuracy"),
    ]:
        examples = [Example(str(i), ("a", "b"), i % 2) for i in range(5)]
        scores = metrics.score(TASKS[name], examples, [e.label for e in examples])
        assert tuple(scores) == TASKS[name].metrics and list(scores)[0] == headline
        assert scores == pytest.approx(dict.fromkeys(scores, 1.0)) and {type(v) for v in scores.values()} == {float}
    with pytest.raises(ValueError, match="4 predictions for 5 examples"):
        metrics.score(TASKS["cola"], examples, [0] * 4)
    with pytest.raises(ValueError, match="prediction of row 1 is not finite"):
        metrics.score(TASKS["stsb"], examples, [0.0, float("nan"), 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="no labels to score against"):
        metrics.score(TASKS["cola"], [Example("0", ("a",))], [0])
    with pytest.raises(ValueError, match="no labels to score against"):
        metrics.score(TASKS["mlm"], [Example("0", ("a",))], [0])


# ------------------------------------------------------------------ of generated answers


def test_exact_match_is_of_the_stripped_texts():
    assert metrics.exact_match([" a b", "c", "d", "e"], ["a b ", "C", "d", "f"]) == 0.5


@pytest.mark.parametrize(
    "label, prediction, same",
    [
        ("so #### 1,200", "it is 1200.", True), ("7", "7 or 8", False), ("7", "8 or 7", True), ("3", "none", False),
        ("none", "none", False), ("-.5", "1 - 1.5 is -0.5", True), ("-5", "5", False), ("2.50", "2.5", True),
        ("2.5", "2.", False), ("12,345.5", "12345.50", True),
    ],
)  # fmt: skip
def test_the_last_numbers_are_compared_as_numbers(label, prediction, same):
    assert metrics.last_number([label, "1"], [prediction, "1"]) == (2 if same else 1) / 2


@pytest.mark.parametrize(
    "label, prediction, same",
    [
        (r"so \boxed{\frac{1}{2}}", r"\boxed{0}, no: \boxed{\frac{1} {2}} !", True),
        (r"\frac{1}{2}", r"\boxed{ \frac{1}{2} }", True),
        ("1/2", r"\boxed{1/3}", False), (r"\boxed{3}", "3", False), (r"\boxed{4}", r"\boxed{4", False), ("4", r"\boxed{4", False),
        (r"\boxed{4", r"\boxed{4}", False), (r"\boxed{x}", r"\boxed{x}} and \boxed{{x}}", False), ("7", r"{\boxed{7}}", True),
    ],
)  # fmt: skip
def test_what_stands_in_the_last_box_is_compared(label, prediction, same):
    assert metrics.boxed([label, "1"], [prediction, r"\boxed{1}"]) == (2 if same else 1) / 2


def test_choices_are_scored_by_the_chosen_text():
    task = data.Task("sft", "lm", metrics=("choice",))
    rows = [Example(str(i), (("user", "q"),), label) for i, label in enumerate(["a", "b"])]
    assert metrics.score(task, rows, ["a", "c"]) == {"choice": 0.5}
    task = data.Task("sft", "lm", metrics=("exact_match", "last_number", "boxed"))
    assert metrics.score(task, rows, ["a", "b"]) == {"exact_match": 1.0, "last_number": 0.0, "boxed": 0.0}
