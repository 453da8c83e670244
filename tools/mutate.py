#!/usr/bin/env python3
"""Mutation testing of `pixrl.equations`: change one thing at a time and see whether a test notices.

    python tools/mutate.py [--minimum 0.90] [--out report.json] [--only sde,nft] [--jobs 2] [--timeout 30]

One process imports torch and pytest, and nothing of pixrl. For each mutant it forks; the child imports the
package with one module's source replaced and runs the tests of that module alone
(`tests/equations/test_MODULE.py`), stopping at the first failure. A mutant is killed when a test fails, the
package cannot be imported, or the time is up. Exit code 1 when the killed share is below the minimum, 2 when
the tests fail without any mutation.

`tools/mutants_equivalent.toml` explains survivors that no test can notice. They still count as survivors.
`tools/mutate_semantic.py` does the same for what is not an equation.
"""

import argparse
import ast
import contextlib
import gc
import importlib.abc
import importlib.machinery
import io
import json
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, FOLDER, TESTS = "pixrl.equations", ROOT / "src/pixrl/equations", ROOT / "tests/equations"
ALLOWED = Path(__file__).with_name("mutants_equivalent.toml")
MutantT = TypeVar("MutantT")

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ONE = "minimum min amin clamp_min sin all sum isinf ones_like"
OTHER = "maximum max amax clamp_max cos any mean isnan zeros_like"
SWAPS = dict(zip(f"{ONE} {OTHER}".split(), f"{OTHER} {ONE}".split(), strict=True))
DROPPED_METHODS = "abs sqrt clamp clamp_min detach tanh sigmoid exp log copysign to"
DROPPED_FUNCTIONS = {"widen"}


@dataclass(frozen=True)
class Mutant:
    """One change of one module, compiled."""

    module: str
    function: str
    line: int
    before: str
    after: str
    code: CodeType

    @property
    def mutation(self) -> str:
        """The change in words."""
        return f"{self.before} -> {self.after}"


@dataclass
class Tally:
    """What became of one module's mutants."""

    mutants: int = 0
    killed: int = 0
    timeouts: int = 0

    @property
    def share(self) -> float:
        """Killed share; timeouts count as killed."""
        return self.killed / self.mutants if self.mutants else 1.0


# -- what can be changed -------------------------------------------------------------------------------------


def alternatives(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """Every replacement of this one node."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield with_field(node, "op", OPERATORS[type(op)]())
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
            yield node.operand
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                for other in COMPARISONS[type(operator)]:
                    yield with_field(node, "ops", [*node.ops[:i], other(), *node.ops[i + 1 :]])
        case ast.Constant():
            yield from other_constants(node.value, parent)
        case ast.Call():
            yield from other_calls(node)
        case ast.Attribute(attr="tiny"):
            yield with_field(node, "attr", "eps")
        case ast.IfExp():
            yield ast.IfExp(test=node.test, body=node.orelse, orelse=node.body)
        case ast.If(test=ast.Name() | ast.Call() | ast.Attribute()):
            yield with_field(node, "test", ast.UnaryOp(op=ast.Not(), operand=node.test))
        case ast.Raise() | ast.Expr(value=ast.Call()):
            yield ast.Pass()


def other_constants(value: object, parent: ast.AST) -> Iterator[ast.Constant]:
    """Neighbours of a constant. Strings count where they decide something, not in messages."""
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
        yield ast.Constant(value - 1)
    elif isinstance(value, float):
        yield ast.Constant(value * 2 or 1.0)
        yield ast.Constant(value / 2 or -1.0)
    elif isinstance(value, str) and isinstance(parent, ast.Compare | ast.arguments | ast.Tuple):
        yield ast.Constant(value + "_")


def other_calls(node: ast.Call) -> Iterator[ast.AST]:
    """A call swapped for its opposite, a method dropped from its receiver, `where` with its branches swapped."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in SWAPS:
        field = "attr" if isinstance(node.func, ast.Attribute) else "id"
        yield with_field(node, "func", with_field(node.func, field, SWAPS[name]))
    if isinstance(node.func, ast.Attribute) and name in DROPPED_METHODS.split():
        yield node.func.value
    if isinstance(node.func, ast.Name) and name in DROPPED_FUNCTIONS:
        yield ast.Tuple(elts=node.args, ctx=ast.Load())
    if name == "where":
        condition, first, second = node.args
        yield with_field(node, "args", [condition, second, first])


def with_field(node: ast.AST, field: str, value: object) -> ast.AST:
    """A copy of the node with one field replaced."""
    return type(node)(**{**dict(ast.iter_fields(node)), field: value})


# -- where it is changed -------------------------------------------------------------------------------------


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[Mutant] = []

    def visit(node: ast.AST, function: str) -> None:
        for field, value in ast.iter_fields(node):
            if skipped(node, field):
                continue
            children = value if isinstance(value, list) else [value]
            for index, child in enumerate(children):
                if not isinstance(child, ast.AST):
                    continue
                name = child.name if isinstance(child, ast.FunctionDef | ast.ClassDef) else function
                for other in alternatives(child, node):
                    found.append(compiled(node, field, index, other, name))
                visit(child, name)

    def compiled(node: ast.AST, field: str, index: int, other: ast.AST, function: str) -> Mutant:
        value = getattr(node, field)
        original = value[index] if isinstance(value, list) else value
        put(node, field, index, ast.copy_location(other, original))
        try:
            code = compile(ast.fix_missing_locations(tree), str(path), "exec")
        finally:
            put(node, field, index, original)
        before, after = shown(original), shown(other)
        return Mutant(path.stem, function, original.lineno, before, after, code)

    visit(tree, "")
    return found


def skipped(node: ast.AST, field: str) -> bool:
    """Annotations, decorators, docstrings, messages of errors and imports are not behaviour."""
    return (
        field in ("annotation", "returns", "decorator_list")
        or isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in ("Literal", "Callable"))
    )


def put(node: ast.AST, field: str, index: int, value: ast.AST) -> None:
    """Set a field, or one element of a field that is a list."""
    if isinstance(getattr(node, field), list):
        getattr(node, field)[index] = value
    else:
        setattr(node, field, value)


def shown(node: ast.AST) -> str:
    """One line of source, cut to a readable length; of an `if`, its head."""
    text = ast.unparse(node).split("\n")[0]
    return text if len(text) <= 90 else text[:87] + "..."


# -- running -------------------------------------------------------------------------------------------------


class Replacement(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook: one module is executed from the given code instead of its file."""

    def __init__(self, name: str, code: CodeType) -> None:
        self.name, self.code = name, code

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Claim the one module."""
        if fullname != self.name:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=self.code.co_filename)
        spec.has_location = True  # modules may ask for __file__
        return spec

    def exec_module(self, module: ModuleType) -> None:
        """Run the mutated code as the module."""
        exec(self.code, module.__dict__)


def warm_up() -> None:
    """Import what every child needs. No autograd here: its threads do not survive a fork."""
    import pytest
    import torch
    import torch.distributions
    from torch.autograd import gradcheck  # noqa: F401

    torch.set_num_threads(1)
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--version", "-c", os.devnull])  # imports pytest's own plugins
    gc.collect()
    gc.freeze()  # children neither scan nor copy what the parent made
    if "pixrl" in sys.modules:
        raise SystemExit("pixrl must not be imported before the fork")


def start(name: str, code: CodeType | None, arguments: Sequence[str]) -> int:
    """Fork a child that runs pytest with one module replaced, unless `code` is None; its process id."""
    child = os.fork()
    if child:
        return child
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    status = 1
    try:
        import pytest

        if code is not None:
            sys.meta_path.insert(0, Replacement(name, code))
        unused = ["cacheprovider", "unraisableexception", "threadexception", "faulthandler"]
        status = int(
            pytest.main(["-x", "-q", "--tb=no", *(f"-pno:{plugin}" for plugin in unused), *arguments])
        )
    finally:
        os._exit(status)


def start_equations(module: str, code: CodeType | None) -> int:
    """The same with one module of the equations and its own tests."""
    test = TESTS / f"test_{module.lstrip('_')}.py"
    options = ["-c", os.devnull, "--rootdir", str(ROOT), "--noconftest", str(test)]
    return start(f"{PACKAGE}.{module}", code, options)


def run_all(
    mutants: Sequence[MutantT], begin: Callable[[MutantT], int], jobs: int, timeout: float
) -> Iterator[tuple[MutantT, str]]:
    """Test all mutants, `jobs` at a time; `begin` forks a child for one and says its process id.

    Yields each with `killed`, `survived` or `timeout`.
    """
    waiting, running = list(reversed(mutants)), dict[int, tuple[MutantT, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[begin(mutant)] = mutant, time.monotonic() + timeout
        for child, (mutant, deadline) in list(running.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del running[child]
                yield mutant, "survived" if status == 0 else "killed"
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                del running[child]
                yield mutant, "timeout"
        time.sleep(0.005)


def check_unmutated(modules: list[str]) -> None:
    """Exit with code 2 unless the tests pass without a mutation and mutations really reach the tests."""
    for module in modules:
        if os.waitpid(start_equations(module, None), 0)[1] != 0:
            print(f"{TESTS}/test_{module.lstrip('_')}.py fails without any mutation", file=sys.stderr)
            raise SystemExit(2)
        if os.waitpid(start_equations(module, compile("raise SystemError", module, "exec")), 0)[1] == 0:
            print(f"the tests of {module} do not import it", file=sys.stderr)
            raise SystemExit(2)


# -- the report ----------------------------------------------------------------------------------------------


def explained(mutant: Mutant, allowed: list[dict[str, str]]) -> str | None:
    """The reason why no test can notice this mutant, if one is written down."""
    key = (mutant.module, mutant.function, mutant.mutation)
    reasons = [row["reason"] for row in allowed if (row["module"], row["function"], row["mutation"]) == key]
    return reasons[0] if reasons else None


def report(
    tallies: dict[str, Tally], survivors: list[Mutant], allowed: list[dict[str, str]], minimum: float
) -> dict[str, object]:
    """Print the table and the survivors; the same as a JSON-ready object."""
    total = Tally(*(sum(getattr(t, field) for t in tallies.values()) for field in Tally.__dataclass_fields__))
    print(f"{'module':<14}{'mutants':>8}{'killed':>8}{'timeouts':>9}{'share':>8}")
    for name, tally in [*tallies.items(), ("all", total)]:
        print(f"{name:<14}{tally.mutants:>8}{tally.killed:>8}{tally.timeouts:>9}{tally.share:>8.1%}")
    rows = []
    for mutant in survivors:
        reason = explained(mutant, allowed)
        place = f"src/pixrl/equations/{mutant.module}.py:{mutant.line}"
        print(f"survived {place} {mutant.function}: {mutant.mutation}" + (f"  ({reason})" if reason else ""))
        rows.append(
            {"place": place, "function": mutant.function, "mutation": mutant.mutation, "reason": reason}
        )
    used = {(mutant.module, mutant.function, mutant.mutation) for mutant in survivors}
    stale = [row for row in allowed if (row["module"], row["function"], row["mutation"]) not in used]
    for row in stale:
        if row["module"] in tallies:
            print(f"no longer survives, remove from {ALLOWED.name}: {row['module']}: {row['mutation']}")
    modules = {name: {**asdict(tally), "share": tally.share} for name, tally in tallies.items()}
    overall = {**asdict(total), "share": total.share}
    return {"minimum": minimum, "all": overall, "modules": modules, "survivors": rows}


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minimum", type=float, default=0.90, help="least killed share (0.90)")
    parser.add_argument("--out", type=Path, help="where to write the JSON report")
    parser.add_argument("--only", default="", help="module names, separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds a mutant may take (30)")
    options = parser.parse_args()

    os.environ.update(OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.path.insert(0, str(ROOT / "src"))
    modules = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    if options.only:
        unknown = set(options.only.split(",")) - set(modules)
        if unknown:
            parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(modules)}")
        modules = options.only.split(",")
    mutants = [mutant for module in modules for mutant in mutants_of(FOLDER / f"{module}.py")]
    warm_up()
    check_unmutated(modules)

    began, tallies, survivors = time.monotonic(), {module: Tally() for module in modules}, list[Mutant]()

    def begin(mutant: Mutant) -> int:
        return start_equations(mutant.module, mutant.code)

    for mutant, outcome in run_all(mutants, begin, options.jobs, options.timeout):
        tally = tallies[mutant.module]
        tally.mutants += 1
        tally.killed += outcome != "survived"
        tally.timeouts += outcome == "timeout"
        if outcome == "survived":
            survivors.append(mutant)
    survivors.sort(key=lambda mutant: (mutant.module, mutant.line, mutant.mutation))
    allowed = (
        tomllib.loads(ALLOWED.read_text(encoding="utf-8")).get("equivalent", []) if ALLOWED.exists() else []
    )
    result = report(tallies, survivors, allowed, options.minimum)
    print(f"{len(mutants)} mutants in {time.monotonic() - began:.0f} s")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if len(survivors) <= (1 - options.minimum) * len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
