"""Imports go one way: types <- nets <- world_model <- behavior <- policies <- dreamer <- optional packages."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sb3_dreamer"

# layer -> the layers that it may import; a new one needs a line here
CORE = {
    "types": set(),
    "nets": {"types"},
    "world_model": {"types", "nets"},
    "behavior": {"types", "nets", "world_model"},
    "replay": {"types", "files", "spaces"},
    "spaces": {"types"},
    "actions": {"spaces"},
    "policies": {"types", "nets", "world_model", "behavior", "spaces", "actions", "checks"},
    "environments": {"spaces", "actions"},
    "files": {"checks"},
    "imitation": set(),
    "callbacks": set(),
    "checks": set(),
    "algorithm": {"types", "replay", "imitation", "policies", "environments", "files"},
    "knobs": {"replay", "checks"},
    "metrics": set(),
    "capture": {"types"},
    "optional_methods": set(),
    "dreamer": {
        "optional_methods",
        "types",
        "capture",
        "nets",
        "world_model",
        "behavior",
        "replay",
        "policies",
        "algorithm",
        "knobs",
        "metrics",
        "imitation",
        "files",
        "environments",
    },
    "acting": {"dreamer", "environments"},
}
OPTIONAL = {"resume", "hybrid", "zoo", "dreams", "planning", "tianshou", "distributed"}
# `__init__` stands for what the package itself exports, as in `from sb3_dreamer import Dreamer`
ALLOWED = CORE | {package: set(CORE) | {"__init__"} for package in OPTIONAL} | {"__init__": set(CORE)}

# layer -> the only libraries that it may import besides the standard library
LIBRARIES = {
    "types": {"torch", "numpy"},
    "nets": {"torch", "numpy"},
    "world_model": {"torch", "numpy"},
    "behavior": {"torch", "numpy"},
    "replay": {"torch", "numpy", "gymnasium", "stable_baselines3", "psutil"},
    "spaces": {"torch", "numpy", "gymnasium", "stable_baselines3"},
    "actions": {"numpy", "gymnasium"},
    "policies": {"torch", "numpy", "gymnasium", "stable_baselines3"},
    "environments": {"gymnasium", "numpy", "stable_baselines3"},
    "files": {"numpy", "torch", "gymnasium", "stable_baselines3"},
    "algorithm": {"torch", "numpy", "gymnasium", "stable_baselines3"},
    "knobs": set(),
    "imitation": {"numpy"},
    "callbacks": {"stable_baselines3"},
    "checks": set(),
    "metrics": {"torch"},
    "capture": {"torch"},
    "optional_methods": {"stable_baselines3"},
    "dreamer": {"torch", "numpy", "gymnasium", "stable_baselines3"},
    "acting": {"numpy", "gymnasium", "stable_baselines3"},
    "__init__": set(),
}

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 320


class Import(NamedTuple):
    file: Path
    line: int
    module: str  # absolute, dotted
    at_call: bool  # inside a function, so it happens when the function is called

    @property
    def where(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of_module(module: str) -> str:
    """`sb3_dreamer.nets.layers` -> `nets`; `sb3_dreamer` and `sb3_dreamer.Dreamer` -> `__init__`."""
    _, layer, *_ = [*module.split("."), "__init__"]
    return layer if layer in ALLOWED else "__init__"


def absolute(node: ast.ImportFrom, file: Path) -> str:
    if node.level == 0:
        return node.module or ""
    package = ("sb3_dreamer", *file.relative_to(PACKAGE).parts[:-1])
    base = ".".join(package[: len(package) - node.level + 1])
    return f"{base}.{node.module}" if node.module else base


def modules_of(node: ast.AST, file: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = absolute(node, file)
        # `from sb3_dreamer import x`: x may be a layer
        return [f"{base}.{alias.name}" for alias in node.names] if base == "sb3_dreamer" else [base]
    return []


def imports_below(node: ast.AST, file: Path, at_call: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for module in modules_of(child, file):
            yield Import(file, child.lineno, module, at_call)
        inside = at_call or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports_below(child, file, inside)


def all_imports() -> list[Import]:
    return [found for file in sources() for found in imports_below(ast.parse(file.read_text("utf-8")), file)]


def own(found: Import) -> bool:
    return found.module.split(".")[0] == "sb3_dreamer"


def test_every_module_belongs_to_a_layer():
    strangers = {layer_of(file) for file in sources()} - ALLOWED.keys()
    assert not strangers, f"{strangers} are in no line of CORE or OPTIONAL: decide what they may import"


def test_imports_go_one_way():
    def allowed(found: Import) -> bool:
        here, there = layer_of(found.file), layer_of_module(found.module)
        on_call = here == "optional_methods" and found.at_call and there in OPTIONAL
        return here == there or there in ALLOWED[here] or on_call

    against = [found.where for found in all_imports() if own(found) and not allowed(found)]
    assert not against, "\n".join(against)


def test_the_rooms_of_the_model_import_no_rl_library():
    def foreign(found: Import) -> bool:
        top = found.module.split(".")[0]
        layer = layer_of(found.file)
        return layer in LIBRARIES and top not in LIBRARIES[layer] | sys.stdlib_module_names | {"sb3_dreamer"}

    against = [found.where for found in all_imports() if foreign(found)]
    assert not against, "\n".join(against)


def test_no_file_is_a_drawer_for_everything():
    drawers = {"utils", "util", "tools", "common", "helpers", "misc"}
    found = [file for file in PACKAGE.rglob("*") if file.stem in drawers]
    assert not found, f"name {found} after what it holds"


def functions(file: Path) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef))


def lines_of_code(function: ast.FunctionDef) -> int:
    """Without the docstring; of a constructor without the list of its knobs either."""
    first = function.body[0]
    told = ast.get_docstring(function) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if told else 0
    begin = first.lineno if function.name == "__init__" else function.lineno
    return (function.end_lineno or 0) - begin + 1 - docstring


def test_files_stay_short():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in sources()}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert not long, f"over {MAX_FILE_LINES} lines: {long}"


def test_functions_stay_short():
    found = [(file, function) for file in sources() for function in functions(file)]
    long = [f"{file.name}:{f.lineno} {f.name}" for file, f in found if lines_of_code(f) > MAX_FUNCTION_LINES]
    assert not long, f"over {MAX_FUNCTION_LINES} lines beside the docstring: {long}"


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tests"])
def test_package_never_imports_the_folders_around_it(folder: str):
    against = [found.where for found in all_imports() if found.module.split(".")[0] == folder]
    assert not against, "\n".join(against)


def test_import_of_the_package_brings_no_heavy_library():
    heavy = ["rl_zoo3", "tianshou", "ray", "matplotlib", "mujoco", "optuna", "dm_control", "sb3_contrib"]
    code = f"import sys, sb3_dreamer; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
