"""The structure of the project: imports of envs/ only point down, functions are short, the README is one screen."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from common import ROOT

FLOORS = [
    {"run", "market", "networks"},
    {"baselines", "optimum", "calibration"},
    {"benchmark"},
    {"figures", "models", "gym"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
SCRIPTS = sorted(ROOT.glob("phase*.py"))
SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "envs").rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in SOURCES.items()}


def imported(tree: ast.Module) -> list[str]:
    """Full names of all that a file imports, modules and names in them."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def modules_imported(tree: ast.Module) -> set[str]:
    """The modules of envs/ that a file imports."""
    found = {name if name in MODULES else name.rpartition(".")[0] for name in imported(tree)}
    return found & set(MODULES)


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"envs"}))
def test_imports_only_point_down(module):
    for other in modules_imported(MODULES[module]) - {"envs"}:
        below = FLOOR[room(other)] < FLOOR[room(module)]
        assert below or room(other) == room(module), f"{module} imports {other}, which is not below it"
    assert "envs" not in modules_imported(MODULES[module]), f"{module} imports the package itself"


def test_no_circle_of_imports():
    list(TopologicalSorter({name: modules_imported(tree) - {name} for name, tree in MODULES.items()}).static_order())


def test_a_circle_and_an_import_that_points_up_would_be_found():
    tree = ast.parse("from envs.figures import style\nimport envs.market.hedging\nfrom envs.run.run import Run")
    assert modules_imported(tree) == {"envs.figures.style", "envs.market.hedging", "envs.run.run"}
    with pytest.raises(ValueError, match="cycle"):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_inside_a_function_but_wandbs(module):
    tree = MODULES[module]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {name for function in functions for name in imported(function)}
    assert inside <= ({"wandb"} if module == "envs.run.run" else set())
    assert "wandb" not in {name.split(".")[0] for name in imported(tree)} or module == "envs.run.run"


def test_importing_envs_loads_neither_matplotlib_nor_wandb():
    code = "import sys, envs; print(*(name for name in ('matplotlib', 'wandb', 'arch') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_phase_imports_another_and_envs_imports_none():
    for tree in [*(ast.parse(path.read_text()) for path in SCRIPTS), *MODULES.values()]:
        assert not {name.split(".")[0] for name in imported(tree)} & {path.stem for path in SCRIPTS}


def test_envs_leaves_the_command_line_to_the_scripts():
    for name, path in SOURCES.items():
        assert "sys.argv" not in path.read_text(), name


@pytest.mark.parametrize("path", [*SCRIPTS, *SOURCES.values()], ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_readme_is_one_screen_and_its_links_resolve():
    text = (ROOT / "README.md").read_text()
    assert len(text) <= 12_000
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    for page in (ROOT / "docs").glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
