"""Every line of bad_inputs.tsv: what cannot be used ends in one sentence that says what to type, and touches nothing.

A line holds the exit code (2: the usage is wrong, 1: it failed), a command line, or after >>> a Python call, and words
of the message, `|` between them. All of them meet the files that `in_this_folder` writes.
"""

import json
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import pixrl
from pixrl import api, cli
from pixrl.errors import PixrlError
from pixrl.hub import CARD_FILE
from pixrl.toy import CHECKPOINTS

TABLE = Path(__file__).with_name("bad_inputs.tsv")
CALL = ">>> "
LEAST = 250
REWARD = "rewards: [{name: clip_text, options: {model: toy:clip}}]"
FEW = "kind: align\nmodel: toy:sd3\nsteps: 2\nprompts: {source: list.txt, per_step: 2}\n"
LETTERS = "abcdefghij"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in pairwise(LETTERS)
)
FILES = {
    "list.txt": "a photo of an owl\na photo of a red cat\n",
    "words.txt": "a photo of a dragon\n",
    "latin.txt": "café\n".encode("latin1"),
    "empty.txt": "",
    "broken.jsonl": '{"prompt": \n',
    "pairs.txt": "owl & snail\n",
    "bad-pairs.txt": "owl snail\n",
    "half-pairs.txt": "owl & \n",
    "tiny.yaml": f"{FEW}{REWARD}\n",
    "subject.yaml": f"kind: personalize\nmodel: toy:flux\nsteps: 2\nprompts: {{source: cup, per_step: 1}}\n{REWARD}\n",
    "geneval.yaml": f"{FEW}rewards: [{{name: geneval, options: {{segmenter: toy:segmenter, clip: toy:clip}}}}]\n",
    "identity.yaml": f"{FEW}rewards: [{{name: dino_seg, options: {{model: toy:identity, mask: none}}}}]\n",
    "code.yaml": f"{FEW}rewards: [{{name: python, options: {{function: runs.py:nosuch}}}}]\n",
    "cup/class.txt": "cup\n",
    "cup/prompts.txt": "a photo of a cup on the beach\n",
    "code.py": (
        "def good(images, prompts, metadata):\n    return [0.0] * len(images)\n"
        "def two(images, prompts):\n    return []\n"
        "def raises(images, prompts, metadata):\n    raise KeyError('tag')\n"
        "def short(images, prompts, metadata):\n    return [1.0]\n"
    ),
    "runs.py": "raise RuntimeError('it was executed')\ndef f(images, prompts, metadata): ...\n",
    "broken.py": "def f(:\n",
    "bad.yaml": "budget: [1\n",
    "deep.yaml": f"a: {'[' * 200}{']' * 200}\n",
    "date.yaml": "seed: 2024-13-45\n",
    "number.yaml": f"seed: {'9' * 5000}\n",
    "bomb.yaml": BOMB,
    "itself.yaml": "a: &a [*a]\n",
    "twice.yaml": "seed: 1\nseed: 2\n",
    "latin.yaml": "model: café\n".encode("latin1"),
    "keys.yaml": "5: 6\n",
    "flat.yaml": "hello\n",
    "list.yaml": "- a\n",
    "full/thesis.txt": "mine\n",
}


def rows() -> Iterator[tuple[str, str, list[str]]]:
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            code, given, words = line.split("\t")
            yield code, given, words.split("|")


ROWS = list(rows())


@pytest.fixture(scope="module")
def in_this_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
    Image.new("RGB", (64, 64), "red").save(folder / "cup" / "0.png")
    write_untold(folder / "untold")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.dont_write_bytecode", True)
        for name in ("NO_SUCH_KEY", "NO_SUCH_TOKEN", "PIXRL_REWARD_TOKEN"):
            patch.delenv(name, raising=False)
        yield folder


def write_untold(folder: Path) -> None:
    """`toy:sd3` without what tells true fusions."""
    folder.mkdir()
    for path in (CHECKPOINTS / "sd3").iterdir():
        (folder / path.name).symlink_to(path.resolve())
    card = json.loads((folder / CARD_FILE).read_text())
    (folder / CARD_FILE).unlink()
    (folder / CARD_FILE).write_text(json.dumps({key: card[key] for key in card if key != "parts"}))


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def told_by_command(line: str) -> tuple[int, str]:
    """Exit code and message; a traceback is no answer."""
    done = CliRunner().invoke(cli.app, shlex.split(line))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    framed = done.output.replace("│", " ")
    return done.exit_code, " ".join(framed.split())


def told_by_call(call: str) -> tuple[int, str]:
    names: dict[str, Any] = {"pixrl": pixrl, "examine": api.examine}
    with pytest.raises(PixrlError) as caught:
        eval(call, names)
    return caught.value.exit_code, " ".join(str(caught.value).split())


def test_the_table_is_large_and_has_no_line_twice() -> None:
    lines = [given for _, given, _ in ROWS]
    assert len(lines) == len(set(lines)) >= LEAST
    assert all(word for _, _, words in ROWS for word in words)


@pytest.mark.parametrize(("code", "given", "words"), ROWS, ids=[given[:80] for _, given, _ in ROWS])
def test_it_ends_in_a_sentence(code: str, given: str, words: list[str], in_this_folder: Path) -> None:
    before = state_of(in_this_folder)
    tell = told_by_call if given.startswith(CALL) else told_by_command
    found, message = tell(given.removeprefix(CALL))
    assert str(found) == code, message
    assert [word for word in words if word not in message] == [], message
    assert state_of(in_this_folder) == before
