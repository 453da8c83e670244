#!/usr/bin/env python3
"""Run the tests that compute as other processors would: other vector widths, other kernels, one and two threads.

    python tools/isa.py [--tests "tests/models tests/align"] [--only avx2,oldest] [--workers 2]

Three libraries choose kernels by the processor: torch's own (ATEN_CPU_CAPABILITY), oneDNN (ONEDNN_MAX_CPU_ISA) and MKL
(MKL_ENABLE_INSTRUCTIONS); besides, sums are split among threads, and `dtype: auto` means bfloat16 where the processor
multiplies it. The full cross is over a hundred runs of the suite. `CONFIGURATIONS` are those that differ most: each
value of each variable at least once, each with one thread and with two where it matters, and the one mixture that was
seen to fail alone (oneDNN held at AVX2 on a processor with more).

Left out are `tests/data`, `tests/surface` and `tests/test_tolerance.py`: files, texts, names and commands, none of
which calls a kernel whose rounding it compares. They are told by their folder: a test that compares computed numbers
belongs into another. Prints a table; exit code 1 when a test of any configuration failed, 2 when the tests cannot be
run.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ("tests/data", "tests/surface", "tests/test_tolerance.py")


@dataclass(frozen=True)
class Configuration:
    """How torch is told to take a lesser processor for the one that it runs on."""

    why: str
    threads: int
    aten: str = ""
    onednn: str = ""
    mkl: str = ""
    auto_bfloat16: bool = False
    """`dtype: auto` is bfloat16, as on a processor with AVX512-BF16 or AMX, whose instructions oneDNN then emulates."""

    def environment(self) -> dict[str, str]:
        """What differs from the machine's own; variables that would get in the way are taken out by `clean`."""
        wanted = {
            "ATEN_CPU_CAPABILITY": self.aten,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
            "OMP_NUM_THREADS": str(self.threads),
        }
        return {name: value for name, value in wanted.items() if value}


CONFIGURATIONS = {
    "native": Configuration("the machine as it is", 1),
    "native-2": Configuration("sums split between two threads", 2),
    "avx512": Configuration("a server without bfloat16 instructions", 2, "avx512", "AVX512_CORE", "AVX512"),
    "avx2": Configuration("a desktop, an AMD server before Zen 4", 1, "avx2", "AVX2", "AVX2"),
    "avx2-2": Configuration("the same, two threads", 2, "avx2", "AVX2", "AVX2"),
    "oldest": Configuration("no vectors in torch, MKL at SSE4.2", 1, "default", "AVX2", "SSE4_2"),
    "onednn-avx2": Configuration("torch and MKL wider than oneDNN", 1, "", "AVX2", ""),
    "aten-default": Configuration("oneDNN and MKL wider than torch", 2, "default", "", ""),
    "bfloat16": Configuration("dtype auto is bfloat16", 1, auto_bfloat16=True),
    "bfloat16-avx2": Configuration(
        "the same in oneDNN's AVX2 kernels", 2, "", "AVX2", "", auto_bfloat16=True
    ),
}


@dataclass
class Result:
    """What a configuration's run gave."""

    status: str
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def clean() -> dict[str, str]:
    """The environment without what another configuration may have set."""
    names = {name for one in CONFIGURATIONS.values() for name in one.environment()}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    fixed = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | fixed


def unable(one: Configuration) -> str:
    """Why this machine cannot run a configuration; empty if it can."""
    needs = {word for word in (one.aten, one.onednn, one.mkl) if word}
    wide, narrow = (
        any("avx512" in word.lower() for word in needs),
        any("avx2" in word.lower() for word in needs),
    )
    program = (
        "import torch; print(torch.cpu._is_avx512_supported(), torch.cpu._is_avx2_supported(), "
        "torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], env=clean() | one.environment(), capture_output=True, text=True
    )
    if found.returncode:
        return f"torch does not start: {found.stderr.strip().splitlines()[-1]}"
    has_512, has_2, capability, threads = found.stdout.split()
    if wide and has_512 != "True":
        return "the processor has no AVX512"
    if narrow and has_2 != "True":
        return "the processor has no AVX2"
    if one.aten and capability != one.aten.upper():
        return f"torch took {capability} instead of {one.aten.upper()}"
    if int(threads) != one.threads:
        return f"torch uses {threads} threads instead of {one.threads}"
    return ""


def run(name: str, tests: list[str], workers: int) -> Result:
    """The tests under one configuration, their output passed through."""
    one = CONFIGURATIONS[name]
    reason = unable(one)
    if reason:
        return Result(f"cannot run here: {reason}")
    processes = max(1, workers // one.threads) if workers else 0
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        str(processes),
        "--dist",
        "loadfile",
        "-p",
        "no:cacheprovider",
    ]
    command += [f"--ignore={path}" for path in LEFT_OUT if path not in tests]
    command += ["-p", "tests.auto_bfloat16"] if one.auto_bfloat16 else []
    print(f"\n== {name}: {one.why} {one.environment()}", flush=True)
    began = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(
        [*command, *tests], cwd=ROOT, env=clean() | one.environment(), stdout=subprocess.PIPE, text=True
    ) as child:
        for line in child.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    counts = {
        word: int(n)
        for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", lines[-1] if lines else "")
    }
    status = {0: "green", 1: "red"}.get(child.returncode, f"pytest ended with {child.returncode}")
    return Result(status, counts, time.monotonic() - began)


def table(results: Mapping[str, Result]) -> str:
    """One line a configuration."""
    columns = ("torch", "oneDNN", "MKL", "threads", "passed", "failed", "s", "result")
    lines = ["{:13} {:8} {:12} {:8} {:>7} {:>7} {:>7} {:>5}  {}".format("configuration", *columns)]
    for name, result in results.items():
        one = CONFIGURATIONS[name]
        failed = sum(n for word, n in result.counts.items() if word.startswith(("failed", "error")))
        own = "bf16" if one.auto_bfloat16 else "own"
        lines.append(
            f"{name:13} {one.aten or own:8} {one.onednn or 'own':12} {one.mkl or 'own':8} {one.threads:7} "
            f"{result.counts.get('passed', 0):7} {failed:7} {result.seconds:5.0f}  {result.status}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", default="", help="folders or files, separated by spaces (default: tests)")
    parser.add_argument("--only", default="", help=f"of {', '.join(CONFIGURATIONS)}, separated by commas")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="single-threaded test processes"
    )
    given = parser.parse_args()
    tests, names = (
        given.tests.split() or ["tests"],
        given.only.split(",") if given.only else list(CONFIGURATIONS),
    )
    unknown = [f"configuration {name!r}" for name in names if name not in CONFIGURATIONS]
    unknown += [f"path {path!r}" for path in tests if not (ROOT / path.split("::")[0]).exists()]
    if unknown:
        print(f"Unknown {unknown[0]}. Configurations: {', '.join(CONFIGURATIONS)}.", file=sys.stderr)
        return 2
    results = {name: run(name, tests, given.workers) for name in names}
    print("\n" + table(results))
    return max((1 if result.status == "red" else 2 for result in results.values() if _bad(result)), default=0)


def _bad(result: Result) -> bool:
    return result.status != "green" and not result.status.startswith("cannot run")


if __name__ == "__main__":
    sys.exit(main())
