"""Personalization methods side by side on held-out subjects, at equal pictures and equal updates, over seeds.

    python -m pixrl.studies.personalize RECIPE --out DIR --workers N

It is `align_study` on subjects: the same runs, records and budgets. DIR/table.md also has the paper's tables and says
which of its orderings hold; DIR/figures/ has curves, trade-offs, conflict of rewards, the spectrum of the denoising
path and a gallery. `--table` only writes tables and charts of the records so far.
With `--set reuse=OTHER` finished runs of another study's folder with the same recipe and seed are measured instead of
trained again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixrl.studies import align as align_study
from pixrl.studies.align_figures import write_figures
from pixrl.studies.align_table import UNIT, write_tables
from pixrl.studies.fusion_table import summary_of
from pixrl.studies.gallery import write_gallery
from pixrl.studies.personalize_config import PersonalizeStudyConfig
from pixrl.studies.personalize_figures import write_personalize_figures
from pixrl.studies.personalize_tables import conflict_rows, orderings, sections
from pixrl.studies.runner import Record, study_command
from pixrl.studies.spectrum import write_spectrum


def run_study(study: PersonalizeStudyConfig, out: Path, workers: int) -> list[Record]:
    """All runs, then the spectrum and the gallery where they are asked for."""
    records = align_study.run_study(study, out, workers)
    write_spectrum(study, out)
    write_gallery(study, records, out)
    return records


def write_results(study: PersonalizeStudyConfig, records: list[Record], out: Path) -> str:
    """table.md, summary.json and the charts of figures/ from the records so far; returns the Markdown."""
    write_figures(study, records, out)
    write_personalize_figures(study, records, out)
    more: dict[str, Any] = {
        "conflict": summary_of(conflict_rows(study, records), UNIT),
        "orderings": [
            {**one, "difference": summary_of({"": {"": one["difference"]}}, UNIT)[""].get("")}
            for one in orderings(study, records)
        ],
    }
    return write_tables(study, records, out, sections(study, records), more)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    module, kind = "pixrl.studies.personalize", PersonalizeStudyConfig.kind
    return study_command(module, __doc__, kind, PersonalizeStudyConfig, run_study, write_results, arguments)


if __name__ == "__main__":
    sys.exit(main())
