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
"""The least characters of a secret; a shorter one is a word such as EMPTY, which local services want for a key."""
LONGEST = 300
"""The characters of another's text that are kept for people."""
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
MOST_DEPTH = 64
"""The most lists and mappings inside each other, in JSON and in YAML."""
_SIGNS = re.compile(
    r"[\\`*\[\]<#|~$&@]|^>|(?<![^\W_])_|_(?![^\W_])|(?<=http):|(?<=https):|(?<=ftp):|(?<=www)\.",
    re.IGNORECASE,
)
"""The signs with a meaning inside a line of Markdown, those included that make links of bare addresses."""
_BY_NUMBER = "&<>@:.|$"
"""The signs among them that are written by number, since a backslash would not stop a link, formula or cell."""
_AT_START = re.compile(r"^(\d*)([-+=.)])(?![^\W_])")
"""The start that makes a line part of a list, or the one above it a heading."""


class Secret:
    """A key to find in what a service sent: whole or its beginning, as it is, or as JSON or an address spells it."""

    def __init__(self, secret: str) -> None:
        codes = [(re.escape(sign), ord(sign)) for sign in secret] if len(secret) >= LEAST_SECRET else []
        units = [rf"(?:\\?{sign}|\\u{number:04x}|%{number:02x})".encode() for sign, number in codes]
        self._start = re.compile(b"".join(units[:LEAST_SECRET]), re.IGNORECASE) if units else None
        self._rest = [re.compile(unit, re.IGNORECASE) for unit in units[LEAST_SECRET:]]

    def without(self, content: bytes) -> bytes:
        """Return the content with `[secret]` in the key's place, in time that is linear in the content."""
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
        """Return a text with `[secret]` in the key's place, as `without` does for bytes."""
        return self.without(text.encode(errors="surrogatepass")).decode(errors="surrogatepass")


def secrets_in(environment: Mapping[str, str]) -> list[Secret]:
    """Return the keys and tokens that environment variables hold, by the variables' names."""
    return [
        Secret(value) for name, value in environment.items() if _SECRET_NAME.search(name) and value.isascii()
    ]


def plain(text: str, most: int = LONGEST) -> str:
    """Return one line of printable characters, cut to `most`: none moves a cursor or turns the direction of writing."""
    line = " ".join(text[: 4 * most].split())
    shown = "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line[: most + 1]
    )
    return shown if len(shown) <= most else f"{shown[:most]}..."


def markdown(text: object) -> str:
    """Return mere text for a line of Markdown, table cells included: no link, tag, heading, emphasis or code."""
    line = " ".join(encodable(str(text)).split())
    escaped = _SIGNS.sub(
        lambda found: f"&#{ord(found[0])};" if found[0] in _BY_NUMBER else f"\\{found[0]}", line
    )
    return _AT_START.sub(r"\1\\\2", escaped)


def code(text: object, *, in_table: bool = False) -> str:
    """Return a name as code within a line of Markdown, between as many backticks as it needs."""
    line = " ".join(encodable(str(text)).split()) or " "
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    if in_table:  # a cell ends at a bar, unless an odd number of backslashes stands before it
        line = re.sub(r"(\\*)\|", lambda found: f"{found[1]}{chr(92) * (len(found[1]) % 2 + 1)}|", line)
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fenced(text: str, language: str) -> str:
    """Return a block of code in Markdown, which nothing inside it ends."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{encodable(text)}\n{fence}"


def encodable(text: str) -> str:
    """Return the text with what UTF-8 cannot write, such as bytes of a folder's name, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def require_depth(text: str | bytes, found: Any) -> None:
    """Raise RecursionError where what a JSON text says has lists and mappings more than `MOST_DEPTH` deep."""
    brackets = (
        text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    )
    if brackets <= MOST_DEPTH:
        return
    level: Sequence[Any] = [found]
    for _ in range(MOST_DEPTH):  # a walk without recursion
        level = [
            inner
            for one in level
            if isinstance(one, Mapping | list)
            for inner in (one.values() if isinstance(one, Mapping) else one)
        ]
    if any(isinstance(one, Mapping | list) for one in level):
        raise RecursionError(f"more than {MOST_DEPTH} deep")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as `json.loads` does.

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
