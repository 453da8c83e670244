"""The loop that every stage of the build shares: it survives a kill, and a machine that goes away.

The state of a stage lies in `work/STAGE/state.safetensors` (ignored by git) and is written every other minute.
`keep` writes what is worth carrying to another machine, the averaged weights in half precision, into `build-state/`
(committed); a build that finds no state of its own goes on from there, with moments that start anew.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

SAVE_EVERY_SECONDS = 120.0
Lesson = tuple[Any, ...]
"""What a step trains on: tensors on the CPU, and whatever else its loss needs."""
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build-state"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage trains; `ema` is the decay of the averaged weights that are shipped.

    The rate rises over `warmup` steps, is level up to the share `level` of all steps, and falls along a cosine. With
    `muon`, matrices inside a transformer's blocks learn by Muon at that rate (Jordan et al. 2024), the rest by AdamW.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.998
    level: float = 0.6
    muon: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass(frozen=True)
class Draw:
    """The random numbers of one training step: they depend on the seed and the step alone, so resuming is exact."""

    step: int
    rng: np.random.Generator
    noise: torch.Generator

    def rows(self, count: int, batch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self.rng.integers(count, size=batch)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.noise)


@dataclass(frozen=True)
class Build:
    """Where a build works: `out` receives checkpoints, `work` holds pictures and unfinished training states."""

    out: Path
    work: Path
    seed: int = 7
    device: torch.device = CPU
    workers: int = 0
    """Processes that prepare lessons ahead: none where the processor trains, many where a GPU would wait for them."""

    def draw(self, step: int) -> Draw:
        noise = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return Draw(step, np.random.default_rng((self.seed, step)), noise)

    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 where the machine multiplies it fast."""
        fast = self.device.type == "cuda" or has_fast_bf16()
        return torch.autocast(self.device.type, torch.bfloat16) if fast else nullcontext()

    def fit(
        self,
        stage: str,
        module: nn.Module,
        plan: Plan,
        lesson: Callable[[Draw], Lesson],
        loss: Callable[..., Tensor],
    ) -> None:
        """Train the module in place on `loss(*lesson(draw))`; at the end it holds the averaged weights."""
        _Trainer(self, stage, module, plan).run(lesson, loss)

    def lessons(self, lesson: Callable[[Draw], Lesson], steps: range) -> Iterator[Lesson]:
        """The lessons of these steps, in order."""
        loader = DataLoader(_Lessons(self, lesson, steps), batch_size=None, num_workers=self.workers)
        return iter(loader)

    def state(self, stage: str) -> Path:
        """Where the stage's state is: of this machine, or else the one that another machine left."""
        own, kept = self.work / stage / "state.safetensors", KEPT / f"{stage}.safetensors"
        return own if own.exists() or not kept.exists() else kept

    def finished(self, stage: str, plan: Plan) -> bool:
        """Whether the stage's state says that all of its steps are done."""
        path = self.state(stage)
        return path.exists() and int(_meta(path)["step"]) >= plan.steps

    def provenance(self, folder: str, plans: dict[str, Plan]) -> None:
        """Write beside the weights how they were made; `pixrl toy verify` adds the gates' figures."""
        seconds = {stage: float(_meta(self.state(stage))["seconds"]) for stage in plans}
        names = ("torch", "diffusers", "transformers", "pillow", "numpy")
        record = {
            "command": f"pixrl toy build --stage {folder}",
            "seed": self.seed,
            "plans": {stage: vars(plan) for stage, plan in plans.items()},
            "seconds": {stage: round(value) for stage, value in seconds.items()},
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.device.type}",
            "versions": {name: version(name) for name in names},
        }
        (self.out / folder / "provenance.json").write_text(json.dumps(record, indent=1) + "\n")


def kept_rows(path: Path, count: int, make: Callable[[range], Tensor], size: int = 256) -> Tensor:
    """Rows that take long to make, half precision [count, ...], kept in the file `path` and mapped from it.

    `make` gives the rows of a range. What a killed build has made is not made again.
    """
    part, done = path.with_suffix(".part.npy"), path.with_suffix(".done")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = int(done.read_text()) if done.exists() and part.exists() else 0
        for start in range(made, count, size):
            rows = make(range(start, min(start + size, count))).half().numpy()
            shape = (count, *rows.shape[1:])
            kept = np.lib.format.open_memmap(part, "r+" if start else "w+", np.float16, shape)
            kept[start : start + len(rows)] = rows
            kept.flush()
            done.write_text(str(start + len(rows)))
        part.replace(path)
        done.unlink()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def has_fast_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def eager_attention(model: PreTrainedModel) -> None:
    """Plain matrix products: on a CPU the fused kernel's backward pass took twice as long (docs/log.md)."""
    model.set_attn_implementation("eager")


def keep(work: Path, out: Path, kept: Path = KEPT) -> list[Path]:
    """Write the state of every stage that `out` holds no checkpoint of into `kept`, small enough to be committed."""
    written = []
    for path in sorted(work.glob("*/state.safetensors")):
        meta, tensors = _meta(path), load_file(path)
        if (out / path.parent.name).exists():
            continue
        small = {name: half(t) for name, t in tensors.items() if name.startswith(("average.", "buffer."))}
        kept.mkdir(exist_ok=True)
        target = kept / f"{path.parent.name}.safetensors"
        save_file(small, target, metadata=meta)
        written.append(target)
    return written


class _Lessons(Dataset[Lesson]):
    """Lessons by their place in a range of steps, as torch's loader wants them."""

    def __init__(self, build: Build, lesson: Callable[[Draw], Lesson], steps: range) -> None:
        self.build, self.lesson, self.steps = build, lesson, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Lesson:
        if index >= len(self.steps):
            raise IndexError(index)
        return self.lesson(self.build.draw(self.steps[index]))


class Muon32(torch.optim.Muon):
    """Torch's Muon with its Newton-Schulz iteration in float32, for matrices of one shape at once.

    Torch iterates in bfloat16, which some processors only imitate: two thirds of `sd3`'s time went there.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                turned = self._orthogonal(torch.stack([self._direction(p, group) for p in parameters]), group)
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))  # "match_rms_adamw"
                for parameter, direction in zip(parameters, turned, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=rate)

    def _direction(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Nesterov's, from the kept average of gradients."""
        assert parameter.grad is not None
        average = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(average, group["momentum"])

    def _orthogonal(self, matrices: Tensor, group: dict[str, Any]) -> Tensor:
        a, b, c = group["ns_coefficients"]
        tall = matrices.shape[1] > matrices.shape[2]
        x: Tensor = matrices.mT if tall else matrices
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x


class _Trainer:
    """AdamW, and Muon where the plan asks for it, with averaged weights and a state on disk."""

    def __init__(self, build: Build, stage: str, module: nn.Module, plan: Plan) -> None:
        self.build, self.stage, self.module, self.plan = build, stage, module, plan
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        matrices = [p for name, p in named if plan.muon and p.ndim == 2 and _turned_by_muon(name)]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.parameters if id(p) not in chosen]
        adam = torch.optim.AdamW(
            others, plan.lr, betas=plan.betas, weight_decay=plan.weight_decay, fused=True
        )
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [(adam, plan.lr)]
        if plan.muon and matrices:
            muon = Muon32(
                matrices, lr=plan.muon, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers.append((muon, plan.muon))
        self.average = [p.detach().clone() for p in self.parameters]
        self.state_path = build.work / stage / "state.safetensors"
        self.step, self.warm_from, self.seconds = 0, 0, 0.0

    def run(self, lesson: Callable[[Draw], Lesson], loss: Callable[..., Tensor]) -> None:
        self._restore()
        lessons = self.build.lessons(lesson, range(self.step, self.plan.steps))
        started = saved = time.monotonic()
        before, smooth = self.seconds, math.nan
        attention = sdpa_kernel(SDPBackend.MATH) if self.build.device.type == "cpu" else nullcontext()
        with attention:
            for prepared in lessons:
                value = self._advance(loss, prepared)
                smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
                now = time.monotonic()
                self.seconds = before + now - started
                if now - saved > SAVE_EVERY_SECONDS or self.step == self.plan.steps:
                    self._save()
                    saved = now
                    print(f"{self.stage} step {self.step} loss {smooth:.4f} {self.seconds:.0f}s", flush=True)
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            parameter.data.copy_(mean)

    def _advance(self, loss: Callable[..., Tensor], lesson: Lesson) -> float:
        self.module.train()
        value = loss(*(part.to(self.build.device) if isinstance(part, Tensor) else part for part in lesson))
        for optimizer, rate in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate * self._schedule()
        value.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, _ in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(self.plan.ema, self.step / (self.step + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return float(value.detach())

    def _schedule(self) -> float:
        plan = self.plan
        rise = min((self.step - self.warm_from + 1) / max(plan.warmup, 1), 1.0)
        start = plan.level * plan.steps
        done = max(self.step - start, 0) / max(plan.steps - start, 1)
        return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def _save(self) -> None:
        named: dict[str, Tensor] = {f"parameter.{i}": p.data for i, p in enumerate(self.parameters)}
        named |= {f"average.{i}": p for i, p in enumerate(self.average)}
        named |= {f"buffer.{name}": value for name, value in self.module.named_buffers()}
        for i, p in enumerate(self.parameters):
            for optimizer, _ in self.optimizers:
                state = optimizer.state.get(p, {})
                named |= {f"{name}.{i}": value for name, value in state.items() if name in MOMENTS}
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.state_path.with_suffix(".tmp")
        done = "yes" if self.step >= self.plan.steps else "no"
        meta = {"step": str(self.step), "seconds": str(self.seconds), "finished": done}
        save_file({k: v.contiguous() for k, v in named.items()}, beside, metadata=meta)
        beside.replace(self.state_path)

    def _restore(self) -> None:
        path = self.build.state(self.stage)
        if not path.exists():
            return
        saved, meta = load_file(path), _meta(path)
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        self.warm_from = 0 if path == self.state_path else self.step
        for i, (parameter, mean) in enumerate(zip(self.parameters, self.average, strict=True)):
            mean.copy_(saved[f"average.{i}"])
            parameter.data.copy_(saved.get(f"parameter.{i}", mean))
            moments = {name: saved[f"{name}.{i}"] for name in MOMENTS if f"{name}.{i}" in saved}
            for optimizer, _ in self.optimizers:
                if moments and any(parameter is p for g in optimizer.param_groups for p in g["params"]):
                    optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        for name, buffer in self.module.named_buffers():
            buffer.copy_(saved.get(f"buffer.{name}", buffer))  # a batch norm's averages are no parameters
        print(f"{self.stage} goes on at step {self.step}, from {path}", flush=True)


def _turned_by_muon(name: str) -> bool:
    """The matrices of attention and MLPs inside blocks; embeddings, modulations and heads are AdamW's."""
    return "blocks." in name and any(part in name for part in (".attn", ".ff.", ".ff_context.", ".proj_"))


def half(tensor: Tensor) -> Tensor:
    """Half precision of what is a fraction; counters as they are."""
    return tensor.half() if tensor.is_floating_point() else tensor


def _meta(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def save_half(module: ModelMixin | PreTrainedModel, folder: Path) -> None:
    """Save a model in half precision and leave the one in memory as it is."""
    module.save_pretrained(folder)
    config = folder / "config.json"
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)  # a folder of this machine, which is nobody's business
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    for path in folder.glob("*.safetensors"):
        stored = load_file(path)
        halved = {name: half(t) for name, t in stored.items()}
        save_file(halved, path, metadata={"format": "pt"})
        path.chmod(0o644)
