"""Lists of prompts: every source, and every way in which one can be wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

from pixrl.data.prompts import Prompt, PromptSet, load_prompts
from pixrl.data.toy import TAGS
from pixrl.errors import InputError
from pixrl.rewards.geneval import judge
from pixrl.toy.language import is_held_out, parse
from pixrl.toy.scene import GENEVAL

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data"
FEW = "toy:geneval/single_object,counting"


# --- the toy world ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training() -> PromptSet:
    return load_prompts(FEW)


@pytest.fixture(scope="module")
def evaluation() -> PromptSet:
    return load_prompts(FEW, split="evaluation")


def key(prompt: Prompt) -> str:
    """The canonical string of a single-object or counting prompt, from the prompt alone."""
    read = parse(prompt.text)
    (thing,) = read.metadata["include"]
    noun = " ".join(word for word in (read.size, read.mood, read.pattern, thing["class"]) if word)
    content = f"{thing['count']} {noun}" if read.metadata["tag"] == "counting" else noun
    accessory = read.accessories[0] if read.accessories else "-"
    return f"{read.metadata['tag']}: {content} | {accessory} | {read.background or '-'}"


def test_toy_prompts_carry_their_geneval_entry(training: PromptSet) -> None:
    assert training.name == FEW
    assert len(training) == 128
    assert {prompt.metadata["tag"] for prompt in training} == {"single_object", "counting"}
    for prompt in training:
        assert prompt.metadata["prompt"] == prompt.text
        assert not judge({}, prompt.metadata).correct


def test_the_splits_are_held_out_and_not(training: PromptSet, evaluation: PromptSet) -> None:
    assert not any(is_held_out(key(prompt)) for prompt in training)
    assert all(is_held_out(key(prompt)) for prompt in evaluation)
    assert len(evaluation) == 64
    assert not {p.text for p in training} & {p.text for p in evaluation}
    assert len({p.text for p in training}) == len(training)


def test_toy_prompts_are_the_same_each_time_and_in_any_selection(training: PromptSet) -> None:
    alone = load_prompts("toy:geneval/counting")
    assert alone.prompts == tuple(p for p in training if p.metadata["tag"] == "counting")


@pytest.mark.slow
def test_all_six_tasks() -> None:
    every = load_prompts("toy:geneval", split="evaluation")
    assert [every[32 * n].metadata["tag"] for n in range(6)] == list(TAGS)
    assert len(every) == 6 * 32


def test_the_tasks_are_the_toy_worlds() -> None:
    assert TAGS == GENEVAL


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "toy:geneval/countng",
            r"no task 'countng'\. Did you mean 'counting'\? It has single_object, two_object",
        ),
        ("toy:geneval/subject", "no task 'subject'"),
        ("toy:geneval/", "no task ''"),
        ("toy:geneval/counting,", "no task ''"),
        ("toy:geneval/counting,colors,counting", "'counting' is given twice"),
        ("toy:genevl", r"no prompts 'genevl'\. Did you mean 'geneval'\? Type toy:geneval, or some"),
        ("toy:", "no prompts ''"),
        (
            "geneval",
            r"is no list of prompts\. Did you mean 'toy:geneval'\? Give toy:geneval, a file that ends in",
        ),
        ("prompts.yaml", r"ends in \.txt, \.jsonl, \.json, \.csv, \.tsv, \.parquet, or a folder"),
    ],
)
def test_unknown_sources(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_prompts(source)


def test_unknown_splits() -> None:
    with pytest.raises(InputError, match=r"'evaluate'\. Did you mean 'evaluation'\? Use train, evaluation"):
        load_prompts(FEW, split="evaluate")


# --- files -----------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path: Path) -> list[str]:
    return [prompt.text for prompt in load_prompts(path)]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_text_files(ends: str, last: bool, tmp_path: Path) -> None:
    content = f"\ufeffan owl{ends}  a café, at night {ends}# two{ends if last else ''}"
    assert texts(write(tmp_path, "list.txt", content)) == ["an owl", "a café, at night", "# two"]


def test_a_file_is_the_same_for_both_splits(tmp_path: Path) -> None:
    path = write(tmp_path, "list.TXT", "an owl\na cat\n")
    assert load_prompts(path, split="evaluation") == load_prompts(str(path))


def test_a_line_separator_inside_a_prompt_is_no_line(tmp_path: Path) -> None:
    assert texts(write(tmp_path, "list.txt", "an\u2028owl\na cat")) == ["an\u2028owl", "a cat"]


def test_jsonl(tmp_path: Path) -> None:
    entry = {"tag": "counting", "include": [{"class": "owl", "count": 2}], "prompt": " two owls "}
    lines = f'{json.dumps(entry)}\n{{"prompt": "a cat", "n": 3}}\n'
    two, cat = load_prompts(write(tmp_path, "list.jsonl", lines))
    assert (two.text, two.metadata) == ("two owls", entry)
    assert (cat.text, cat.metadata["n"]) == ("a cat", 3)


def test_csv(tmp_path: Path) -> None:
    content = 'id,caption\r\n1,"an owl, and a ""cat"""\r\n2,two\r\n'
    first, second = load_prompts(write(tmp_path, "list.csv", content))
    assert first == Prompt('an owl, and a "cat"', {"id": "1"})
    assert second.text == "two"
    both = write(tmp_path, "both.csv", "caption,prompt\nlong,short\n")
    assert load_prompts(both)[0] == Prompt("short", {"caption": "long"})


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    parquet.write_table(arrow.table({"n": [1, 2], "caption": ["an owl", "a cat"]}), path)
    assert texts(path) == ["an owl", "a cat"]
    parquet.write_table(arrow.table({"n": [1, 2]}), path)
    with pytest.raises(InputError, match="has no column 'prompt' or 'prompts' or 'caption'; it has n"):
        load_prompts(path)
    parquet.write_table(arrow.table({"prompt": ["an owl", None]}), path)
    with pytest.raises(InputError, match="row 2: prompt is None, not text"):
        load_prompts(path)
    parquet.write_table(arrow.table({"prompt": ["an owl", "an owl"]}), path)
    assert "row 2 repeats row 1" in load_prompts(path).notes[0]
    path.write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        load_prompts(path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"Type: pip install 'pixrl\[parquet\]'"):
        load_prompts(write(tmp_path, "list.parquet", b""))


@pytest.mark.parametrize("name", ["list.txt", "list.jsonl", "list.csv"])
@pytest.mark.parametrize("content", ["", "\ufeff"])
def test_empty_files(name: str, content: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no prompts\. Write at least one"):
        load_prompts(write(tmp_path, name, content))


def test_a_table_without_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no prompts"):
        load_prompts(write(tmp_path, "list.csv", "prompt\n"))


@pytest.mark.parametrize("name", ["list.txt", "list.jsonl", "list.csv"])
def test_the_wrong_encoding_is_told_by_file_byte_and_line(name: str, tmp_path: Path) -> None:
    content = "prompt\na cat\na café\n".encode("latin-1")
    for mark, byte in ((b"", 18), (b"\xef\xbb\xbf", 21)):
        path = write(tmp_path, name, mark + content)
        with pytest.raises(InputError) as caught:
            load_prompts(path)
        for piece in (str(path), f"byte {byte} (0xe9), in line 3", "iconv -f cp1252"):
            assert piece in str(caught.value)


def test_repeats_are_noted_with_their_lines(tmp_path: Path) -> None:
    found = load_prompts(write(tmp_path, "list.txt", "an owl\na cat\nan owl \na dog\na cat\n"))
    assert [prompt.text for prompt in found] == ["an owl", "a cat", "a dog"]
    (note,) = found.notes
    for piece in ("2 of 5 rows", "line 3 repeats line 1: 'an owl'", "line 5 repeats line 2: 'a cat'"):
        assert piece in note
    assert "line 3 repeats line 2" in load_prompts(write(tmp_path, "list.csv", "prompt\na\na\n")).notes[0]
    many = load_prompts(write(tmp_path, "many.txt", "a\n" * 20))
    assert len(many) == 1 and "; and 16 more)" in many.notes[0]


def test_one_prompt_with_several_metadata_is_several(tmp_path: Path) -> None:
    found = load_prompts(write(tmp_path, "list.jsonl", '{"prompt": "a"}\n{"prompt": "a", "tag": "x"}'))
    assert [dict(prompt.metadata) for prompt in found] == [{"prompt": "a"}, {"prompt": "a", "tag": "x"}]
    assert found.notes == ()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", "an owl\n\na cat\n", "line 2 holds no prompt"),
        ("list.txt", "an owl\n   \n", "line 2 holds no prompt"),
        ("list.jsonl", '{"prompt": " "}', "line 1 holds no prompt"),
        ("list.jsonl", '{"prompt": "a"}\n{"prompt": "b"', "line 2 is not JSON: .* at character 15"),
        ("list.jsonl", '{"prompt": "a"}\n\n', "line 2 is not JSON"),
        ("list.jsonl", '{"text": "a"}', r'line 1 has no text under "prompt" \(found: text\)'),
        ("list.jsonl", '{"prompt": 3}', "has no text under"),
        ("list.jsonl", '["a"]', r"\(found: list\)"),
        ("list.csv", "text,Promts\nan owl,x\n", r"it has text, Promts\. Did you mean 'prompts'\?"),
        ("list.csv", "prompt\nan owl, a cat\n", "line 2 has not 1 cells"),
        ("list.csv", "prompt,n\nan owl\n", "line 2 has not 2 cells"),
        ("list.csv", 'prompt\n"an owl\n', "is not CSV"),
        ("list.csv", "prompt,n\n,1\n", "line 2 holds no prompt"),
    ],
)
def test_bad_lines(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_prompts(write(tmp_path, name, content))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        load_prompts(tmp_path / "list.txt")
    with pytest.raises(InputError, match="There is no file"):
        load_prompts(tmp_path / "list.parquet")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="is not a file"):
        load_prompts(tmp_path / "folder.txt")


def test_published_lists() -> None:
    if not PUBLISHED.is_dir():
        pytest.skip(f"the published lists are not in {PUBLISHED}")
    with_metadata = load_prompts(PUBLISHED / "geneval_evaluation_metadata.jsonl")
    plain = load_prompts(PUBLISHED / "geneval_generation_prompts.txt")
    assert len(with_metadata) == len(plain) == 553
    assert {prompt.metadata["tag"] for prompt in with_metadata} == set(TAGS)
    assert {prompt.text for prompt in with_metadata} == {prompt.text for prompt in plain}


def test_loading_prompts_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pixrl.data.prompts import load_prompts; load_prompts('toy:geneval/counting');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
