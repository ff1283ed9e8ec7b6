"""What may import what, and how long a file may be: read from the sources, so nothing here is imported."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastbert_hf"
MODELING = PACKAGE / "modeling"
MOST_LINES = 500
# Folders and files of the package, from below: each may import what stands in a line above its own, nothing else.
LEVELS = (
    {"modeling", "operators", "escapes", "files", "rows", "version", "word_rows", "span_rows", "label_kinds"},
    {"engines", "data"},
    {"evaluation"},
    {"calibration"},
    {"sharing"},
    {"training"},
    {"serving"},
    {"commands"},
    {"fastbert_hf"},  # its __init__.py
)
# What may import less than its line says.
ONLY = {
    "modeling": set(),
    "operators": set(),
    "escapes": set(),
    "files": set(),
    "rows": {"word_rows"},
    "word_rows": {"modeling"},
    "label_kinds": set(),
    "span_rows": set(),
    "version": set(),
    "evaluation": {"modeling", "files", "rows"},
}
# Beside its siblings: what a checkpoint that travels with its code finds everywhere.
ALLOWED_IN_MODELING = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}


def python_files(*folders: str) -> list[Path]:
    """Return every Python file below some folders of the project."""
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def sources_of(folder: Path) -> dict[str, str]:
    """Return the source of every module below a package's folder, by the module's full name."""
    names = {file: file.relative_to(folder.parent).with_suffix("").parts for file in sorted(folder.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): file.read_text() for file, parts in names.items()}


def imports_of(source: str) -> Iterator[tuple[int, str, str | None]]:
    """Yield (dots, module, name) of every import of a source, those inside functions too; `name` only where given."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return which modules of a package each of them imports."""
    graph = {}
    for module, source in sources.items():
        # An `__init__.py` is inside the package that it names.
        is_package = any(name.startswith(f"{module}.") for name in sources)
        here = module.split(".") if is_package else module.split(".")[:-1]
        graph[module] = set()
        for dots, named, name in imports_of(source):
            start = here[: len(here) - dots + 1] if dots else []
            imported = ".".join([*start, *filter(None, [named])])
            # `from package import name` gives a file of that name, or what the package itself defines.
            imported = next((known for known in (f"{imported}.{name}", imported) if known in sources), None)
            graph[module] |= {imported} - {None, module}
    return graph


def circle_of(graph: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def part_of(module: str) -> str:
    """Return the folder of a module, or its own name where it lies in none."""
    return module.split(".")[1] if "." in module else module


def level_of(part: str) -> int:
    """Return the line of `LEVELS` that names a part."""
    (level,) = (level for level, parts in enumerate(LEVELS) if part in parts)
    return level


def wrong_arrows(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports that lead up, aside, or where `ONLY` does not let them."""
    arrows = {(module, imported) for module, every in graph.items() for imported in every}
    wrong = []
    for module, imported in sorted(arrows):
        part, below = part_of(module), part_of(imported)
        allowed = below in ONLY[part] if part in ONLY else level_of(below) < level_of(part)
        if part != below and not allowed:
            wrong.append(f"{module} -> {imported}")
    return wrong


def forbidden_imports(source: str) -> list[str]:
    """Return the imports that would fail in a folder that holds this file, its dotted siblings and nothing else."""
    forbidden = []
    for dots, module, _ in imports_of(source):
        is_sibling = dots == 1 and (MODELING / f"{module}.py").is_file()
        is_everywhere = dots == 0 and module.partition(".")[0] in ALLOWED_IN_MODELING
        if not is_sibling and not is_everywhere:
            forbidden.append("." * dots + module)
    return forbidden


def classes_of(source: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}


def checks_of_foreign_classes(source: str, our_classes: set[str]) -> list[str]:
    """Return the `isinstance` and `issubclass` calls that name one of our classes from another file."""
    foreign = our_classes - classes_of(source)
    checks = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("isinstance", "issubclass"):
                named = re.findall(r"\w+", ast.unparse(node.args[1]))
                checks += [ast.unparse(node) for name in named if name in foreign]
    return checks


def public_names(source: str) -> set[str]:
    """Return the public functions and classes of a file."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    named = (node.name for node in ast.parse(source).body if isinstance(node, definitions))
    return {name for name in named if not name.startswith("_")}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return sources_of(PACKAGE)


@pytest.fixture(scope="module")
def modeling() -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(MODELING.glob("*.py"))}


def test_no_files_import_each_other_in_a_circle(sources):
    graph = import_graph(sources)
    assert graph["fastbert_hf"] and graph["fastbert_hf.evaluation"]  # the imports were found
    assert circle_of(graph) == []


def test_imports_lead_from_each_folder_to_those_below_it(sources):
    graph = import_graph(sources)
    assert "fastbert_hf.modeling.modeling_fastbert" in graph["fastbert_hf"]
    assert set(map(part_of, graph)) <= set().union(*LEVELS)  # a new part needs its line
    assert wrong_arrows(graph) == []


def test_modeling_is_flat(modeling):
    assert {path.name for path in MODELING.iterdir() if path.name != "__pycache__"} == modeling.keys()


def test_modeling_files_import_only_what_travels_with_a_checkpoint(modeling):
    assert {file: names for file, source in modeling.items() if (names := forbidden_imports(source))} == {}


def test_modeling_files_do_not_check_for_classes_of_other_files(modeling):
    our_classes = set().union(*map(classes_of, modeling.values()))
    assert {"FastBertConfig", "PackedBatch", "FastBertForSequenceClassification"} <= our_classes
    checks = {file: checks_of_foreign_classes(source, our_classes) for file, source in modeling.items()}
    assert {file: found for file, found in checks.items() if found} == {}


def test_a_public_name_is_defined_in_one_file(sources):
    # Every command has a `main`, or a `run` that the command line calls.
    files = {}
    for module, source in sources.items():
        for name in public_names(source) - {"main", "run"}:
            files.setdefault(name, []).append(module)
    assert {name: modules for name, modules in files.items() if len(modules) > 1} == {}


def test_no_python_file_is_longer_than_500_lines():
    files = python_files("fastbert_hf", "tests", "examples", "benchmarks")
    assert Path(__file__) in files
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {file: length for file, length in lengths.items() if length > MOST_LINES} == {}


def test_no_file_of_the_package_sets_thread_counts_or_registers_for_auto_classes(sources):
    for name in ("set_num_threads", "register_for_auto_class"):
        assert [module for module, source in sources.items() if name in source] == []


# The checks themselves


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import numpy as np", "numpy"),
        ("from datasets import Dataset", "datasets"),
        ("import fastbert_hf.version", "fastbert_hf.version"),
        ("from fastbert_hf.modeling import exit_policies", "fastbert_hf.modeling"),
        ("from . import exit_policies", "."),
        ("from ..training import arguments", "..training"),
        ("from .training.arguments import ExitTrainingArguments", ".training.arguments"),
        ("from .no_such_file import name", ".no_such_file"),
        ("def late():\n    import accelerate", "accelerate"),
    ],
)
def test_import_check_sees_what_would_not_travel(line, name):
    assert forbidden_imports(line) == [name]


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(x, PackedBatch)",
        "isinstance(x, (str, packed_batch.PackedBatch))",
        "issubclass(x, PackedBatch | None)",
    ],
)
def test_class_check_sees_classes_of_other_files(line):
    assert checks_of_foreign_classes(line, {"PackedBatch"}) == [line]
    assert checks_of_foreign_classes(f"class PackedBatch: ...\n{line}", {"PackedBatch"}) == []


@pytest.mark.parametrize(
    ("line", "imported"),
    [
        ("from .other import name", "pack.part.other"),
        ("from . import other", "pack.part.other"),
        ("from ..files import name", "pack.files"),
        ("from .. import files", "pack.files"),
        ("from .. import name", "pack"),
        ("import pack.files", "pack.files"),
        ("from pack.part import name", "pack.part"),
        ("def late():\n    from .other import name", "pack.part.other"),
        ("import json", None),
        ("from other import name", None),
    ],
)
def test_import_graph_finds_the_file_behind_an_import(line, imported):
    files = {name: "" for name in ("pack", "pack.files", "pack.part", "pack.part.other", "pack.part.this")}
    assert import_graph({**files, "pack.part.this": line})["pack.part.this"] == {imported} - {None}
    in_package = import_graph({**files, "pack.part": line})["pack.part"]
    assert in_package == {imported} - {None, "pack.part"}


def test_circles_are_found_through_several_files():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}
    assert set(circle_of(graph)) == {"a", "b", "c"}
    assert circle_of({**graph, "c": {"d"}}) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("modeling.tasks", "files"),
        ("modeling.tasks", "evaluation.replay"),
        ("files", "modeling.tasks"),
        ("evaluation.replay", "data"),
        ("evaluation.replay", "sharing.push"),
        ("sharing.push", "training.stages"),
        ("training.stages", "commands.run"),
        ("serving.ray", "commands.run"),
        ("training.stages", None),
    ],
)
def test_arrows_up_and_aside_are_found(module, imported):
    module = f"fastbert_hf.{module}"
    imported = "fastbert_hf" if imported is None else f"fastbert_hf.{imported}"
    below = {"fastbert_hf.modeling.tasks", "fastbert_hf.files"} - {module}
    allowed = {} if "modeling" in module or module.endswith("files") else {module: below}
    assert wrong_arrows(allowed) == []
    assert wrong_arrows({**allowed, module: {imported}}) == [f"{module} -> {imported}"]
