"""What the site needs beside mkdocs: pages that stand outside docs/, and links that lead there.

Links are written for a reader of the repository, relative to the file they stand in. Here every
one is turned into a link between pages of the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "examples", "experiments")
KINDS = (".md", ".json", ".jsonl", ".html", ".png", ".svg", ".toml", ".txt", "")
LATER = ()  # pages of the navigation that are not written yet
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_config(config: Any) -> Any:
    """Leave out of the navigation what is not written yet."""
    docs = Path(config.docs_dir)
    missing = {page for page in LATER if not (docs / page).exists()}
    config.nav = _without(config.nav, missing)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and records that stand outside docs/."""
    for name in OUTSIDE:
        paths = sorted((ROOT / name).rglob("*")) if (ROOT / name).is_dir() else [ROOT / name]
        for path in paths:
            if path.is_file() and path.suffix in KINDS:
                place = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the repository as links of the site."""
    here = _of_repository(page.file)

    def link(match: re.Match[str]) -> str:
        target = match[2]
        if ":" in target:
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        of_site = place.removeprefix("docs/")
        moved = posixpath.relpath(of_site, posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{moved}{match[3] or ''}{match[4]}"

    return _LINK.sub(link, markdown)


def _of_repository(file: File) -> str:
    """Where a page stands in the repository."""
    return file.src_uri if file.generated_by else f"docs/{file.src_uri}"


def _without(nav: Any, missing: set[str]) -> Any:
    if isinstance(nav, list):
        kept = [_without(each, missing) for each in nav if not _is_missing(each, missing)]
        return kept
    if isinstance(nav, dict):
        return {title: _without(each, missing) for title, each in nav.items()}
    return nav


def _is_missing(entry: Any, missing: set[str]) -> bool:
    page = next(iter(entry.values())) if isinstance(entry, dict) else entry
    return isinstance(page, str) and page in missing
