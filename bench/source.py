"""What a program does, without what only people and type checkers read: so that a comment makes no kept result old."""

import ast


def bare(tree):
    """The syntax tree, changed in place: docstrings are empty, and the types of positional arguments and of results are gone.

    Types of keyword-only arguments stay: the method files' are read by the command line.
    """
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0].value.value = ""
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in [*node.args.posonlyargs, *node.args.args, node.args.vararg, node.args.kwarg]:
                if argument:
                    argument.annotation = None
    if isinstance(tree, ast.Module):
        tree.body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module == "collections.abc")]
    return tree
