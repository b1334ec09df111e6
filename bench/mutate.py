"""Do the tests notice a wrong line? One small change at a time, and the tests that should fail.

    python bench/mutate.py tlora.py                 # a file of the table below, or --all
    python bench/mutate.py tlora.py --list          # its mutants, without running them
    python bench/mutate.py tlora.py --survivors     # again only those that survived last time: quick, for writing tests
    python bench/mutate.py --all --jobs 2 --write   # and bench/mutants.md, of all files whose results are complete,
                                                    # with the verdicts in bench/mutants.jsonl.gz

A mutant is the file with one point changed (`variants` says how), never a docstring, an annotation or a message. It is
killed if a test fails, the tests cannot be collected or they do not end. What a run has found is kept in out/mutants/
(--cache) and not run again while it holds: a survivor until the file or its tests change, a kill as long as the function
that was mutated and the test that noticed are what they were. What changes nothing that could be noticed is listed
with the reason in bench/equivalent.jsonl, by file, line of source and change.

The tests run in a copy of the tree, each mutant in a fresh process: a fork of one that has imported torch and whatever
else the tests import, but no file of this project. Only the tests that reach the changed line are run, those that
killed before first. Every test starts from the same seed, since the order changes. Tests that read the source text
notice any change and prove nothing: they are left out, as are those that fail on the file as it is.

Why no tool: cosmic-ray starts an interpreter for each mutant, 5 to 10 seconds of imports here. mutmut (3.8) forks, but
leaves out decorated functions (each `merge`, all properties), class bodies and the module level. To both, transposed
matrices, reductions, the order of arguments and the table of equivalents would have to be added.
"""

import argparse
import ast
import collections
import contextlib
import copy
import functools
import glob
import gzip
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads cannot be forked

import numpy as np
import pytest
import torch
from source import bare

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EQUIVALENT, REPORT, KEPT = (os.path.join(ROOT, "bench", name) for name in ("equivalent.jsonl", "mutants.md", "mutants.jsonl.gz"))

# file: the tests that are to notice a wrong line of it, the quickest first
METHODS = ["tests/test_walking.py", "tests/test_methods.py"]
BASELINES = "lora_plus dora pissa olora lora_ga corda lora_xs adalora increlora houlsby".split()
OF_BASELINES = ["tests/test_baselines.py", "tests/test_methods.py"]
FILES = {
    "tlora.py": ["tests/test_tlora.py", *METHODS],
    "tlora_plus.py": ["tests/test_tlora_plus.py", *METHODS],
    "task_tlora.py": ["tests/test_task_tlora.py", *METHODS],
    "triadapt.py": ["tests/test_triadapt.py", *METHODS],
    "baselines/lora.py": ["tests/test_lora.py", *METHODS],
    **{f"baselines/{name}.py": [f"tests/test_{name}.py", *OF_BASELINES] for name in BASELINES},
    "baselines/start.py": ["tests/test_corda.py", "tests/test_lora_ga.py", *OF_BASELINES],
    "baselines/pfeiffer.py": ["tests/test_houlsby.py", *OF_BASELINES],
    "model.py": ["tests/test_model.py"],
    "data.py": ["tests/test_data.py"],
    "reading/files.py": ["tests/test_files.py", "tests/test_own_data.py"],
    "harness/metrics.py": ["tests/test_metrics.py"],
}

# ------------------------------------------------------------------------ the changes

Mutant = collections.namedtuple("Mutant", "line lines code change source")  # `lines` are those of the statement

SWAPPED = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.And: [ast.Or], ast.Or: [ast.And],
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
    ast.LShift: [ast.RShift], ast.RShift: [ast.LShift],
}  # fmt: skip
PAIRS = "sum mean, max min, amax amin, any all, argmax argmin, floor ceil, cos sin, ones zeros, triu tril, maximum minimum"
RENAMED = {a: b for pair in PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])} | {"sorted": "list"}
# Calls that may be left out: x.abs() and abs(x) become x.
UNWRAPPED = {
    "transpose", "abs", "sqrt", "square", "sign", "detach", "clone", "float", "double", "half", "to", "cpu", "contiguous",
    "round", "clamp", "train", "eval", "diff", "cumsum", "flip", "strip", "lower", "log", "exp", "t",
}  # fmt: skip
# Two arguments change places, but not here: the result is the same, or a TypeError that all tests notice.
KEEPS_ORDER = {"min", "max", "equal", "transpose", "promote_types", "isinstance", "issubclass", "print"}
KEEPS_ORDER |= {"hasattr", "getattr", "setattr"}
MESSAGES = {"print", "ValueError", "TypeError", "RuntimeError", "SystemExit", "warn", "add_argument"}


def called(call):
    """The last name of what is called: `mean` of x.mean()."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def altered(node, **fields):
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def without(values, i):
    return values[:i] + values[i + 1 :]


def variants(node, parent):
    """What one node may become: nodes of its own kind, expressions for an expression, statements for a statement."""
    kind = type(node)
    if kind is ast.Compare:
        for i, op in enumerate(node.ops):
            for other in SWAPPED[type(op)]:
                yield altered(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
    elif kind is ast.BinOp and isinstance(node.op, ast.MatMult):
        yield altered(node, left=node.right, right=node.left)
    elif kind in (ast.BinOp, ast.BoolOp, ast.AugAssign):
        for other in SWAPPED.get(type(node.op), []):
            yield altered(node, op=other())
    elif kind is ast.UnaryOp:
        yield node.operand
    elif kind is ast.Attribute and node.attr in ("T", "mT"):
        yield node.value
    elif kind is ast.Constant:
        yield from constants(node.value)
    elif kind is ast.Call:
        yield from calls(node)
    elif kind is ast.Return and node.value:
        yield ast.Return(ast.Constant(None))
        if isinstance(node.value, ast.Tuple):
            yield ast.Return(altered(node.value, elts=node.value.elts[::-1]))
    if isinstance(node, ast.expr):
        conditions = getattr(parent, "ifs", []) + [getattr(parent, "test", None)]
        if node in conditions and not isinstance(node, (ast.Compare, ast.UnaryOp)):
            yield ast.UnaryOp(ast.Not(), node)
        if node in getattr(parent, "decorator_list", []):
            yield ast.parse("(lambda undecorated: undecorated)", mode="eval").body
        if isinstance(parent, ast.withitem) and node is parent.context_expr and not parent.optional_vars:
            yield ast.parse("__import__('contextlib').nullcontext()", mode="eval").body


def constants(value):
    if isinstance(value, (bool, str)):
        yield ast.Constant(not value if isinstance(value, bool) else value + "_")
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
    elif isinstance(value, float):
        yield ast.Constant(2 * value or 1.0)


def calls(node):
    name, args = called(node), node.args
    if name in RENAMED and (isinstance(node.func, ast.Attribute) or name != "sum"):  # there is no builtin mean
        field = "attr" if isinstance(node.func, ast.Attribute) else "id"
        yield altered(node, func=altered(node.func, **{field: RENAMED[name]}))
    if name in UNWRAPPED and isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") not in MODULES:
        yield node.func.value
    elif name in UNWRAPPED and args:
        yield args[0]
    if len(args) > 1 and name not in KEEPS_ORDER and not any(isinstance(a, ast.Starred) for a in args[:2]):
        yield altered(node, args=[args[1], args[0], *args[2:]])
    if name not in MESSAGES:
        for i in range(len(node.keywords)):
            yield altered(node, keywords=without(node.keywords, i))


MODULES = {"torch", "nn", "F", "math", "np", "os", "json"}  # what stands before the point is no value


def droppable(node, bound):
    """Is this a statement whose absence leaves the names that follow it defined?"""
    if isinstance(node, ast.Assign):
        names = [target for target in node.targets if isinstance(target, (ast.Name, ast.Tuple))]
        return not names or all(getattr(name, "id", None) in bound for name in names)
    call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    return call or isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Delete, ast.Assert))


class Finder:
    """Walks a file's tree and keeps each mutant that is something else to Python too."""

    def __init__(self, source):
        self.lines, self.found, self.names = source.encode().splitlines(keepends=True), {}, collections.Counter()
        tree = ast.parse(source)
        for block in tree.body:
            self.block, self.original = block, ast.dump(block)
            self.walk(block, tree, None, None, set())
        self.mutants = sorted(self.found.values(), key=lambda mutant: mutant.line)  # a stable sort

    def walk(self, node, parent, statement, fstring, bound):
        """`statement` encloses the node; `fstring` is the outermost f-string around it; `bound` are names bound before."""
        if isinstance(node, ast.stmt):
            statement = node
        if isinstance(node, ast.JoinedStr):
            fstring = fstring or node
        message = isinstance(statement, ast.Raise) or isinstance(parent, ast.JoinedStr)
        message |= isinstance(parent, ast.Call) and called(parent) in MESSAGES or isinstance(parent, ast.Expr)
        if not (message and isinstance(node, ast.Constant) and isinstance(node.value, str)):
            for new in variants(node, parent):
                self.keep(node, parent, new, statement, fstring)
        if isinstance(node, ast.stmt) and droppable(node, bound):
            self.keep(node, parent, ast.Pass(), statement, fstring)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            bound = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and field not in ("annotation", "returns", "format_spec"):
                    self.walk(child, node, statement, fstring, bound)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        if isinstance(node, ast.ClassDef):  # what a class body binds is an attribute, and may be absent
            for child in node.body:
                if isinstance(child, ast.Assign):
                    self.keep(child, node, ast.Pass(), child, None)

    def keep(self, node, parent, new, statement, fstring):
        change = f"{brief(node)} → {brief(new)}" if not isinstance(new, ast.Pass) else f"dropped: {brief(node)}"
        anchor = fstring or node  # inside an f-string Python 3.11 knows no columns: the whole of it is written anew
        if fstring and fstring is not node:
            new = copy.deepcopy(fstring, {id(node): new})
        try:
            text = ast.unparse(new)
        except ValueError:  # a backslash in an f-string
            return
        before, middle, after = self.spliced(anchor, text if isinstance(new, ast.stmt) else f"({text})")
        try:
            block = ast.parse(middle).body
        except SyntaxError:
            return
        code = before + middle + after
        if len(block) == 1 and ast.dump(block[0]) == self.original or code in self.found:
            return
        simple = not hasattr(statement, "body")
        first = min(statement.lineno, anchor.lineno)  # a decorator stands above its statement
        lines = range(first, (statement.end_lineno if simple else anchor.end_lineno) + 1)
        line = self.lines[anchor.lineno - 1].decode().strip()
        self.names[line, change] += 1  # the same change twice on lines that read the same
        change += f" ({self.names[line, change]})" if self.names[line, change] > 1 else ""
        self.found[code] = Mutant(anchor.lineno, lines, code, change, line)

    def spliced(self, node, text):
        """The source with `text` in the node's place: before the top-level statement that it is in, this, and after it."""
        top = min([self.block, *getattr(self.block, "decorator_list", [])], key=lambda n: n.lineno).lineno - 1
        first, last, end = node.lineno - 1, node.end_lineno - 1, self.block.end_lineno
        head = b"".join(self.lines[top:first]) + self.lines[first][: node.col_offset]
        tail = self.lines[last][node.end_col_offset :] + b"".join(self.lines[last + 1 : end])
        parts = b"".join(self.lines[:top]), head + text.encode() + tail, b"".join(self.lines[end:])
        return [part.decode() for part in parts]


def brief(node):
    return " ".join(ast.unparse(node).split())


def mutants_of(source):
    return Finder(source).mutants


# -------------------------------------------------------- one run of the tests, in a fork


class Plugin:
    """What pytest is told: which tests in which order, the seed, and (tracing) which lines of `file` each one reaches."""

    def __init__(self, order, file=None):
        self.order, self.file = order, file  # order: test ids, or None for all
        self.failed, self.reached, self.seconds = [], {}, {}
        self.lines = set()
        if file:
            sys.settrace(self.trace)  # what importing reaches, every test reaches

    def trace(self, frame, event, arg):
        if frame.f_code.co_filename == self.file:
            self.lines.add(frame.f_lineno)
            return self.trace

    def pytest_collection_modifyitems(self, items):
        sys.settrace(None)
        self.reached[""], self.lines = self.lines, set()
        items[:] = [item for item in items if "getsource" not in names_in(item.function.__code__)]
        if self.order is not None:
            place = {test: i for i, test in enumerate(self.order)}
            items[:] = sorted((i for i in items if i.nodeid in place), key=lambda item: place[item.nodeid])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.lines = set()
        start = time.perf_counter()
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if self.file:
            sys.settrace(self.trace)
        yield
        sys.settrace(None)
        self.reached[item.nodeid], self.seconds[item.nodeid] = self.lines, time.perf_counter() - start

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)


def names_in(code):
    inner = [c for c in code.co_consts if hasattr(c, "co_names")]
    return set(code.co_names).union(*(names_in(c) for c in inner))


def fork(tree, tests, order, traced=None, cpu_seconds=None):
    """Start the tests in `tree`; returns the pid. The result is left in tree.json, what was printed in tree.log."""
    pid = os.fork()
    if pid:
        return pid
    status = 3
    try:
        os.setsid()  # so that what it starts can be ended with it
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
        if cpu_seconds:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        log = os.open(f"{tree}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(tree)
        sys.path[0] = tree  # it was bench/
        # The tests and the other files are compiled once; the mutant never: a file of the same second is not seen as new.
        sys.dont_write_bytecode = traced is None
        plugin = Plugin(order, traced and os.path.join(tree, traced))
        options = ["-q", "--tb=native", "-p", "no:cacheprovider", f"--basetemp={tree}.tmp"] + ["-x"] * (traced is None)
        ended = pytest.main([*options, *tests], plugins=[plugin])
        result = {"failed": plugin.failed, "seconds": plugin.seconds}
        if traced:
            outside = [name for name, m in list(sys.modules.items()) if not inside(tree, m)]
            reached = {test: sorted(lines) for test, lines in plugin.reached.items()}
            result |= {"reached": reached, "modules": outside}
        with open(f"{tree}.json", "w") as file:
            json.dump(result, file)
        status = ended
    finally:
        os._exit(int(status))


def inside(tree, module):
    return str(getattr(module, "__file__", None) or "").startswith(tree)


class Bench:
    """One file, its tests, and copies of the tree to run them in."""

    def __init__(self, file, tests, jobs, folder):
        self.file, self.tests = file, tests
        self.source = read(os.path.join(ROOT, file))
        first = os.path.join(folder, "0")
        shutil.copytree(ROOT, first, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
        pid = fork(first, tests, None, traced=file)
        _, status, used = os.wait4(pid, 0)
        if os.waitstatus_to_exitcode(status) not in (0, 1):
            raise SystemExit(f"{file}: its tests do not run\n{read(first + '.log')[-3000:]}")
        result = json.loads(read(f"{first}.json"))
        self.left_out = sorted(set(result["failed"]))
        self.seconds = {t: s for t, s in result["seconds"].items() if t not in self.left_out}
        self.reached = {test: set(lines) for test, lines in result["reached"].items()}
        self.cpu_seconds = int(2 + 4 * (used.ru_utime + used.ru_stime))
        for name in result["modules"]:
            with contextlib.suppress(Exception):  # not all can be imported by their names: then each fork does it again
                importlib.import_module(name)
        torch.set_num_threads(1)
        folder_of_file, name = os.path.split(os.path.join(first, file))
        for compiled in glob.glob(f"{folder_of_file}/__pycache__/{name[:-3]}.*"):
            os.remove(compiled)  # it would be taken for the mutant's
        self.trees = [first] + [os.path.join(folder, str(i)) for i in range(1, jobs)]
        for tree in self.trees[1:]:
            shutil.copytree(first, tree)

    def order(self, mutant, kills):
        """The tests that reach the mutant's lines, those that killed most first."""
        everywhere = self.reached[""] & set(mutant.lines)
        tests = [t for t in self.seconds if everywhere or self.reached[t] & set(mutant.lines)]
        return sorted(tests, key=lambda test: (-kills[test], self.seconds[test]))

    def run(self, todo):
        """todo: [(key, code, test ids in order)]. Yields (key, result, by which test) as they end."""
        todo, free, running = collections.deque(todo), list(self.trees), {}
        try:
            while todo or running:
                while todo and free:
                    tree, (key, code, order) = free.pop(), todo.popleft()
                    if callable(order):
                        order = order()
                    if not order:
                        free.append(tree)
                        yield key, "survived", "no test reaches it"
                        continue
                    with open(os.path.join(tree, self.file), "w") as file:
                        file.write(code)
                    if os.path.exists(f"{tree}.json"):
                        os.remove(f"{tree}.json")
                    pid = fork(tree, self.tests, order, cpu_seconds=self.cpu_seconds)
                    running[pid] = key, tree, time.time() + 10 * self.cpu_seconds
                for pid in list(running):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        key, tree, _ = running.pop(pid)
                        end_group(pid)
                        free.append(tree)
                        yield key, *verdict(os.waitstatus_to_exitcode(status), tree)
                    elif time.time() > running[pid][2]:
                        end_group(pid)
                time.sleep(0.01)
        finally:
            for pid in running:
                end_group(pid)


def end_group(pid):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def verdict(code, tree):
    if code in (0, 5):
        return "survived", "all tests pass"
    if code == 1:
        return "killed", (json.loads(read(f"{tree}.json"))["failed"] or ["an error beside the tests"])[0]
    if code == 2:
        return "killed", "the tests cannot be collected"
    if code < 0:
        timeout = -code in (signal.SIGXCPU, signal.SIGKILL)
        return "killed", "the tests do not end" if timeout else f"signal {-code}"
    return "survived", f"pytest ended with {code}: {read(tree + '.log')[-300:]}"


def read(path):
    with open(path) as file:
        return file.read()


# ------------------------------------------------------------------- results and report


class Results:
    """Every verdict in a JSONL file, the latest for a key wins: (file, state of file and tests, mutant)."""

    def __init__(self, folder):
        os.makedirs(folder, exist_ok=True)
        self.path, self.rows, self.killers, self.killed = os.path.join(folder, "results.jsonl"), {}, {}, {}
        self.kills = collections.Counter()
        kept = gzip.open(KEPT, "rt").read() if os.path.exists(KEPT) else ""
        for line in (kept + (read(self.path) if os.path.exists(self.path) else "")).splitlines():
            if line.endswith("}"):  # a run that was ended may leave half a line
                self.learn(json.loads(line))

    def learn(self, row):
        self.rows[row["file"], row["state"], row["source"], row["change"]] = row
        if row["result"] == "killed":
            self.killers[row["file"], row["source"], row["change"]] = row["by"]
            self.kills[row["by"]] += 1
            self.killed[row["file"], row["source"], row["change"], row.get("holds")] = row
        elif row["result"] == "survived":
            self.killers.pop((row["file"], row["source"], row["change"]), None)

    def add(self, **row):
        self.learn(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def keep(self):
        """Write beside the report the verdicts that hold today, so that another machine goes on from them."""
        rows = []
        for file, tests in FILES.items():
            state = state_of(file, tests)
            found = [self.get(file, state, mutant) for mutant in mutants_of(read(os.path.join(ROOT, file)))]
            rows += [row for row in [*found, self.rows.get((file, state, "", ""))] if row]
        with open(KEPT, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            packed.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())

    def get(self, file, state, mutant):
        """The verdict that holds for the mutant today, or None."""
        key = file, mutant.source, mutant.change
        by = self.killers.get(key)
        kept = by and self.killed.get((*key, holds_while(read(os.path.join(ROOT, file)), mutant.line, by)))
        return self.rows.get((file, state, mutant.source, mutant.change)) or kept


@functools.cache
def holds_while(text, line, by, folder=ROOT):
    """A hash of what a kill rests on: the function (or top-level statement) of the mutated line, and the test."""
    parts = [segment(text, lambda node: node.lineno <= line <= node.end_lineno)]
    path, _, test = by.partition("::")
    if test and os.path.exists(os.path.join(folder, path)):
        name = test.partition("[")[0].rpartition("::")[2]
        parts.append(segment(read(os.path.join(folder, path)), lambda node: getattr(node, "name", None) == name))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def tree_of(text):
    return bare(ast.parse(text))


def segment(text, wanted):
    """The program of the innermost function, or else top-level statement, that `wanted` picks."""
    inside = [node for top in tree_of(text).body for node in [top, *getattr(top, "body", [])] if isinstance(node, ast.stmt)]
    found = [node for node in inside if wanted(node)]
    return ast.unparse(found[-1]) if found else ""


def state_of(file, tests):
    """A hash of the file's program and its tests': whatever is found holds for these."""
    digest = hashlib.sha256()
    for path in [file, *tests, "tests/conftest.py"]:
        digest.update(ast.unparse(tree_of(read(os.path.join(ROOT, path)))).encode() + b"\0")
    return digest.hexdigest()[:16]


def equivalents():
    rows = [json.loads(line) for line in read(EQUIVALENT).splitlines()] if os.path.exists(EQUIVALENT) else []
    return {(file, row["line"], row["change"]): row["why"] for row in rows for file in row["files"]}


def run_file(file, tests, options, results):
    state, mutants = state_of(file, tests), mutants_of(read(os.path.join(ROOT, file)))
    todo = [m for m in mutants if not results.get(file, state, m)]
    if options.survivors:
        todo = [m for m in todo if (file, m.source, m.change) not in results.killers]
    print(f"{file}: {len(mutants)} mutants, {len(todo)} to run", flush=True)
    if not todo and (file, state, "", "") in results.rows:
        return
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        bench = Bench(file, tests, options.jobs, os.path.realpath(folder))
        for test in bench.left_out:
            print(f"  left out, fails on the file as it is: {test}")
        # The same tests in another order, after the imports: whatever fails here would kill for no reason.
        for _, result, by in bench.run([(None, bench.source, list(bench.seconds)[::-1])]):
            if result != "survived":
                raise SystemExit(f"{file}: the file as it is fails in another order: {by}")
        results.add(file=file, state=state, source="", change="", result="as it is", by=bench.left_out)

        def order(mutant):
            last = results.killers.get((file, mutant.source, mutant.change))
            return sorted(bench.order(mutant, results.kills), key=lambda test: test != last)

        start = shown = time.time()
        count = collections.Counter()
        for mutant, result, by in bench.run([(m, m.code, lambda m=m: order(m)) for m in todo]):
            basis = {"holds": holds_while(read(os.path.join(ROOT, file)), mutant.line, by)} if result == "killed" else {}
            results.add(file=file, state=state, source=mutant.source, change=mutant.change, result=result, by=by, **basis)
            count[result] += 1
            done, now = count.total(), time.time()
            if result == "survived":
                print(f"  {file}:{mutant.line}: {mutant.change}   ({by})", flush=True)
            if now - shown > 10 or done == len(todo):
                left, shown = (now - start) / done * (len(todo) - done), now
                print(f"  {done}/{len(todo)}, {count['survived']} survived, {left:.0f} s left", flush=True)


def table(header, rows):
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    marks = ["--:" if all(re.fullmatch(r"[\d.]+ ?%?", c[i]) for c in cells) else "---" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *cells])


def summary(file, tests, results, known):
    """(row of the table, survivors' rows, tests left out), or None if the file's results are not complete."""
    state, mutants = state_of(file, tests), mutants_of(read(os.path.join(ROOT, file)))
    rows = [results.get(file, state, m) for m in mutants]
    if not all(rows):
        return None
    survivors, equivalent = [], 0
    for mutant, row in zip(mutants, rows):
        why = known.get((file, mutant.source, mutant.change))
        equivalent += why is not None and row["result"] == "survived"
        if row["result"] == "survived":
            survivors.append((mutant.line, f"`{mutant.source}`", f"`{mutant.change}`", why or f"**not noticed**: {row['by']}"))
        elif why:
            print(f"{file}:{mutant.line}: {mutant.change}: listed as equivalent, but noticed by {row['by']}")
    killed = len(mutants) - len(survivors)
    share = 100 * killed / (len(mutants) - equivalent)
    left_out = results.rows[file, state, "", ""]["by"]
    return (f"`{file}`", len(mutants), killed, equivalent, f"{share:.1f} %"), survivors, left_out


def report(results):
    known, rows, parts = equivalents(), [], []
    for file, tests in FILES.items():
        found = summary(file, tests, results, known) if os.path.exists(os.path.join(ROOT, file)) else None
        if not found:
            print(f"{file}: not complete, not in the report")
            continue
        row, survivors, left_out = found
        rows.append(row)
        parts.append(f"\n## {file}\n\n{' and '.join(f'`{t}`' for t in tests)}.\n")
        parts += [f"\nLeft out, since it fails on the file as it is: `{test}`.\n" for test in left_out]
        if survivors:
            parts.append("\n" + table(["line", "source", "change", "why no test notices"], survivors) + "\n")
    head = (
        "`python bench/mutate.py --all --write`: one point of a file changed at a time, and whether a test fails.\n"
        "The share is killed / (mutants - equivalent). Below, each mutant that no test notices, with the reason.\n"
        f"Made on {time.strftime('%Y-%m-%d')}: a file that changed since has other lines.\n\n"
    )
    with open(REPORT, "w") as file:
        file.write(head + table(["file", "mutants", "killed", "equivalent", "share"], rows) + "\n" + "".join(parts))
    results.keep()
    print("wrote", os.path.relpath(REPORT, ROOT))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help=f"of {', '.join(FILES)}")
    parser.add_argument("--all", action="store_true", help="all of these")
    parser.add_argument("--tests", nargs="+", help="other test files than the table's")
    parser.add_argument("--jobs", type=int, default=2, help="processes beside each other")
    parser.add_argument("--cache", default=os.path.join(ROOT, "out", "mutants"), help="folder of the results")
    parser.add_argument("--list", action="store_true", help="say which mutants there are, and end")
    parser.add_argument("--survivors", action="store_true", help="run only those that survived last time")
    parser.add_argument("--write", action="store_true", help="write bench/mutants.md")
    options = parser.parse_args()
    files = list(FILES) if options.all else options.files
    for file in files:
        if file not in FILES and not options.tests or not os.path.isfile(os.path.join(ROOT, file)):
            parser.error(f"{file} is not one of {', '.join(FILES)}")
    results = Results(options.cache)
    for file in files:
        if options.list:
            for mutant in mutants_of(read(os.path.join(ROOT, file))):
                print(f"{file}:{mutant.line}: {mutant.change}")
        else:
            run_file(file, options.tests or FILES[file], options, results)
    for file in files if not options.list else []:
        found = summary(file, options.tests or FILES[file], results, equivalents())
        if found:
            print("{}: {} mutants, {} killed, {} equivalent, {}".format(*found[0]))
    if options.write:
        report(results)


if __name__ == "__main__":
    main()
