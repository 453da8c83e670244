"""Texts of others made harmless: without our secrets, on one line, as mere text in Markdown, and JSON of sane depth.

Everything that a service says passes `without_secret` where it enters (`rewards.http.Service.ask`); what then reaches a
log, a manifest or a person passes `plain`; what reaches a model card, `markdown`, `code` or `fenced`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = b"[secret]"
LEAST_SECRET = 8
"""Characters: a shorter one is taken for a word such as EMPTY, which local services want in place of a key."""
LONGEST = 300
"""Characters of another's text that are kept for people."""
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
MOST_DEPTH = 64
"""Of lists and mappings inside each other, in JSON and in YAML."""
_SIGNS = re.compile(
    r"[\\`*\[\]<#|~$&@]|^>|(?<![^\W_])_|_(?![^\W_])|(?<=http):|(?<=https):|(?<=ftp):|(?<=www)\.",
    re.IGNORECASE,
)
"""What means something inside a line of Markdown, those included that make links of bare addresses."""
_BY_NUMBER = "&<>@:.|$"
"""Of these: a backslash would not stop a link or a formula, and a cell of a table would end behind one."""
_AT_START = re.compile(r"^(\d*)([-+=.)])(?![^\W_])")
"""What makes a line part of a list, or the one above it a heading."""


class Secret:
    """Finds a key in what a service sent: whole or its beginning, as it is, or as JSON or an address spells it."""

    def __init__(self, secret: str) -> None:
        units = [_spelled(sign) for sign in secret] if len(secret) >= LEAST_SECRET else []
        self._start = re.compile(b"".join(units[:LEAST_SECRET]), re.IGNORECASE) if units else None
        self._rest = [re.compile(unit, re.IGNORECASE) for unit in units[LEAST_SECRET:]]

    def without(self, content: bytes) -> bytes:
        """The content with `[secret]` in its place, in time that is linear in the content."""
        if self._start is None:
            return content
        kept, at = [], 0
        while found := self._start.search(content, at):
            kept += [content[at : found.start()], REDACTED]
            at = found.end()
            for unit in self._rest:
                if not (further := unit.match(content, at)):
                    break
                at = further.end()
        return b"".join([*kept, content[at:]]) if kept else content

    def without_in(self, text: str) -> str:
        """As `without`, of a text."""
        return self.without(text.encode(errors="surrogatepass")).decode(errors="surrogatepass")


def secrets_in(environment: Mapping[str, str]) -> list[Secret]:
    """The keys and tokens that environment variables hold, by the variables' names."""
    return [
        Secret(value) for name, value in environment.items() if _SECRET_NAME.search(name) and value.isascii()
    ]


def _spelled(sign: str) -> bytes:
    """A pattern of the ways in which an ASCII character is written."""
    number = ord(sign)
    return rf"(?:\\?{re.escape(sign)}|\\u{number:04x}|%{number:02x})".encode()


def plain(text: str, most: int = LONGEST) -> str:
    """One line of printable characters, cut to `most`: none moves a cursor or turns the direction of writing."""
    line = " ".join(text[: 4 * most].split())
    shown = "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line[: most + 1]
    )
    return shown if len(shown) <= most else f"{shown[:most]}..."


def markdown(text: object) -> str:
    """A text as mere text within a line of Markdown, table cells included: no link, tag, heading, emphasis or code."""
    line = " ".join(encodable(str(text)).split())
    return _AT_START.sub(r"\1\\\2", _SIGNS.sub(_escaped, line))


def _escaped(match: re.Match[str]) -> str:
    sign = match[0]
    return f"&#{ord(sign)};" if sign in _BY_NUMBER else f"\\{sign}"


def code(text: object, *, in_table: bool = False) -> str:
    """A name as code within a line of Markdown, between as many backticks as it needs."""
    line = " ".join(encodable(str(text)).split()) or " "
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    if in_table:  # a cell ends at a bar, unless an odd number of backslashes stands before it
        line = re.sub(r"(\\*)\|", lambda found: f"{found[1]}{chr(92) * (len(found[1]) % 2 + 1)}|", line)
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fenced(text: str, language: str) -> str:
    """A block of code in Markdown, which nothing inside it ends."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{encodable(text)}\n{fence}"


def encodable(text: str) -> str:
    """The text with what UTF-8 cannot write, such as bytes of a folder's name, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def require_depth(text: str | bytes, found: Any) -> None:
    """RecursionError where what a JSON text says has lists and mappings more than `MOST_DEPTH` deep."""
    brackets = (
        text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    )
    if brackets > MOST_DEPTH and _is_deeper(found, MOST_DEPTH):
        raise RecursionError(f"more than {MOST_DEPTH} deep")


def parse_json(text: str | bytes) -> Any:
    """What `json.loads` gives.

    Raises:
        ValueError: it is no JSON, has a number of thousands of digits, or lists and mappings more than `MOST_DEPTH`
            deep, which Python could read but not walk through.
    """
    try:
        found = json.loads(text)
        require_depth(text, found)
    except RecursionError:
        raise ValueError(f"lists and mappings are more than {MOST_DEPTH} deep") from None
    return found


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and mappings are more than `most` deep; without recursion."""
    level: Sequence[Any] = [value]
    for _ in range(most):
        level = [
            inner
            for one in level
            if isinstance(one, Mapping | list)
            for inner in (one.values() if isinstance(one, Mapping) else one)
        ]
        if not level:
            return False
    return any(isinstance(one, Mapping | list) for one in level)
