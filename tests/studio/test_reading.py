"""A log that grows is read as if it were read anew, and of it the new lines alone; the shape of a recipe is kept."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixrl.errors import CheckpointError
from pixrl.report.figures import by_change, scored_pairs
from pixrl.runs.folder import JsonLines
from pixrl.runs.reading import HELD_OUT, MEASURED, SCORES, START, TRAINED, Tail, read_shape, samples_of
from pixrl.runs.record import shape_of
from tests.align.synthetic import run_folder
from tests.align.synthetic import settings as recipe

ROW = {"step": 0, "text": "größer", "value": 0.5, "none": None}
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("cut"), st.integers(0, 6)),
        st.tuples(st.just("tear"), st.integers(1, 20)),
        st.tuples(st.just("replace"), st.integers(0, 3)),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(STEPS, st.data())
def test_reading_on_is_reading_anew(
    tmp_path_factory: pytest.TempPathFactory, steps: object, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    tail, number = Tail(file), 0
    for what, count in steps:  # type: ignore[attr-defined]
        log = JsonLines(file, file.parent)
        if what == "append":
            log.append([{**ROW, "step": (number := number + 1)} for _ in range(count)])
        elif what == "cut":
            log.keep(min(count, len(log.read())))
        elif what == "tear" and file.exists():
            with file.open("ab") as raw:
                raw.write(b'{"step": 99, "half of a line": 1'[:count])
        elif what == "replace":
            file.unlink(missing_ok=True)
            log.append([{**ROW, "step": (number := number + 1)} for _ in range(count)])
        if data.draw(st.booleans()):
            before = list(tail.rows)
            known = tail.update()
            assert tail.rows == JsonLines(file, file.parent).read()
            assert tail.rows[:known] == before[:known]
    tail.update()
    assert tail.rows == JsonLines(file, file.parent).read()


def test_only_new_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = JsonLines(file, tmp_path)
    log.append([{**ROW, "step": step} for step in range(3)])
    tail = Tail(file)
    assert tail.update() == 0 and len(tail.rows) == 3
    content = bytearray(file.read_bytes())
    content[3] ^= 1  # in the first line, which nobody looks at again
    file.write_bytes(content)
    assert tail.update() == 3
    with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 1, does not match"):
        Tail(file).update()


def test_a_damaged_line_is_told_and_what_stands_before_it_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = JsonLines(file, tmp_path)
    log.append([{**ROW, "step": step} for step in range(4)])
    tail = Tail(file)
    tail.update()
    log.append([{**ROW, "step": step} for step in range(4, 8)])
    lines = file.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b"0.5", b"0.6")
    file.write_bytes(b"".join(lines))
    with pytest.raises(CheckpointError, match="line 6, "):
        tail.update()
    assert [row["step"] for row in tail.rows] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("loss", ["nft", "sft"])
def test_the_shape_that_a_run_keeps_is_the_recipes(tmp_path: Path, loss: str) -> None:
    parts = {} if loss == "nft" else {"loss": {"kind": "sft"}, "exploration": {"kind": "noise", "noises": 12}}
    config = recipe(evaluation={"per_prompt": 2}, **parts)
    folder = run_folder(tmp_path / "run", config, done=0, evaluated=())
    shape = shape_of(config)
    assert (shape.steps, shape.group_size, shape.per_prompt) == (40, 12, 2)
    assert shape.learned == (loss == "nft")
    expected = (
        {"geneval": TRAINED, "preference": HELD_OUT}
        if shape.learned
        else dict.fromkeys(shape.roles, MEASURED)
    )
    assert shape.roles == expected
    if shape.learned:  # a run of before shapes were kept
        assert read_shape(folder) == shape
    start = json.loads((folder.path / START).read_text())
    (folder.path / START).write_text(json.dumps({**start, "shape": shape.__dict__}))
    assert read_shape(folder) == shape
    (folder.path / START).write_text(json.dumps({**start, "shape": {"steps": 3, "wings": 2}}))
    with pytest.raises(CheckpointError, match="another version"):
        read_shape(folder)


def test_pairs_are_sorted_by_change_and_those_without_a_score_come_last(tmp_path: Path) -> None:
    config = recipe()
    folder = run_folder(tmp_path / "run", config, done=2, evaluated=(0, 4))
    before = [0.1, 0.5, 0.2, None, 0.3, 0.4]
    after = [0.4, 0.4, 0.9, 0.9, None, 0.4]
    for step, values in ((0, before), (4, after)):
        (samples_of(folder, step) / SCORES).write_text(json.dumps({"geneval": values}))
    pairs = scored_pairs(folder, shape_of(config))
    assert [pair.number for pair in by_change(pairs, "geneval")] == [2, 0, 5, 1, 3, 4]
    assert [pair.number for pair in by_change(pairs, "geneval", falls=True)] == [1, 5, 0, 2, 3, 4]
    assert pairs[2].scores["geneval"] == (0.2, 0.9) and pairs[2].gain("geneval") == 0.9 - 0.2
    assert [pair.number for pair in by_change(pairs, "preference")] == list(range(6))
    assert pairs[2].before.parent == samples_of(folder, 0) and pairs[2].after.parent == samples_of(folder, 4)
