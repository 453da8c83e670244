"""Text from outside: the one reader of lists, captions, recipes, words that were typed and texts for services.

| given | what happens |
|---|---|
| UTF-8, with or without its mark; UTF-16 with its mark | read |
| another encoding | refused, with the `iconv` line that mends it |
| CR, LF or both | end a line, and nothing else does (U+0085, U+2028 and the like are white space within it) |
| half of a surrogate pair; a control character but tab, line ends and U+0085 | refused, with line and character |
| one letter written in two ways (é, e + ´) | the same where texts are compared, and drawn as it was given |

Names of files and folders are bytes, not text: they may hold anything, and are shown by `shown_name`.
"""

import codecs
import json
import os
import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any

from pixrl.errors import InputError
from pixrl.untrusted import require_depth

LONGEST_PART, LONGEST_PATH = 255, 4095
"""The most bytes of a file's name and of a path on Linux, whose calls fail beyond them instead of finding nothing."""

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does, so it is looked for first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
"""The control characters save tab, LF, CR and U+0085, and surrogates, of which a str holds none but lone ones."""
_LINE_END = re.compile(r"\r\n|\n|\r")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
"""The escapes of JSON, in a text where a backslash begins nothing else."""
_LETTERS = {"b": "\b", "f": "\f"}


def read_text(path: Path) -> str:
    """Read a text file without its byte order mark.

    Raises:
        InputError: there is no such file, it cannot be read, or it is no text (see the table above).
    """
    require_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    return decode(content, path)


def require_file(path: Path) -> None:
    """Raise InputError where there is no file of that name."""
    require_path(str(path), "the name of a file")
    if not path.exists():
        raise InputError(f"There is no file {str(path)!r} (looked in {Path.cwd()}).")
    if not path.is_file():
        raise InputError(
            f"{str(path)!r} is not a file but a folder or a device. Give the path of a file in it."
        )


def decode(content: bytes, path: Path) -> str:
    """Return the text that the bytes of a file hold.

    Raises:
        InputError: it is no text (see the table above).
    """
    mark = next((name for start, name in _MARKS if content.startswith(start)), None)
    if mark is None:  # UTF-16 has zeros, every other byte of Latin letters
        for start, name in ((1, "utf-16le"), (0, "utf-16be")):
            half, other = content[start::2], content[1 - start :: 2]
            if len(half) > 1 and half.count(0) > len(half) / 2 and other.count(0) == 0:
                mark = name
                break
    if mark in (None, "utf-16"):
        try:
            text = content.decode(mark or "utf-8")
        except UnicodeDecodeError as error:
            text = _half_characters(path, content, error)
        return require_text(text.removeprefix("\ufeff"), str(path), line=1)
    what = f"is {mark.upper()}" if mark == "utf-32" else f"looks like {mark.upper()} without its mark"
    raise InputError(f"{path} {what}, not UTF-8. Convert it: {_iconv(path, mark)}")


def _half_characters(path: Path, content: bytes, error: UnicodeDecodeError) -> str:
    """Decode what is UTF-8 but for lone surrogates, which are told later; anything else is refused."""
    if error.encoding == "utf-8":
        try:
            return content.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            pass
    first = error.start
    line = len(_LINE_END.findall(content[:first].decode("latin-1"))) + 1
    if error.encoding != "utf-8":
        raise InputError(
            f"{path} begins as UTF-16 and is none: byte {first}, {error.reason}. Save it again, as UTF-8."
        )
    refused = f"{path} is not UTF-8 text: byte {first} (0x{content[first]:02x}), in line {line}."
    try:
        content.decode("cp1252")
    except UnicodeDecodeError:
        raise InputError(
            f"{refused} It is not cp1252 either: find its encoding out and convert it: {_iconv(path, 'ENCODING')}"
        ) from None
    raise InputError(
        f"{refused} It can be read as cp1252, which Windows writes. Convert it: {_iconv(path, 'cp1252')}"
    ) from None


def _iconv(path: Path, encoding: str) -> str:
    return f"iconv -f {encoding} -t utf-8 {shlex.quote(path.name)} > utf8{path.suffix}"


def lines(text: str) -> list[str]:
    """Return the lines as an editor numbers them; an end of line after the last one begins no other."""
    found = _LINE_END.split(text)
    return found[:-1] if not found[-1] else found


def require_text(text: str, place: str, *, line: int | None = None) -> str:
    """Return the text itself where it is text.

    Args:
        text: one or more lines.
        place: where it stands, for the message: a file, or `the concept 'owl'`.
        line: the number of the first line; None: lines are counted only where there are several.

    Raises:
        InputError: it holds a control character or half of a surrogate pair; says the line and character of the first.
    """
    bad = _NO_TEXT.search(text)
    if bad is not None:
        _refuse(text, bad.start(), bad[0], place, line)
    return text


def require_name(name: str, what: str) -> str:
    """Return the name of a file or folder; InputError where it holds control characters."""
    require_text(shown_name(name), what)
    return name


def require_path(name: str, what: str) -> str:
    """Return a name that can be looked up on a disk: as `require_name`, and InputError where it is too long for a disk.

    The system's calls do not say of longer names that nothing is there: they fail.
    """
    whole, longest = (max(len(os.fsencode(part)) for part in parts) for parts in ([name], name.split("/")))
    if longest > LONGEST_PART or whole > LONGEST_PATH:
        raise InputError(
            f"{what[:1].upper()}{what[1:]} is too long: {whole} bytes, {longest} of them between two slashes; "
            f"at most {LONGEST_PATH} and {LONGEST_PART} can be the name of a file. Give the path of one."
        )
    return require_name(name, what)


def shown_name(name: str | os.PathLike[str]) -> str:
    r"""Return a file's name as text, with bytes that are not UTF-8 as `\xe9`.

    Raises:
        InputError: it holds half of a surrogate pair, which no file's name does.
    """
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return require_text(os.fspath(name), f"the name {os.fspath(name)!r}")


def comparable(text: str) -> str:
    """Return the text with each letter in one way (NFC) of writing it, for comparing alone."""
    return unicodedata.normalize("NFC", text)


def parse_json(text: str, place: str, *, line: int = 1, like: str = "") -> Any:
    """Parse a JSON text.

    Args:
        text: the document.
        place: the file, for messages.
        line: its number of the document's first line.
        like: a sentence that shows how the document should look, to end messages with.

    Raises:
        InputError: it is no JSON, gives a key twice, is nested too deeply, holds a number of thousands of digits, or
            a text in it is none (as `require_text` says).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _Repeated(key)
            found[key] = value
        return found

    _refuse_escapes(text, place, line)
    end = f" {like}" if like else ""
    try:
        found = json.loads(text, object_pairs_hook=unique)
        require_depth(text, found)
        return found
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        raise InputError(
            f"{place}, line {at} is not JSON: {error.msg} at character {error.colno}.{end}"
        ) from None
    except _Repeated as error:
        raise InputError(f"{place}, line {line}: the key {error.key!r} is given twice.{end}") from None
    except RecursionError:
        raise InputError(f"{place}, line {line} is nested too deeply.{end}") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise InputError(f"{place}, line {line} holds a number of too many digits.{end}") from None


class _Repeated(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _refuse_escapes(text: str, place: str, line: int) -> None:
    r"""Raise InputError for what is no text and hides behind \u0000, \b and the like."""
    high: tuple[int, str] | None = None  # where the first half of a pair stands, and which it is
    for match in _ESCAPE.finditer(text):
        letter = chr(int(match[1], 16)) if match[1] else _LETTERS.get(match[2], "")
        if high is not None and match.start() == high[0] + 6 and "\udc00" <= letter <= "\udfff":
            high = None
            continue
        if high is not None:
            break
        if "\ud800" <= letter <= "\udbff":
            high = (match.start(), letter)
        elif _NO_TEXT.match(letter):
            _refuse(text, match.start(), letter, place, line)
    if high is not None:
        _refuse(text, high[0], high[1], place, line)


def _refuse(text: str, at: int, letter: str, place: str, line: int | None) -> None:
    before = _LINE_END.split(text[:at])
    has_lines = line is not None or _LINE_END.search(text) is not None
    number = f", line {(line or 1) + len(before) - 1}" if has_lines else ""
    where = f"{place}{number}, character {len(before[-1]) + 1}"
    code = f"U+{ord(letter):04X}"
    if "\ud800" <= letter <= "\udfff":
        raise InputError(
            f"{where} is half a character ({code}, a lone surrogate): an emoji or the like was cut in two. "
            "Write it whole, or delete it."
        )
    raise InputError(f"{where} is the control character {code}, which is no text. Delete it.")
