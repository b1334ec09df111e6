"""The table in docs/equations.md is true: every equation is there, and every function and test it names exists."""

import ast
import os
import re

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COUNTS = {"TLoRA+": 8, "Task-aware TLoRA": 17, "TriAdaptLoRA": 16}


def sections():
    """{paper: [(number, what, function, test)]} of the tables."""
    with open(os.path.join(ROOT, "docs", "equations.md"), encoding="utf-8") as f:
        parts = re.split(r"^## ", f.read(), flags=re.M)[1:]
    return {
        part.split(" (arXiv")[0]: [
            [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if re.match(r"\| \d", line)
        ]
        for part in parts
    }


def names(path):
    """Every function of a file, methods as Class.method."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        tree = ast.parse(f.read())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return found


def test_all_41_equations_are_in_the_table_once_and_in_order():
    assert {paper: [int(row[0]) for row in rows] for paper, rows in sections().items()} == {
        paper: list(range(1, n + 1)) for paper, n in COUNTS.items()
    }
    assert sum(COUNTS.values()) == 41


def test_every_function_and_test_named_exists():
    checked = 0
    for paper, rows in sections().items():
        for number, what, function, test in rows:
            if not function and not test:
                assert "*background*" in what, f"{paper} {number} has no function and is not marked as background"
                continue
            path, name = re.fullmatch(r"`([\w/]+\.py):([\w.]+)`", function).groups()
            assert name in names(path), f"{paper} {number}: {function}"
            path, name = re.fullmatch(r"`(test_\w+\.py):(\w+)`", test).groups()
            assert name in names(f"tests/{path}"), f"{paper} {number}: {test}"
            checked += 1
    assert checked == 40  # all but Hebb's rule
