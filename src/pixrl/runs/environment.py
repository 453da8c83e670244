"""The environment of a run, as `environment.json` keeps it: versions, machine, command. Imports nothing heavy."""

import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from pixrl.untrusted import secrets_in
from pixrl.workers import cores

PACKAGES = (
    "pixrl",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "pydantic",
)


def describe(seed: object, recipe_sha256: str) -> bytes:
    """Return the content of environment.json. `recipe_sha256` lets `RunFolder.open` notice a changed recipe."""
    torch = sys.modules.get("torch")  # if it is in use already; asking never loads it
    words, cpu = sys.argv[1:], platform.processor() or platform.machine()
    for secret in secrets_in(os.environ):  # a key's value is kept as the variable that holds it, $MY_KEY
        words = [secret.without_in(word) for word in words]
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        named = dict([part.strip() for part in line.partition(":")[::2]] for line in reversed(lines))
        cpu = named.get("model name", cpu)
    gpus = range(torch.cuda.device_count()) if torch is not None and torch.cuda.is_available() else ()
    root = Path(__file__).resolve().parents[3]
    commit: str | None = None  # of pixrl's own source tree, `-dirty` when it was changed; a wheel has none
    if (root / ".git").exists():
        described = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(described, capture_output=True, text=True, timeout=10, check=False)
            commit = done.stdout.strip() or None
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *words],
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "machine": {
            "system": platform.platform(),
            "cpu": cpu,
            "cores": cores(),
            "ram_bytes": None
            if sys.platform == "win32"
            else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": [torch.cuda.get_device_name(index) for index in gpus] if torch is not None else [],
        },
        "threads": {
            "torch": None if torch is None else torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "git_commit": commit,
        "recipe_sha256": recipe_sha256,
    }
    return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
