"""What travels between a run and a reward server: JSON, its pictures as PNG or as safetensors. Nothing in it is run.

A request names one of the server's own rewards and can set no option of it. Its pictures, those in the metadata
included, are in one list, each picture once; everything else refers to them by number.

| in memory                              | in JSON                                                        |
|----------------------------------------|----------------------------------------------------------------|
| the batch's pictures [B, 3, H, W]      | `images`: B numbers                                            |
| a picture [3, H, W] in the metadata    | `{"$picture": number}`                                         |
| pictures [M, 3, H, W] in the metadata  | `{"$pictures": [numbers]}`                                     |
| the pictures themselves                | `pictures`: `{"png": [base64, ...]}`, 8 bits a channel, or     |
|                                        | `{"safetensors": base64}` of tensors named 0, 1 ..., float32   |
| nan                                    | null                                                           |
"""

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pixrl.errors import PixrlError
from pixrl.rewards.python_reward import to_pil
from pixrl.types import RewardBatch, Scores

PROTOCOL: Literal[1] = 1
PICTURE, PICTURES = "$picture", "$pictures"
MOST_PIXELS = 2**26
"""Of all pictures of a request, 64 of 1024 x 1024: a small PNG can unfold to any size."""


class WireError(PixrlError, ValueError):
    """A message that cannot be sent, or one that is not what was agreed on."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


MessageT = TypeVar("MessageT", bound=_Message)


class PNGPictures(_Message):
    """Pictures of 8 bits a channel."""

    png: list[str]


class TensorPictures(_Message):
    """Pictures as they are in memory."""

    safetensors: str


class Request(_Message):
    """Score these pictures."""

    protocol: Literal[1]
    reward: str
    """The server's name of it."""
    prompts: list[str] = Field(min_length=1)
    images: list[int]
    metadata: list[dict[str, Any]]
    pictures: PNGPictures | TensorPictures


class Answer(_Message):
    """One score a picture, or null and why; what produced them."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    protocol: Literal[1]
    scores: list[float | None]
    reasons: list[str | None]
    detail: dict[str, list[float | None]] = Field(default_factory=dict)
    provenance: dict[str, str] = Field(min_length=1)


class Served(_Message):
    """One reward of a server."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: str
    kind: str
    licence: str
    provenance: dict[str, str]
    problem: str | None = None
    """Why it could not score a grey picture when the server started; null where it could."""


class Description(_Message):
    """What a server has, and how much it takes at once."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    protocol: Literal[1]
    rewards: list[Served]
    max_body: int
    """Bytes of a request."""
    longest_answer: float
    """Seconds that an answer may take, waiting included."""


def request(reward: str, batch: RewardBatch, *, exact: bool) -> bytes:
    """A batch as the body of a request.

    Raises:
        WireError: the metadata holds what is neither JSON nor a picture.
    """
    gallery = _Gallery()
    images = [gallery.number(image) for image in batch.images_BCHW]
    metadata = [gallery.refer(dict(one), f"metadata[{row}]") for row, one in enumerate(batch.metadata)]
    message = Request.model_construct(
        protocol=PROTOCOL,
        reward=reward,
        prompts=list(batch.prompts),
        images=images,
        metadata=metadata,
        pictures=gallery.pack(exact),
    )
    return message.model_dump_json().encode()


def read_request(body: bytes) -> tuple[str, RewardBatch]:
    """The reward's name and the batch that a request holds.

    Raises:
        WireError: it is no request, or a picture in it is none.
    """
    message = _parse(Request, body)
    pictures = _unpack(message.pictures)
    count = len(message.prompts)
    if len(message.images) != count or len(message.metadata) not in (0, count):
        raise WireError(
            f"{count} prompts need {count} images, and {count} metadata or none; "
            f"got {len(message.images)} and {len(message.metadata)}."
        )
    images = [_picture(pictures, number) for number in message.images]
    if len({image.shape for image in images}) > 1:
        raise WireError("All images of one request must have one size.")
    metadata = [_resolve(one, pictures) for one in message.metadata]
    return message.reward, RewardBatch(torch.stack(images), message.prompts, metadata)


def answer(scores: Scores) -> bytes:
    """Scores as the body of an answer."""
    message = Answer(
        protocol=PROTOCOL,
        scores=_numbers(scores.values_B),
        reasons=list(scores.reasons),
        detail={name: _numbers(values_B) for name, values_B in scores.detail.items()},
        provenance=dict(scores.provenance),
    )
    return message.model_dump_json().encode()


def read_answer(body: bytes, count: int) -> Scores:
    """The scores of an answer about `count` pictures.

    Raises:
        WireError: it is no answer, or has another number of scores.
    """
    message = _parse(Answer, body)
    if len(message.scores) != count or len(message.reasons) != count:
        raise WireError(
            f"the server gave {len(message.scores)} scores and {len(message.reasons)} reasons for {count} pictures"
        )
    if any(len(values) != count for values in message.detail.values()):
        raise WireError(f"the server gave details that are not one number for each of {count} pictures")
    return Scores(
        _tensor(message.scores),
        tuple(map(_reason, message.scores, message.reasons)),
        {name: _tensor(values) for name, values in message.detail.items()},
        message.provenance,
    )


def read_description(body: bytes) -> Description:
    """What a server says of itself. WireError where that is not what was agreed on."""
    return _parse(Description, body)


def png_base64(image_CHW: Tensor) -> str:
    """A picture in [0, 1] as a PNG file in base64."""
    buffer = io.BytesIO()
    to_pil(image_CHW[None])[0].save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


class _Gallery:
    """The pictures of a request, each once: a group's samples share their references."""

    def __init__(self) -> None:
        self._pictures: list[Tensor] = []
        self._numbers: dict[tuple[object, ...], int] = {}

    def number(self, image_CHW: Tensor) -> int:
        """Its number."""
        if image_CHW.ndim != 3 or image_CHW.shape[0] != 3 or not image_CHW.is_floating_point():
            raise WireError(
                f"a tensor of {image_CHW.dtype} {list(image_CHW.shape)} is no picture: float [3, H, W] is sent alone"
            )
        # the same memory read in the same way
        key = (image_CHW.data_ptr(), image_CHW.dtype, tuple(image_CHW.shape), image_CHW.stride())
        if key not in self._numbers:
            self._numbers[key] = len(self._pictures)
            self._pictures.append(image_CHW)
        return self._numbers[key]

    def refer(self, value: object, where: str) -> Any:
        """The value with numbers in its pictures' place."""
        match value:
            case Tensor() if value.ndim == 4:
                return {PICTURES: [self.number(one) for one in value]}
            case Tensor():
                return {PICTURE: self.number(value)}
            case None | bool() | int() | str():
                return value
            case float() if math.isfinite(value):
                return value
            case Mapping():
                return {_key(key, where): self.refer(x, f"{where}[{key!r}]") for key, x in value.items()}
            case Sequence() if not isinstance(value, bytes | bytearray | memoryview):
                return [self.refer(x, f"{where}[{place}]") for place, x in enumerate(value)]
        raise WireError(f"{where} is {_short(value)}, which is neither JSON nor a picture")

    def pack(self, exact: bool) -> PNGPictures | TensorPictures:
        if not exact:
            return PNGPictures(png=[png_base64(one) for one in self._pictures])
        named = {
            str(n): one.detach().float().cpu().contiguous().clone() for n, one in enumerate(self._pictures)
        }
        return TensorPictures(safetensors=base64.b64encode(save(named)).decode())


def _key(key: object, where: str) -> str:
    if not isinstance(key, str) or key in (PICTURE, PICTURES):
        raise WireError(f"{where} has the key {key!r}; keys are texts other than {PICTURE} and {PICTURES}")
    return key


def _parse(kind: type[MessageT], body: bytes) -> MessageT:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WireError(
            f"no {kind.__name__.lower()} of protocol {PROTOCOL}: {where + ': ' if where else ''}{first['msg']}; "
            f"it begins {_short(body[:60].decode(errors='replace'))}"
        ) from None


def _unpack(pictures: PNGPictures | TensorPictures) -> list[Tensor]:
    if isinstance(pictures, PNGPictures):
        files = [_open_png(_from_base64(text)) for text in pictures.png]
        if sum(file.width * file.height for file in files) > MOST_PIXELS:
            raise WireError(f"the pictures have more than {MOST_PIXELS} pixels in all; send fewer at once")
        return [_load_png(file) for file in files]
    try:
        named = load(_from_base64(pictures.safetensors))
    except SafetensorError as error:
        raise WireError(f"the pictures are no safetensors file: {error}") from None
    if named.keys() != {str(number) for number in range(len(named))}:
        raise WireError("the tensors of the pictures are not named 0, 1 ... without a gap")
    found = [named[str(number)] for number in range(len(named))]
    for image in found:
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype is not torch.float32 or not image.numel():
            raise WireError(f"a picture is {image.dtype} {list(image.shape)}, not float32 [3, H, W]")
    return found


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise WireError(f"a picture is no base64: it begins {_short(text[:40])}") from None


def _open_png(content: bytes) -> Image.Image:
    """The header alone."""
    try:
        file = Image.open(io.BytesIO(content), formats=["PNG"])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise WireError(f"a picture cannot be read as PNG: {error}") from None
    if file.mode != "RGB":
        raise WireError(f"a picture is {file.mode}, not RGB of 8 bits a channel")
    return file


def _load_png(file: Image.Image) -> Tensor:
    try:
        levels = np.array(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise WireError(f"a picture cannot be read as PNG: {error}") from None
    return torch.from_numpy(levels).permute(2, 0, 1) / 255


def _resolve(value: Any, pictures: Sequence[Tensor]) -> Any:
    """Metadata with the pictures themselves in it."""
    match value:
        case {"$picture": number, **rest} if not rest:
            return _picture(pictures, number)
        case {"$pictures": list(numbers), **rest} if not rest:
            found = [_picture(pictures, number) for number in numbers]
            if len({image.shape for image in found}) != 1:
                raise WireError(f"{PICTURES} must name one or more pictures of one size")
            return torch.stack(found)
        case dict():
            return {key: _resolve(x, pictures) for key, x in value.items()}
        case list():
            return [_resolve(x, pictures) for x in value]
    return value


def _picture(pictures: Sequence[Tensor], number: object) -> Tensor:
    if not isinstance(number, int) or not 0 <= number < len(pictures):
        raise WireError(f"there is no picture {number!r}; {len(pictures)} were sent")
    return pictures[number]


def _numbers(values_B: Tensor) -> list[float | None]:
    return [None if math.isnan(x) else x for x in values_B.double().tolist()]


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if x is None else x for x in values], dtype=torch.float32)


def _reason(score: float | None, reason: str | None) -> str | None:
    if score is None:
        return reason or "the server gave no score and no reason"
    if not math.isfinite(score):
        return f"the server gave {score}"
    return reason


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{type(value).__name__} {text[:80]}..."
