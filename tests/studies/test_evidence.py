"""The committed evidence: each study's tables and summary are made again from its records, equal to the byte,
and every figure that follows from records is there."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from pixrl import config as recipes
from studies import fusion_runs
from studies.command import KINDS

ROOT = Path(__file__).parents[2] / "docs/evidence"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/records.jsonl.xz"))


def read(folder: Path) -> bytes:
    """The records of a study, which are packed."""
    return lzma.decompress((folder / "records.jsonl.xz").read_bytes())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_committed_tables_follow_from_the_committed_records(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    # thresholds of the encoders are measured on pictures, not worked out from records
    monkeypatch.setattr(fusion_runs, "_calibration", lambda *given: summary["calibration"])
    name = recipes.kind_of(folder / "recipe.yaml") or ""
    kind = KINDS[name]
    study: Any = recipes.load(kind.model, folder / "recipe.yaml", kind=name)
    records = [json.loads(line) for line in read(folder).splitlines()]
    text = kind.tables(study, records, tmp_path)
    assert text.encode() == (folder / "table.md").read_bytes() == (tmp_path / "table.md").read_bytes()
    assert (tmp_path / "summary.json").read_bytes() == (folder / "summary.json").read_bytes()
    drawn = {path.name for path in tmp_path.glob("figures/*.svg")}
    committed = {path.name for path in folder.glob("figures/*.svg")}
    assert drawn == {
        name for name in committed if not name.startswith(("projection-", "spectrum"))
    }  # by models


def test_there_is_evidence_of_every_kind() -> None:
    assert {recipes.kind_of(folder / "recipe.yaml") for folder in FOLDERS} == set(KINDS)
