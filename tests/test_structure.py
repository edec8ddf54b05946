"""The rules of the house: which module may import which, and the size of what a reader has to hold in mind."""

import ast
import dataclasses
import importlib
import sys
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

# The core, in reading order, and what it may import besides itself.
CORE = "loop model tokenizer sampler lm prompts judge pairs sft dpo train evaluate rng".split()
PACKAGES_OF_THE_CORE = {"torch", "numpy", "sentencepiece", "tqdm", *sys.stdlib_module_names}

# Who may import whom: a module only those before it.
ORDER = """
    rng model tokenizer sampler train sft dpo lm prompts judge pairs evaluate loop
    fast.rng fast.forward fast.cache fast.decode_step fast.sampler fast.cuda_graphs fast.losses
    fast.master_weights fast.lm fast
    runner runner.processes runner.launcher runner.files
    worlds worlds.tiny worlds.tiny.words worlds.tiny.oracle worlds.tiny.writers worlds.tiny.corpus
    worlds.words worlds.words.words worlds.words.requests worlds.words.sentence worlds.words.oracle
    worlds.words.annotator worlds.words.edits worlds.words.corpus worlds.words.measures worlds.catalog
    interop interop.shape interop.end_tokens interop.jinja_templates interop.chat_templates interop.tokenizer_json
    interop.sentencepiece_json interop.names
    runner.judge_prompt runner.checkpoint interop.hf interop.gguf interop.source
    runner.stop runner.journal runner.storage runner.muon runner.lora runner.resumable runner.gradients runner.sharding
    runner.training runner.engine runner.json_records runner.command runner.config runner.record_formats
    runner.data_sets runner.seed_data runner.sources runner.pretrain runner.run runner.evaluation runner.variants
    runner.steps runner.head_to_head runner.reuse runner.experiment_plan runner.experiment
    report report.table report.head_to_head_table report.show report.chat report.seed_statistics report.experiment_table
    report.figures report.markup report.chart_data report.run_files report.run_charts report.transcripts report.page
    bench runner.bench_processes cli __main__
""".split()


def imported_names(tree):
    """Every dotted name that a file imports, wherever in it: modules, and what modules hold."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(tree):
    """The modules of this package that a file imports, without "minisr."."""
    for name in imported_names(tree):
        module = name if name in NAMES else name.rpartition(".")[0]
        if module.startswith("minisr."):
            yield module.removeprefix("minisr.")


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def code_lines(file):
    """Lines that are neither blank, nor comment, nor docstring."""
    documentation = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            documentation |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    return sum(1 for number, line in lines
               if line.strip() and not line.strip().startswith("#") and number not in documentation)


def test_the_core_is_small():
    sizes = {name: code_lines(NAMES[f"minisr.{name}"]) for name in CORE}
    assert len(CORE) <= 13 and max(sizes.values()) <= 150 and sum(sizes.values()) <= 850, sizes


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_only_itself_and_four_packages(name):
    tree = TREES[NAMES[f"minisr.{name}"]]
    assert {module for module in imported_modules(tree) if module not in CORE} == set()
    assert {name.partition(".")[0] for name in imported_names(tree)} <= PACKAGES_OF_THE_CORE | {"minisr"}


@pytest.mark.parametrize("name", CORE)
def test_the_core_opens_no_files(name):
    tree = TREES[NAMES[f"minisr.{name}"]]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not used & {"open", "Path"} and "pathlib" not in set(imported_names(tree))


def test_only_the_engine_and_the_benchmark_import_the_fast_engine():
    importers = {name for name in ORDER if not name.startswith("fast")
                 and any(module.split(".")[0] == "fast" for module in imported_modules(TREES[NAMES[f"minisr.{name}"]]))}
    assert importers == {"runner.engine", "bench"}


@pytest.mark.parametrize("name", sorted(NAMES.keys() - {"minisr.__main__"}))  # importing it runs it
def test_every_module_imports(name):
    importlib.import_module(name)


def test_the_order_of_modules_names_each_once():
    assert sorted(ORDER) == sorted(name.removeprefix("minisr.") for name in NAMES if name != "minisr")


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    allowed = ORDER[:ORDER.index(name)]
    assert [module for module in imported_modules(TREES[NAMES[f"minisr.{name}"]]) if module not in allowed] == []


def test_no_function_is_longer_than_40_lines():
    assert [f"{file.name}: {node.name}" for file, tree in TREES.items() for node in functions(tree)
            if node.end_lineno - node.lineno >= 40] == []


def test_no_function_has_more_than_six_parameters():
    crowded = []
    for file, tree in TREES.items():
        for node in functions(tree):
            names = [argument.arg for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            if len([name for name in names if name not in ("self", "cls", "ctx")]) > 6:
                crowded.append(f"{file.name}: {node.name}")
    assert crowded == []


def config_keys(kind):
    """Every key of a config, with its sections' keys."""
    for name, hint in get_type_hints(kind).items():
        yield name
        if dataclasses.is_dataclass(hint):
            yield from config_keys(hint)


@pytest.mark.parametrize("kind", [Config, PretrainConfig])
def test_every_config_key_is_read_somewhere(kind):
    # A key that nothing reads would promise the user a setting that does nothing.
    read = {node.attr for tree in TREES.values() for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    read |= {"gradient_checkpointing", "optimizer"}  # read by getattr, since the core's TrainConfig lacks them
    keys = set(config_keys(kind))
    assert {"seed", "learning_rate"} <= keys
    assert keys - read == set()
