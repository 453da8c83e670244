"""The documentation site builds without a warning, and needs no network to be read."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_every_page_of_the_docs_is_there(site: Path) -> None:
    docs = ROOT / "docs"
    missing = [
        page
        for page in docs.rglob("*.md")
        if not (site / page.relative_to(docs)).with_suffix(".html").exists()
    ]
    assert missing == []
    assert "Ten lines of Python" in (site / "index.html").read_text(
        encoding="utf-8"
    )  # the README is the home page


@pytest.mark.slow
def test_nothing_is_loaded_from_the_network(site: Path) -> None:
    loaded = re.compile(r'<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)="?((?:https?:)?//[^"\s>]+)')
    outside = {
        found for page in site.rglob("*.html") for found in loaded.findall(page.read_text(encoding="utf-8"))
    }
    styles = "".join(sheet.read_text(encoding="utf-8") for sheet in site.rglob("*.css"))
    outside |= set(re.findall(r"url\((?:https?:)?//[^)]+\)", styles))
    assert outside == set()


@pytest.mark.slow
def test_formulas_and_docstrings_are_rendered(site: Path) -> None:
    equations = (site / "equations.html").read_text(encoding="utf-8")
    assert equations.count('class="arithmatex"') > 40
    assert "$$" not in equations
    reference = (site / "api" / "equations.html").read_text(encoding="utf-8")
    assert "the probability that a sample is optimal" in reference
