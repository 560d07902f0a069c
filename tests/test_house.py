"""The house keeps its shape: imports go one way, files and functions stay small."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "medlite"
FILES = sorted(PACKAGE.rglob("*.py"))

ROOM_LEVELS = {
    "types": 0, "errors": 0, "optional": 0, "monai_metadata": 0, "safety_settings": 0,
    "metrics": 1, "runtimes": 1, "config_schema": 1,
    "export": 2,
    "data": 3, "models": 3, "tasks": 3, "compression": 3, "bench": 3, "safety": 3, "report": 3,
    "config": 3, "command_line": 3,
    "store": 4,
    "pipeline": 5, "audit": 5, "search": 5, "gate": 5,
    "__main__": 6,
}  # fmt: skip
"""A room imports only from its own and lower levels; on one level, only from itself."""

FORBIDDEN = {
    room: {"hydra", "omegaconf", "wandb"}
    for room in ("models", "metrics", "export", "runtimes", "compression")
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def imported_rooms(path: Path) -> set[str]:
    parts = (module.split(".") for module in imported_modules(path))
    return {part[1] for part in parts if part[0] == "medlite" and len(part) > 1} - {"__version__"}


def test_the_package_is_found():
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path):
    room = room_of(path)
    if room == "__init__":
        assert imported_modules(path) <= {"sys"}
        return
    wrong = {
        other
        for other in imported_rooms(path) - {room}
        if ROOM_LEVELS[other] >= ROOM_LEVELS[room] and ROOM_LEVELS[room] > 0
    }
    assert not wrong, f"{room} imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_inner_rooms_know_nothing_of_configuration_or_logging(path):
    roots = {module.split(".")[0] for module in imported_modules(path)}
    assert not roots & FORBIDDEN.get(room_of(path), set())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    too_long = [f.name for f in functions if f.end_lineno - f.lineno >= 80]
    assert not too_long
