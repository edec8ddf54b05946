import ast
import dataclasses
import importlib
from pathlib import Path
from typing import get_type_hints

import pytest

import minisr
from minisr.runner.config import Config, PretrainConfig

FOLDER = Path(minisr.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
NAMES = {".".join(["minisr", *file.relative_to(FOLDER).with_suffix("").parts]).removesuffix(".__init__"): file
         for file in FILES}

# Who may import whom: a module only those to its left.
ORDER = """runner runner.files runner.stop runner.resume rng fast fast.cache fast.lean model tokenizer worlds
worlds.tiny worlds.tiny.words worlds.tiny.oracle worlds.tiny.writers worlds.tiny.corpus fast.step
sampler train sft dpo prompts judge pairs evaluate runner.checkpoint interop interop.names
interop.sentencepiece_json interop.hf interop.gguf interop.source runner.seed_data runner.config
runner.pretrain runner.run runner.stages runner.metrics runner.reuse runner.experiment_plan
runner.experiment report report.table report.show report.chat report.seed_statistics
report.experiment_table report.figures report.markup report.chart_data report.run_files
report.run_charts report.transcripts report.page loop bench cli __main__""".split()


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
        for name in names:  # a name may be a module or what a module holds
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
