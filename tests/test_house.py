"""The architecture and the style, as far as a program can see them.

Files import in one direction. A file of the reading path has on average at most 11 tokens a code
line, at most 2 lines in a hundred with more than 30, and no statement that does several things at
once. (nanoGPT and its like have 6 to 11 tokens a code line.)
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem for path in ROOT.glob("*.py")} | {"tools"}

# What each file may import of ours, inside functions too.
ALLOWED = {
    "cps": set(),
    "tiny": set(),
    "common": set(),
    "prompts": {"common"},
    "hub": {"common"},
    "checkpoint": {"common", "hub"},
    "variants": {"common", "cps"},
    "pictures": {"common", "cps"},
    "text": {"common"},
    "lora": {"checkpoint", "common", "cps"},
    "backbones": {"common"},
    "attention": {"lora"},
    "model": {"attention", "backbones", "checkpoint", "common", "cps", "hub", "lora", "pictures", "text"},
    "rewards": {"common", "hub", "prompts", "tiny"},
    "cold_start": {"checkpoint", "common", "cps", "model", "prompts", "text", "variants"},
    "rtdmd_rl": {
        "checkpoint", "cold_start", "common", "cps", "hub", "model", "pictures", "prompts", "rewards",
        "text", "variants",
    },
    "sample": {"attention", "checkpoint", "common", "cps", "hub", "model", "pictures", "prompts", "text"},
}  # fmt: skip
TOOLS = [f"tools/{path.stem}" for path in ROOT.glob("tools/[!_]*.py")]
READABLE = sorted([*ALLOWED, *TOOLS])


def tree_of(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def imports(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found & MODULES


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_go_in_one_direction(name):
    assert imports(tree_of(name)) <= ALLOWED[name]


def tokens_by_line(name):
    """{line number: tokens that begin on it}, docstrings left out."""
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    docstrings = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, documented) and ast.get_docstring(node):
            docstrings.add(node.body[0].lineno)
    words = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    count = {}
    text = (ROOT / f"{name}.py").read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type in words and line not in docstrings:
            count[line] = count.get(line, 0) + 1
    return count


@pytest.mark.parametrize("name", READABLE)
def test_a_code_line_holds_few_tokens(name):
    count = tokens_by_line(name)
    assert sum(count.values()) / len(count) <= 11


@pytest.mark.parametrize("name", READABLE)
def test_hardly_a_line_is_heavy(name):
    count = tokens_by_line(name)
    heavy = [line for line, tokens in count.items() if tokens > 30]
    assert len(heavy) <= 0.02 * len(count), heavy


def does_several_things(node):
    if isinstance(node, ast.Expr):  # a(), b()   or   [f(x) for x in y]
        return isinstance(node.value, (ast.Tuple, ast.ListComp))
    if isinstance(node, ast.Assign):
        unpacks = isinstance(node.value, ast.Tuple)
        values = node.value.elts if unpacks else [node.value]
        if any(isinstance(value, ast.Lambda) for value in values):
            return True
        return len(values) > 2 and isinstance(node.targets[0], ast.Tuple)
    if isinstance(node, ast.Call):
        return any(isinstance(argument, ast.NamedExpr) for argument in node.args)
    return False


@pytest.mark.parametrize("name", READABLE)
def test_a_statement_does_one_thing(name):
    packed = [node.lineno for node in ast.walk(tree_of(name)) if does_several_things(node)]
    assert packed == []
