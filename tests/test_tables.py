"""Tables as text, with rich and without."""

import sys

import pytest

from convext import tables
from convext.bench.tables import Grid

COLUMNS = ["layer", "reason", "ms"]
ROWS = [["conv1", "a hook listens", "3.25"], ["layer1.0.conv2", "", "12"]]


@pytest.fixture(params=["rich", "plain"])
def drawn(request, monkeypatch):
    """Which of the two draws."""
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "rich", None)
    else:
        pytest.importorskip("rich")
    return request.param


def cells(line):
    return [part.strip() for part in line.replace("┃", "│").strip("│").split("│")]


def test_a_plain_table_is_this_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert tables.render("Net: convolutions", COLUMNS, ROWS, "note 1: it is so\n2 rows", names=2) == (
        "Net: convolutions\n"
        "layer           reason            ms\n"
        "--------------  --------------  ----\n"
        "conv1           a hook listens  3.25\n"
        "layer1.0.conv2                    12\n"
        "note 1: it is so\n"
        "2 rows"
    )


def test_rich_draws_the_same_rows():
    pytest.importorskip("rich")
    lines = tables.render("Net: convolutions", COLUMNS, ROWS, "2 rows", names=2).splitlines()
    assert lines[0].strip() == "Net: convolutions" and lines[-1].strip() == "2 rows"
    assert [cells(line) for line in lines if line[0] in "┃│"] == [COLUMNS, *ROWS]
    assert "┃   ms ┃" in lines[2] and "│   12 │" in lines[5]  # figures to the right


def test_what_is_too_long_goes_on_in_the_next_line_and_nothing_is_lost(drawn):
    words = [f"word{index}" for index in range(60)]
    text = tables.render("", ["name", "told"], [["x" * 90, " ".join(words)], ["short", "[4, 8]"]], "c " * 100, width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("x") == 90 and text.count("c") == 100 and "[4, 8]" in text
    assert all(text.count(word) for word in words)


def test_more_columns_than_the_page_holds_are_all_there(drawn):
    text = tables.render("", [f"c{index}" for index in range(12)], [[f"<{index:05}>" for index in range(12)]], width=40)
    assert text.count("<") == 12 and text.count(">") == 12


def test_brackets_are_no_markup(drawn):
    text = tables.render("[bold]t", ["[b]"], [["[red]1[/red]"], ["[/]"], [":smile:"]], "[dim]c")
    for part in ("[bold]t", "[b]", "[red]1[/red]", "[/]", ":smile:", "[dim]c"):
        assert part in text


def test_no_rows_leave_the_headings(drawn):
    text = tables.render("none", COLUMNS, [])
    assert all(word in text for word in ["none", *COLUMNS])


def test_empty_and_broken_cells_keep_their_row(drawn):
    text = tables.render("", ["a", "b"], [["", ""], ["one\ntwo", "x"], [1, None]])
    assert all(word in text for word in ("one", "two", "x", "1", "None")) and "one\ntwo" not in text
    assert all(not line.endswith(" ") for line in text.splitlines()) or drawn == "rich"


def test_a_row_of_another_length_is_refused(drawn):
    with pytest.raises(ValueError, match=r"rows: expected 3 values, .* got 2: \['conv1', '3'\]"):
        tables.render("", COLUMNS, [["conv1", 3]])


def test_the_environment_puts_no_colours_into_the_text(monkeypatch, drawn):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in tables.render("title", COLUMNS, ROWS, "caption")


def test_in_a_notebook_the_text_is_returned_and_not_shown(monkeypatch):
    console = pytest.importorskip("rich.console")
    monkeypatch.setattr(console, "_is_jupyter", lambda: True)
    assert "layer1.0.conv2" in tables.render("title", COLUMNS, ROWS)


def test_the_width_is_the_terminals_and_at_least_100(monkeypatch, drawn):
    row = [["y" * 500]]
    for columns, expected in (("60", 100), ("120", 120)):
        monkeypatch.setenv("COLUMNS", columns)
        assert max(map(len, tables.render("", ["z"], row).splitlines())) == expected


def test_a_grid_aligns_names_left_and_figures_right(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    grid = Grid(["network", "ms"], rows=[["resnet18", "3.2"], ["x", "10.25"]])
    assert grid.text() == "network      ms\n--------  -----\nresnet18    3.2\nx         10.25"
