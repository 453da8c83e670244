"""Reading LoRA files and PEFT folders, as trainers write them, for one denoiser: a transformer or a UNet.

A module's change is strength * up @ down, and the strength is alpha / rank (alpha / sqrt(rank) with rank-stabilized
LoRA). Where its alpha may stand, by who writes it there:

| place | written by |
|---|---|
| MODULE.alpha, a tensor for each module | kohya's sd-scripts, musubi-tuner, OneTrainer, ComfyUI's layout |
| adapter_config.json beside | peft's save_pretrained: Flow-GRPO, DiffusionNFT |
| header: lora_adapter_metadata, JSON of peft's configuration | diffusers' save_lora_weights, save_lora_adapter |
| header: transformer.lora_alpha and transformer.r, one key a setting | the same configuration, written flat |
| header: ss_network_alpha, network_alpha, lora_alpha, alpha; or within JSON | kohya, OneTrainer |

All that are there must agree: places that contradict each other are refused, and so is every setting that makes of a
file something else than plain LoRA. A file without any alpha has strength 1, as diffusers, ComfyUI and UNO read it.
"""

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixrl.device import quiet_loading
from pixrl.errors import CheckpointError
from pixrl.hub import is_hub_id
from pixrl.hub_check import read_header
from pixrl.models.lora.export import ADAPTER_METADATA, PREFIXES
from pixrl.models.lora.published_names import from_published
from pixrl.models.slots import DOWN, UP, Lora
from pixrl.untrusted import parse_json, plain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files that peft's save_pretrained writes into a folder."""
_PEFT_PREFIX = "base_model.model."
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ALPHA = ".alpha"
_KOHYA = (".lora_down.weight", ".lora_up.weight")
_PAIRS = ((DOWN, UP), _KOHYA, (".down.weight", ".up.weight"))
_SUFFIXES = (*(side for pair in _PAIRS for side in pair), _ALPHA)
"""The endings of the keys of all LoRA layouts that are read; another key is of something that is not."""
_OWN = tuple(dict.fromkeys(PREFIXES.values()))
"""What diffusers' names of a denoiser's modules begin with."""
_SDXL_LAYERS = SimpleNamespace(layers_per_block=2)
"""What diffusers must know of the UNet to read the names that Stability AI gave its blocks."""
_TEXT_ENCODERS = ("text_encoder", "lora_te")
_DOWN_UP_NAMES = (("transformer.",), ("lora_transformer_",), ("lora_unet_", "diffusion_model."))
"""The prefixes of keys in FLUX's files with lora_down; diffusers drops all but those of the first in a file."""
_PUBLISHED_NAMES = ("lora_unet_", "model.diffusion_model.", "diffusion_model.")
"""The prefixes of keys whose module has the name that the models' authors gave it."""
_ALPHA_KEY = re.compile(r"(ss_)?(network_|lora_|linear_)?alpha")
_RANK_KEYS = ("r", "rank", "lora_rank", "lora_dim", "network_dim", "network_rank", "ss_network_dim")
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "init_lora_weights"}
"""The settings of peft's configuration that are applied."""
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "loftq_config",
    "eva_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config",
}  # fmt: skip
"""The settings of peft's configuration without effect on how a finished adapter is added."""
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""The initializations that take something out of the base model, without which the adapter means nothing."""
_CONVERTERS_FAILURES = (
    ValueError, KeyError, IndexError, AssertionError, AttributeError, RuntimeError, NotImplementedError,
)  # fmt: skip
_SHOWN = 700
"""The most characters of a message about a file."""
_DEPTH = 3
"""The depth of mappings within each other that are searched for an alpha."""
_SAME = 2.0**-8
"""The relative difference of strengths that counts as none: alphas are saved in bfloat16, too."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that was read from a file, with a description."""

    lora: Lora
    """The modules of the transformer with (down, up), float32, strengths put into the ups."""
    said: str
    """A description: how many modules, of what rank and strength, and where the strength is stated."""


def read_lora(place: Path, kind: str) -> Lora:
    """Read a LoRA as `open_lora` does, without its description."""
    return open_lora(place, kind).lora


def open_lora(place: Path, kind: str) -> LoraFile:
    """Read a LoRA.

    Args:
        place: a .safetensors file, or a folder that holds one: peft's, diffusers' or an export of pixrl.
        kind: of the model that it is for: a key of `PREFIXES`, such as sd3.

    Raises:
        CheckpointError: it is missing, damaged, a pickle, of a layout that is not known, holds more than plain LoRA of
            the transformer, or says two strengths.
    """
    file, config = find_lora(place)
    try:
        read_header(file)
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118
            header: dict[str, str] = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no safetensors file, or cut short: {error}") from error
    keys = {key: key.removeprefix(_PEFT_PREFIX) for key in tensors}
    for key, own in keys.items():
        if own.startswith(("double_blocks.", "single_blocks.")):
            keys[key] = key  # the authors' names of FLUX keep peft's prefix for diffusers
    _refuse(file, "are there twice", _repeated(keys.values()))
    modules = _grouped({keys[key]: x for key, x in tensors.items()}, file, kind)
    has_alphas = any(module.alpha is not None for module in modules)
    sources = []
    if config is not None:
        try:
            settings = parse_json(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{config} cannot be read: {error}. Download it again.") from error
        sources.append(_peft_source(CONFIG, settings, config))
    sources += _of_header(header, file, has_alphas=has_alphas)
    if has_alphas and not sources:
        _refuse(file, "have no alpha, but others do", (x.name for x in modules if x.alpha is None))
    strengths = []
    for module in modules:  # each has the one strength that all places agree on; 1 where none states any
        stated: dict[str, float] = {}
        if module.alpha is not None:
            stated[f"{module.name}{_ALPHA}"] = module.alpha / len(module.down)
        stated |= {source.place: source.strength(module, file) for source in sources}
        for (one, first), (other, second) in pairwise(stated.items()):
            if not math.isclose(first, second, rel_tol=_SAME):
                raise _wrong(
                    file,
                    f"the strength of {module.name} is {first:g} by {one} and {second:g} by {other}. Find out "
                    "which it was trained with, and take the other out of the file.",
                )
        strengths.append(next(iter(stated.values()), 1.0))
    scaled = [
        replace(module, up=module.up * strength) for module, strength in zip(modules, strengths, strict=True)
    ]
    lora = _of_sd3(scaled, file) if kind == "sd3" else _by_diffusers(scaled, file, kind)
    places = [*(["its alpha tensors"] if has_alphas else []), *(source.place for source in sources)]
    by = f"by {' and '.join(places)}" if places else "for it has no alpha"
    rank, strength = _span([len(module.down) for module in modules]), _span(strengths)
    return LoraFile(lora, f"{len(modules)} LoRA modules of rank {rank} and strength {strength}, {by}")


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if math.isclose(low, high, rel_tol=_SAME) else f"{low:g} to {high:g}"


def find_lora(place: Path) -> tuple[Path, Path | None]:
    """Return the file of a LoRA, and peft's configuration where one lies beside it.

    Raises:
        CheckpointError: there is none, or it is a pickle.
    """
    try:
        place = place.expanduser()
        if place.is_dir():
            return _in_folder(place)
        is_there = place.exists()
    except (OSError, RuntimeError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"The LoRA {str(place)[:200]!r} cannot be looked for: {said}.") from error
    if not is_there:
        raise CheckpointError(_missing(place))
    if place.suffix.lower() in _PICKLED:
        raise _pickled(place)
    config = place.with_name(CONFIG)
    is_its_own = place.name == WEIGHTS or not place.with_name(WEIGHTS).is_file()
    if place.name == WEIGHTS and not config.is_file():
        raise CheckpointError(
            f"{place} is peft's, whose strength stands in {CONFIG}, and there is none beside it. Put it there."
        )
    return place, config if config.is_file() and is_its_own else None


def _in_folder(folder: Path) -> tuple[Path, Path | None]:
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return folder / WEIGHTS, folder / CONFIG
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return find_lora(files[0])
    if files:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder} holds {len(files)} safetensors files: give one of {names}.")
    if pickles := [file for file in sorted(folder.iterdir()) if file.suffix.lower() in _PICKLED]:
        raise _pickled(pickles[0])
    inner = next((config.parent for config in sorted(folder.glob(f"*/{CONFIG}"))), None)
    advice = (
        f"{folder.name}/{inner.name} does: give {inner}."
        if inner
        else f"Give one with {WEIGHTS} and {CONFIG}."
    )
    raise CheckpointError(f"The folder {folder} holds no LoRA. {advice}")


def _missing(place: Path) -> str:
    ref = str(place)
    is_id = is_hub_id(ref) and place.suffix.lower() not in (".safetensors", *_PICKLED)
    repo, folder = (ref, ref) if is_id else ("OWNER/NAME", "FOLDER")
    return (
        f"There is no LoRA file or folder {ref!r} (looked in {Path.cwd()}). From the hub: hf download {repo} "
        f"--local-dir {folder}; UNO's: hf download bytedance-research/UNO dit_lora.safetensors --local-dir ."
    )


def _pickled(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a pickle (torch.save), which can run code when it is read, so it is never loaded. Give the "
        ".safetensors of the same weights, or ask who made it for one."
    )


def _wrong(file: Path, what: str) -> CheckpointError:
    """Return an error about a file, on one line; names in it are shown as far as they can be."""
    return CheckpointError(f"{file}: {plain(what, _SHOWN)}")


def _refuse(file: Path, problem: str, keys: Iterable[str]) -> None:
    """Raise CheckpointError for keys, if there are any, and name some: nothing of a file must be lost in silence."""
    found = sorted(keys)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        names = ", ".join(plain(key, 120) for key in found[:3])
        raise _wrong(
            file,
            f"{names}{more} {problem}. pixrl merges plain LoRA layers of the transformer (down and up, with or "
            "without alpha): give a file that holds only those.",
        )


@dataclass(frozen=True)
class _Module:
    """One module's LoRA, by the file's name for the module."""

    name: str
    ends: tuple[str, str]
    """The endings of the keys of down and up."""
    down: Tensor
    up: Tensor
    alpha: float | None


def _grouped(raw: Mapping[str, Tensor], file: Path, kind: str) -> list[_Module]:
    """Return the modules of a file; a key that is of none is refused."""
    others = [key for key in raw if not key.endswith(_SUFFIXES)]
    if len(others) == len(raw):
        raise CheckpointError(f"{file} holds no LoRA of {kind.upper()}'s transformer.")
    _refuse(file, "are no LoRA layers", others)
    _refuse(file, "are not of the transformer", (key for key in raw if key.startswith(_TEXT_ENCODERS)))
    if kind == "flux" and any(_KOHYA[0] in key for key in raw):  # diffusers would drop others without a word
        own = next((names for names in _DOWN_UP_NAMES if any(key.startswith(names) for key in raw)), ())
        _refuse(file, "are of another layout than the rest", (key for key in raw if not key.startswith(own)))
    _refuse(file, "are not finite", (key for key, x in raw.items() if not x.isfinite().all()))
    modules = []
    for down_end, up_end in _PAIRS:
        for name in (key.removesuffix(down_end) for key in raw if key.endswith(down_end)):
            if name + up_end not in raw:
                continue
            alpha = raw.get(name + _ALPHA)
            if alpha is not None and (alpha.numel() != 1 or alpha.item() <= 0):
                raise _wrong(file, f"{name}{_ALPHA} must be one number above 0. Save it again.")
            pair, stated = (raw[name + down_end], raw[name + up_end]), None if alpha is None else alpha.item()
            modules.append(_Module(name, (down_end, up_end), *pair, stated))
    taken = {module.name + end for module in modules for end in (*module.ends, _ALPHA)}
    _refuse(file, "belong to no pair of down and up", raw.keys() - taken)
    for module in modules:
        down, up = list(module.down.shape), list(module.up.shape)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
            raise _wrong(
                file, f"{module.name} has no down and up of one rank: {down} and {up}. Download it again."
            )
    return modules


@dataclass(frozen=True)
class _Source:
    """The settings that one place states for all modules, by peft's names."""

    place: str
    settings: Mapping[str, Any]

    def strength(self, module: _Module, file: Path) -> float:
        """Return the factor of up @ down; CheckpointError where the rank is another one than the file has."""
        rank, said = len(module.down), self._of_pattern("rank_pattern", module, self.settings.get("r"))
        if said is not None and module.alpha is None and float(said) != rank:
            raise _wrong(
                file,
                f"{module.name} has rank {rank}, but {self.place} says {said}. They do not belong together: "
                "download both again.",
            )
        alpha = float(self._of_pattern("alpha_pattern", module, self.settings["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _of_pattern(self, pattern: str, module: _Module, usual: Any) -> Any:
        from peft.utils.other import get_pattern_key

        own = self.settings.get(pattern) or {}
        return own.get(get_pattern_key(list(own), _bare(module.name)), usual)


def _of_header(header: Mapping[str, str], file: Path, *, has_alphas: bool) -> Iterator[_Source]:
    """Yield the settings that the keys of a file's header state."""
    if ADAPTER_METADATA in header:
        try:
            stated = parse_json(header[ADAPTER_METADATA])
            own = {_bare(key): x for key, x in stated.items() if key.startswith(_OWN)}
            own = own or {key: x for key, x in stated.items() if not key.startswith(_TEXT_ENCODERS)}
        except (ValueError, AttributeError) as error:
            raise _wrong(file, f"its {ADAPTER_METADATA} cannot be read: {error}. Save it again.") from error
        yield _peft_source(f"its header's {ADAPTER_METADATA}", own, file)
    flat = {key: _literal(text) for key, text in header.items() if key != ADAPTER_METADATA}
    own = {_bare(key): value for key, value in flat.items() if key.startswith(_OWN)}
    if own.keys() & {"r", "lora_alpha"}:
        prefix = next(one for one in _OWN if any(key.startswith(one) for key in flat))
        yield _peft_source(f"its header's {prefix}lora_alpha", own, file)
    others = {key: value for key, value in flat.items() if not key.startswith((*_OWN, *_TEXT_ENCODERS))}
    if others.get("use_dora"):
        raise _wrong(file, "its header sets use_dora, and pixrl reads plain LoRA alone.")
    rank = next((others[key] for key in _RANK_KEYS if _is_positive(others.get(key))), None)
    for path, alpha in _alphas_within(others):
        place = f"its header's {'.'.join(path)}"
        if len(path) == 1 and not _ALPHA_KEY.fullmatch(path[0]):
            raise _wrong(
                file,
                f"{place} ({alpha}) may be an alpha, and pixrl does not know whose. Name it lora_alpha "
                "if it is the LoRA's, else take it out.",
            )
        if _is_positive(alpha):
            known = {"r": rank, "use_rslora": others.get("use_rslora")} if len(path) == 1 else {}
            yield _Source(place, {"lora_alpha": alpha, **known})
        elif not has_alphas:  # sd-scripts writes "Dynamic" where each module has an alpha of its own
            raise _wrong(file, f"{place} is {alpha!r}: no number, and its modules have no alphas.")


def _alphas_within(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield keys of an alpha with their values: of a header any, within JSON only those that name the LoRA's."""
    for key, inner in value.items():
        if isinstance(inner, dict) and len(path) < _DEPTH:
            yield from _alphas_within(inner, (*path, str(key)))
        elif (_ALPHA_KEY.fullmatch(str(key)) and key != "alpha") if path else "alpha" in str(key).lower():
            yield (*path, str(key)), inner


def _peft_source(place: str, settings: Any, file: Path) -> _Source:
    """Return peft's configuration as a source; CheckpointError where it is of more than plain LoRA or unreadable."""
    problem = _peft_problem(settings)
    if problem is not None:
        raise _wrong(file, f"{place} {problem}")
    return _Source(place, settings)


def _peft_problem(settings: Any) -> str | None:
    if not isinstance(settings, dict):
        return "is no mapping of settings. Save it again."
    method = str(settings.get("peft_type") or "LORA").removeprefix("PeftType.")
    if method != "LORA":
        return f"is of {method}, and pixrl reads plain LoRA alone."
    others = {k: v for k, v in settings.items() if k not in _READ | _WITHOUT_EFFECT and v and v != "none"}
    if others:
        said = ", ".join(f"{name}={value}" for name, value in others.items())
        return f"sets {said}. That is more than plain LoRA, which is all that pixrl reads."
    start = str(settings.get("init_lora_weights", ""))
    if start.lower().startswith(_CHANGES_THE_BASE):
        return f"sets init_lora_weights={start}, which changes the base. Convert it to plain LoRA with peft first."
    if "lora_alpha" not in settings:
        return "says no lora_alpha, so its strength is not known. Save it again with peft or diffusers."
    patterns = [settings.get(name) or {} for name in ("alpha_pattern", "rank_pattern")]
    try:
        are_patterns = all(isinstance(one, dict) and all(map(re.compile, one)) for one in patterns)
    except (re.error, TypeError):
        are_patterns = False
    if not are_patterns:
        return "cannot be read: alpha_pattern and rank_pattern must map names of modules to numbers. Save it again."
    numbers = [settings["lora_alpha"], settings.get("r", 1), *(x for one in patterns for x in one.values())]
    if not all(_is_positive(x) for x in numbers):
        return (
            "cannot be read: lora_alpha, r and those of the patterns must be numbers above 0. Save it again."
        )
    return None


def _is_positive(value: object) -> bool:
    """Return whether a value is a finite number above 0, or its text."""
    try:
        return not isinstance(value, bool) and 0 < float(str(value)) < math.inf
    except ValueError:
        return False


def _literal(text: str) -> Any:
    """Parse a header's text as JSON or as a Python literal; other text is itself."""
    for parse in (parse_json, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _of_sd3(modules: Iterable[_Module], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Rename to diffusers' names, the only ones that it reads of SD3; the authors' are translated by their table."""
    ours: list[tuple[str, tuple[Tensor, Tensor]]] = []
    unknown = []
    for module in modules:
        pair = module.down, module.up
        prefix = next((known for known in _PUBLISHED_NAMES if module.name.startswith(known)), None)
        if prefix is None:
            ours.append((_bare(module.name), pair))
            continue
        parts = from_published(module.name.removeprefix(prefix), pair, "sd3")
        ours += parts.items()
        unknown += [] if parts else [module.name]
    _refuse(file, "are modules that pixrl has no name for", unknown)
    _refuse(file, "are there twice", _repeated(name for name, _ in ours))
    return dict(ours)


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _by_diffusers(modules: Iterable[_Module], file: Path, kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Rename to diffusers' names of any model but SD3 through its own converters."""
    given: dict[str, Tensor] = {}
    for module in modules:
        given |= {module.name + module.ends[0]: module.down, module.name + module.ends[1]: module.up}
        if module.ends == _KOHYA and module.alpha is not None:
            given[module.name + _ALPHA] = torch.tensor(float(len(module.down)))  # strength 1 more
    with quiet_loading():
        from diffusers import (
            Flux2KleinPipeline,
            FluxPipeline,
            QwenImagePipeline,
            StableDiffusionXLPipeline,
            ZImagePipeline,
        )
        from diffusers.utils import convert_unet_state_dict_to_peft

        try:
            if kind == "sdxl":
                state, _ = StableDiffusionXLPipeline.lora_state_dict(given, unet_config=_SDXL_LAYERS)
                found = convert_unet_state_dict_to_peft(state)
            else:
                readers: dict[str, Any] = {
                    "flux": FluxPipeline,
                    "flux2-klein": Flux2KleinPipeline,
                    "z-image": ZImagePipeline,
                    "qwen-image": QwenImagePipeline,
                }
                found = readers[kind].lora_state_dict(given)
        except _CONVERTERS_FAILURES as error:
            raise _wrong(
                file, f"is in no LoRA layout of {kind.upper()} that diffusers reads: {error}"
            ) from error
    names = [key.removesuffix(DOWN) for key in found if key.endswith(DOWN)]
    left = found.keys() ^ {name + end for name in names for end in (DOWN, UP)}
    _refuse(file, "belong to no pair of down and up", left)
    _refuse(file, "are there twice", _repeated(map(_bare, names)))
    return {_bare(name): (found[name + DOWN], found[name + UP]) for name in names}


def _bare(name: str) -> str:
    """Return a name without the prefix of diffusers' denoisers."""
    return next((name.removeprefix(prefix) for prefix in _OWN if name.startswith(prefix)), name)
