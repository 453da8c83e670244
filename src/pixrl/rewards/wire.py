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

How much a request may ask for is counted before anything is unfolded, and for every use of a picture: a number that
stands a thousand times in a list is a thousand pictures. Rewards bring small pictures to some hundred pixels a side,
so each counts as if its shorter side had at least 512.
"""

import base64
import binascii
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pixrl.errors import InputError, PixrlError
from pixrl.rewards.http import LONGEST_WAIT
from pixrl.rewards.python import to_pil
from pixrl.text import require_text
from pixrl.types import RewardBatch, Scores
from pixrl.untrusted import plain

PROTOCOL: Literal[1] = 1
PICTURE, PICTURES = "$picture", "$pictures"
MOST_PIXELS = 2**26
"""Of all pictures of a request as `cost` counts them, 64 of 1024 x 1024: a small PNG can unfold to any size."""
LEAST_SIDE = 512
"""To which a reward may enlarge a picture's shorter side."""
MOST_ASPECT = 16
"""Of a picture's longer side to its shorter one."""
MOST_PICTURES = MOST_PIXELS // LEAST_SIDE**2
LONGEST_PROVENANCE = 2000
"""Characters of one entry."""
MOST_VALUES = 2**20
"""Commas and brackets of a request: what it unfolds to in memory beside its pictures."""
LONGEST_PROMPT = 2**16
"""Characters."""
MOST_HEADER = 2**16
"""Bytes of a safetensors header, about two hundred for each picture."""


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
    reward: str = Field(max_length=256)
    """The server's name of it."""
    prompts: list[Annotated[str, Field(max_length=LONGEST_PROMPT)]] = Field(min_length=1)
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
    max_body: int = Field(gt=0)
    """Bytes of a request."""
    max_pixels: int = Field(MOST_PIXELS, gt=0)
    """Of a request, as `cost` counts them."""
    longest_answer: float = Field(gt=0, le=LONGEST_WAIT)
    """Seconds that an answer may take, waiting included."""


def cost(height: int, width: int) -> int:
    """What one use of a picture counts: its pixels, once its shorter side has `LEAST_SIDE`.

    Raises:
        WireError: it is empty, or more than `MOST_ASPECT` times as long as it is wide.
    """
    shorter, longer = sorted((height, width))
    if shorter < 1 or longer > MOST_ASPECT * shorter:
        raise WireError(
            f"a picture has {width} x {height} pixels; one side may be at most {MOST_ASPECT} times the other"
        )
    scaled = max(shorter, LEAST_SIDE)
    return scaled * -(-longer * scaled // shorter)


def request(reward: str, batch: RewardBatch, *, exact: bool, max_pixels: int = MOST_PIXELS) -> bytes:
    """A batch as the body of a request.

    Raises:
        WireError: the metadata holds what is neither JSON nor a picture, or a text with what is none; a picture is too
            long and thin, or all have more than `max_pixels`, as `cost` counts them.
    """
    gallery = _Gallery(max_pixels)
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
    values = sum(body.count(sign) for sign in (b",", b"[", b"{"))
    if values > MOST_VALUES:
        raise WireError(f"the request has {values} values, and at most {MOST_VALUES} are read")
    message = _parse(Request, body)
    count = len(message.prompts)
    if len(message.images) != count or len(message.metadata) not in (0, count):
        raise WireError(
            f"{count} prompts need {count} images, and {count} metadata or none; "
            f"got {len(message.images)} and {len(message.metadata)}."
        )
    uses = [*message.images, *_uses(message.metadata)]
    if len(uses) > MOST_PICTURES:
        raise WireError(
            f"the request uses {len(uses)} pictures, and at most {MOST_PICTURES} are scored at once"
        )
    pictures = _unpack(message.pictures, uses)
    images = [_picture(pictures, number) for number in message.images]
    if len({image.shape for image in images}) > 1:
        raise WireError("All images of one request must have one size.")
    metadata = [_resolve(one, pictures) for one in message.metadata]
    try:
        return message.reward, RewardBatch(torch.stack(images), message.prompts, metadata)
    except InputError as error:
        raise WireError(str(error)) from None


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
        {plain(name): _tensor(values) for name, values in message.detail.items()},
        _plain_values(message.provenance),
    )


def read_description(body: bytes) -> Description:
    """What a server says of itself. WireError where that is not what was agreed on."""
    found = _parse(Description, body)
    rewards = [one.model_copy(update={"provenance": _plain_values(one.provenance)}) for one in found.rewards]
    return found.model_copy(update={"rewards": rewards})


def _plain_values(provenance: Mapping[str, str]) -> dict[str, str]:
    return {plain(name): plain(text, LONGEST_PROVENANCE) for name, text in provenance.items()}


def png_of(image_CHW: Tensor) -> bytes:
    """Return a picture in [0, 1] as the content of a PNG file."""
    buffer = io.BytesIO()
    to_pil(image_CHW[None])[0].save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def png_base64(image_CHW: Tensor) -> str:
    """A picture in [0, 1] as a PNG file in base64."""
    return base64.b64encode(png_of(image_CHW)).decode()


class _Gallery:
    """The pictures of a request, each once: a group's samples share their references."""

    def __init__(self, max_pixels: int) -> None:
        self._left = max_pixels
        self._pictures: list[Tensor] = []
        self._numbers: dict[tuple[object, ...], int] = {}

    def number(self, image_CHW: Tensor) -> int:
        """Its number."""
        if image_CHW.ndim != 3 or image_CHW.shape[0] != 3 or not image_CHW.is_floating_point():
            raise WireError(
                f"a tensor of {image_CHW.dtype} {list(image_CHW.shape)} is no picture: float [3, H, W] is sent alone"
            )
        self._left -= cost(image_CHW.shape[1], image_CHW.shape[2])
        if self._left < 0:
            raise WireError("its pictures have more pixels than the server takes at once")
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
            case str():
                return _text(value, where)
            case None | bool() | int():
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


def _text(value: str, where: str) -> str:
    try:
        return require_text(value, where)
    except InputError as error:
        raise WireError(str(error)) from None


def _key(key: object, where: str) -> str:
    if not isinstance(key, str) or key in (PICTURE, PICTURES):
        raise WireError(f"{where} has the key {key!r}; keys are texts other than {PICTURE} and {PICTURES}")
    return _text(key, f"the key {key!r} of {where}")


def _parse(kind: type[MessageT], body: bytes) -> MessageT:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = plain(".".join(str(part) for part in first["loc"]))
        raise WireError(
            f"no {kind.__name__.lower()} of protocol {PROTOCOL}: {where + ': ' if where else ''}{first['msg']}; "
            f"it begins {_short(body[:60].decode(errors='replace'))}"
        ) from None


def _uses(value: object) -> Iterator[object]:
    """The numbers of all pictures in metadata, as often as they stand there."""
    match value:
        case {"$picture": number, **rest} if not rest:
            yield number
        case {"$pictures": list(numbers), **rest} if not rest:
            yield from numbers
        case dict():
            for inner in value.values():
                yield from _uses(inner)
        case list():
            for inner in value:
                yield from _uses(inner)


def _unpack(pictures: PNGPictures | TensorPictures, uses: Sequence[object]) -> list[Tensor]:
    """The pictures of a request; none is unfolded before what all its uses cost was found to be little enough."""
    if isinstance(pictures, PNGPictures):
        if len(pictures.png) > MOST_PICTURES:
            raise WireError(f"{len(pictures.png)} pictures were sent, and at most {MOST_PICTURES} are read")
        contents = [io.BytesIO(_from_base64(text)) for text in pictures.png]
        try:
            files = [Image.open(content, formats=["PNG"]) for content in contents]  # the headers alone
            for file in files:
                if [part[3] for part in file.tile] != ["RGB"]:  # PIL's mode is RGB of 16 bits too
                    raise WireError(f"a picture is {file.mode}, not RGB of 8 bits a channel")
            _require_few_pixels([(file.height, file.width) for file in files], uses)
            return [torch.from_numpy(np.array(file)).permute(2, 0, 1) / 255 for file in files]
        except WireError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise WireError(f"a picture cannot be read as PNG: {error}") from None
    content = _from_base64(pictures.safetensors)
    if int.from_bytes(content[:8], "little") > MOST_HEADER:
        raise WireError(f"the pictures are no safetensors file with a header of at most {MOST_HEADER} bytes")
    try:
        named = load(content)
    except SafetensorError as error:
        raise WireError(f"the pictures are no safetensors file: {error}") from None
    if named.keys() != {str(number) for number in range(len(named))}:
        raise WireError("the tensors of the pictures are not named 0, 1 ... without a gap")
    found = [named[str(number)] for number in range(len(named))]
    for image in found:
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype is not torch.float32 or not image.numel():
            raise WireError(f"a picture is {image.dtype} {list(image.shape)}, not float32 [3, H, W]")
    _require_few_pixels([(image.shape[1], image.shape[2]) for image in found], uses)
    return found


def _require_few_pixels(sizes: Sequence[tuple[int, int]], uses: Sequence[object]) -> None:
    """`sizes`: height and width of each picture; one that nothing uses counts once, since it is unfolded too."""
    costs = [cost(height, width) for height, width in sizes]
    used = [number for number in uses if isinstance(number, int) and 0 <= number < len(costs)]
    whole = sum(costs[number] for number in used) + sum(costs[n] for n in set(range(len(costs))) - set(used))
    if whole > MOST_PIXELS:
        raise WireError(
            f"the pictures have more than {MOST_PIXELS} pixels in all, each use counted and with sides of at least "
            f"{LEAST_SIDE}; send fewer at once"
        )


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise WireError(f"a picture is no base64: it begins {_short(text[:40])}") from None


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
        return plain(reason or "") or "the server gave no score and no reason"
    if not math.isfinite(score):
        return f"the server gave {score}"
    return None if reason is None else plain(reason)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{type(value).__name__} {text[:80]}..."
