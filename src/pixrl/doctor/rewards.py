"""What a recipe's rewards need that may be missing: options, packages, keys, services, and the models that they read.

A reward's own class is asked first: made with references to nothing in place of its models, it refuses options,
functions and services that it cannot use, and then the first missing model, before it would load anything. How it reads
each of its models is the table READS.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from pixrl import rewards as rewards_table
from pixrl.data.prompts import Prompt
from pixrl.device import choose_precision
from pixrl.doctor.diagnosis import Findings, Need
from pixrl.doctor.needs import existing_device, file_bytes, model_bytes, present, require_pieces
from pixrl.errors import CheckpointError, ConfigError, InputError, PixrlError, ServiceError
from pixrl.hub import read_json, resolve
from pixrl.hub_fetch import cached_folder
from pixrl.rewards.http import key_from
from pixrl.rewards.settings import RewardSetting
from pixrl.rewards.weights import WEIGHT_SUFFIXES, is_weight_file

Options = Mapping[str, object]
NOTHING = "./no-model-of-the-doctor"
"""A reference that no reward can load."""
KEYS = {"judge": "key_env", "remote": "token_env"}
"""Reward -> its option that names the environment variable of a key."""
_AT_ONCE = {"patience": 0.0, "tries": 1}
"""Options of rewards that ask a service: it is asked once."""
_HERE = {"device": "cpu", "dtype": "float32"}
_WRONG_KINDS = (TypeError, ValueError, AttributeError, LookupError)
"""What Python raises for an option of a kind that a reward does not expect."""


class Form(StrEnum):
    """How a model is read."""

    MODEL = "model"
    """A transformers folder with its weights, or one file of weights."""
    FILES = "files"
    """Published files: the first one by its path, or all of them in a folder."""
    WORDS = "words"
    """Config, tokenizer or preprocessing, without weights: any of the files."""


@dataclass(frozen=True)
class Read:
    """How a reward reads the model that one of its options names."""

    form: Form = Form.MODEL
    files: Callable[[Options], Sequence[str]] = lambda options: ("config.json",)
    """What they are called."""
    usual: Callable[[Options], object] = lambda options: None
    """What is read where the option is left out; None: nothing."""
    beside: bool = False
    """Whether the files then lie beside the model's, which published ones do not."""
    alone: Callable[[Options], bool] = lambda options: False
    """Whether one file of weights will do for a MODEL."""
    kinds: Sequence[str] = ()
    """The model types of transformers that will do; none: any."""
    advice: Callable[[], str] = lambda: ""
    """What else to give."""


def find_rewards(
    settings: Sequence[RewardSetting], prompts: Sequence[Prompt], findings: Findings
) -> dict[str, int]:
    """Model of a reward -> bytes of the weights that are loaded of it, as often as they are; of those that are there.

    Args:
        settings: the rewards.
        prompts: all that they will score pictures of.
        findings: where what is missing is noted.
    """
    found: dict[str, int] = {}
    for setting in settings:
        try:
            options = rewards_table.checked_options(setting.reward, setting.options)
        except ImportError as error:
            findings.miss(
                Need.PACKAGE,
                f"The reward {setting.name!r} needs {error.name}. Type: pip install 'pixrl[rewards]'",
            )
            continue
        except InputError as error:
            findings.miss(Need.SETTING, error)
            continue
        _require_place(setting, options, findings)
        if setting.reward == "python" and not callable(options["function"]):
            _require_function(options["function"], findings)
            continue
        if not _is_refused(setting, options, findings):
            for ref, taken in _models(setting, options, findings):
                found[ref] = found.get(ref, 0) + taken
        if setting.reward == "blip_vqa":
            _require_parser(setting, prompts, findings)
    return found


def _require_function(path: object, findings: Findings) -> None:
    """Code of the user's: its file is read, and nothing here executes it."""
    from pixrl.rewards.python import find_function

    try:
        find_function(path)
    except ConfigError as error:
        findings.miss(Need.SETTING, error)


def _is_refused(setting: RewardSetting, options: Options, findings: Findings) -> bool:
    """Whether the reward's class refuses its options; then that is a problem."""
    reads = READS[setting.reward]
    nothing = {option: NOTHING for option, read in reads.items() if _named(options, option, read) is not None}
    given = {
        **options,
        **{option: value for option, value in (_HERE | _AT_ONCE).items() if option in options},
    }
    variable = options.get(KEYS.get(setting.reward, ""))
    try:
        if variable is not None:
            key_from(os.environ, str(variable), f"The reward {setting.name!r}")
    except ConfigError as error:
        findings.miss(Need.TOKEN, error)
        return True
    try:
        rewards_table.load(setting.reward, **{**given, **nothing})
    except CheckpointError:
        return False  # its first model is the missing one
    except ServiceError as error:
        findings.miss(Need.SERVICE, error)
    except PixrlError as error:
        findings.miss(Need.SETTING, error)
    except _WRONG_KINDS as error:
        findings.miss(Need.SETTING, f"The reward {setting.name!r} does not take its options: {error}.")
    else:
        return False
    return True


def _require_place(setting: RewardSetting, options: Options, findings: Findings) -> None:
    """The device and precision that a reward's own options name."""
    try:
        if "device" in setting.options:
            choose_precision(existing_device(str(options["device"])), str(options.get("dtype", "auto")))
    except InputError as error:
        findings.miss(Need.DEVICE, f"The reward {setting.name!r}: {error}")


def _require_parser(setting: RewardSetting, prompts: Sequence[Prompt], findings: Findings) -> None:
    """spaCy, where a prompt does not list its phrases."""
    from pixrl.rewards.zoo.blip_vqa import KEY, SPACY_MODEL

    if all(prompt.metadata.get(KEY) is not None for prompt in prompts):
        return
    who = f"The reward {setting.name!r} finds the phrases of prompts whose metadata lists none with"
    model = f"python -m spacy download {SPACY_MODEL}"
    if find_spec("spacy") is None:
        findings.miss(Need.PACKAGE, f"{who} spacy. Type: pip install 'pixrl[compbench]' && {model}")
    elif find_spec(SPACY_MODEL) is None and not Path(SPACY_MODEL).is_dir():
        findings.miss(Need.PACKAGE, f"{who} spaCy's {SPACY_MODEL}. Type: {model}")


def _models(setting: RewardSetting, options: Options, findings: Findings) -> list[tuple[str, int]]:
    """What a reward reads, and the bytes of its weights."""
    found = []
    for option, read in READS[setting.reward].items():
        ref = _named(options, option, read)
        try:
            if ref is None and read.beside:
                _require_beside(str(options["model"]), read, options, findings)
            taken = _bytes(str(ref), options, read, findings) if isinstance(ref, str | Path) else None
        except CheckpointError as error:
            advice = read.advice()
            findings.miss(
                Need.WEIGHTS, f"The reward {setting.name!r}, option {option}: {error} {advice}".rstrip()
            )
            continue
        if taken is not None:
            found.append((str(ref), taken))
    return found


def _named(options: Options, option: str, read: Read) -> object:
    """What an option names, or what is read in its place."""
    given = options.get(option)
    return read.usual(options) if given is None else given


def _bytes(ref: str, options: Options, read: Read, findings: Findings) -> int | None:
    """Bytes of the weights; None where there are none to load, or they are not there.

    Raises:
        CheckpointError: a file is missing, cut short, or another model's.
    """
    if is_weight_file(ref):
        if read.form is Form.MODEL and not read.alone(options):
            raise CheckpointError(
                f"{ref} is one file of weights; a folder or a hub id with a config is needed."
            )
        return file_bytes(ref)
    if read.form is Form.MODEL:
        taken = model_bytes(ref, findings)
        if taken is not None and read.kinds:
            _require_kind(ref, read.kinds)
        return taken
    names = read.files(options)
    folder = present(
        ref, findings, lambda folder: not _missing(folder, read, names), weights=read.form is Form.FILES
    )
    if folder is None:
        return None
    _require_files(folder, read, names)
    require_pieces(folder, findings)
    if read.form is Form.WORDS:
        return None
    return sum(file_bytes(folder / name) for name in names if name.endswith(WEIGHT_SUFFIXES))


def _require_kind(ref: str, kinds: Sequence[str]) -> None:
    place = resolve(ref)
    folder = cached_folder(place) if isinstance(place, str) else place
    kind = None if folder is None else read_json(folder / "config.json").get("model_type")
    if kind not in kinds:
        raise CheckpointError(
            f"{folder} holds a {kind!r} model, and a {' or '.join(map(repr, kinds))} one is needed."
        )


def _require_beside(model: str, read: Read, options: Options, findings: Findings) -> None:
    """Config or tokenizer in the folder of the model, where no other is named."""
    names = read.files(options)
    if is_weight_file(model):
        folder: Path | None = Path(model).expanduser().parent
    else:
        place = resolve(model)
        folder = cached_folder(place) if isinstance(place, str) else place
    if folder is None:
        raise CheckpointError(f"It is not given, and {model} is published without {' or '.join(names)}.")
    _require_files(folder, read, names)
    require_pieces(folder, findings)


def _require_files(folder: Path, read: Read, names: Sequence[str]) -> None:
    missing = _missing(folder, read, names)
    if missing:
        raise CheckpointError(f"{folder} holds no {' or '.join(missing)}.")


def _missing(folder: Path, read: Read, names: Sequence[str]) -> Sequence[str]:
    """What a folder lacks: of FILES any, of WORDS all."""
    missing = [name for name in names if not (folder / name).is_file()]
    return missing if read.form is Form.FILES or len(missing) == len(names) else ()


def _aesthetic_head(options: Options) -> Sequence[str]:
    from pixrl.rewards.aesthetic import HEADS, Version

    return (HEADS[Version(str(options["version"]))],)


def _aesthetic_encoder(options: Options) -> str:
    from pixrl.rewards.aesthetic import ENCODERS, Version

    return ENCODERS[Version(str(options["version"]))]


def _hpsv2_file(options: Options) -> Sequence[str]:
    from pixrl.rewards.zoo.hpsv2 import FILES, Version

    return (FILES[Version(str(options["version"]))],)


def _hpsv3_file(options: Options) -> Sequence[str]:
    from pixrl.rewards.zoo.hpsv3 import WEIGHTS

    return (WEIGHTS,)


def _image_reward_files(options: Options) -> Sequence[str]:
    from pixrl.rewards.zoo.image_reward import CONFIG, WEIGHTS

    return (WEIGHTS, CONFIG)


def _vocabulary(options: Options) -> Sequence[str]:
    from pixrl.rewards.zoo.image_reward import VOCABULARY

    return (VOCABULARY,)


def _t5_tokenizer(options: Options) -> Sequence[str]:
    from pixrl.rewards.zoo.vqascore import TOKENIZER_FILES

    return TOKENIZER_FILES


def _t5_tower(options: Options) -> object:
    """The CLIP that the checkpoint's config names."""
    config = Path(str(options["model"])).expanduser() / "config.json"
    return read_json(config).get("mm_vision_tower") if config.is_file() else None


def _with_processor(options: Options) -> bool:
    return options.get("processor") is not None


def _own_detector() -> str:
    from pixrl.rewards.zoo.openmmlab import URL

    return f"GenEval's own: curl -O {URL}"


_CLIP = Read(kinds=("clip",))
_DETECTOR = Read(
    kinds=("mask2former",),
    alone=lambda options: str(options["detector"]).lower().endswith(".pth"),
    advice=_own_detector,
)
READS: Mapping[str, Mapping[str, Read]] = {
    "aesthetic": {"head": Read(Form.FILES, _aesthetic_head), "model": Read(usual=_aesthetic_encoder)},
    "blip_vqa": {"model": Read(kinds=("blip",))},
    "clip_i": {"model": _CLIP},
    "clip_image": {"model": _CLIP, "segmenter": Read()},
    "clip_t": {"model": _CLIP},
    "clip_text": {"model": _CLIP},
    "dino": {"model": Read()},
    "dino_seg": {"model": Read(), "segmenter": Read()},
    "geneval": {"segmenter": Read(), "detector": _DETECTOR, "clip": _CLIP},
    "hpsv2": {"model": Read(Form.FILES, _hpsv2_file), "processor": Read(Form.WORDS)},
    "hpsv3": {
        "model": Read(Form.FILES, _hpsv3_file),
        "processor": Read(
            Form.WORDS, beside=True, advice=lambda: "Type: processor: Qwen/Qwen2-VL-7B-Instruct"
        ),
    },
    "image_reward": {
        "model": Read(Form.FILES, _image_reward_files),
        "tokenizer": Read(
            Form.WORDS,
            _vocabulary,
            beside=True,
            advice=lambda: "Type: tokenizer: google-bert/bert-base-uncased",
        ),
    },
    "judge": {},
    "ocr": {"model": Read(), "detector": Read()},
    "preference": {"model": Read(kinds=("clip",), alone=_with_processor), "processor": Read(Form.WORDS)},
    "python": {},
    "remote": {},
    "vqascore": {
        "model": Read(),
        "tokenizer": Read(
            Form.WORDS, _t5_tokenizer, beside=True, advice=lambda: "Type: tokenizer: google/flan-t5-xxl"
        ),
        "vision": Read(Form.WORDS, usual=_t5_tower),
    },
}
"""Reward -> option that names a model -> how it is read."""
