"""What every stage of the build needs: where to work, the training loop that survives a kill, and provenance."""

import hashlib
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import ModelMixin
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from toy_build.first_edition.processes import leads, wait_for_all

SAVE_EVERY_SECONDS = 60.0
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage trains; `ema` is the decay of the averaged weights that are kept.

    `level` is the share of the steps before the learning rate falls. With `muon`, the matrices inside a
    transformer's blocks learn by Muon at that rate (Jordan et al. 2024), everything else by AdamW.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float | None = None
    level: float = 0.0
    muon: float | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Draw:
    """The random numbers of one training step: they depend on the seed and the step alone, so resuming is exact."""

    rng: np.random.Generator
    noise: torch.Generator

    def rows(self, count: int, batch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self.rng.integers(count, size=batch)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.noise)


@dataclass(frozen=True)
class Workshop:
    """A build: `out` receives the checkpoints, `work` holds pictures and unfinished training states."""

    out: Path
    work: Path
    seed: int
    device: torch.device
    resume: bool
    command: str

    def folder(self, stage: str) -> Path:
        """Where this process writes a checkpoint; torchrun's other processes write theirs to be thrown away."""
        folder = self.out / stage if leads() else Path(tempfile.mkdtemp()) / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 where the machine multiplies it fast."""
        if self.device.type == "cuda" or has_fast_bf16():
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def draw(self, step: int) -> Draw:
        return Draw(
            np.random.default_rng((self.seed, step)),
            torch.Generator().manual_seed(self.seed * 1_000_003 + step),
        )

    def cached(
        self, name: str, source: nn.Module, make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `make` computes with the frozen `source`: kept on disk, made anew when the source's weights change."""
        digest = hashlib.blake2b(digest_size=8)
        for parameter in source.parameters():
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        path = self.work / "encoded" / f"{name}-{self.seed}-{digest.hexdigest()}.safetensors"
        if leads() and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in make().items()}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        wait_for_all()
        return load_file(path)

    def fit(self, stage: str, module: nn.Module, plan: Plan, loss: Callable[[Draw], Tensor]) -> float:
        """Train the module in place and return the seconds that it took, those before a kill included."""
        return _Trainer(self, stage, module, plan).run(loss)

    def finished(self, stage: str, plans: dict[str, Plan]) -> float | None:
        """The seconds that the checkpoint in `out` took, when resuming and it was made by exactly these plans."""
        path = self.out / stage / "provenance.json"
        if not self.resume or not path.exists():
            return None
        record = json.loads(path.read_text())
        wanted = {name: vars(plan) for name, plan in plans.items()}
        return float(record["seconds"]) if (record["seed"], record["plans"]) == (self.seed, wanted) else None

    def compiled(self, module: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
        """The module as torch.compile makes it when the plan is long enough to win back the minutes that it takes."""
        return torch.compile(module, dynamic=False) if plan.compiled else module

    def provenance(self, stage: str, plans: dict[str, Plan], seconds: float) -> None:
        """Write beside the weights how they were made; `pixrl toy verify` adds the gates' figures."""
        if not leads():
            return
        record = {
            "command": self.command,
            "seed": self.seed,
            "plans": {name: vars(plan) for name, plan in plans.items()},
            "seconds": round(seconds, 1),
            "machine": f"{platform.machine()}, {dist.get_world_size() if dist.is_initialized() else 1} processes, "
            f"{torch.get_num_threads()} threads each, {self.device.type}",
            "versions": {
                name: version(name) for name in ("torch", "diffusers", "transformers", "pillow", "numpy")
            },
        }
        (self.out / stage / "provenance.json").write_text(json.dumps(record, indent=1) + "\n")


def has_fast_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def eager_attention(model: PreTrainedModel) -> None:
    """Plain matrix products: on a CPU the fused kernel's backward pass took twice as long."""
    model.set_attn_implementation("eager")


def training_attention(device: torch.device) -> AbstractContextManager[object]:
    """The same choice for diffusers' models; sampling, which has no backward pass, keeps the fused kernel."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _turned_by_muon(name: str) -> bool:
    """The matrices of attention and MLPs inside blocks; embeddings, modulations and heads are AdamW's."""
    return "blocks." in name and any(part in name for part in (".attn.", ".ff.", ".ff_context.", ".proj_"))


class _Trainer:
    """AdamW (and Muon) with a warm-up and a cosine tail; the state goes to disk once a minute.

    Under torchrun every process draws batches of its own and gradients are averaged.
    """

    def __init__(self, shop: Workshop, stage: str, module: nn.Module, plan: Plan) -> None:
        self.shop, self.stage, self.module, self.plan = shop, stage, module, plan
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        matrices = [p for name, p in named if plan.muon and p.ndim == 2 and _turned_by_muon(name)]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.parameters if id(p) not in chosen]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.AdamW(
                    others, lr=plan.lr, betas=(0.9, 0.98), weight_decay=plan.weight_decay, fused=True
                ),
                plan.lr,
            )
        ]
        if plan.muon and matrices:
            muon = torch.optim.Muon(
                matrices, lr=plan.muon, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers.append((muon, plan.muon))
        self.average = [p.detach().clone() for p in self.parameters] if plan.ema else []
        self.state_path = shop.work / stage / "state.safetensors"
        self.step, self.seconds = 0, 0.0
        self.rank, self.processes = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )

    def run(self, loss: Callable[[Draw], Tensor]) -> float:
        if self.shop.resume and self.state_path.exists():
            self._restore()
        started = saved = time.monotonic()
        before = self.seconds
        smooth = math.nan
        with _progress() as progress, training_attention(self.shop.device):
            bar = progress.add_task(self.stage, total=self.plan.steps, completed=self.step, loss="")
            while self.step < self.plan.steps:
                value = self._advance(loss)
                smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
                progress.update(bar, completed=self.step, loss=f"loss {smooth:.4f}")
                now = time.monotonic()
                self.seconds = before + now - started
                if leads() and (now - saved > SAVE_EVERY_SECONDS or self.step == self.plan.steps):
                    self._save()
                    saved = now
                    print(f"{self.stage} step {self.step} loss {smooth:.4f} {self.seconds:.0f}s", flush=True)
        for parameter, mean in zip(self.parameters, self.average, strict=False):
            parameter.data.copy_(mean)
        return self.seconds

    def _advance(self, loss: Callable[[Draw], Tensor]) -> float:
        value = loss(self.shop.draw(self.step * self.processes + self.rank))
        for optimizer, rate in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate * self._schedule()
        value.backward()
        if self.processes > 1:
            self._average_gradients()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, _ in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.plan.ema:
            decay = min(self.plan.ema, self.step / (self.step + 10))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return float(value.detach())

    def _average_gradients(self) -> None:
        """Every process trains on a batch of its own; they take the same step."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, mean in zip(
            gradients, flat.div_(self.processes).split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))

    def _schedule(self) -> float:
        """Up, level for `plan.level` of the steps, then down along a cosine to a fiftieth."""
        if self.step < self.plan.warmup:
            return (self.step + 1) / self.plan.warmup
        start = max(self.plan.warmup, self.plan.level * self.plan.steps)
        done = max(self.step - start, 0) / max(self.plan.steps - start, 1)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    def _tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {f"parameter.{i}": p.data for i, p in enumerate(self.parameters)}
        named |= {f"average.{i}": p for i, p in enumerate(self.average)}
        for i, p in enumerate(self.parameters):
            for optimizer, _ in self.optimizers:
                named |= {
                    f"{name}.{i}": x for name, x in optimizer.state.get(p, {}).items() if name in MOMENTS
                }
        return named

    def _save(self) -> None:
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.state_path.with_suffix(".tmp")
        meta = {"step": str(self.step), "seconds": str(self.seconds)}
        save_file({k: v.contiguous() for k, v in self._tensors().items()}, beside, metadata=meta)
        beside.replace(self.state_path)

    def _restore(self) -> None:
        saved = load_file(self.state_path)
        with safe_open(self.state_path, framework="pt") as file:
            meta = file.metadata()
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(saved[f"parameter.{i}"])
            moments = {name: saved[f"{name}.{i}"] for name in MOMENTS if f"{name}.{i}" in saved}
            for optimizer, _ in self.optimizers:
                if moments and any(parameter is p for g in optimizer.param_groups for p in g["params"]):
                    optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        for i, mean in enumerate(self.average):
            mean.copy_(saved[f"average.{i}"])


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    return Progress(*columns)


def save_half(module: ModelMixin | PreTrainedModel, folder: Path) -> None:
    """Save a model in half precision and leave the one in memory as it is."""
    module.save_pretrained(folder)
    forget_origin(folder / "config.json")
    for path in folder.glob("*.safetensors"):
        stored = load_file(path)
        save_file(
            {name: t.half() if t.is_floating_point() else t for name, t in stored.items()},
            path,
            metadata={"format": "pt"},
        )
        path.chmod(0o644)


def forget_origin(config: Path) -> None:
    """diffusers notes where a part was loaded from: a folder of this machine, which is nobody's business."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
