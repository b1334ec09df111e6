"""What a model predicts, from its logits, and how good that is: the metrics of GLUE, SQuAD 2.0 and GSM8K."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

MAX_ANSWER = 30  # tokens of a predicted span, as in BERT's SQuAD code


def predictions(task, rows: Sequence[tuple], logits: torch.Tensor) -> tuple[list, list]:
    """(answers, probabilities) for some rows, (feature, Example) each, from their logits, one each:

    class indices and lists over classes from (B, C); scores and None from (B,); texts, "" where [CLS] beats the best
    span, and that span's probability from (B, T, 2).
    """
    logits = torch.as_tensor(logits).float().cpu()
    if task.kind == "classification":
        return logits.argmax(-1).tolist(), logits.softmax(-1).tolist()
    if task.kind == "regression":
        return logits.tolist(), [None] * len(rows)
    if task.kind == "span":
        spans = [best_span(f["offsets"], e.text[1], scores.numpy()) for (f, e), scores in zip(rows, logits)]
        p = logits.softmax(1)  # (B, T, 2), over the tokens
        return [text for text, _, _ in spans], [(p[i, a, 0] * p[i, b, 1]).item() for i, (_, a, b) in enumerate(spans)]
    raise ValueError(f"task {task.name} generates text; there is no prediction in one batch of logits")


def best_span(offsets: Sequence, context: str, scores: np.ndarray) -> tuple[str, int, int]:
    """(text, first token, last token) of the best span of the context, ("", 0, 0) for no answer; scores (T, 2)."""
    tokens = [t for t, place in enumerate(offsets) if place]
    if not tokens:
        return "", 0, 0
    total = scores[tokens, 0][:, None] + scores[tokens, 1][None, :]  # (first, last)
    length = np.arange(len(tokens))[None, :] - np.arange(len(tokens))[:, None]
    total[(length < 0) | (length >= MAX_ANSWER)] = -np.inf
    first, last = divmod(int(total.argmax()), len(tokens))
    if scores[0].sum() >= total[first, last]:
        return "", 0, 0
    first, last = tokens[first], tokens[last]
    return context[offsets[first][0] : offsets[last][1]].strip(), first, last


def score(task, examples: Sequence, predictions: Sequence) -> dict[str, float]:
    """{metric: value} in the order of task.metrics, the headline first. predictions, one for each
    example: class indices, scores, answers as text."""
    labels = [e.label for e in examples]
    if len(labels) != len(predictions) or not labels:
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} examples")
    if None in labels or task.pretraining:
        raise ValueError(f"task {task.name}: the examples have no labels to score against")
    if task.kind == "regression" and not np.isfinite(predictions).all():
        raise ValueError(f"prediction of row {int(np.argmin(np.isfinite(predictions)))} is not finite")
    return {name: float(METRICS[task.kind][name](labels, predictions)) for name in task.metrics}  # type: ignore[index]


def accuracy(labels: Sequence, predictions: Sequence) -> float:
    return np.mean(np.asarray(labels) == np.asarray(predictions))


def confusion(labels: Sequence, predictions: Sequence, positive: int = 1) -> tuple[int, int, int, int]:
    """(true positive, false positive, false negative, true negative) counts as exact ints."""
    y, p = np.asarray(labels) == positive, np.asarray(predictions) == positive
    return int((y & p).sum()), int((~y & p).sum()), int((y & ~p).sum()), int((~y & ~p).sum())


def f1(labels: Sequence, predictions: Sequence, positive: int = 1) -> float:
    """F1 of one class; 0 if it is neither there nor predicted."""
    tp, fp, fn, _ = confusion(labels, predictions, positive)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def macro_f1(labels: Sequence, predictions: Sequence) -> float:
    """Mean F1 of the classes that are there or predicted."""
    return np.mean([f1(labels, predictions, c) for c in sorted({*labels, *predictions})])  # type: ignore[return-value]


def matthews(labels: Sequence, predictions: Sequence) -> float:
    """Matthews correlation of two classes; 0 if labels or predictions are all the same."""
    tp, fp, fn, tn = confusion(labels, predictions)
    under = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(under) if under else 0.0


def pearson(labels: Sequence, predictions: Sequence) -> float:
    """Pearson correlation; 0 if one side is constant."""
    x, y = (np.asarray(v, dtype=np.float64) for v in (labels, predictions))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # no overflow in the squares below
    x, y = x - x.mean(), y - y.mean()
    return np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0)


def spearman(labels: Sequence, predictions: Sequence) -> float:
    """Pearson correlation of the ranks; ties share their average rank."""

    def ranks(values):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return pearson(ranks(labels), ranks(predictions))


def normalize_answer(text: str) -> str:
    """SQuAD's official comparison form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_em(gold: str, answer: str) -> float:
    return float(normalize_answer(gold) == normalize_answer(answer))


def answer_f1(gold: str, answer: str) -> float:
    """F1 of the words in common; where one side has no words, 1 if both have none."""
    gold, answer = normalize_answer(gold).split(), normalize_answer(answer).split()
    if not gold or not answer:
        return float(gold == answer)
    common = sum((Counter(gold) & Counter(answer)).values())
    return 2 * common / (len(gold) + len(answer))


def over_answers(compare: Callable[[str, str], float]) -> Callable[[Sequence, Sequence], float]:
    """Mean over questions of the best comparison with one of the answers; no answer is ''."""

    def metric(labels, predictions):
        golds = [[text for text, _ in spans if normalize_answer(text)] or [""] for spans in labels]
        return np.mean([max(compare(g, p) for g in gold) for gold, p in zip(golds, predictions)])

    return metric


def final_number(text: str) -> str | None:
    """What GSM8K's official code compares: the number after the first '#### ', commas removed."""
    match = re.search(r"#### (-?[0-9.,]+)", text)
    return match and match[1].replace(",", "")  # type: ignore[return-value]


def math_em(labels: Sequence[str], predictions: Sequence[str]) -> float:
    return np.mean([final_number(label) == final_number(p) for label, p in zip(labels, predictions)])  # type: ignore[return-value]


def exact_match(labels: Sequence[str], predictions: Sequence[str]) -> float:
    return np.mean([label.strip() == p.strip() for label, p in zip(labels, predictions)])  # type: ignore[return-value]


def last_number(labels: Sequence[str], predictions: Sequence[str]) -> float:
    """As GSM8K is scored when answers are free text: the last number of both, commas removed, as numbers."""

    def number(text):
        found = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
        return float(found[-1].replace(",", "")) if found else None

    return np.mean([number(p) is not None and number(label) == number(p) for label, p in zip(labels, predictions)])


def boxed(labels: Sequence[str], predictions: Sequence[str]) -> float:
    r"""As MATH is scored: what stands in the last \boxed{..}, spaces aside; where a label has none, all of it."""

    def inside(text):
        start = text.rfind("\\boxed{") + len("\\boxed{")
        if start < len("\\boxed{"):
            return None
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return "".join(text[start:end].split())
        return None

    golds = [inside(label) or "".join(label.split()) for label in labels]
    return np.mean([inside(p) == gold for gold, p in zip(golds, predictions)])


METRICS = {
    "classification": {"accuracy": accuracy, "f1": f1, "macro_f1": macro_f1, "matthews": matthews},
    "regression": {"pearson": pearson, "spearman": spearman},
    "span": {"f1": over_answers(answer_f1), "em": over_answers(answer_em)},
    "lm": {"em": math_em, "exact_match": exact_match, "last_number": last_number, "boxed": boxed, "choice": exact_match},
}
