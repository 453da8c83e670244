#!/usr/bin/env python3
"""Mutation testing of what is not an equation: one plausible mistake at a time, and see whether a test notices.

    python tools/mutate_semantic.py [--only nft,flux] [--name WORDS] [--jobs 2] [--timeout 600] [--out report.json]

`tools/mutants_semantic.toml` lists the mistakes by area, and each area's tests, which run without those marked slow or
learning. A snippet of source stands for its place: it is looked for in the whole package, whatever its white space, so
that neither moving nor formatting a file matters; `tests/surface/test_mutants.py` says when one is no longer found
exactly once. Children are forked as in `tools/mutate.py`. Exit code 1 when the killed share is below the minimum, 2
when an area's tests fail without any mutation.

`tools/mutants_equivalent.toml` explains survivors that no test can notice. They still count as survivors.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType

sys.path.insert(0, str(Path(__file__).parent))
from mutate import ALLOWED, ROOT, Tally, run_all, start, warm_up

TABLE = Path(__file__).with_name("mutants_semantic.toml")
SOURCE = ROOT / "src"


@dataclass(frozen=True)
class Semantic:
    """One mistake."""

    area: str
    name: str
    before: str
    after: str

    def pattern(self) -> re.Pattern[str]:
        """Finds the snippet, whatever the white space between its words."""
        return re.compile(r"\s+".join(re.escape(word) for word in self.before.split()))

    def places(self, sources: Mapping[Path, str]) -> list[Path]:
        """The file of each occurrence."""
        pattern, longest = self.pattern(), max(self.before.split(), key=len)
        return [path for path, text in sources.items() if longest in text for _ in pattern.finditer(text)]

    def applied(self, text: str) -> str:
        """The file's text with the mistake."""
        return self.pattern().sub(lambda _: self.after, text)


@dataclass(frozen=True)
class Table:
    """All of them, and what must notice."""

    tests: Mapping[str, tuple[str, ...]]
    """Area -> test files, quickest first."""
    mutants: tuple[Semantic, ...]

    @staticmethod
    def read(path: Path = TABLE) -> "Table":
        areas = tomllib.loads(path.read_text(encoding="utf-8"))
        return Table(
            {area: tuple(entry["tests"]) for area, entry in areas.items()},
            tuple(Semantic(area, *row) for area, entry in areas.items() for row in entry["mutants"]),
        )


def package_sources() -> dict[Path, str]:
    """The text of every module of pixrl and of the studies beside it."""
    modules = [*sorted((SOURCE / "pixrl").rglob("*.py")), *sorted((ROOT / "studies").glob("*.py"))]
    return {path: path.read_text(encoding="utf-8") for path in modules}


def compiled(mutant: Semantic, sources: Mapping[Path, str]) -> tuple[str, CodeType]:
    """The mutated module's name and code. ValueError unless the snippet is there exactly once."""
    places = mutant.places(sources)
    if len(places) != 1:
        raise ValueError(
            f"{mutant.area}: {mutant.name}: {len(places)} places of {mutant.before!r} in src/pixrl and studies"
        )
    (path,) = places
    root = SOURCE if path.is_relative_to(SOURCE) else ROOT
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    return name, compile(mutant.applied(sources[path]), str(path), "exec")


class Runner:
    """Forks children, each with a folder of its own for what its tests write."""

    def __init__(self, table: Table, folder: Path) -> None:
        self.table, self.folder, self.count = table, folder, 0

    def begin(self, tests: Sequence[str], name: str = "", code: CodeType | None = None) -> int:
        """A child that runs some test files."""
        self.count += 1
        arguments = [
            "-c",
            str(ROOT / "pyproject.toml"),
            "--rootdir",
            str(ROOT),
            "-m",
            "not slow and not learning",
        ]
        arguments += ["--basetemp", str(self.folder / str(self.count))]
        return start(name, code, [*arguments, *(str(ROOT / test) for test in tests)])

    def tidy(self) -> None:
        """Forget what children wrote, save the last ones, which may still be at it."""
        for number in range(max(1, self.count - 40), self.count - 20):
            shutil.rmtree(self.folder / str(number), ignore_errors=True)


def import_libraries() -> None:
    """What most tests import, once for all children."""
    import diffusers
    import transformers

    for library, names in (
        (
            diffusers,
            "AutoencoderKL FluxPipeline FluxKontextPipeline StableDiffusion3Pipeline SD3Transformer2DModel",
        ),
        (
            transformers,
            "CLIPModel CLIPTokenizer T5EncoderModel SegformerForSemanticSegmentation Dinov2Model ViTModel",
        ),
        (transformers, "CLIPImageProcessor BitImageProcessor AutoModel"),
    ):
        for name in names.split():
            getattr(library, name)
    import scipy.optimize
    import scipy.stats  # noqa: F401


def check_unmutated(runner: Runner, areas: Sequence[str]) -> float:
    """Seconds of a processor that the areas' tests take without a mutation. Exit with code 2 where one fails."""
    whole = 0.0
    for test in dict.fromkeys(test for area in areas for test in runner.table.tests[area]):
        _, status, used = os.wait4(runner.begin([test]), 0)
        if status != 0:
            print(f"{test} fails without any mutation", file=sys.stderr)
            raise SystemExit(2)
        whole += used.ru_utime + used.ru_stime
        print(f"{test}: {used.ru_utime + used.ru_stime:.0f} s without a mutation", flush=True)
    return whole


def chosen(table: Table, only: str, words: str) -> Iterator[Semantic]:
    """The mutants of some areas whose names hold the words; of all where nothing is given."""
    areas = only.split(",") if only else list(table.tests)
    unknown = set(areas) - set(table.tests)
    if unknown:
        raise ValueError(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(table.tests)}")
    return (one for one in table.mutants if one.area in areas and words in one.name)


def report(
    tallies: Mapping[str, Tally], survivors: Sequence[Semantic], mutants: Sequence[Semantic], seconds: float
) -> dict[str, object]:
    """Print the figures by area and the survivors; the same as a JSON-ready object."""
    total = Tally(*(sum(getattr(t, field) for t in tallies.values()) for field in Tally.__dataclass_fields__))
    print(f"{'area':<14}{'mutants':>8}{'killed':>8}{'timeouts':>9}{'share':>8}")
    for name, tally in [*tallies.items(), ("all", total)]:
        print(f"{name:<14}{tally.mutants:>8}{tally.killed:>8}{tally.timeouts:>9}{tally.share:>8.1%}")
    explained = tomllib.loads(ALLOWED.read_text(encoding="utf-8")).get("semantic", [])
    reasons = {(row["area"], row["name"]): row["reason"] for row in explained}
    rows = [{"area": m.area, "name": m.name, "reason": reasons.get((m.area, m.name))} for m in survivors]
    for row in rows:
        print(f"survived {row['area']}: {row['name']}" + (f"  ({row['reason']})" if row["reason"] else ""))
    tested = {(m.area, m.name) for m in mutants} - {(m.area, m.name) for m in survivors}
    for area, name in reasons.keys() & tested:
        print(f"no longer survives, remove from {ALLOWED.name}: {area}: {name}")
    return {"all": asdict(total) | {"share": total.share}, "seconds_of_tests": seconds, "survivors": rows}


def read_arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minimum", type=float, default=0.95, help="least killed share (0.95)")
    parser.add_argument("--out", type=Path, help="where to write the JSON report")
    parser.add_argument("--only", default="", help="areas, separated by commas")
    parser.add_argument("--name", default="", help="words in the names of mutants")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a mutant may take (600)")
    return parser.parse_args()


def main() -> int:
    """Run it; the exit code."""
    options = read_arguments()
    os.environ.update(OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", TOKENIZERS_PARALLELISM="false")
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TESTS_START="fork")
    sys.path[:0] = [str(SOURCE), str(ROOT)]
    table, sources = Table.read(), package_sources()
    try:
        mutants = list(chosen(table, options.only, options.name))
        codes = {mutant: compiled(mutant, sources) for mutant in mutants}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    import_libraries()
    warm_up()
    began = time.monotonic()
    areas = list(dict.fromkeys(mutant.area for mutant in mutants))
    tallies, survivors = {area: Tally() for area in areas}, list[Semantic]()
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(table, Path(folder))
        seconds = check_unmutated(runner, areas)
        for mutant, outcome in run_all(
            mutants,
            lambda one: runner.begin(table.tests[one.area], *codes[one]),
            options.jobs,
            options.timeout,
        ):
            tally = tallies[mutant.area]
            tally.mutants += 1
            tally.killed += outcome != "survived"
            tally.timeouts += outcome == "timeout"
            if outcome == "survived":
                survivors.append(mutant)
                print(f"survived {mutant.area}: {mutant.name}", flush=True)
            runner.tidy()
    result = report(tallies, survivors, mutants, seconds)
    print(
        f"{len(mutants)} mutants in {time.monotonic() - began:.0f} s; the tests alone take {seconds:.0f} CPU seconds"
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if len(survivors) <= (1 - options.minimum) * len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
