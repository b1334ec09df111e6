"""The house keeps its shape: imports point one way, method files stand alone, files and functions stay short."""

import ast
import os
import re
import subprocess
import sys

import pytest

from harness.methods import METHODS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# From the top down: a file imports from lower floors, or, within a folder, from its neighbours. Beside it: who knows what.
FLOORS = [
    ["train.py", "predict.py", "export.py", "bench", "examples"],
    ["harness"],
    ["data.py", "model.py", "triadapt.py", "tlora.py", "tlora_plus.py", "task_tlora.py", "baselines", "fast.py"],
    ["generated", "reading"],
]
TOP = {name for floor in FLOORS for name in floor} | {
    "README.md", "LICENSE", "requirements.txt", "requirements-optional.txt", "tests", "docs", "assets", ".ci", ".gitignore",
    "pyproject.toml", "CITATION.cff", "CONTRIBUTING.md", "recipes",
}  # fmt: skip
METHOD_FILES = ["triadapt.py", "tlora.py", "tlora_plus.py", "task_tlora.py", "baselines/lora.py", "fast.py"]


def sources():
    """{path: syntax tree} of the program, tests aside."""
    trees = {}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in ("tests", "out") and not f.startswith(".")]
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), ROOT)
            if name.endswith(".py") and path.split(os.sep)[0] in TOP:
                with open(os.path.join(ROOT, path), encoding="utf-8") as f:
                    trees[path] = ast.parse(f.read())
    return trees


TREES = sources()


def imports(tree):
    """Dotted names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def graph():
    """{file: the files of the project that it imports}"""
    modules = {path[:-3].replace(os.sep, "."): path for path in TREES}
    return {path: {modules[name] for name in imports(tree) if name in modules} for path, tree in TREES.items()}


def circle(edges):
    """Some circle of the graph as a list of nodes, or None."""
    done = set()

    def visit(node, trail):
        if node in trail:
            return trail[trail.index(node) :] + [node]
        if node not in done:
            for other in sorted(edges.get(node, ())):
                if found := visit(other, trail + [node]):
                    return found
            done.add(node)

    return next((found for node in sorted(edges) if (found := visit(node, []))), None)


def room(path):
    return path.split(os.sep)[0]


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) is None


def test_imports_point_one_way():
    edges = graph()
    assert "harness/run.py" in edges["train.py"] and "data.py" in edges["harness/run.py"]  # the graph sees what is there
    assert circle(edges) is None
    rooms = {}
    for path, others in edges.items():
        rooms.setdefault(room(path), set()).update(room(other) for other in others if room(other) != room(path))
    assert circle(rooms) is None
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    for path, others in edges.items():
        for other in others:
            if room(path) != room(other):
                assert floor[room(path)] < floor[room(other)] or room(path) == "bench", f"{path} imports {other}"
    assert not {"predict.py", "export.py"} & edges["train.py"]


@pytest.mark.parametrize("path", [path for path in METHOD_FILES if path in TREES])
def test_a_method_file_needs_torch_alone(path):
    own = {name.split(".")[0] for name in imports(TREES[path])}
    optional = {"safetensors"}  # save() has a way without it
    assert "torch" in own and own - optional <= {"torch"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", ["model.py", "data.py"])
def test_model_and_data_name_no_method(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        text = f.read()
    names = "|".join({*METHODS, *(module.split(".")[-1] for module, *_ in METHODS.values())} - {"full", "head"})
    assert not re.search(rf"\b({names})\b", text, re.I)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_functions_fit_on_a_screen_and_take_few_parameters():
    """Demos and autograd's own forwards aside; a verb's keyword options are a method's flags, not parameters to carry about."""
    seen = 0
    for path, tree in TREES.items():
        for f in functions(tree):
            seen += 1
            names = [a.arg for a in f.args.posonlyargs + f.args.args if a.arg not in ("self", "cls")]
            assert len(names) <= 6 or names[0] == "ctx", f"{path}: {f.name} takes {len(names)} parameters"
            if f.name != "main":
                assert f.end_lineno - f.lineno < 60, f"{path}: {f.name} has {f.end_lineno - f.lineno + 1} lines"
    assert seen > 200


def test_the_loop_is_on_one_screen_and_its_file_is_short():
    loop = next(f for f in functions(TREES["train.py"]) if f.name == "train")
    assert loop.end_lineno - loop.lineno < 60
    for path, most in (("train.py", 350), ("data.py", 450)):
        with open(os.path.join(ROOT, path), encoding="utf-8") as f:
            assert f.read().count("\n") <= most, path


def test_nothing_else_stands_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert {path.split("/")[0] for path in listed if path} <= TOP
