"""What keeps the code readable; `make lint` holds the order of imports (pyproject.toml)."""

import ast
from pathlib import Path

import prime_jax

MAX_LINES = 80


def test_functions_fit_on_a_page():
    long = []
    for file in Path(prime_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                long += [f"{file.name}:{node.name}: {lines}"] if lines > MAX_LINES else []
    assert not long
