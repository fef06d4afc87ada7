"""`convext bench calibrate`: the fit recovers what was planted, samples are kept and resumed, choices are judged."""

import itertools
import json
import math
import random

import pytest
import torch

from convext import cli, options
from convext.backends import costs, native
from convext.bench import calibrate, shapes
from convext.problem import Pass

pytestmark = pytest.mark.skipif(native._C is None, reason="the compiled library is not there")


def planted(samples, terms, noise, seed=0):
    """Counts that range over four decades, seconds of one of each, and what the samples take then."""
    generator = torch.Generator().manual_seed(seed)
    counts = 10 ** (4 * torch.rand(samples, terms, generator=generator, dtype=torch.float64))
    counts[:, 0] = 1
    truth = torch.tensor([1e-5, 1e-8, 3e-8, 1e-7, 2e-9][:terms], dtype=torch.float64)
    seconds = counts @ truth * (noise * torch.randn(samples, generator=generator, dtype=torch.float64)).exp()
    return counts, truth, seconds


def test_the_fit_finds_what_was_planted():
    """Without noise what is left is the pull, of 1e-3 samples among 300, towards a start that is off by up to a factor
    of 1e4, whose logarithm is below 10: 1e-3 * 10 over the information of a term that has no less than a fiftieth of
    the time, in the mean of squares, of 300 samples, is far below 1 %."""
    counts, truth, seconds = planted(300, 5, noise=0)
    share = ((counts * truth / seconds[:, None]) ** 2).mean(0)
    assert share.min() > 1 / 50**2
    assert torch.allclose(calibrate.fit_row(counts, seconds), truth, rtol=0.01)


def test_the_fit_bears_noise_and_samples_that_were_disturbed():
    """10 % of noise: the standard error of a logarithm is 0.1 / sqrt(300 * share^2), so 3 of them in a term's share of
    the sum. One sample in twenty taking five times as long moves the middle by less than that noise."""
    counts, truth, seconds = planted(300, 5, noise=0.1)
    seconds[::20] *= 5
    found = calibrate.fit_row(counts, seconds)
    expected, total = counts @ truth, counts @ found
    assert float((total / expected).log().abs().median()) < 0.05
    assert torch.all(found >= 0)


def test_terms_that_no_sample_has_take_nothing():
    counts, truth, seconds = planted(50, 3, noise=0)
    counts = torch.cat([counts, torch.zeros(50, 1, dtype=torch.float64)], 1)
    found = calibrate.fit_row(counts, seconds)
    assert found[3] == 0 and torch.allclose(found[:3], truth, rtol=0.05)


def test_a_table_is_fitted_from_synthetic_timings_and_chooses_by_them():
    """On a machine where each row's terms take a third to three times what the package says, drawn at random: there the
    package's table chooses badly, and the one that is fitted well."""
    draw = random.Random(1)
    here = costs.table()
    kernels, aten = (
        {row: {term: s * 3 ** draw.uniform(-1, 1) for term, s in terms.items()} for row, terms in rows.items()}
        for rows in (here.kernels, here.aten)
    )
    jobs = [job for draw in (shapes.draw, shapes.draw_layers, shapes.draw_groups) for job in draw(500, 11)]
    samples, compared = [], costs.compared_isas()
    try:
        costs.use(here._replace(kernels=kernels, aten=aten))
        for pass_, problem in jobs:
            timed = [(native.kernels()[i], cost) for i, cost in native.ranked(pass_, problem)]
            seconds = {kernel["name"]: cost for kernel, cost in timed if costs.isa_class(kernel["isa"]) in compared}
            seconds["aten"] = costs.aten_seconds(pass_, problem)
            samples.append(calibrate.Sample(pass_, problem, seconds))
        costs.use(None)
        before = calibrate.summary(calibrate.check(samples))
        fitted = calibrate.fit(samples, {**here.limits, "call_saving": 0.0})
        costs.use(fitted)
        after = calibrate.summary(calibrate.check(samples))
    finally:
        costs.use(None)
    assert fitted.machine["threads"] == torch.get_num_threads()
    assert before["within"] < 0.8 and after["within"] > 0.95, (before, after)


def test_rows_of_few_samples_are_left_to_other_tables():
    (pass_, problem), *_ = shapes.draw(1)
    few = [calibrate.Sample(pass_, problem, {"aten": 1e-3})] * 7
    assert calibrate.fit(few, {}).aten == {}
    assert len(calibrate.fit([*few, few[0]], {}).aten) == 1


def test_samples_are_measured_checked_and_resumed(tmp_path):
    path = tmp_path / "samples.jsonl"
    jobs = [*shapes.draw(4, 2)]
    first = calibrate.collect(jobs[:3], math.inf, path)
    assert [(one.pass_, one.problem) for one in first] == jobs[:3]
    assert all("aten" in one.seconds and len(one.seconds) > 1 for one in first)
    again = calibrate.collect(jobs, math.inf, path)
    assert again[:3] == first and again == calibrate.read_samples(path) and len(again) == 4
    assert calibrate.collect(jobs, 0.0, path) == again  # no time: what is there


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch):
    pass_, problem = next(iter(shapes.draw(1, 2)))
    right = native.bare_calls(pass_, problem, *calibrate.operands_of(pass_, problem))
    wrong = {**right, "wrong": lambda: next(iter(right.values()))() * 1.01}
    monkeypatch.setattr(calibrate.native, "bare_calls", lambda *operands: wrong)
    found = calibrate.measure(pass_, problem).seconds
    assert "wrong" not in found and found.keys() > {"aten"}


@pytest.mark.parametrize("line", ["{", "{}", '{"pass": "fprop", "problem": [1], "dtype": "FLOAT32", "layout": "NCHW"}'])
def test_a_file_of_no_samples_is_refused_by_line(tmp_path, line):
    path = tmp_path / "samples.jsonl"
    pass_, problem = next(iter(shapes.draw(1)))
    path.write_text(json.dumps(calibrate.Sample(pass_, problem, {"aten": 1.0}).as_json()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="line 2: no sample|line 2: Expecting"):
        calibrate.read_samples(path)


def test_choices_are_judged_by_the_best_and_by_aten():
    problem = next(iter(shapes.draw(1)))[1]
    sample = calibrate.Sample(Pass.WGRAD, problem, {"aten": 1.0, "a": 2.0, "b": 0.95})
    checked = [calibrate.Checked(sample, name) for name in ("a", "b", "aten", "gone")]
    assert [one.regret for one in checked] == [pytest.approx(2 / 0.95), 1.0, pytest.approx(1 / 0.95), 4.0]
    assert [one.speed for one in checked] == pytest.approx([0.5, 1 / 0.95, 1.0, 1 / 3.8])
    found = calibrate.summary(checked)
    assert found["within"] == 0.5 and found["slower_than_aten"] == 2 and found["most"] == 4
    assert calibrate.table({"some": checked, "none": []}).rows[0][:3] == ["some", "4", "50.0%"]


def test_forward_passes_are_judged_as_they_are_served():
    """By C++, which saves a kernel what the table says, and at most three quarters of what it takes."""
    problem = next(iter(shapes.draw(1)))[1]
    seconds = {"aten": 3e-6, "a": 4e-6, "b": 2.2e-6}
    try:
        costs.use(costs.Table({}, {"call_saving": 2e-6}, {}, {}))
        for pass_, expected in ((Pass.FPROP, [3e-6, 2e-6, 2.2e-6 / 4]), (Pass.DGRAD, [3e-6, 4e-6, 2.2e-6])):
            sample = calibrate.Sample(pass_, problem, seconds)
            assert [*calibrate.Checked(sample, "a").seconds.values()] == pytest.approx(expected)
    finally:
        costs.use(None)


def test_a_call_is_slower_beyond_noise_where_most_rounds_say_so():
    problem = next(iter(shapes.draw(1)))[1]
    for speed, upper, slower in ((0.9, 0.99, True), (0.9, 1.01, False), (0.96, 0.98, False), (2.0, 2.1, False)):
        assert calibrate.Beside(problem, speed, upper).slower == slower
    found = calibrate.beside(problem)
    assert found.speed > 0 and found.upper >= found.speed
    said = calibrate.said_of([calibrate.Beside(problem, 0.5, 0.6), calibrate.Beside(problem, 2.0, 2.0)])
    assert "2 shapes at random: 1.00 times as fast in geometric mean, slower beyond noise in 1, least 0.50" in said


def test_layers_are_drawn_as_networks_have_them():
    drawn = [problem for _, problem in shapes.draw_layers(300, 4)]
    assert drawn == [problem for _, problem in shapes.draw_layers(300, 4)]
    assert any(p.is_depthwise for p in drawn) and any(p.is_dilated for p in drawn) and any(p.c == 3 for p in drawn)
    assert {p.n for p in drawn} == {1, 8} and max(p.flops for p in drawn) <= shapes.MOST_LAYER_FLOPS


def test_groups_are_drawn_of_few_channels():
    drawn = [problem for _, problem in shapes.draw_groups(100, 4)]
    assert all(1 < p.groups and p.c_per_group <= 16 and p.k_per_group <= 16 for p in drawn)
    assert any(p.is_depthwise for p in drawn) and any(p.is_pointwise for p in drawn)


def test_a_unet_is_that_of_the_shape_file():
    found = [problem for pass_, problem in cli._layers(["unet"], 8, options.DType.float32) if pass_ is Pass.FPROP]
    assert len(found) == len(set(found)) and all(p.n == 8 and p.p == p.h and p.y_layout == 1 for p in found)
    assert (found[0].c, found[0].k, found[0].h) == (3, 64, 256) and max(p.c for p in found) == 1024


def test_the_command_writes_a_table_that_counts_from_then_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path))
    costs.forget()
    samples = tmp_path / "samples.jsonl"
    calibrate.collect(itertools.islice(calibrate.problems(1), 2), math.inf, samples)
    assert cli.main(["bench", "calibrate", "--seconds", "0", "--samples", str(samples)]) == 0
    printed = capsys.readouterr().out
    assert f"{costs.user_path()} counts from now on" in printed and "within 10 %" in printed
    assert costs.sources()[0] == str(costs.user_path()) and costs.read(costs.user_path()).machine["threads"] == 1
    monkeypatch.undo()
    costs.forget()


def test_the_command_checks_and_keeps_the_figures(tmp_path, capsys):
    path = tmp_path / "choice.json"
    assert cli.main(["bench", "calibrate", "--check", "--count", "3", "--json", str(path)]) == 0
    assert "shapes at random" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["machine"]["summary"]["shapes at random"]["problems"] == 3
    choices, besides = found["results"][:3], found["results"][3:]
    assert all(one["choice"] and one["seconds"]["aten"] > 0 for one in choices)
    assert len(besides) == 3 and all(one["speed"] > 0 for one in besides)


def test_the_command_judges_what_it_measured_before(tmp_path, capsys):
    samples, path = tmp_path / "samples.jsonl", tmp_path / "choice.json"
    arguments = ["bench", "calibrate", "--check", "--count", "2", "--samples", str(samples), "--json", str(path)]
    assert cli.main(arguments) == 0
    first = samples.read_text()
    assert cli.main(arguments) == 0
    assert samples.read_text() == first and len(first.splitlines()) == 2
    assert [one["seconds"] for one in json.loads(path.read_text())["results"][:2]] == [
        json.loads(line)["seconds"] for line in first.splitlines()
    ]
    capsys.readouterr()
    assert cli.main([*arguments, "--seed", "9"]) == 2
    assert "--samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json", "x.json"], "--model and --json go with --check"),
        (["--model", "resnet18"], "--model and --json go with --check"),
        (["--check", "--model", "no_such"], "model: got 'no_such'"),
    ],
)
def test_the_command_refuses_in_words(arguments, said, capsys):
    assert cli.main(["bench", "calibrate", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_broken_file_of_samples_is_refused(tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    path.write_text("nonsense\n")
    assert cli.main(["bench", "calibrate", "--samples", str(path), "--output", str(tmp_path / "t.json")]) == 2
    assert "--samples" in capsys.readouterr().err and not (tmp_path / "t.json").exists()


def test_passes_are_named():
    assert {calibrate.Sample(p, next(iter(shapes.draw(1)))[1], {"aten": 1.0}).as_json()["pass"] for p in Pass} == {
        "fprop", "dgrad", "wgrad"
    }  # fmt: skip
