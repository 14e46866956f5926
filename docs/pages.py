"""What `make docs` makes a site of: the pages where they lie, what they link to, and nothing from another host."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINKED = re.compile(r"\]\(([^)#:\s]+)\)")
ELSEWHERE = re.compile(
    r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//|url\(["']?(?:https?:)?//"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Each page, and each file that one links to, at its path in the repository: every link holds as it stands."""
    pages = [*(ROOT / name for name in BESIDE), *sorted((ROOT / "docs").glob("*.md"))]
    linked = {(page.parent / link).resolve() for page in pages for link in LINKED.findall(page.read_text())}
    found = {path for path in linked if path.is_file() and path.is_relative_to(ROOT)}
    return Files(
        [
            *(file for file in files if file.src_dir != config.docs_dir),  # the theme's
            *(
                File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
                for path in sorted(found.union(pages))
            ),
        ]
    )


def on_page_markdown(markdown: str, **_: object) -> str:
    """A bar in the code of a table, which GitHub wants with a backslash, and this generator without."""
    return markdown.replace(r"\|", "|")


def on_post_build(config: MkDocsConfig) -> None:
    """Raises PluginError where a built page would ask another host for something."""
    site = Path(config.site_dir)
    for path in sorted({*site.rglob("*.html"), *site.rglob("*.css")}):
        if asked := ELSEWHERE.search(path.read_text()):
            raise PluginError(f"{path.relative_to(site)}: {asked[0]!r} asks another host")
