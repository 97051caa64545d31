"""Which module may import which: the dependency rule of README.md, checked on the syntax trees of all modules."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import data.cache
import model.sparse
import option

ROOT = Path(__file__).resolve().parents[1]
RULE = re.compile(r"^`(tools, main\b[\w, >-]+)`$", re.MULTILINE)
HIDDEN = {"import_module", "__import__", "exec_module", "load_module", "run_path", "run_module"}
HIDDEN |= {"spec_from_file_location", "runpy", "builtins", "imp"}
BUILTINS = {"exec", "eval"}  # only as plain names: `model.eval()` is something else
NO_PROJECT = {"tests", "node_modules", "venv"}


# ---- the checker -----------------------------------------------------------------------------------------------------


def find_modules(root: Path) -> dict[str, Path]:
    """{name as in an import: file} of all modules of the project."""
    folders = [folder for folder in root.iterdir() if any(folder.glob("*.py"))]
    folders = [folder for folder in folders if folder.name not in NO_PROJECT and not folder.name.startswith(".")]
    files = [*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    modules = {}
    for path in sorted(files):
        parts = path.relative_to(root).with_suffix("").parts
        if not NO_PROJECT & set(parts):
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def parse_rule(text: str) -> dict[str, int]:
    """{top-level name: layer} of the line "`tools, main -> ...`"; 0 is the lowest layer."""
    lines = RULE.findall(text)
    assert len(lines) == 1, "README.md must hold the dependency rule once, on a line of its own, in backticks"
    layers = [layer.split(", ") for layer in lines[0].split(" -> ")]
    names = [name for layer in layers for name in layer]
    assert len(names) == len(set(names)), "the dependency rule has a name twice"
    return {name: len(layers) - 1 - index for index, layer in enumerate(layers) for name in layer}


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """(line, module, names) of each import in a module, at any depth; `import module` has no names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or ""), [alias.name for alias in node.names]


def hidden_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that can import or run a module without an import statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in HIDDEN:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name) and node.id in HIDDEN | BUILTINS:
            yield node.lineno, node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in HIDDEN:
            yield node.lineno, node.value  # getattr(importlib, "import_module")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            origin = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from ((node.lineno, name) for name in HIDDEN & {*origin, *(alias.name for alias in node.names)})


def top(name: str) -> str:
    """The first part of the name of a module."""
    return name.partition(".")[0]


def check(root: Path) -> list[str]:
    """Everything in the tree `root` that breaks the dependency rule of its README.md, one line each."""
    modules, layers = find_modules(root), parse_rule((root / "README.md").read_text(encoding="utf-8"))
    found = {top(name) for name in modules}
    problems = [f"{name}: is missing from the rule" for name in sorted(found - layers.keys())]
    problems += [f"{name}: is in the rule, but does not exist" for name in sorted(layers.keys() - found)]
    graph = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        file, graph[name] = path.relative_to(root), set()
        problems += [f"{file}:{line}: hides an import ({what})" for line, what in hidden_imports(tree)]
        for line, target, parts in imported_names(tree):
            if target.startswith("."):
                problems.append(f"{file}:{line}: has a relative import")
            elif top(target) in found:
                graph[name] |= executed_modules(name, target, parts, modules)
                problems += check_import(f"{file}:{line}", name, target, modules, layers)
            elif is_sibling_script(path, target):
                problems.append(f"{file}:{line}: imports {target} without its package")
    return problems + find_cycles(graph)


def check_import(place: str, name: str, target: str, modules: dict[str, Path], layers: dict[str, int]) -> list[str]:
    """The problems of an import of the module `target` in the module `name`."""
    if target not in modules and not any(module.startswith(f"{target}.") for module in modules):
        return [f"{place}: imports {target}, which does not exist"]
    importer, imported = top(name), top(target)
    if importer != imported and layers.get(importer, 0) <= layers.get(imported, 0):
        return [f"{place}: {importer} imports {imported}, which is not in a lower layer"]
    return []


def is_sibling_script(path: Path, target: str) -> bool:
    """Whether `import target` finds a file next to the script `path`: a script has its own folder in sys.path."""
    return (path.parent / f"{top(target)}.py").exists() and not (path.parent / "__init__.py").exists()


def executed_modules(name: str, target: str, parts: list[str], modules: dict[str, Path]) -> set[str]:
    """The modules that `from target import parts`, or `import target`, in the module `name` executes.

    The packages that contain `name` are not among them, because they are always executed before it, unless it needs
    more than submodules of them.
    """
    submodules = {f"{target}.{part}" for part in parts} & modules.keys()
    steps = target.split(".")
    packages = {".".join(steps[:length]) for length in range(1, len(steps) + 1)}
    needed = {package for package in packages if not name.startswith(f"{package}.")} | submodules
    if len(submodules) < len(parts) or not parts:
        needed.add(target)
    return needed & modules.keys() - {name}


def find_cycles(graph: dict[str, set[str]]) -> list[str]:
    """The import cycles that a depth-first search meets, one line each."""
    finished, cycles = set(), []

    def visit(name, path):
        if name in path:
            cycles.append("cycle: " + " -> ".join([*path[path.index(name) :], name]))
        elif name not in finished:
            for imported in sorted(graph[name]):
                visit(imported, [*path, name])
            finished.add(name)

    for name in sorted(graph):
        visit(name, [])
    return cycles


# ---- tests of the checker --------------------------------------------------------------------------------------------

GOOD = {
    "README.md": "Dependencies:\n\n`tools, main -> trainer -> model, data -> utility`\n\nEnd.\n",
    "main.py": "import trainer\nfrom model import build\n",
    "trainer.py": "from data import image\nfrom model.smsr import SMSR\nimport utility, os\n",
    "utility.py": "import json\n",
    "model/__init__.py": "from model.smsr import SMSR\nfrom model import common\n",
    "model/smsr.py": "from model import common\nimport model.common\n",
    "model/common.py": "from utility import InputError\n",
    "data/__init__.py": "",
    "data/image.py": "model = 1\nmodel.eval()\n",
    "tools/compare.py": "from tools import timing\nfrom tools.tables import timed\nimport model.smsr\n",
    "tools/tables.py": "def timed():\n    from utility import clock\n",
    "tests/test_main.py": "import main\n__import__('main')\n",
    "venv/lib/main.py": "import trainer\n",
    "venv/tool.py": "from . import nothing\n",
}


@pytest.fixture
def tree(tmp_path):
    """A function that writes the good tree, with other or additional files, and returns what the checker finds."""

    def check_tree(changes):
        for name, text in {**GOOD, **changes}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return check(tmp_path)

    return check_tree


def test_the_checker_accepts_a_good_tree(tree):
    assert tree({}) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("utility.py", "import trainer", "utility.py:1: utility imports trainer, which is not in a lower layer"),
        ("utility.py", "def f():\n    from model.smsr import SMSR", "utility.py:2: utility imports model"),
        ("utility.py", "if TYPE_CHECKING:\n    import data.image", "utility.py:2: utility imports data"),
        ("data/image.py", "import os, model.smsr as m", "data/image.py:1: data imports model"),
        ("model/common.py", "from main import main", "model/common.py:1: model imports main"),
        ("tools/tables.py", "import main", "tools/tables.py:1: tools imports main"),
        ("trainer.py", "import tools.compare", "trainer.py:1: trainer imports tools"),
        ("trainer.py", "from tools import compare", "trainer.py:1: trainer imports tools"),
        ("main.py", "from model.absent import X", "main.py:1: imports model.absent, which does not exist"),
        ("model/smsr.py", "from .common import conv", "model/smsr.py:1: has a relative import"),
        ("model/smsr.py", "from . import common", "model/smsr.py:1: has a relative import"),
        ("tools/tables.py", "import compare", "tools/tables.py:1: imports compare without its package"),
        ("pictures.py", "", "pictures: is missing from the rule"),
        ("watch/board.py", "", "watch: is missing from the rule"),
    ],
)
def test_the_checker_finds_imports_that_break_the_rule(tree, name, text, problem):
    found, *cycles = tree({name: text})
    assert found.startswith(problem)
    assert all(line.startswith("cycle: ") for line in cycles)


def test_the_checker_finds_names_in_the_rule_that_do_not_exist(tree):
    assert tree({"README.md": "`tools, main -> trainer -> model, data, loss -> utility`\n"}) == [
        "loss: is in the rule, but does not exist"
    ]


@pytest.mark.parametrize(
    ("changes", "cycle"),
    [
        ({"model/common.py": "def f():\n    import model.smsr"}, "model.common -> model.smsr -> model.common"),
        ({"model/common.py": "from model import smsr"}, "model.common -> model.smsr -> model.common"),
        ({"model/common.py": "from model import build"}, "model -> model.common -> model"),
        ({"model/common.py": "from model import *"}, "model -> model.common -> model"),
        ({"model/common.py": "import model"}, "model -> model.common -> model"),
        ({"tools/tables.py": "import tools.compare"}, "tools.compare -> tools.tables -> tools.compare"),
    ],
)
def test_the_checker_finds_cycles_inside_packages(tree, changes, cycle):
    assert tree(changes) == [f"cycle: {cycle}"]


def test_the_checker_finds_cycles_across_packages(tree):
    found = tree({"data/__init__.py": "import model.common", "model/common.py": "import data.image"})
    assert "cycle: data -> model -> model.common -> data" in found
    found = tree({"data/__init__.py": "", "model/common.py": "", "utility.py": "import trainer"})
    assert found[1:] == ["cycle: trainer -> utility -> trainer"]


@pytest.mark.parametrize(
    "text",
    [
        "import importlib\nimportlib.import_module('main')",
        "from importlib import import_module as load\nload('main')",
        "import importlib\ngetattr(importlib, 'import_module')('main')",
        "__import__('main')",
        "exec(open('main.py').read())",
        "def f():\n    exec('import main')",
        "eval('__import__')",
        "import builtins\nbuiltins.exec('import main')",
        "import runpy\nrunpy.run_path('main.py')",
        "from runpy import run_module",
        "import importlib.util\nimportlib.util.spec_from_file_location('main', 'main.py')",
    ],
)
def test_the_checker_finds_hidden_imports(tree, text):
    found = tree({"data/image.py": text})
    assert found
    assert all(re.match(r"data/image\.py:\d: hides an import", line) for line in found)


@pytest.mark.parametrize("text", ["", "`tools, main -> model`\n`tools, main -> model`\n", "`tools, main -> a -> a`\n"])
def test_the_rule_must_be_there_once_and_name_each_module_once(text):
    with pytest.raises(AssertionError, match="rule"):
        parse_rule(text)


# ---- tests of the project --------------------------------------------------------------------------------------------


def test_the_project_follows_the_dependency_rule():
    assert check(ROOT) == []


def test_the_checker_reads_all_modules():
    modules = find_modules(ROOT)
    assert {"main", "option", "utility", "model", "model.smsr", "data.srdata", "tools.compare"} <= modules.keys()
    assert not any(name.startswith("tests") for name in modules)


def in_a_fresh_process(folder, *arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=folder)


def test_help_works_in_a_fresh_process(tmp_path):
    done = in_a_fresh_process(tmp_path, ROOT / "main.py", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: main.py")
    assert done.stderr == ""
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [("from model import load_model", {"matplotlib", "cv2", "option"}), ("import option", {"model", "data", "cv2"})],
)
def test_light_modules_load_no_heavy_ones(tmp_path, statement, absent):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {statement}; print(*sys.modules)"
    done = in_a_fresh_process(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    assert not absent & set(done.stdout.split())


def test_main_needs_neither_pyav_nor_every_function_of_opencv(tmp_path):
    program = f"import sys, cv2; sys.path.insert(0, {str(ROOT)!r}); vars(cv2).pop('setLogLevel', 0)"
    done = in_a_fresh_process(tmp_path, "-c", f"{program}; sys.modules['av'] = None; import main")
    assert done.returncode == 0, done.stderr


def test_choices_of_the_command_line_are_those_of_the_modules():
    assert option.INFERENCE_MODES == model.sparse.INFERENCE_MODES
    assert option.ENGINES == model.engines.NAMES
    assert option.CACHE_KINDS == data.cache.CACHE_KINDS
