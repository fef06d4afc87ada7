"""The tables of what kernels and ATen cost on the CPU: which counts, what is refused, and what follows from one."""

import json
import warnings

import pytest
import torch

from convext import backends
from convext.backends import costs, native, tuned
from convext.bench import shapes
from convext.problem import ConvProblem, DType, Geom, Pass

pytestmark = pytest.mark.skipif(native._C is None, reason="the compiled library is not there")


def table(kernels=(), aten=(), limits=(), **machine):
    about = {"cpu": tuned.cpu_name(), "isa": costs.isa_class(native.isa()), "threads": 1, "torch": "2", "time": "now"}
    return costs.Table({**about, **machine}, dict(limits), dict(kernels), dict(aten))


def problem_of(n, c, side, k, taps, stride=1, groups=1, channels_last=True, dtype=torch.float32):
    x = torch.empty(n, c, side, side, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    w = torch.empty(k, c // groups, taps, taps, dtype=dtype)
    return ConvProblem.of_fprop(x, w, Geom((stride, stride), (taps // 2, taps // 2), (1, 1), groups))


@pytest.fixture
def use():
    """costs.use, undone at the end."""
    yield costs.use
    costs.use(None)


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVEXT_CACHE", str(tmp_path))
    costs.forget()
    yield tmp_path
    monkeypatch.undo()
    costs.forget()


# ---- what is in the package


def test_the_packages_tables_hold_and_say_where_they_were_measured():
    files = sorted(costs.PACKAGED.glob("*.json"))
    assert {path.stem for path in files} >= {*costs.ISAS}
    for path in files:
        found = costs.read(path)
        assert all(found.machine[name] for name in ("cpu", "isa", "threads", "torch", "time")), path
        meanings = json.loads(path.read_text())["meanings"]
        for part, rows in (("kernels", found.kernels.values()), ("aten", found.aten.values())):
            assert all(meanings[f"{part}.{term}"] for row in rows for term in row)
        assert all(meanings[f"limits.{name}"] for name in found.limits)


def test_terms_are_those_of_the_library():
    assert tuple(costs.KERNEL_TERMS) == costs.native_terms()


def test_on_every_instruction_set_the_kernels_and_limits_have_a_number():
    """But for two that hardly any problem has where a vector is of four floats; such come last."""
    convolutions = ("direct", "dilated", "winograd", "stem", "pointwise", "grouped", "depthwise")
    for isa in costs.ISAS:
        found = costs.read(costs.PACKAGED / f"{isa}.json")
        mine = [k for k in native.kernels() if k["isa"] == isa and k["algorithm"] in convolutions]
        missing = [kernel for kernel in mine if kernel["name"] not in found.kernels]
        rare = [k for k in missing if k["algorithm"] in ("grouped", "depthwise")] if isa == "portable" else []
        assert mine and missing == rare and found.limits.keys() == costs.LIMITS.keys()


def test_no_problem_of_images_is_chosen_without_knowing_what_aten_takes():
    known = costs.table().aten
    for draw in (shapes.draw, shapes.draw_layers, shapes.draw_groups):
        assert {costs.aten_row(pass_, problem) for pass_, problem in draw(400, 3)} <= known.keys()


# ---- which table counts


def test_the_users_table_comes_before_the_packages(user_folder):
    path = costs.user_path()
    before = costs.table()
    own = table(kernels={"fprop_direct_f32_portable": {"call": 5.0}}, limits={"candidates": 7})
    path.write_text(json.dumps(own.as_json()))
    costs.forget()
    assert costs.sources()[0] == str(path)
    assert costs.table().kernels["fprop_direct_f32_portable"] == {"call": 5.0}
    assert costs.table().limits == {**before.limits, "candidates": 7.0}  # what it leaves out the next say
    assert costs.table().aten == before.aten


def test_the_model_of_the_cpu_comes_before_its_instruction_set_and_that_before_the_default(tmp_path, monkeypatch):
    limits = dict.fromkeys(costs.LIMITS, 1.0)
    isa = costs.isa_class(native.isa())
    for name, cpu, of, candidates in (
        ("portable", "some CPU", "portable", 1),
        (isa, "some CPU", isa, 2),
        ("another", "another CPU", isa, 3),
        ("this", tuned.cpu_name(), isa, 4),
    ):
        found = table(cpu=cpu, isa=of, limits={**limits, "candidates": candidates})
        (tmp_path / f"{name}.json").write_text(json.dumps(found.as_json()))
    monkeypatch.setattr(costs, "PACKAGED", tmp_path)
    for name, candidates in (("this", 4), (isa, 2), ("portable", 1)):
        costs.forget()
        assert costs.table().limits["candidates"] == candidates
        (tmp_path / f"{name}.json").unlink(missing_ok=True)
    monkeypatch.undo()
    costs.forget()


def test_a_table_of_a_higher_instruction_set_does_not_count(monkeypatch):
    monkeypatch.setattr(costs, "_isa", lambda: "avx2")
    costs.forget()
    assert [costs.read(path).machine["isa"] for path, _ in costs._chain()] == ["avx2", "portable"]
    monkeypatch.undo()
    costs.forget()


# ---- what is refused

GOOD = {"format": 1, "machine": {"cpu": "a", "isa": "avx2", "threads": 1, "torch": "2", "time": "now"},
        "limits": {}, "kernels": {}, "aten": {}}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "its format is not 1"),
        ({"machine": {"cpu": "a"}}, "machine lacks some of cpu, isa, threads, torch, time"),
        ({"machine": {**GOOD["machine"], "isa": "sse"}}, "machine.isa is 'sse', expected one of portable"),
        ({"limits": {"candidates": -1}}, "limits.candidates is -1, expected a finite number that is not negative"),
        ({"limits": {"few": 1}}, "limits.few is unknown, expected some of"),
        ({"kernels": {"k": {"call": float("nan")}}}, "kernels.k.call is nan, expected a finite number"),
        ({"kernels": {"k": {"call": "fast"}}}, "kernels.k.call is 'fast', expected a finite number"),
        ({"kernels": {"k": {"calls": 1.0}}}, "kernels.k.calls is unknown, expected some of call"),
        ({"kernels": {"k": 3}}, "kernels.k is missing or no object"),
        ({"aten": {"row": {"product": float("inf")}}}, "aten.row.product is inf, expected a finite number"),
        ({"aten": None}, "aten is missing or no object"),
    ],
)
def test_a_table_that_does_not_hold_is_refused_by_what_is_wrong(change, said):
    costs.parse(GOOD)
    with pytest.raises(ValueError) as raised:
        costs.parse({**GOOD, **change})
    assert said in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format": 1}', json.dumps(GOOD)])
def test_a_users_table_that_does_not_hold_is_said_and_the_packages_count(user_folder, text):
    before = costs.table()
    costs.user_path().write_text(text)
    costs.forget()
    with pytest.warns(UserWarning, match="the package's tables count instead"):
        assert costs.table() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        costs.table()


# ---- what follows from a table


def one_each(name):
    """A table in which one kernel's every term takes next to nothing, and every other's a second."""
    slow = dict.fromkeys(costs.native_terms(), 1.0)
    fast = dict.fromkeys(costs.native_terms(), 1e-15)
    return table(kernels={k["name"]: fast if k["name"] == name else slow for k in native.kernels()})


@pytest.mark.parametrize("isa", [0, -1], ids=["next", "own"])
@pytest.mark.parametrize("family", ["direct", "winograd2x2"])
def test_the_library_selects_by_the_table_that_it_is_given(use, family, isa):
    name = f"fprop_{family}_f32_{costs.compared_isas()[isa]}"
    problem = problem_of(2, 32, 28, 32, 3)
    use(one_each(name))
    assert native.BACKEND.variant(Pass.FPROP, problem) == name


def test_aten_serves_where_its_expected_time_is_less(use):
    problem = problem_of(2, 32, 28, 32, 3)
    row, work = costs.aten_work(Pass.FPROP, problem)
    own = native._C.cost(native._plan(Pass.FPROP, problem).variant, native._arriving(problem))
    for factor, name in ((0.9, "aten"), (1.1, "native")):
        use(table(aten={row: {"call": factor * own}}))
        choice = backends.select(Pass.FPROP, problem)
        assert choice.backend.name == name, choice
    assert work["call"] == 1 and costs.aten_seconds(Pass.FPROP, problem) == 1.1 * own


def test_seconds_of_a_kernel_are_the_sum_over_its_work(use):
    problem = problem_of(2, 3, 9, 5, 3, stride=2, channels_last=False)
    seconds = {term: 10.0**-i for i, term in enumerate(costs.native_terms())}
    use(table(kernels={kernel["name"]: seconds for kernel in native.kernels()}))
    for index, expected in native.ranked(Pass.FPROP, problem):
        if costs.isa_class(native.kernels()[index]["isa"]) not in costs.compared_isas():
            continue
        counts = native.work(index, problem)
        assert expected == pytest.approx(sum(n * s for n, s in zip(counts, seconds.values(), strict=True)), rel=1e-12)
        assert counts[0] == 1


def test_copies_count_where_the_kernel_does_not_read_the_order_that_arrives():
    """The stem's kernel reads NCHW as it lies, the direct one has x and y copied, and neither does of one channel."""
    copy = costs.native_terms().index("copy")
    indices = {kernel["name"]: index for index, kernel in enumerate(native.kernels())}
    direct, stem = indices["fprop_direct_f32_portable"], indices["fprop_stem_f32_portable"]
    nchw, nhwc = (problem_of(2, 3, 8, 16, 3, channels_last=last) for last in (False, True))
    assert native.work(direct, nchw)[copy] == nchw.x_size + nchw.y_size
    assert native.work(stem, nchw)[copy] == native.work(direct, nhwc)[copy] == 0
    assert native.work(direct, problem_of(2, 1, 8, 16, 3, channels_last=False))[copy] == 2 * 16 * 64
    convert = costs.native_terms().index("convert")
    half = problem_of(2, 3, 8, 16, 3, dtype=torch.bfloat16)
    assert native.work(direct, half)[convert] == half.x_size + half.y_size and native.work(direct, nchw)[convert] == 0


def test_a_kernel_that_was_measured_comes_before_one_that_was_not():
    """Whatever the problem, where the first has seconds as they are; of copies both have what the first's row says."""
    isa = costs.compared_isas()[-1]
    seconds = {"call": 5e-6, "product": 1e-9, "tap": 1e-9, "output": 1e-9, "operand": 1e-9, "copy": 1e-9}
    known = {k["name"]: seconds for k in native.kernels() if k["algorithm"] == "direct"}
    for lower in costs.compared_isas()[:-1]:
        known |= {k["name"]: {"call": 1.0} for k in native.kernels() if k["isa"] == lower}
    costs._hand_over(known)
    try:
        for pass_, problem in shapes.draw(100, 8):
            index = native._C.select(0, int(pass_), native._arriving(problem))
            assert native.kernels()[index]["name"] == f"{pass_.name.lower()}_direct_f32_{isa}"
    finally:
        costs.forget()
        costs.table()


def test_kernels_two_instruction_sets_below_are_not_chosen(use):
    """Where they are expected to take no time at all."""
    compared = costs.compared_isas()
    use(table(kernels={k["name"]: {} for k in native.kernels() if costs.isa_class(k["isa"]) not in compared}))
    for pass_, problem in shapes.draw(100, 8):
        name = native.BACKEND.variant(pass_, problem)
        assert costs.isa_class(next(k["isa"] for k in native.kernels() if k["name"] == name)) in compared


def test_a_row_for_each_kernel_is_finite_and_not_negative():
    rows = [[0.0] * len(costs.native_terms()) for _ in native.kernels()]
    for wrong, said in ((rows[:-1], "a row for each"), ([[-1.0, *rows[0][1:]], *rows[1:]], "finite and not negative")):
        with pytest.raises(ValueError, match=said):
            native._C.set_costs(wrong)
    costs.forget()
    costs.table()


# A fixed table, so that only a change of what is counted can change what is chosen, and not the machine that the test
# runs on: seconds on one thread of a CPU with AVX-512, of few terms. Who is fastest there was measured.
FIXED = {
    "direct": {"call": 4e-6, "product": 1.5e-11, "tap": 2e-10, "output": 5e-10, "operand": 1e-10, "copy": 1e-10},
    "stem": {"call": 4e-6, "product": 1.2e-11, "gather": 2e-10, "output": 5e-10, "row": 1e-9},
    "grouped": {"call": 4e-6, "product": 1.6e-11, "gather": 4e-10, "output": 5e-10},
    "depthwise": {"call": 4e-6, "product": 1e-11, "reload": 2e-11, "output": 4e-10},
}


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (problem_of(1, 3, 64, 32, 3), "stem"),  # few channels: no tap is looked up again
        (problem_of(8, 256, 14, 256, 1, stride=2), "direct"),  # long sums
        (problem_of(2, 64, 28, 64, 3, groups=16), "grouped"),  # 4 of a vector's lanes filled, else
        (problem_of(2, 64, 28, 64, 3, groups=64), "depthwise"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fixed_table_chooses_the_same_kernels_everywhere(use, problem, expected):
    isa = costs.compared_isas()[-1]
    seconds = {f"fprop_{family}_f32_{isa}": terms for family, terms in FIXED.items()}
    never = {kernel["name"]: {"call": 1.0} for kernel in native.kernels() if kernel["name"] not in seconds}
    use(table(kernels={**never, **seconds}))
    assert native.BACKEND.variant(Pass.FPROP, problem) == f"fprop_{expected}_f32_{isa}"


# Shapes of which the choice was wrong by a third and more before copies, empty lanes and taps were counted: the choice
# now, or as good a one within noise, as it was measured on one thread of a CPU with AVX-512.
NAMED = [
    (problem_of(4, 64, 56, 4, 3, stride=2), {"aten_fprop", "fprop_direct_f32_avx2"}),
    (problem_of(1, 32, 28, 64, 7, stride=2, groups=8), {"aten_fprop"}),
    (problem_of(1, 32, 28, 8, 1, groups=2), {"fprop_direct_f32_avx512", "fprop_direct_f32_avx2"}),
    (problem_of(1, 64, 14, 24, 1, stride=2), {"aten_fprop", "fprop_direct_f32_avx512"}),
]


@pytest.mark.skipif(costs.isa_class(native.isa()) != "avx512", reason="the table is of CPUs with AVX-512")
@pytest.mark.parametrize(("problem", "expected"), NAMED, ids=lambda value: "" if isinstance(value, set) else str(value))
def test_named_shapes_go_to_who_is_fastest_by_the_packages_table(use, problem, expected):
    use(costs.read(costs.PACKAGED / "avx512.json"))
    assert backends.select(Pass.FPROP, problem).variant in expected


# ---- what ATen does


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_row_is_that_of_the_kernels_that_torch_takes(dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for draw in (shapes.draw, shapes.draw_layers, shapes.draw_groups):
            for pass_, problem in draw(300, 5, dtype):
                row = costs.aten_row(pass_, problem)
                assert native._is_onednns(problem) == ("onednn" in row), (row, problem)
    finally:
        torch.set_num_threads(before)


def test_taps_that_meet_padding_are_not_atens_where_onednn_computes():
    """One output in the middle of the image of one pixel has one tap of 7x7 inside; ATen's unfolded matrix has all."""
    inside = costs.aten_work(Pass.FPROP, problem_of(2, 16, 1, 16, 7))
    assert inside[0] == "float32 fprop onednn NHWC" and inside[1]["product"] == 2 * 16
    unfolded = costs.aten_work(Pass.FPROP, problem_of(1, 16, 1, 16, 3))
    assert unfolded[0] == "float32 fprop gemm NHWC" and unfolded[1]["product"] == 9 * 16
    for extent, taps, stride, pad, dilation in ((5, 3, 1, 1, 1), (7, 5, 2, 3, 2), (4, 7, 3, 8, 1), (9, 1, 2, 0, 1)):
        out = (extent + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
        met = sum(0 <= i * stride + t * dilation - pad < extent for i in range(out) for t in range(taps))
        assert costs._inside(extent, out, taps, stride, pad, dilation) == met / (out * taps)


def test_who_serves_does_not_depend_on_the_number_of_threads():
    before, problems = torch.get_num_threads(), [*shapes.draw(200, 6), *shapes.draw_layers(200, 6)]
    chosen = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            costs.forget()
            chosen.append([repr(backends.select(pass_, problem)) for pass_, problem in problems])
    finally:
        torch.set_num_threads(before)
    assert chosen[0] == chosen[1] == chosen[2]


def test_a_type_that_no_row_speaks_of_stays_with_the_library():
    problem = problem_of(2, 32, 28, 32, 3, dtype=torch.float16)
    assert problem.dtype is DType.FLOAT16 and costs.aten_seconds(Pass.FPROP, problem) is None
    assert native.BACKEND.slower(Pass.FPROP, problem) is None
