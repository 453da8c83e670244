"""The one reader of text from outside: encodings, lines, what is no text, and one way to compare."""

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from pixrl import config
from pixrl.config import find_recipe
from pixrl.data.pairs import check_concepts, parse_pairs
from pixrl.data.prompts import load_prompts
from pixrl.data.subjects import load_subjects
from pixrl.errors import ConfigError, InputError
from pixrl.hub import resolve
from pixrl.runs.config import AlignConfig
from pixrl.text import (
    comparable,
    decode,
    lines,
    parse_json,
    read_text,
    require_file,
    require_text,
    shown_name,
)
from pixrl.types import RewardBatch

TEXT = "a café\nan owl 🦉\n"
HALF = "\ud83d"
REWARD: dict[str, object] = {"rewards": [{"name": "geneval"}]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_unicode_by_its_mark(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    path.write_bytes(mark + TEXT.encode(encoding))
    assert read_text(path) == TEXT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a café".encode("cp1252"),
            r"byte 5 \(0xe9\), in line 1\. It can be read as cp1252, which Windows writes\. "
            r"Convert it: iconv -f cp1252 -t utf-8 list\.txt > utf8\.txt",
        ),
        ("\n\rлиса".encode("cp1251"), r"\(0xeb\), in line 3\. It can be read as cp1252"),
        (b"\x81 owl \x8d", r"not cp1252 either: .*iconv -f ENCODING -t utf-8"),
        (TEXT.encode("utf-16-le"), r"looks like UTF-16LE without its mark.*iconv -f utf-16le"),
        ("an owl".encode("utf-16-be"), r"looks like UTF-16BE without its mark"),
        (TEXT.encode("utf-32"), r"is UTF-32, not UTF-8\. Convert it: iconv -f utf-32"),
        ("an owl".encode("utf-16")[:-1], r"begins as UTF-16 and is none: byte 12"),
        (b"\xff\xfe\x3d\xd8o\x00", r"begins as UTF-16 and is none"),
        (
            b"an owl\n  " + HALF.encode("utf-8", "surrogatepass"),
            r"line 2, character 3 is half a char",
        ),
        (b"an owl\r\n\0", r"list\.txt, line 2, character 1 is the control character U\+0000"),
        ("an owl \x9b1m".encode(), r"line 1, character 8 is the control character U\+009B"),
    ],
)
def test_what_is_no_text_is_told_with_its_place(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        decode(content, tmp_path / "list.txt")


def test_a_name_with_a_space_is_quoted_in_what_to_type() -> None:
    with pytest.raises(InputError, match=r"iconv -f cp1252 -t utf-8 'my list\.csv' > utf8\.csv"):
        decode(b"caf\xe9", Path("my list.csv"))


def test_only_cr_and_lf_end_a_line() -> None:
    assert lines("a\x85b\u2028c\u2029d\ne\r\nf\rg\n") == ["a\x85b\u2028c\u2029d", "e", "f", "g"]
    assert lines("") == []
    assert lines("\n") == [""]
    assert require_text("tab\t, \x85 and ends\r\n", "it") == "tab\t, \x85 and ends\r\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": "x \\ud83d"}', r"list, line 7, character 10 is half a character \(U\+D83D"),
        ('{"a":\n "\\udd89"}', r"list, line 8, character 3 is half a character \(U\+DD89"),
        ('{"a": "\\ud83d\\ud83d\\udd89"}', r"line 7, character 8 is half a character \(U\+D83D"),
        ('{"a\\u0000": 1}', r"line 7, character 4 is the control character U\+0000"),
        ('["\\b"]', r"line 7, character 3 is the control character U\+0008"),
        ('{"a": 1, "a": 2}', "line 7: the key 'a' is given twice"),
        ('{"a": }', "line 7 is not JSON: Expecting value at character 7. Like so."),
        ("[" * 100_000, "line 7 is nested too deeply"),
        ("1" * 5000, "line 7 holds a number of too many digits"),
    ],
)
def test_json_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_json(text, "list", line=7, like="Like so.")


def test_json_that_is_read() -> None:
    for value in ({"a": "\\ud83d is no escape", "b": ["🦉", "\n\t"]}, [], "x", 3.5, None):
        assert parse_json(json.dumps(value), "list") == value


def test_letters_are_composed_for_comparing_and_never_for_drawing() -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != apart and comparable(composed) == comparable(apart)
    pairs = parse_pairs([f"{apart} & owl", f"owl & {composed.upper()}"])
    assert pairs.pairs == ((apart, "owl"),)
    with pytest.raises(InputError, match="given twice"):
        check_concepts([composed, apart])


def test_words_that_were_typed_are_text() -> None:
    with pytest.raises(InputError, match=r"the concept .* character 4 is half a character"):
        check_concepts([f"owl{HALF}", "snail"])
    with pytest.raises(
        InputError, match=r"list of pairs, line 2, character 5 is the control character U\+0007"
    ):
        parse_pairs(["owl & snail", "bear\x07 & cat"])


def test_texts_to_rewards_are_text() -> None:
    import torch

    with pytest.raises(InputError, match=r"the prompt .* character 8 is half a character"):
        RewardBatch(torch.zeros(2, 3, 4, 4), ["an owl", f"an owl {HALF}"])


def test_a_file_name_is_no_text(tmp_path: Path) -> None:
    assert shown_name(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert shown_name(Path("café")) == "café"
    source = os.fsdecode(b"caf\xe9.txt")
    for given in (
        config.load(AlignConfig, REWARD, [f"prompts.source={source}"]),
        config.load(AlignConfig, {**REWARD, "prompts": {"source": source}}),
    ):
        again = config.load(AlignConfig, config.parse_yaml(config.dump(given), "its own recipe"))
        assert given.prompts.source == again.prompts.source == source


@pytest.mark.parametrize("recipe", [{"prompts": {"source": f"a{HALF}"}}, {f"a{HALF}": 1}, {"model": "a\0b"}])
def test_recipes_hold_text(recipe: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"character [12] is (half a character|the control)"):
        config.load(AlignConfig, recipe)


def test_a_recipe_as_windows_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("kind: align\nmodel: été\nrewards: [{name: geneval}]\n", encoding="utf-16")
    assert config.load(AlignConfig, path).model == "été"
    path.write_text("kind: align\nmodel: été\nrewards: [{name: geneval}]\n", encoding="cp1252")
    with pytest.raises(ConfigError, match=r"Cannot read the recipe: .* iconv -f cp1252"):
        config.load(AlignConfig, path)


@pytest.mark.parametrize("name", ["x" * 300, "ä" * 200, "y/" * 3000], ids=["part", "bytes", "path"])
@pytest.mark.parametrize("look_up", [load_prompts, load_subjects, find_recipe, resolve, require_file])
def test_a_name_longer_than_a_disk_can_hold(look_up: Callable[[Path], object], name: str) -> None:
    with pytest.raises(InputError, match="is too long"):
        look_up(Path(name))


def test_the_longest_name_is_looked_up() -> None:
    with pytest.raises(InputError, match="There is no file"):
        require_file(Path("x" * 255))
