"""Texts of others: YAML and JSON that unfold, and Markdown that is mere text."""

import html
import json
import re
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from pixrl import config
from pixrl.config import MOST_YAML
from pixrl.data.prompts import load_prompts
from pixrl.errors import CheckpointError, ConfigError, InputError
from pixrl.hub_check import read_header, read_json
from pixrl.models import NOT_STATED, generator_licence
from pixrl.rewards import weights as sources
from pixrl.runs.environment import describe
from pixrl.runs.folder import JsonLines
from pixrl.untrusted import MOST_DEPTH, Secret, code, fenced, markdown, parse_json, plain

LETTERS = "abcdefghij"


def bomb(first: str, aliases: str) -> str:
    """Nine times nine times nine ... values, in a few hundred characters."""
    lines = [f"a: &a {first}"]
    for before, name in pairwise(LETTERS):
        nine = ", ".join([f"*{before}"] * 9)
        lines.append(f"{name}: &{name} {aliases.replace('ALIASES', nine)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb("[x, x]", "[ALIASES]"), "values with its aliases written out"),
        (bomb("{x: 1}", "{<<: [ALIASES]}"), "values with its aliases written out"),
        (bomb("{x: 1}", "{? 1 : [ALIASES]}"), "values with its aliases written out"),
        ("x" * (MOST_YAML + 1), f"characters of YAML; at most {MOST_YAML} are read"),
        ("[" * 100_000, "levels deep"),
        ("{a: " * 500, "levels deep"),
        ("- " * 20_000 + "a", "levels deep"),
        ("a: &a {b: [*a]}", "holds itself"),
        ("9" * 5000, "is no number"),
        ("!!timestamp x", "x is no date"),
        ("!!bool x", "x is no truth value"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: \x1b[2J", "special characters are not allowed"),
    ],
)
def test_yaml_that_unfolds_or_runs_code(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.parse_yaml(text, "x.yaml")


def test_yaml_of_recipes_is_read_as_ever() -> None:
    for name in config.recipe_names():
        text = config.find_recipe(name).read_text(encoding="utf-8")
        assert config.parse_yaml(text, name) == yaml.safe_load(text)
    text = "a: &a {x: 1}\nb: {z: *a, y: 2}\nc: [*a, *a]\nd: 2024-01-02"
    assert config.parse_yaml(text, "") == yaml.safe_load(text)


def test_a_models_page_is_read_by_the_same_reader(tmp_path: Any) -> None:
    page = tmp_path / "README.md"
    page.write_text("---\nlicense: MIT\n---\n# A model\n")
    assert generator_licence(str(tmp_path)) == "MIT"
    bombed = f"{bomb('[x, x]', '[ALIASES]')}\nlicense: MIT"
    for front in ("license: [", "license: MIT\nlicense: GPL", bombed, "[" * 9999):
        page.write_text(f"---\n{front}\n---\n# A model\n")
        assert generator_licence(str(tmp_path)) == NOT_STATED


@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 65 + "1" + "}" * 65, "9" * 5000, "[", "\ud83d", b"\xff"]
)
def test_json_that_is_too_deep_or_none(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("depth", [65, 900, 100_000])
def test_lists_of_prompts_that_are_too_deep(tmp_path: Path, depth: int) -> None:
    """What Python reads at a depth of 900 it could not walk through, nor could the wire to a reward server."""
    file = tmp_path / "list.jsonl"
    file.write_text('{"prompt": "a owl", "x": ' + "[" * depth + "]" * depth + "}\n")
    with pytest.raises(InputError, match="line 1 is nested too deeply"):
        load_prompts(file)


def test_json_is_read_as_ever() -> None:
    for value in ([[]] * 100, {"a": [{"b": 1.5}, None, "[[[{"]}, "[" * 1000):
        assert parse_json(json.dumps(value)) == value
        assert parse_json(json.dumps(value).encode()) == value
    assert parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH) is not None


@pytest.mark.parametrize("value", ["[" * 5000 + "]" * 5000, "9" * 5000, "[1] x"])
def test_a_log_of_others_is_damaged_not_a_traceback(tmp_path: Path, value: str) -> None:
    body = f'{{"a": {value}'.encode()
    (tmp_path / "log.jsonl").write_bytes((body + b', "crc": "%08x"}\n' % zlib.crc32(body)) * 2)
    with pytest.raises(CheckpointError, match="line 1"):
        JsonLines(tmp_path / "log.jsonl", tmp_path).read()


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a": ' * 100 + "1" + "}" * 100, '{"a": ' + "9" * 5000 + "}"]
)
def test_configs_and_headers_that_are_too_deep(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_json(tmp_path / "config.json")
    header = content.encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="no safetensors header"):
        read_header(tmp_path / "x.safetensors")


# ---------------------------------------------------------------------------------------------- Markdown

NASTY = [
    "a | b || c |",
    "back\\slash \\| and \\\\| more\\",
    "`code` ``two`` ```three",
    "[link](http://evil.org) ![picture](http://evil.org/x.png) [ref]: http://evil.org",
    "<script>alert(1)</script><img src=x onerror=alert(1)> <!-- hidden -->",
    "<http://evil.org> http://evil.org https://evil.org www.evil.org me@evil.org",
    "# heading\n## another\n\n---\n===\n* item\n> quote",
    "- item",
    "+ item",
    "1. item",
    "12) item",
    "* * *",
    "***bold*** __under__ _it_ ~~gone~~ snake_case_name",
    "&lt;b&gt; &amp; &#124; &copy",
    "    indented",
    "```\n</code>\n~~~",
    "$x^2$ \\(y\\) @someone #1",
    "\ud83d\udc80 half",
    "",
]
READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def shown(text: str) -> str:
    """What a reader of a text sees: one line; what UTF-8 cannot write is spelled out."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def tokens(source: str) -> list[Any]:
    return [inner for token in READER.parse(source) for inner in (token, *(token.children or []))]


@pytest.mark.parametrize("text", NASTY)
def test_a_text_is_mere_text_in_markdown(text: str) -> None:
    for source, kinds in (
        (f"# {markdown(text)}", {"heading_open", "inline", "text", "text_special", "heading_close"}),
        (f"- {markdown(text)}", {"bullet_list_open", "list_item_open", "paragraph_open", "inline", "text",
                                 "text_special", "paragraph_close", "list_item_close", "bullet_list_close"}),
    ):  # fmt: skip
        found = tokens(source)
        assert {token.type for token in found} <= kinds, source
        assert "".join(token.content for token in found if token.type == "text") == shown(text)


@pytest.mark.parametrize("text", NASTY)
def test_a_text_stays_in_its_cell(text: str) -> None:
    for cell in (markdown(text), code(text, in_table=True)):
        found = tokens(f"| a | b | c |\n|---|---|---|\n| x | {cell} | y |")
        cells = [token.children for token in found if token.type == "inline"]
        assert [len(part) for part in (cells[3], cells[5])] == [1, 1] and len(cells) == 6
        assert {token.type for token in cells[4]} <= {"text", "code_inline"}
        inside = "".join(token.content for token in cells[4])
        odd = re.sub(r"(?<!\\)((?:\\\\)*)\\\|", r"\1\\\\|", shown(text))  # a table shows one more backslash
        assert inside.strip() in {shown(text), odd if cell.startswith("`") else ""}


@pytest.mark.parametrize("text", NASTY)
def test_a_name_is_mere_code(text: str) -> None:
    found = tokens(f"Of {code(text)}, and more")
    (name,) = [token for token in found if token.type == "code_inline"]
    assert name.content.strip() == shown(text)
    assert [token.content for token in found if token.type == "text"] == ["Of ", ", and more"]


@pytest.mark.parametrize("text", NASTY)
def test_nothing_ends_a_block_of_code_but_its_end(text: str) -> None:
    block, after = [token for token in READER.parse(f"{fenced(text, 'yaml')}\n\nafter") if token.content]
    assert block.type == "fence" and block.content.rstrip("\n") == text.encode(
        "utf-8", "backslashreplace"
    ).decode().rstrip("\n")
    assert after.content == "after"


def test_what_is_shown_of_a_text() -> None:
    assert plain("a\r\n\tb \x1b[2J\u202e\ud83d\x00") == "a b \\x1b[2J\\u202e\\ud83d\\x00"
    assert plain("x" * 10**7) == "x" * 300 + "..."
    assert plain("ünï 猫 🦉") == "ünï 猫 🦉"
    assert html.escape(plain("<b>")) == "&lt;b&gt;"


def test_a_key_is_found_in_linear_time() -> None:
    key = "aaaaaaaaaaaaaaaaaaaaaaab"
    content = b"a" * 2_000_000
    assert len(Secret(key).without(content)) < len(content)
    assert Secret("short").without(b"short") == b"short"
    assert Secret(key).without(f"x{key}y{key}z".encode()) == b"x[secret]y[secret]z"


def test_a_key_typed_on_the_command_line_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-0123456789abcdef")
    monkeypatch.setenv("MY_WORD", "toy/e2po-is-no-key")
    monkeypatch.setattr(
        "sys.argv", ["/x/pixrl", "align", "toy/e2po-is-no-key", "--set", "a=sk-0123456789abcdef"]
    )
    command = json.loads(describe(0, ""))["command"]
    assert command == ["pixrl", "align", "toy/e2po-is-no-key", "--set", "a=[secret]"]


@pytest.mark.parametrize(
    ("front", "stated"),
    [
        ("license: MIT", "MIT"),
        ("license:  'mit' \t", "mit"),
        ('license: other\nlicense_name: "its own"', "its own"),
        ("license:\nother: x", None),
        ("license: a" + " " * 10**6 + "'", "a"),
        ("license: " + " '" * 10**6, "'"),
        ("license: a\x1b[2Jb", "a\\x1b[2Jb"),
    ],
)
def test_a_rewards_licence_is_read_in_one_pass(tmp_path: Path, front: str, stated: str | None) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    found = sources._front_matter(tmp_path / "README.md")
    assert (found is None and stated is None) or (found is not None and found.startswith(str(stated)))
