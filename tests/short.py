"""Short runs for the tests: seconds on a table of our own, with a model of a few thousand numbers."""

import json
import os

import torch

import train
from harness import folder, methods

TINY = "--scratch --width 16 --depth 1 --heads 2 --hidden 16 --threads 1 --device cpu --no-figures".split()
METHODS = list(methods.METHODS)


def go(csv, out, *more):
    """Run train.main on the table; returns (exit code, the rows of metrics.jsonl without times)."""
    argv = ["--data", csv, "--text", "text", "--label", "label", "--out", str(out), "--epochs", "3", *TINY]
    argv += ["--rank", "4"] * ("tlora" in more)  # its default, the author's 32, is more than this width of 16
    argv += map(str, more)
    code = train.main(argv)
    return code, rows_of(out)


def rows_of(out, name="metrics.jsonl"):
    """The rows of a run without times; of a stopped one, those in its state."""
    if os.path.exists(folder.state_path(out)):
        rows = folder.load_state(out)[2][{"metrics.jsonl": "history", "layers.jsonl": "layers"}[name]]
    elif not os.path.exists(os.path.join(out, name)):
        return None
    else:
        with open(os.path.join(out, name)) as f:
            rows = [json.loads(line) for line in f]
    return [{k: v for k, v in row.items() if k not in train.TIMES} for row in rows]


def adapter_of(out):
    return folder.read_run(out)[1]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
