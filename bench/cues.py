"""What the labels of the generated tasks betray on their surface: bags of words, and the second text alone.

    python bench/cues.py --write    # writes bench/cues.md; about three minutes

A logistic regression (ridge regression for stsb) on word counts, trained on the training split and measured on the
development split, with the best of three penalties there: an upper estimate. "both" counts the words of the two texts
apart, "second" those of the second text only. For squad it says whether there is an answer, for math which number.
"""

import argparse
import os
import sys

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import data  # noqa: E402
from harness import metrics  # noqa: E402

torch.set_num_threads(1)


def target(task, example):
    """What the regression predicts of an example."""
    if task.kind == "span":
        return int(bool(example.label))
    return metrics.final_number(example.label) if task.kind == "lm" else example.label


def words(example, texts):
    return [f"{i} {word}" for i in texts for word in example.text[i].split()]


def counts(examples, texts, columns):
    """(rows, columns) of word counts, a last column of ones."""
    x = np.zeros((len(examples), len(columns) + 1), dtype=np.float32)
    x[:, -1] = 1
    for row, example in zip(x, examples):
        for word in words(example, texts):
            if word in columns:
                row[columns[word]] += 1
    return torch.from_numpy(x)


def fit(x, y, classes, penalty):
    """Weights (columns, classes) of the softmax regression, by Adam on all rows at once."""
    w = torch.zeros(x.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.05)
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(x @ w, y) + 0.5 * penalty * (w[:-1] ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return w.detach()


def reach(task, texts):
    """The task's first metric on the development split (accuracy for squad and math), in points of 100."""
    train, dev = data.load(task, split="train"), data.load(task, split="dev")
    columns = {word: i for i, word in enumerate(sorted({w for e in train for w in words(e, texts)}))}
    x, x_dev = counts(train, texts, columns), counts(dev, texts, columns)
    y, y_dev = [target(task, e) for e in train], [target(task, e) for e in dev]
    best = -np.inf
    if task.kind == "regression":
        for penalty in (1.0, 10.0, 100.0):
            w = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ torch.tensor(y))
            best = max(best, metrics.pearson(y_dev, (x_dev @ w).tolist()))
        return 100 * best
    known = sorted(set(y))
    for penalty in (1e-2, 1e-3, 1e-4):
        w = fit(x, torch.tensor([known.index(label) for label in y]), len(known), penalty)
        guess = [known[i] for i in (x_dev @ w).argmax(1)]
        metric = metrics.METRICS["classification"][task.metrics[0]] if task.kind == "classification" else metrics.accuracy
        best = max(best, metric(y_dev, guess))
    return 100 * best


def constant(task):
    """The first metric of the best constant answer."""
    if task.kind == "regression" or task.metrics[0] == "matthews":
        return 0.0
    labels = [target(task, e) for e in data.load(task, split="dev")]
    return 100 * max(labels.count(label) for label in set(labels)) / len(labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write bench/cues.md")
    write = parser.parse_args().write
    lines = ["| task | metric | constant answer | bag of words | second text alone |", "|---|---|--:|--:|--:|"]
    for name in data.GENERATED:
        task = data.TASKS[name]
        if task.pretraining:
            continue
        metric = {"squad": "has an answer", "math": "accuracy"}.get(name, task.metrics[0])
        both = reach(task, (0, 1) if task.pair else (0,))
        second = f"{reach(task, (1,)):.1f}" if task.pair else ""
        lines.append(f"| {name} | {metric} | {constant(task):.1f} | {both:.1f} | {second} |")
        print(lines[-1], flush=True)
    text = """`python bench/cues.py`: what word counts alone reach on the development split, in points of 100, the best of three
penalties. Bag of words: a logistic regression on the counts of both texts; last column: on those of the second.

"""
    if write:
        with open(os.path.join(ROOT, "bench", "cues.md"), "w") as f:
            f.write(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
