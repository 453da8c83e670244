"""What mkdocs does beside reading docs/: the README is the home page, and links lead to pages wherever files lie.

The Markdown of the repository is written for two readers, who browse the repository or the site. Links in it are paths
of files; here they become paths of pages, and a link that shows a file's name shows the page's title. The name of a
page's file in code becomes a link. A link to a file that has no page stops the build.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*_loop.py"))
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
    **{f"examples/{file.name}": f"examples/{file.stem}.md" for file in EXAMPLES},
}
"""Files outside docs/ that have a page, and its path."""
SOURCES = {page: file for file, page in OUTSIDE.items()}
HIDDEN = {"index.md": ["navigation", "toc"], "tour.md": ["navigation"], "equations.md": ["navigation"]}
"""Pages that are alone under their tab need no list of pages beside them."""
LINK = re.compile(r"\[([^][]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
NAMED = re.compile(r"(?<![\[`])(`((?:docs|examples)/[\w/.-]+(?:\.md|_loop\.py))`)(?![\]`])")
"""A file with a page, named as code."""
INTERVAL = re.compile(r"(?<=\d )\[[-−]?[\d.]+, [-−]?[\d.]+\]")
CELL = re.compile(rf"(<td[^>]*>(?:<strong>)?[-−]?[\d.]+ )({INTERVAL.pattern})(?=(?:</strong>)?</td>)")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages for files outside docs/."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source.endswith(".py"):
            text = f"# {source}\n\n```python\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links between files become links between pages."""
    place = page.file.src_uri
    source = SOURCES.get(place, f"docs/{place}")
    wide = place.startswith(("evidence/", "examples/"))  # tables and lines of code
    page.meta["hide"] = ["toc"] if wide else HIDDEN.get(place, [])
    if place.startswith("evidence/"):
        markdown = _evidence(markdown, ROOT / source)
    parts = FENCE.split(markdown)  # what stands between fences has an odd place
    up = "../" * source.count("/")
    for k in range(0, len(parts), 2):
        linked = NAMED.sub(rf"[\1]({up}\2)", parts[k])
        parts[k] = LINK.sub(lambda link: _rewritten(link, source, place), linked)
    return "".join(parts)


def on_page_content(html: str, **_: Any) -> str:
    """An interval is one word, and stands below its mean where a cell holds nothing else."""
    html = CELL.sub(r'\1<span class="interval below">\2</span>', html)
    return INTERVAL.sub(r'<span class="interval">\g<0></span>', html)


def _rewritten(link: re.Match[str], source: str, place: str) -> str:
    words, target, anchor = link[1], link[2], link[3] or ""
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if file in OUTSIDE:
        goal = OUTSIDE[file]
    elif re.fullmatch(r"docs/evidence/[\w-]+", file):
        goal = f"{file}/table.md"
    elif re.fullmatch(r"docs/evidence/[\w-]+/figures", file):
        goal, anchor = f"{posixpath.dirname(file)}/table.md", "#figures"
    elif file.startswith("docs/"):
        goal = file
    else:
        raise PluginError(
            f"{source} links to {target}, which has no page: name it as code, or add it to {__file__}"
        )
    if (
        words.endswith((".md", ".md`"))
        and file.endswith(words.strip("`"))
        and not goal.startswith("docs/evidence/")
    ):
        words = _title(ROOT / file)
    goal = goal.removeprefix("docs/")
    return f"[{words}]({posixpath.relpath(goal, posixpath.dirname(place) or '.')}{anchor})"


def _title(file: Path) -> str:
    """The first heading, up to a colon."""
    heading = re.search(r"^# (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return heading[1].split(":")[0] if heading else file.name


def _evidence(table: str, file: Path) -> str:
    """A study's table with its title, and its figures below."""
    figures = [
        path for path in sorted((file.parent / "figures").glob("*")) if path.suffix in (".svg", ".png")
    ]
    shown = "\n\n".join(
        f"![{path.stem.replace('-', ' ')}](figures/{path.name})\n{{ .figure }}" for path in figures
    )
    return f"# Tables and figures: `{file.parent.name}`\n\n{table}\n\n## Figures\n\n{shown}\n"
