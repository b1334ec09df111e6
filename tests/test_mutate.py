"""bench/mutate.py: which mutants it makes, which it calls killed, and that the tree it works for stays as it is."""

import json
import os
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "bench"))

import mutate  # noqa: E402

SOURCE = '''"""Says 1 < 2."""


def f(a, b: "the second" = 2):
    """Says 1 < 2."""
    if a < b and not g(a, b):
        raise ValueError(f"{a} is under {b + 1:.3f}")
    a += b.T @ g(b, wide=True)
    print("made", a.sum())
    return a[..., 0], b


@no_grad()
def h(m):
    with no_grad():
        m.rank = "low"
    for x in [x for x in m if x]:
        continue
    return -max(0.5, x)
'''

EXPECTED = [
    (4, "2 → 3"),
    (6, "a < b and (not g(a, b)) → a < b or not g(a, b)"),
    (6, "a < b and (not g(a, b)) → not (a < b and (not g(a, b)))"),
    (6, "a < b → a <= b"),
    (6, "a < b → a >= b"),
    (6, "not g(a, b) → g(a, b)"),
    (6, "g(a, b) → g(b, a)"),
    (7, "b + 1 → b - 1"),
    (7, "1 → 2"),
    (7, "dropped: raise ValueError(f'{a} is under {b + 1:.3f}')"),
    (8, "a += b.T @ g(b, wide=True) → a -= b.T @ g(b, wide=True)"),
    (8, "dropped: a += b.T @ g(b, wide=True)"),
    (8, "b.T @ g(b, wide=True) → g(b, wide=True) @ b.T"),
    (8, "b.T → b"),
    (8, "g(b, wide=True) → g(b)"),
    (8, "True → False"),
    (9, "dropped: print('made', a.sum())"),
    (9, "a.sum() → a.mean()"),
    (10, "return (a[..., 0], b) → return None"),
    (10, "return (a[..., 0], b) → return (b, a[..., 0])"),
    (10, "0 → 1"),
    (13, "no_grad() → lambda undecorated: undecorated"),
    (15, "no_grad() → __import__('contextlib').nullcontext()"),
    (16, "dropped: m.rank = 'low'"),
    (16, "'low' → 'low_'"),
    (17, "x → not x"),
    (18, "dropped: continue"),
    (19, "return -max(0.5, x) → return None"),
    (19, "-max(0.5, x) → max(0.5, x)"),
    (19, "max(0.5, x) → min(0.5, x)"),
    (19, "0.5 → 1.0"),
]


def test_the_mutants_of_a_small_file_are_these():
    mutants = mutate.mutants_of(SOURCE)
    assert sorted((m.line, m.change) for m in mutants) == sorted(EXPECTED)
    assert len({m.code for m in mutants}) == len(EXPECTED)
    for m in mutants:  # what is changed is that line and no other
        changed = [i for i, (a, b) in enumerate(zip(SOURCE.splitlines(), m.code.splitlines()), 1) if a != b]
        assert changed == [m.line] and m.line in m.lines and m.source == SOURCE.splitlines()[m.line - 1].strip()


made = {file: mutate.mutants_of(mutate.read(os.path.join(ROOT, file))) for file in mutate.FILES}


@pytest.mark.parametrize("file", mutate.FILES)
def test_each_file_of_the_table_has_a_mutant_in_three_lines_with_names_of_their_own(file):
    mutants = made[file]
    assert 3 * len(mutants) >= mutate.read(os.path.join(ROOT, file)).count("\n")
    assert len({m.code for m in mutants}) == len(mutants)
    assert len({(m.source, m.change) for m in mutants}) == len(mutants)  # the key of results and of equivalents
    for m in mutants[::20]:
        compile(m.code, file, "exec")
        assert m.code != mutate.read(os.path.join(ROOT, file))


def test_the_same_mutants_are_made_again():
    assert mutate.mutants_of(mutate.read(os.path.join(ROOT, "tlora.py"))) == made["tlora.py"]


def test_every_equivalent_is_a_mutant_that_is_there():
    keys = {(file, m.source, m.change) for file, mutants in made.items() for m in mutants}
    listed = mutate.equivalents()
    assert listed and not set(listed) - keys and all(listed.values())


TINY = {
    "x.py": """def count(n):
    i = 0
    while i < n:
        i += 1
    return i


def unused(a):
    return -a
""",
    "tests/conftest.py": "import os, sys\nsys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))\n",
    "tests/test_x.py": """import inspect

import x


def test_count():
    assert x.count(3) == 3


def test_nothing():
    assert x.count(0) == 0


def test_text():
    assert "return -a" in inspect.getsource(x.unused)


def test_that_fails():
    assert x.count(2) == 3
""",
}


def tiny_run(tree, *options):
    command = [sys.executable, "bench/mutate.py", "x.py", "--tests", "tests/test_x.py", *options]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout


def test_a_run_kills_what_tests_notice_in_a_copy_and_is_resumed(tmp_path):
    for path, text in TINY.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "bench").mkdir()
    for name in ("mutate.py", "source.py"):
        shutil.copy(os.path.join(ROOT, "bench", name), tmp_path / "bench")
    shown = tiny_run(tmp_path)
    assert "9 mutants, 9 to run" in shown
    assert "left out, fails on the file as it is: tests/test_x.py::test_that_fails" in shown
    rows = (tmp_path / "out" / "mutants" / "results.jsonl").read_text().splitlines()
    found = {row["change"]: (row["result"], row["by"]) for row in map(json.loads, rows)}
    endless = "killed", "the tests do not end"
    zero, three = (("killed", f"tests/test_x.py::{name}") for name in ("test_nothing", "test_count"))
    # By whichever test was run first: the quicker one.
    assert found.pop("return i → return None") in (zero, three) and found.pop("i < n → i <= n") in (zero, three)
    assert found.pop("i < n → i >= n") in (endless, three)
    assert found == {
        "": ("as it is", ["tests/test_x.py::test_that_fails"]),
        "0 → 1": zero,
        "i += 1 → i -= 1": endless,
        "dropped: i += 1": endless,
        "1 → 2": three,
        # test_text reads the source: it would notice, and is left out
        "-a → a": ("survived", "no test reaches it"),
        "return -a → return None": ("survived", "no test reaches it"),
    }
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert files == {*TINY, "bench/mutate.py", "bench/source.py", "out/mutants/results.jsonl"}
    assert all((tmp_path / path).read_text() == text for path, text in TINY.items())
    again = tiny_run(tmp_path)
    assert "9 mutants, 0 to run" in again and "`x.py`: 9 mutants, 7 killed, 0 equivalent, 77.8 %" in again


def test_the_report_counts_equivalents_apart_and_names_every_survivor(tmp_path, monkeypatch):
    (tmp_path / "x.py").write_text(TINY["x.py"])
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "test_x.py"):
        (tmp_path / "tests" / name).write_text("")
    known = {"files": ["x.py"], "line": "return -a", "change": "-a → a", "why": "nobody calls it"}
    (tmp_path / "equivalent.jsonl").write_text(json.dumps(known))
    monkeypatch.setattr(mutate, "ROOT", str(tmp_path))
    monkeypatch.setattr(mutate, "EQUIVALENT", str(tmp_path / "equivalent.jsonl"))
    monkeypatch.setattr(mutate, "REPORT", str(tmp_path / "mutants.md"))
    monkeypatch.setattr(mutate, "FILES", {"x.py": ["tests/test_x.py"]})
    monkeypatch.setattr(mutate, "KEPT", str(tmp_path / "kept.gz"))
    results, state = mutate.Results(str(tmp_path)), mutate.state_of("x.py", ["tests/test_x.py"])
    results.add(file="x.py", state=state, source="", change="", result="as it is", by=[])
    mutants = mutate.mutants_of(TINY["x.py"])
    last = mutants.pop([m.change for m in mutants].index("return -a → return None"))
    for m in mutants:
        result = "survived" if m.change in ("-a → a", "0 → 1") else "killed"
        results.add(file="x.py", state=state, source=m.source, change=m.change, result=result, by="all tests pass")
    mutate.report(results)
    assert "x.py" not in (tmp_path / "mutants.md").read_text()  # one mutant has not been run
    results.add(file="x.py", state=state, source=last.source, change=last.change, result="killed", by="t")
    mutate.report(mutate.Results(str(tmp_path)))  # read anew from the file
    report = (tmp_path / "mutants.md").read_text()
    print(report)
    assert "| `x.py` | 9 | 7 | 1 | 87.5 % |" in report
    again = mutate.Results(str(tmp_path / "elsewhere"))  # another machine goes on from what was kept
    assert all(again.get("x.py", state, m) == results.get("x.py", state, m) for m in mutants)
    assert "| 9 | `return -a` | `-a → a` | nobody calls it |" in report
    assert "| 2 | `i = 0` | `0 → 1` | **not noticed**: all tests pass |" in report
    (tmp_path / "x.py").write_text(TINY["x.py"].replace("(n)", "(n: int) -> int") + "# a comment\n")
    assert mutate.state_of("x.py", ["tests/test_x.py"]) == state  # the same program
    (tmp_path / "x.py").write_text(TINY["x.py"] + "y = 1\n")
    assert mutate.summary("x.py", ["tests/test_x.py"], results, {}) is None  # another file: nothing is known of it
