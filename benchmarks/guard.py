"""How often does the guard find something in honest runs, and how soon in runs that game their reward?

    python benchmarks/guard.py [--honest 10] [--steps 12]

Honest runs train toy:sd3 on the preference model, a seed each, with CLIP held out; the others on the brightness and on
the edges of pictures at four times the rate. Prints a line a run: the first evaluation with a finding, and what it is.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pixrl
from pixrl.runs.folder import RunFolder
from pixrl.runs.reading import read_findings

JUDGE = Path(__file__).parents[1] / "tests" / "align" / "guard_judge.py"
PREFERENCE = {"name": "preference", "options": {"model": "toy:preference"}}
HELD_OUT = {"name": "clip_text", "options": {"model": "toy:clip"}, "held_out": True}


def recipe(reward: dict[str, Any], steps: int, lr: float) -> dict[str, Any]:
    """A small run that is evaluated every four steps."""
    return {
        "model": "toy:sd3", "steps": steps, "rewards": [reward, HELD_OUT],
        "prompts": {"source": "toy:geneval", "per_step": 2}, "exploration": {"kind": "noise", "noises": 6},
        "sampling": {"steps": 4, "solver": "dpm"}, "loss": {"kind": "nft", "timesteps": 2, "kl": 0.01},
        "optimizer": {"lr": lr}, "lora": {"rank": 8, "alpha": 16},
        "evaluation": {"prompts": 10, "per_prompt": 2, "every": 4},
        "machine": {"device": "cpu", "dtype": "float32"}, "output": {"images_every": 1000},
    }  # fmt: skip


def first_finding(run: Path, steps: int) -> str:
    """The first evaluation in which the guard found something, in words."""
    folder = RunFolder.open(run)
    for step in range(4, steps + 1, 4):
        texts = [one.text() for one in read_findings(folder, step) if one.found]
        if texts:
            return f"step {step}: {'; '.join(texts)}"
    return "nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--honest", type=int, default=10, help="honest runs (10)")
    parser.add_argument("--steps", type=int, default=12, help="training steps of each run (12)")
    given = parser.parse_args()
    games = [
        {"name": name, "kind": "python", "options": {"function": f"{JUDGE}:{name}"}}
        for name in ("brightness", "edges")
    ]
    asked = [(game["name"], recipe(game, given.steps, 8e-3), 0) for game in games]
    asked += [("honest", recipe(PREFERENCE, given.steps, 2e-3), seed) for seed in range(given.honest)]
    for name, settings, seed in asked:
        with tempfile.TemporaryDirectory() as folder:
            done = pixrl.align(settings, seed=seed, out=Path(folder) / "run")
            reward = settings["rewards"][0]["name"]
            rise = done.evaluations[-1][f"{reward}/mean"] - done.evaluations[0][f"{reward}/mean"]
            print(
                f"{name} seed {seed}: {reward} {rise:+.3f}, found {first_finding(done.run, given.steps)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
