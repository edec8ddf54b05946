import ast
import dataclasses
import importlib
from pathlib import Path
from typing import get_type_hints

import pytest

import minisr
from minisr.config import Config, PretrainConfig

FOLDER = Path(minisr.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
LINES = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
NAMES = {".".join(["minisr", *file.relative_to(FOLDER).with_suffix("").parts]).removesuffix(".__init__"): file
         for file in FILES}

# Who may import whom: a module only those to its left.
ORDER = """records stop resume chance cache lean model tokenizer world world.words world.oracle
world.writers world.corpus step sampler train sft dpo prompts judge pairs evaluate checkpoint interop
interop.names interop.sentencepiece_json interop.hf interop.gguf interop.source seed_data config
pretrain run stages metrics report show experiment figures markup page loop bench cli __main__""".split()


def imported(tree):
    """The modules of this package that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:  # "from minisr.world import oracle" names a module, "... import Request" does not
            name = name if name in NAMES else name.rpartition(".")[0]
            if name.startswith("minisr."):
                yield name.removeprefix("minisr.")


def test_no_function_is_longer_than_50_lines():
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{file.name}: {node.name}"


def test_no_line_is_wider_than_110_columns():
    wide = [f"{file.name}:{number}" for file in FILES
            for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1) if len(line) > 110]
    assert wide == []


def test_no_module_is_longer_than_300_lines():
    assert {file.name: count for file, count in LINES.items() if count > 300} == {}


def code_lines(file):
    """Lines that are neither blank, nor comment, nor docstring."""
    documented = {ast.get_docstring(node, clean=False) for node in ast.walk(TREES[file])
                  if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)} - {None}
    text = file.read_text(encoding="utf-8")
    for docstring in documented:
        text = text.replace(docstring, "")
    return sum(1 for line in map(str.strip, text.split("\n")) if line.strip('"') and line[0] != "#")


def test_the_package_is_short():
    # Without other people's formats, the benchmark and the pictures.
    core = [file for file in FILES if file.parent.name != "interop" and file.name not in
            ("bench.py", "figures.py", "markup.py", "page.py")]
    assert sum(map(code_lines, core)) <= 3070
    assert sum(LINES[file] for file in core) <= 4500
    assert sum(map(code_lines, FILES)) <= 4700
    path = "loop model cache tokenizer step sampler prompts judge pairs sft dpo evaluate".split()
    assert sum(LINES[NAMES[f"minisr.{name}"]] for name in path) <= 1700


@pytest.mark.parametrize("name", sorted(NAMES.keys() - {"minisr.__main__"}))  # importing it runs it
def test_every_module_imports(name):
    importlib.import_module(name)


def test_the_order_of_modules_names_each_once():
    assert sorted(ORDER) == sorted(name.removeprefix("minisr.") for name in NAMES if name != "minisr")


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    allowed = ORDER[:ORDER.index(name)]
    assert [other for other in imported(TREES[NAMES[f"minisr.{name}"]]) if other not in allowed] == []


def test_nothing_imports_the_loop_but_the_command_line():
    assert [name for name, file in NAMES.items() if "loop" in imported(TREES[file])] == ["minisr.cli"]


def fields(kind):
    """Every key of a config, with its sections' keys."""
    for name, hint in get_type_hints(kind).items():
        yield name
        if dataclasses.is_dataclass(hint):
            yield from fields(hint)


@pytest.mark.parametrize("kind", [Config, PretrainConfig])
def test_every_config_key_is_read_somewhere(kind):
    # A key that nothing reads would promise the user a setting that does nothing.
    read = {node.attr for tree in TREES.values() for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    keys = set(fields(kind))
    assert {"seed", "learning_rate"} <= keys
    assert keys - read == set()
