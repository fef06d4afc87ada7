"""The pages say what is there: every path, name, command, option, test and constant that they mention is looked up, and
their examples run. Links and anchors are mkdocs's to check (`./dev docs`); what the site makes of the pages is tried
here, where mkdocs is installed."""

import contextlib
import doctest
import fnmatch
import functools
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import convext

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCED = re.compile(r"^( *)```(\w*).*?\n(.*?)^\1``` *$", re.M | re.S)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks in one of these languages, in order."""
    return [body for _, language, body in FENCED.findall(text) if language in languages]


def inline_code(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCED.sub("", text))


# ---- paths -----------------------------------------------------------------------------------------------------------


def files() -> list[str]:
    """Those of the source tree, whether or not git knows them."""
    found = [path.relative_to(ROOT).as_posix() for path in ROOT.iterdir() if path.is_file()]
    for folder in ("benchmarks", "convext", "csrc", "docs", "examples", "release", "tests", ".ci"):
        found += [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()]
    return found


FILES = files()
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*\.(?:py|h|cpp|cu|inc|md|toml|yml|cff)|(?:[\w.-]+/)+")


def missing_paths(text: str) -> list[str]:
    """The paths in a page's code that are nowhere in the tree. A path may leave out the folders it begins with."""
    found = []
    for code in inline_code(text):
        if not PATH.fullmatch(code) or code.startswith(("build/", "dist/", ".venv")):
            continue
        inside = f"*/{code}*" if code.endswith("/") else f"*/{code}"
        if not any(fnmatch.fnmatch("/" + file, inside) for file in FILES):
            found.append(code)
    return found


@every_page
def test_paths_exist(page):
    assert missing_paths(page.read_text()) == []


def test_a_path_that_is_nowhere_is_found():
    text = "`core/epilogue.h`, `csrc/core/gone.h`, `gone.py`, `csrc/gone/`, `csrc/tests/cuda_*.cpp`, `a + b`, `tests/`"
    assert missing_paths(text) == ["csrc/core/gone.h", "gone.py", "csrc/gone/"]


@every_page
def test_footnotes_are_defined_once_and_used(page):
    text = FENCED.sub("", page.read_text())
    defined = re.findall(r"^\[\^(\w+)\]:", text, re.M)
    assert len(defined) == len(set(defined))
    assert set(re.findall(r"\[\^(\w+)\](?!:)", text)) == set(defined)


# ---- names of the package --------------------------------------------------------------------------------------------


def resolved(name: str) -> object:
    """The object of a dotted name. Modules are looked for first: some functions have their module's name. Raises
    AttributeError."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        with contextlib.suppress(AttributeError):
            return functools.reduce(getattr, parts[count:], found)
    raise AttributeError(f"{name} is neither a module nor an attribute of one")


def missing_names(text: str) -> list[str]:
    found = []
    for name in dict.fromkeys(re.findall(r"(?<![\w./])convext(?:\.[A-Za-z_]\w*)+", text)):
        try:
            resolved(name)
        except AttributeError:
            found.append(name)
    return found


@every_page
def test_names_exist(page):
    assert missing_names(page.read_text()) == []


def test_a_name_that_is_nowhere_is_found():
    text = "`convext.swap(model)`, convext.nn.Conv2d. `convext.gone`, `convext.nn.Gone`, torch.ops.convext.none"
    assert missing_names(text + " ::: convext.swap.swapping.swap") == ["convext.gone", "convext.nn.Gone"]


def test_the_functions_pages_have_everything_public():
    shown = [
        resolved(name)
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: (.*)$", page.read_text(), re.M)
    ]
    public = [getattr(convext, name) for name in convext.__all__]
    public = [value for value in public if not inspect.ismodule(value)]
    layers = [value for name, value in vars(convext.nn).items() if inspect.isclass(value)]
    assert len(public) > 20 and len(layers) > 8
    assert [value for value in public + layers if value.__module__.startswith("convext") and value not in shown] == []


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(text: str, program: str) -> list[list[str]]:
    """What a page's shell blocks and code call a program with."""
    lines = [line for block in blocks(text, "sh", "") for line in block.splitlines()] + inline_code(text)
    lines = [re.sub(r"^(?:\w+=\S* )+", "", line.replace("\n", " ")) for line in lines]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(program + " ")]


def wrong_commands(text: str) -> list[str]:
    """The calls of the command line on a page that name a command or an option that is not there."""
    typer = pytest.importorskip("typer")
    from convext.cli import app

    found = []
    for words in commands(text, "convext"):
        command, rest = typer.main.get_command(app), list(words)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        options = {"--help", *(option for param in command.params for option in (*param.opts, *param.secondary_opts))}
        unknown = [word for word in rest if word.startswith("-") and word.partition("=")[0] not in options]
        if unknown or hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            found.append(" ".join(words))
    return found


@every_page
def test_commands_exist(page):
    assert wrong_commands(page.read_text()) == []


def test_a_command_that_is_not_there_is_found():
    text = "`convext doctor` `convext gone` `convext bench gone`\n```sh\nconvext tune resnet50 --gone  # so\n```\n"
    assert wrong_commands(text) == ["tune resnet50 --gone", "gone", "bench gone"]


@every_page
def test_verbs_of_dev_exist(page):
    verbs = set(
        re.findall(r"[a-z-]+", re.search(r"^case \$verb in\n(.*?)\n  \*\)", (ROOT / "dev").read_text(), re.M | re.S)[1])
    )
    assert {"lint", "docs", "gpu-check"} <= verbs
    said = {words[0] for words in commands(page.read_text(), "./dev") if words and words[0].islower()}
    assert said <= verbs


DEFINED = {name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}


@every_page
def test_tests_exist(page):
    said = {code for code in inline_code(page.read_text()) if re.fullmatch(r"test_\w+", code)}
    assert said - DEFINED - {path.stem for path in (ROOT / "tests").rglob("test_*.py")} == set()


# ---- constants -------------------------------------------------------------------------------------------------------

CONSTANT = re.compile(r"^\| \[`([^`]+)`\]\(([^)]+)\) \| `([^`]+)` \|", re.M)
CONSTANTS = [(page, *found) for page in PAGES for found in CONSTANT.findall(page.read_text())]


def defined_as(name: str, source: str) -> list[str]:
    """The values that a source gives to a constant, as it writes them."""
    if ", " in name:  # of Python: A, B = 1, 2
        return re.findall(rf"^{re.escape(name)} = (.*?)(?:  #.*)?$", source, re.M)
    values = re.findall(rf"^[^/\n]*\b{name} = ([^;,\n]+)[;,]", source, re.M)
    return values or re.findall(rf"^{name} = (.*?)(?:  #.*)?$", source, re.M)


def test_there_are_constants():
    assert len(CONSTANTS) > 60
    assert defined_as("kB", "constexpr int kA = 1, kB = 2 << 10;  // kB = 3\n") == ["2 << 10"]


@pytest.mark.parametrize(
    ("page", "name", "link", "value"), CONSTANTS, ids=lambda v: v if isinstance(v, str) else v.stem
)
def test_constants_have_their_values(page, name, link, value):
    assert defined_as(name, (page.parent / link).read_text()) == [value]


def table(page: str, first: str) -> list[list[str]]:
    """The rows of the table on a page whose head begins with that column."""
    text = (DOCS / "kernels" / page).read_text()
    rows = re.search(rf"^\| {first} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)[1]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def test_the_tiles_of_igemm_are_those_of_its_source():
    source = (ROOT / "csrc" / "cuda" / "igemm" / "igemm_tiles.h").read_text()
    expected = []
    for numbers in re.findall(r"^using Tile\w+ = Tile<T, ([\d, ]+)>;", source, re.M):
        m, n, warps_m, warps_n, stages, _ = map(int, numbers.split(", "))
        kib, sums = stages * (m + n) * 128 // 1024, m * n // (warps_m * warps_n * 32)
        tile = [f"{m}×{n}", f"{warps_m}×{warps_n}", f"{m // warps_m}×{n // warps_n}"]
        expected.append([*tile, str(stages), f"{kib} KiB", str(sums)])
    assert len(expected) == 5 and table("cuda-igemm.md", "tile") == expected


def test_the_configurations_of_triton_are_those_of_its_source():
    source = (ROOT / "convext" / "triton" / "configs.py").read_text()
    families = re.search(r"^_GEMM = \{\n(.*?)^\}", source, re.M | re.S)[1]
    tiles = re.split(r'^    "\w+": ', families.partition('    "interpreter"')[0], flags=re.M)[1:]
    expected = [re.findall(r"_config\((\d+), (\d+), (\d+), \d+, (\d+)\)", family) for family in tiles]
    found = []
    for _, tiles in table("triton.md", "family"):
        sizes = re.findall(r"(\d+)×(\d+)×(\d+)(?: in (\d+))?", tiles)
        found.append([(m, n, k, stages or sizes[-1][3]) for m, n, k, stages in sizes])
    assert len(expected) == 5 and found == expected


def test_the_register_tiles_are_those_of_their_source():
    """gemm.h's max_rows, for each number of vectors: with 32 registers and with 16."""
    source = (ROOT / "csrc" / "cpu" / "kernels" / "gemm" / "gemm.h").read_text()
    body = re.search(r"constexpr int max_rows\(int vectors\) \{\n(.*?)^\}", source, re.M | re.S)[1]
    many, few = (re.findall(r"\? (\d+)|: (\d+);", line) for line in body.splitlines() if "return" in line)
    most = {"32": 4, "16": 2}
    for (registers, tiles, _), rows in zip(table("cpu-direct.md", "registers"), (many, few), strict=True):
        by_vectors = {vectors: int(a or b) for vectors, (a, b) in enumerate(rows, 1)}
        assert len(by_vectors) == most[registers[:2]]
        assert {(int(n), int(v)) for n, v in re.findall(r"(\d+)×(\d+)", tiles)} == {
            (n, v) for v, n in by_vectors.items()
        }


# ---- drawings --------------------------------------------------------------------------------------------------------

DRAWINGS = sorted((DOCS / "img").glob("*.svg"))
SHOWN = [(page, *image) for page in PAGES for image in re.findall(r"!\[([^\]]*)\]\(([^)]+\.svg)\)", page.read_text())]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda drawing: drawing.stem)
def test_a_drawing_says_what_it_shows(drawing):
    """It has a title, which pages give for it in words, and a description; it loads nothing; and it has the style of
    the others, which is that of the site."""
    root = ElementTree.parse(drawing).getroot()
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.get("role") == "img" and root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert title.get("id") == f"{drawing.stem}-title" and len(description.text) > 60
    assert title.text in {alt for page, alt, link in SHOWN if (page.parent / link).resolve() == drawing}
    assert all("href" not in name for element in root.iter() for name in element.attrib)
    style = root.find(f"{SVG}style").text
    assert style == ElementTree.parse(DRAWINGS[0]).getroot().find(f"{SVG}style").text
    used = {name for element in root.iter() for name in (element.get("class") or "").split()}
    assert used <= set(re.findall(r"\.(\w+) \{", style))


def test_the_site_draws_as_the_drawings_do():
    style = ElementTree.parse(DRAWINGS[0]).getroot().find(f"{SVG}style").text
    css = (DOCS / "assets" / "site.css").read_text()
    rules = re.findall(r"^    ((?:text|\.\w+) \{.*\})$", style, re.M)
    assert len(rules) > 10 and all(f"\n.drawing {rule}\n" in css for rule in rules)
    colours = [re.findall(r"--\w+: #\w+", part) for part in style.split("@media")]
    light, dark = re.findall(r"^(?:\[.*?\] )?\.drawing \{\n(.*?)\n(?:.*?)\}", css, re.M | re.S)
    assert [re.findall(r"--\w+: #\w+", light), re.findall(r"--\w+: #\w+", dark)] == colours and len(colours[0]) == 6


def test_every_picture_is_there():
    assert len(SHOWN) > 15
    assert [link for page, alt, link in SHOWN if not alt or not (page.parent / link).is_file()] == []


# ---- examples --------------------------------------------------------------------------------------------------------


def examples(page: Path) -> list[tuple[str, str]]:
    return [
        (language, body) for _, language, body in FENCED.findall(page.read_text()) if language in ("python", "pycon")
    ]


# README.md's are run by test_docstrings.py; triton.md's wants Triton, see below.
WITH_EXAMPLES = [page for page in PAGES if examples(page) and page.name != "README.md" and page != DOCS / "triton.md"]


def settings() -> tuple[object, ...]:
    return (
        convext.output_pool.limit(),
        convext.backends.forced(),
        convext.backends.native.accuracy(),
        convext.layer_by_layer.on,
        convext.backends.tuned.mode,
    )


def test_there_are_examples():
    assert {"start.md", "swap.md", "choice.md", "troubleshooting.md"} <= {page.name for page in WITH_EXAMPLES}


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_examples_run(page, monkeypatch, tmp_path):
    """Those of a page one after the other, with the names of those before; on a machine where nothing was measured."""
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path))
    if any(".cuda()" in body for _, body in examples(page)) and not torch.cuda.is_available():
        pytest.skip("its example needs a GPU")
    if any("torchvision" in body for _, body in examples(page)):
        pytest.importorskip("torchvision")
    before = settings()
    names: dict[str, object] = {"__name__": "__main__"}
    with convext.backend(None):
        for number, (language, body) in enumerate(examples(page)):
            if language == "python":
                exec(compile(body, f"{page.name}, example {number}", "exec"), names)
                continue
            test = doctest.DocTestParser().get_doctest(body, names, page.name, str(page), 0)
            printed: list[str] = []
            runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
            assert test.examples
            assert runner.run(test, out=printed.append, clear_globs=False).failed == 0, "".join(printed)
            names = test.globs
    assert settings() == before


def test_tritons_example_runs_in_the_interpreter():
    pytest.importorskip("triton")
    ((_, body),) = examples(DOCS / "triton.md")
    program = (
        f"import torch, convext\nx, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)\n{body}\nprint(tuple(y.shape))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=250)
    assert ran.stdout == "(1, 3, 5, 5)\n", ran.stderr


# ---- the site --------------------------------------------------------------------------------------------------------


def test_ci_makes_the_site_and_dev_installs_what_the_extra_names():
    assert re.search(r"^\./dev docs$", (ROOT / ".ci" / "run").read_text(), re.M)
    extra = re.search(r"^docs = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert all(re.fullmatch(r"[\w-]+~=\d+\.\d+", name) for name in re.findall(r'"([^"]+)"', extra))


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "release" / "docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("origin", "markdown", "expected"),
    [
        ("docs/kernels/triton.md", "[a](../../csrc/core/axis.h)", "[a](../source/csrc/core/axis.h.md)"),
        ("docs/start.md", "[a](../README.md#accuracy)", "[a](source/README.md#accuracy)"),
        ("docs/start.md", "[a](swap.md), [b](https://x.org)", "[a](swap.md), [b](https://x.org)"),
        ("README.md", "[a](docs/design.md#words), [b](dev)", "[a](../design.md#words), [b](dev.md)"),
        ("README.md", "[a](tests/gone.py)", "[a](tests/gone.py)"),
        ("docs/start.md", "```\n[a](../dev)\n```\n[a](../dev)", "```\n[a](../dev)\n```\n[a](source/dev.md)"),
    ],
)  # fmt: skip
def test_links_lead_to_the_pages_of_the_site(hooks, origin, markdown, expected):
    assert hooks.rewritten(markdown, origin) == expected


def test_places_in_the_site_and_in_the_repository_are_one_to_one(hooks):
    for path in ("docs/design.md", "README.md", "dev", "csrc/core/axis.h", "benchmarks/results/cpu_training.json"):
        assert hooks.in_repository(hooks.in_site(path)) == path


def test_what_a_page_would_load_is_found(hooks):
    page = '<a href="https://x.org"></a><link rel="canonical" href="https://x.org"><img src="a.svg"><script src="b.js">'
    assert hooks.loads_from_elsewhere(page) == []
    assert hooks.loads_from_elsewhere(page + '</script><img src="//x.org/a.png">') == ["//x.org/a.png"]
    assert hooks.loads_from_elsewhere('<link rel="stylesheet" href="https://x.org/a.css">') == ["https://x.org/a.css"]


def test_docstrings_are_parsed_as_they_are_meant(hooks):
    """By the parser of the site: what it makes sections of, and what it leaves as text."""
    griffe = pytest.importorskip("griffe")
    text = (
        "A.\n\nArgs:\n    x: one.\n\nReturns: (N, K), as\n    it was.\n\nRaises nothing.\n\nExample:\n    >>> 1\n    1"
    )
    sections = griffe.Docstring(hooks.parsed_as_meant(text)).parse("google")
    assert [section.kind.value for section in sections] == ["text", "parameters", "text", "examples"]
    assert sections[2].value == "**Returns:** (N, K), as it was.\n\nRaises nothing."


BROKEN = {
    "nothing": ("[a](../README.md#here), [b](../code.py)", None),
    "a link": ("[a](../gone.py)", "../gone.py"),
    "an anchor": ("[a](#gone)", "#gone"),
    "an anchor of a file outside docs/": ("[a](../README.md#gone)", "#gone"),
    "a picture": ("![a](img/gone.svg)", "img/gone.svg"),
    "something from elsewhere": ('<script src="https://x.org/a.js"></script>', "would load https://x.org/a.js"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_site_with_something_broken_is_not_made(hooks, tmp_path, case):
    text, said = BROKEN[case]
    (tmp_path / "docs").mkdir()
    (tmp_path / "release").mkdir()
    shutil.copy(ROOT / "release" / "docs_site.py", tmp_path / "release")
    (tmp_path / "README.md").write_text("# Here\n")
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{text}\n")
    own = (ROOT / "mkdocs.yml").read_text()
    kept = re.search(r"^validation:\n(?:  .*\n)+", own, re.M)[0]
    (tmp_path / "mkdocs.yml").write_text(
        f"site_name: x\nstrict: true\nnot_in_nav: /source/\nhooks: [release/docs_site.py]\n{kept}"
        "plugins: []\ntheme: {name: null, custom_dir: theme}\n"
    )
    (tmp_path / "theme").mkdir()
    (tmp_path / "theme" / "main.html").write_text("{{ page.content }}")
    (build,) = re.findall(r"build\) \$VENV/bin/mkdocs (.*?) ;;", (ROOT / "dev").read_text())
    command = [sys.executable, "-m", "mkdocs", *build.split(), "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (built.returncode == 0) == (said is None), built.stderr
    assert said is None or said in built.stderr
    assert said is not None or (tmp_path / "site" / "source" / "code.py" / "index.html").is_file()
