"""Imports point down. DESIGN.md's picture, enforced on every import statement, those inside functions included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pixrl.config

PACKAGE = Path(pixrl.config.__file__).parent
LAYERS = [
    {
        "errors",
        "types",
        "config",
        "hub",
        "hub_check",
        "device",
        "libraries",
        "plugins",
        "text",
        "untrusted",
        "workers",
    },
    {"equations"},
    {"models", "rewards", "data"},
    {"metrics"},
    {"algorithms", "conformance"},
    {"runs", "fusion"},
    {"doctor"},
    {"jobs"},
    {"report", "serve"},
    {"human_study"},
    {"api", "studio", "__init__", "__main__"} | {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SHARED = (0, 5, len(LAYERS) - 1)
"""Layers whose parts import each other: the foundation; the parts of a run and what it fuses with; the top."""
TOY_MAY_IMPORT = LAYERS[0] | LAYERS[1] | LAYERS[2] | LAYERS[3]
MAY_IMPORT_TOY = {"toy", "cli"}
TORCH_FREE = [
    "errors",
    "text",
    "plugins",
    "config",
    "untrusted",
    "hub",
    "hub_check",
    "__init__",
    "__main__",
]
TORCH_FREE += sorted(f"cli/{path.stem}" for path in PACKAGE.glob("cli/*.py"))
LIBRARIES_OF_EQUATIONS = {"torch", "pixrl"}


def module_name(path: Path) -> str:
    parts = ["pixrl", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def part_of(module: str) -> str:
    """`models` for pixrl.models.sd3, `__init__` for pixrl itself and for what is no module (`pixrl.__version__`)."""
    name = module.partition(".")[2].partition(".")[0]
    exists = name in LEVEL or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
    return name if name and exists else "__init__"


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of each module that a file imports; `from pixrl import models` counts as pixrl.models,
    and `from pixrl.runs import align` as pixrl.jobs.align."""
    here = module_name(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            is_bare = base == "pixrl"
            yield from ((node.lineno, f"{base}.{alias.name}" if is_bare else base) for alias in node.names)


def may_import(part: str, other: str, module: str) -> bool:
    if part == other:
        return True
    if other == "toy":
        return part in MAY_IMPORT_TOY
    if other == "__init__":  # the version, and the public names that are loaded on first use
        return part in LAYERS[-1]
    if part == "toy":
        return other in TOY_MAY_IMPORT
    return LEVEL[other] < LEVEL[part] or any({part, other} <= LAYERS[shared] for shared in SHARED)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    part = part_of(module_name(path))
    assert part == "toy" or part in LEVEL, f"{part} has no layer: add it to LAYERS, and to DESIGN's picture"
    wrong = [
        f"{path}:{line} imports {module}"
        for line, module in imported(path)
        if module.split(".")[0] == "pixrl" and not may_import(part, part_of(module), module)
    ]
    assert not wrong


def test_equations_import_torch_alone() -> None:
    import sys

    for path in (PACKAGE / "equations").glob("*.py"):
        roots = {module.split(".")[0] for _, module in imported(path)}
        assert roots <= LIBRARIES_OF_EQUATIONS | sys.stdlib_module_names, path


@pytest.mark.parametrize("name", TORCH_FREE)
def test_light_modules_import_nothing_heavy_at_the_top(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert not {
        n for n in names if n.split(".")[0] in {"torch", "diffusers", "transformers", "peft", "numpy"}
    }


def is_torch_load(call: ast.Call) -> bool:
    f = call.func
    return isinstance(f, ast.Attribute) and ast.unparse(f) == "torch.load"


def test_nothing_reads_files_that_run_code() -> None:
    """No pickle, and torch's own loader in one place, told to build tensors alone."""
    for path in FILES:
        modules = {module.split(".")[0] for _, module in imported(path)}
        assert not modules & {"pickle", "dill", "joblib", "marshal", "shelve"}, path
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        loads = [call for call in calls if is_torch_load(call)]
        assert not loads or path == PACKAGE / "rewards" / "weights.py", path
        for call in loads:
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("weights_only") == "True", path
