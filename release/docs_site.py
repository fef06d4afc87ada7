"""What mkdocs is told when it makes the site out of docs/ (`./dev docs`, mkdocs.yml), as hooks of its own.

The pages are Markdown as GitHub shows it: a link leads to a file of the repository, a drawing is a picture. Here

- a file outside docs/ that a page links to becomes a page below source/, Markdown as what it says, anything else as its
  text, so that a link leads to the file of the same state and is checked as any other;
- a drawing becomes part of its page, where it takes the page's colours, light or dark;
- a site that would load anything from elsewhere when it is looked at is refused.

Docstrings are read, not imported, by mkdocstrings; `Docstrings` is its extension for the words that they have here.
"""

from __future__ import annotations

import os
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "source/"  # where files of the repository are in the site
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".inc": "cpp", ".cu": "cuda", ".toml": "toml", ".yml": "yaml"}
SHELL = {"dev", ".ci/run"}
DATA = {".json", ".csv", ".txt"}  # as it is, not as a page

_FENCED = re.compile(r"^( *)(`{3,}).*?^\1\2 *$", re.M | re.S)
_LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=\))")
_DRAWING = re.compile(r'<img [^>]*?src="[^"]*?img/([\w-]+)\.svg"[^>]*>')
# What a browser loads by itself: element -> attribute.
_LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "video": "src"}


def outside_code(text: str, change) -> str:
    """Markdown with `change` applied to all that is in no fenced block."""
    parts, end = [], 0
    for block in _FENCED.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def links(text: str) -> list[str]:
    """The targets of the links in Markdown, but for those in fenced blocks."""
    found: list[str] = []
    outside_code(text, lambda part: found.extend(_LINK.findall(part)) or part)
    return found


def target(origin: str, link: str) -> str | None:
    """The file of the repository that a relative link on a page leads to; None for a link of another kind.

    origin: the page's own path in the repository."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), parts.path))


def in_site(path: str) -> str:
    """Where a file of the repository is among the sources of the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return SOURCE + path + ("" if Path(path).suffix in {".md", *DATA} else ".md")


def in_repository(uri: str) -> str:
    """The other way round."""
    if not uri.startswith(SOURCE):
        return "docs/" + uri
    path = uri.removeprefix(SOURCE)
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def rewritten(text: str, origin: str) -> str:
    """Markdown of a file of the repository, with its links as the site has them. Those that lead nowhere stay."""
    here = posixpath.dirname(in_site(origin)) or "."

    def one(match: re.Match[str]) -> str:
        path = target(origin, match[1])
        if path is None or not (ROOT / path).is_file():
            return match[0]
        _, mark, anchor = match[1].partition("#")
        return posixpath.relpath(in_site(path), here) + mark + anchor

    return outside_code(text, lambda part: _LINK.sub(one, part))


def page_of(path: str) -> str:
    """What stands on the page of a file that is no Markdown."""
    language = "sh" if path in SHELL else LANGUAGES.get(Path(path).suffix, "text")
    text = (ROOT / path).read_text()
    ticks = max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))]) * "`"
    return f'# {posixpath.basename(path)}\n\n`{path}`\n\n{ticks}{language} linenums="1"\n{text}\n{ticks}\n'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    todo = [in_repository(file.src_uri) for file in files.documentation_pages()]
    seen = set(todo)
    while todo:
        origin = todo.pop()
        for link in links((ROOT / origin).read_text()):
            path = target(origin, link)
            if path is None or path in seen or path.startswith("docs/") or not (ROOT / path).is_file():
                continue
            seen.add(path)
            if Path(path).suffix == ".md":
                todo.append(path)
                content = (ROOT / path).read_text()
            else:
                content = (ROOT / path).read_text() if Path(path).suffix in DATA else page_of(path)
            if Path(path).suffix not in DATA:
                content = f"---\nsearch:\n  exclude: true\n---\n\n{content}"
            files.append(File.generated(config, in_site(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return rewritten(markdown, in_repository(page.file.src_uri))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def one(match: re.Match[str]) -> str:
        path = Path(config.docs_dir) / "img" / f"{match[1]}.svg"
        if not path.is_file():
            return match[0]  # of which mkdocs has warned
        drawing = re.sub(r"\s*<style>.*?</style>|\s*<!--.*?-->", "", path.read_text(), flags=re.S)
        return f'<span class="drawing" tabindex="0">{drawing}</span>'

    return _DRAWING.sub(one, html)


def parsed_as_meant(docstring: str) -> str:
    docstring = re.sub(r"^Example:$", "Examples:", docstring, flags=re.M)
    returns = r"^Returns: (.*\n?(?: +\S.*\n?)*)"
    return re.sub(returns, lambda found: f"**Returns:** {' '.join(found[1].split())}\n", docstring, flags=re.M)


class Docstrings(Extension):
    """Docstrings with the words that the parser knows: examples by the name that it has for them, and what is returned,
    which stands on the line of its title here, as a paragraph."""

    def on_instance(self, *, obj: Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = parsed_as_meant(obj.docstring.value)


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") not in ("stylesheet", "icon", "preload", "preconnect", "modulepreload"):
            return
        address = values.get(_LOADED.get(tag, ""))
        if address and urlsplit(address).netloc:
            self.found.append(address)


def loads_from_elsewhere(html: str) -> list[str]:
    """The addresses of other hosts that a browser would ask for by itself on this page."""
    parser = _Loads()
    parser.feed(html)
    return parser.found


def on_post_build(config: MkDocsConfig) -> None:
    for folder, _, names in os.walk(config.site_dir):
        for name in names:
            path = Path(folder) / name
            if path.suffix == ".html" and (found := loads_from_elsewhere(path.read_text())):
                raise PluginError(f"{path.relative_to(config.site_dir)} would load {', '.join(found)}")
            if path.suffix == ".css" and (found := re.findall(r"url\(['\"]?((?:https?:)?//[^)]*)", path.read_text())):
                raise PluginError(f"{path.relative_to(config.site_dir)} would load {', '.join(found)}")
