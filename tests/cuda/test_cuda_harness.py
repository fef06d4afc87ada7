"""The CUDA kernels on the CPU, from their own sources: correctness, races, alignment, traffic, and planted bugs."""

from __future__ import annotations

from typing import NamedTuple

import cuda_on_cpu as harness
import pytest

pytestmark = [
    pytest.mark.skipif(harness.why_not() is not None, reason=str(harness.why_not())),
    pytest.mark.timeout(1200),
]  # the first test of a form waits for its build

VARIANTS, TRAFFIC = "tests/cuda_variants.cpp", "tests/cuda_on_cpu/traffic.cpp"


@pytest.fixture(scope="session")
def program(shared):
    """program(form, main=VARIANTS): a program with every kernel, or with those given, built once in each form."""
    built = {}

    def get(form: str, main: str = VARIANTS, kernels: list[str] | None = None):
        if (form, main) not in built:
            with shared(f"cuda_{form}") as folder:
                built[form, main] = harness.build(folder, form, kernels or harness.kernel_sources(), main)
        return built[form, main]

    return get


def assert_clean(done):
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_every_variant_under_every_policy(program):
    done = harness.run(program("plain"))
    assert_clean(done)
    assert " 0 failures" in done.stdout


def test_every_variant_instrumented(program):
    assert_clean(harness.run(program("asan"), "--one-policy"))


def test_no_variant_races(program):
    # Not for fp16, which shares its templates with bf16 instruction for instruction: the check is slow.
    assert_clean(harness.run(program("race"), "--one-policy", "bf16", "f32", "f64"))


def test_global_traffic_of_known_networks(program, record_property):
    done = harness.run(program("race", TRAFFIC))
    record_property("told", done.stdout)
    assert_clean(done)
    rows = [row for row in done.stdout.splitlines() if " NHWC " in row]
    for network, layer in layers_of_known_networks():
        passes = [row for row in rows if row.startswith(network) and f" {layer}  " in row]
        assert len(passes) == 3, f"{network}: {layer}"


def layers_of_known_networks():
    """(network, layer) of every distinct convolution, as the table writes them."""
    pytest.importorskip("torchvision")
    from convext import zoo
    from convext.bench import problems

    for name, network in (("mobilenet_v2", "MobileNetV2"), ("resnet50", "ResNet-50")):
        for p in problems.collect(zoo.build(name)[0], zoo.sample(name, 1)):
            depthwise, stride = "depthwise " * p.is_depthwise, f" stride {p.stride_h}" * (p.stride_h > 1)
            yield network, f"{depthwise}{p.c} {p.h}x{p.w} -> {p.k}, {p.r}x{p.s}{stride}"


@pytest.mark.parametrize("form", ["plain", "asan", "race"])
def test_batch_norm(program, form):
    assert_clean(harness.run(program(form, "tests/cuda_batch_norm.cpp", ["cuda/batch_norm/batch_norm_sm80.cu"])))


# ---- planted bugs: a harness that misses them proves nothing


class Mutant(NamedTuple):
    """One edit of the sources that must be caught: by values, poison or guard pages (plain), or by the race check."""

    file: str
    old: str
    new: str
    form: str
    variant: str


IGEMM_FPROP = "fprop_igemm_bf16_64x64x64_sm80"
IGEMM_WGRAD = "wgrad_igemm_bf16_64x64x64_sm80"
IGEMM_DGRAD = "dgrad_igemm_bf16_64x64x64_sm80"
GATHER = "fprop_igemm_bf16_64x64x32_gather_sm80"
WINDOW = "fprop_depthwise_bf16_window_sm80"
BACKWARD = "wgrad_depthwise_bf16_window_sm80"
BACKWARD_ANY = "wgrad_depthwise_bf16_any_sm80"
PLANES = "dgrad_depthwise_bf16_planes_sm80"
SIMT = "fprop_simt_f32_64x64x16_sm80"
STEM = "fprop_stem_bf16_128x64x16_sm80"
STEM_WGRAD = "wgrad_stem_bf16_64x192x16_sm80"

MUTANTS = {
    "missing_wait": Mutant(
        "cuda/igemm/igemm_pixels.h", "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>", "plain", IGEMM_FPROP
    ),
    "missing_wait_in_wgrad": Mutant(
        "cuda/igemm/igemm_wgrad_sm80.cu", "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>", "plain", IGEMM_WGRAD
    ),
    "stage_released_early": Mutant(
        "cuda/tile/gemm.h",
        "load(first + (TILE::STAGES - 1) * TILE::STAGE_BYTES)",
        "load(first + (TILE::STAGES - 2) * TILE::STAGE_BYTES)",
        "plain",
        IGEMM_FPROP,
    ),
    "missing_barrier": Mutant(
        "cuda/igemm/igemm_pixels.h",
        "__syncthreads();  // the stage has landed",
        "// the stage has landed",
        "plain",
        IGEMM_FPROP,
    ),
    "missing_barrier_before_epilogue": Mutant(
        "cuda/igemm/igemm_pixels.h",
        "__syncthreads();  // all have read the last",
        "// all have read the last",
        "race",
        IGEMM_FPROP,
    ),
    "missing_slab_barrier": Mutant(
        "cuda/igemm/igemm_pixels.h",
        "__syncwarp();  // the slab is written",
        "// the slab is written",
        "race",
        IGEMM_FPROP,
    ),
    "wrong_swizzle": Mutant(
        "cuda/tile/gemm.h",
        "k_major_offset<TILE::ROW_BYTES>(first + lane % 16, lane / 16)",
        "k_major_offset<TILE::ROW_BYTES>(first + lane % 16, (lane / 16) ^ (lane & 1))",
        "plain",
        IGEMM_FPROP,
    ),
    "wrong_transposed_swizzle": Mutant(
        "cuda/tile/gemm.h",
        "(k & 1) << 2 | (k & 2) |",
        "(k & 1) << 2 | (k & 2 & threadIdx.x) |",
        "plain",
        IGEMM_WGRAD,
    ),
    "predicate_off_by_one": Mutant(
        "cuda/igemm/igemm_load.h",
        "line >= 0 && line < block.rows.in",
        "line >= 0 && line <= block.rows.in",
        "plain",
        IGEMM_FPROP,
    ),
    "lower_predicate_missing": Mutant(
        "cuda/igemm/igemm_load.h",
        "column >= 0 && column < block.cols.in",
        "column < block.cols.in",
        "plain",
        IGEMM_DGRAD,
    ),
    "row_past_the_end": Mutant(
        "cuda/igemm/igemm_pixels.h",
        "if (m >= block.gemm_m || column >= block.columns) continue;",
        "if (column >= block.columns) continue;",
        "plain",
        IGEMM_FPROP,
    ),
    "residue_class_forgotten": Mutant(
        "core/axis.h", "(residue + pad - first * dil) / stride,", "(pad - first * dil) / stride,", "plain", IGEMM_DGRAD
    ),
    "tap_skipped_too_early": Mutant(
        "cuda/igemm/igemm_block.h", "axis.input(high, tap) >= 0", "axis.input(low, tap) >= 0", "plain", IGEMM_FPROP
    ),
    "chunk_not_gathered_whole": Mutant(
        "cuda/igemm/igemm_gather.h",
        "if (tap_count) element.advance(1, block.channels, taps_w);",
        "if (e < CHUNK - 2) element.advance(1, block.channels, taps_w);",
        "plain",
        GATHER,
    ),
    "shared_memory_too_small": Mutant(
        "cuda/igemm/igemm_pixels.h",
        "igemm_shared_bytes<TILE, DGRAD, VECTOR>, args.stream",
        "igemm_shared_bytes<TILE, DGRAD, VECTOR> - 256, args.stream",
        "plain",
        IGEMM_FPROP,
    ),
    "filters_read_before_barrier": Mutant(
        "cuda/depthwise/depthwise.h",
        "__syncthreads();  // orders the filters",
        "// orders the filters",
        "plain",
        WINDOW,
    ),
    "window_past_the_row": Mutant(
        "cuda/depthwise/depthwise_fprop_sm80.cu",
        "w0 + col < problem.w) inside",
        "w0 + col <= problem.w) inside",
        "plain",
        WINDOW,
    ),
    "sum_overwritten": Mutant(
        "cuda/depthwise/depthwise_patch.h",
        "__syncthreads();  // orders the sum before",
        "// orders the sum before",
        "race",
        BACKWARD,
    ),
    "offset_of_32_bits": Mutant(
        "cuda/igemm/igemm_load.h",
        "n * strides.n + y * strides.h",
        "n * strides.n + y * static_cast<int32_t>(strides.h)",
        "plain",
        IGEMM_FPROP,
    ),
    "steps_of_a_walk_read_too_early": Mutant(
        "cuda/igemm/igemm_load.h",
        "__syncthreads();  // the steps are written",
        "// the steps are written",
        "race",
        IGEMM_FPROP,
    ),
    "walk_over_one_tap_a_step": Mutant(
        "cuda/igemm/igemm_load.h", "while (at >= extent && row", "if (at >= extent && row", "plain", IGEMM_FPROP
    ),
    "walk_forgets_the_row_of_taps": Mutant(
        "cuda/igemm/igemm_load.h",
        "moves[which].row[i] = to_row - wide * to_column;",
        "moves[which].row[i] = to_row - (wide - 1) * to_column;",
        "plain",
        IGEMM_DGRAD,
    ),
    "operand_past_the_reduction": Mutant(
        "cuda/igemm/igemm_load.h",
        "walk.row != walk.end_row && i < b_count",
        "i < b_count",
        "plain",
        IGEMM_FPROP,
    ),
    "distance_added_where_the_swizzle_turns": Mutant(
        "cuda/igemm/igemm_wgrad_sm80.cu",
        "(first ^ (j * SHARE * 16 & TURNED))",
        "(first + (j * SHARE * 16 & TURNED))",
        "plain",
        IGEMM_WGRAD,
    ),
    "step_added_where_the_swizzle_turns": Mutant(
        "cuda/tile/gemm.h", "(at ^ (step * 32)) + i", "(at + (step * 32)) + i", "plain", IGEMM_FPROP
    ),
    "pixel_past_the_split": Mutant(
        "cuda/igemm/igemm_wgrad_sm80.cu",
        "const bool inside = m < end;",
        "const bool inside = true;",
        "plain",
        IGEMM_WGRAD,
    ),
    "shares_summed_too_early": Mutant(
        "cuda/depthwise/depthwise_backward_any_sm80.cu",
        "__syncthreads();  // orders the threads'",
        "// orders the threads'",
        "race",
        BACKWARD_ANY,
    ),
    "part_of_a_large_filter_forgotten": Mutant(
        "cuda/depthwise/depthwise_backward_any_sm80.cu",
        "while (begin < entries)",
        "while (false)",
        "plain",
        BACKWARD_ANY,
    ),
    "statistics_of_what_was_not_stored": Mutant(
        "cuda/igemm/igemm_pixels.h", "seen.template add_stored<T>(v)", "seen.add(v)", "plain", IGEMM_FPROP
    ),
    "statistics_row_forgotten": Mutant(
        "cuda/tile/statistics.h",
        "table.join_rows(0, rows, c,",
        "table.join_rows(0, rows - (rows > 1), c,",
        "plain",
        IGEMM_FPROP,
    ),
    "statistics_before_the_slabs_are_read": Mutant(
        "cuda/igemm/igemm_pixels.h",
        "__syncthreads();  // all have read their slabs",
        "// all have read their slabs",
        "race",
        IGEMM_FPROP,
    ),
    "statistics_over_rows_not_yet_read": Mutant(
        "cuda/tile/statistics.h",
        "__syncthreads();  // the rows are read before",
        "// the rows are read before",
        "race",
        WINDOW,
    ),
    "row_stored_past_its_end": Mutant(
        "cuda/depthwise/depthwise_patch.h", "p.w % kPatchW == 0 && p.pad_w", "p.pad_w", "plain", PLANES
    ),
    "missing_barrier_without_tensor_cores": Mutant(
        "cuda/simt/simt_sm80.cu", "__syncthreads();  // the tile is whole;", "// the tile is whole;", "plain", SIMT
    ),
    "one_buffer_instead_of_two": Mutant("cuda/simt/simt_sm80.cu", "buffer ^= 1", "buffer ^= 0", "race", SIMT),
    "patch_read_too_early": Mutant(
        "cuda/stem/stem_fprop_sm80.cu", "__syncthreads();  // patch, filters", "// patch, filters", "plain", STEM
    ),
    "patch_overwritten_too_early": Mutant(
        "cuda/stem/stem_fprop_sm80.cu",
        "__syncthreads();  // all have read the patch",
        "// all have read the patch",
        "race",
        STEM,
    ),
    "statistics_overwritten_by_the_next_patch": Mutant(
        "cuda/stem/stem_fprop_sm80.cu",
        "__syncthreads();  // the statistics are read",
        "// the statistics are read",
        "race",
        STEM,
    ),
    "pixels_past_the_last_tap": Mutant(
        "cuda/stem/stem_fprop_sm80.cu",
        "{exists ? static_cast<uint32_t>(distance) : zeros, exists}",
        "{static_cast<uint32_t>(distance), true}",
        "plain",
        STEM,
    ),
    "filters_in_another_order": Mutant(
        "cuda/stem/stem_fprop_sm80.cu",
        "filter / 32 * 4 + filter % 8 / 2",
        "filter / 32 * 4 + filter % 8 % 4",
        "plain",
        STEM,
    ),
    "patch_of_the_last_tile": Mutant(
        "cuda/stem/stem.h",
        "left = at.q * problem.stride_w - problem.pad_w",
        "left = min_of(at.q, plan.q - kStemCols) * problem.stride_w - problem.pad_w",
        "plain",
        STEM,
    ),
    "patch_past_the_row": Mutant(
        "cuda/stem/stem.h",
        "static_cast<uint32_t>(left + col) < static_cast<uint32_t>(problem.w)",
        "static_cast<uint32_t>(left + col) <= static_cast<uint32_t>(problem.w)",
        "plain",
        STEM,
    ),
    "dy_not_waited_for": Mutant(
        "cuda/stem/stem_wgrad_sm80.cu", "cp_async_wait<0>", "cp_async_wait<1>", "plain", STEM_WGRAD
    ),
    "dy_overwritten_too_early": Mutant(
        "cuda/stem/stem_wgrad_sm80.cu",
        "__syncthreads();  // all have read dy",
        "// all have read dy",
        "race",
        STEM_WGRAD,
    ),
    "neighbours_of_a_fragment_swapped": Mutant(
        "cuda/stem/stem_wgrad_sm80.cu",
        "(first & 0xFFFFu) | second << 16",
        "(second & 0xFFFFu) | first << 16",
        "plain",
        STEM_WGRAD,
    ),
    "group_of_taps_forgotten": Mutant(
        "cuda/stem/stem_wgrad_sm80.cu",
        "if (group > 0 && first_tap",
        "if (group > 0 && 8 + first_tap",
        "plain",
        STEM_WGRAD,
    ),
    "dy_past_the_edge": Mutant(
        "cuda/stem/stem_wgrad_sm80.cu",
        "at.q + col < plan.q && filter",
        "filter",
        "plain",
        STEM_WGRAD,
    ),
    "split_forgotten": Mutant(
        "cuda/tile/reduce_splits.h", "split < splits;", "split < splits - (splits > 1);", "plain", BACKWARD
    ),
}

# What a variant alone needs of its source file: one instance instead of twenty keeps the mutants quick.
ONLY = {
    IGEMM_FPROP: ("cuda/igemm/igemm_fprop_sm80.cu", "CONVEXT_IGEMM(cuda::bf16, bf16, 64, Tile, 64x64, , true)"),
    IGEMM_DGRAD: ("cuda/igemm/igemm_dgrad_sm80.cu", "CONVEXT_IGEMM(cuda::bf16, bf16, 64, Tile, 64x64, , true)"),
    IGEMM_WGRAD: ("cuda/igemm/igemm_wgrad_sm80.cu", "CONVEXT_IGEMM(cuda::bf16, bf16, 64, Tile, 64x64, , true)"),
    GATHER: ("cuda/igemm/igemm_fprop_sm80.cu", "CONVEXT_IGEMM(cuda::bf16, bf16, 32, Gather, 64x64, _gather, false)"),
    WINDOW: ("cuda/depthwise/depthwise_fprop_sm80.cu", None),
    BACKWARD: ("cuda/depthwise/depthwise_backward_window_sm80.cu", None),
    BACKWARD_ANY: ("cuda/depthwise/depthwise_backward_any_sm80.cu", None),
    PLANES: ("cuda/depthwise/depthwise_backward_planes_sm80.cu", None),
    SIMT: ("cuda/simt/simt_sm80.cu", None),
    STEM: ("cuda/stem/stem_fprop_sm80.cu", "CONVEXT_STEM(cuda::bf16, bf16, 64, 3)"),
    STEM_WGRAD: ("cuda/stem/stem_wgrad_sm80.cu", "CONVEXT_STEM(cuda::bf16, bf16, 64, 192, 2, 3, 3)"),
}


def build_alone(folder, form: str, variant: str, known, mutant: Mutant | None = None):
    """cuda_variants with one variant, its sources edited by the mutant. What the edit does not reach is in `known`."""
    source, instance = ONLY[variant]
    csrc = harness.sources_of(folder, variant, source, instance)
    if mutant is not None:
        edit(csrc / mutant.file, mutant.old, mutant.new)
    return harness.build(folder / form, form, [source], VARIANTS, csrc, known)


def edit(file, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
    file.write_text(text.replace(old, new))


@pytest.fixture(scope="session")
def sound(shared, tmp_path_factory):
    """sound(variant, form): the same single-variant program without a bug, which must pass, once. Returns the folder of
    the objects that it consists of."""

    def check(variant: str, form: str):
        with shared(f"sound_{variant}_{form}") as known:
            if not (known / "passed").exists():
                program = build_alone(tmp_path_factory.mktemp("sound"), form, variant, known)
                arguments = [] if form == "plain" else ["--one-policy"]
                assert_clean(harness.run(program, variant, *arguments))
                (known / "passed").touch()
        return known

    return check


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(tmp_path, sound, name):
    mutant = MUTANTS[name]
    known = sound(mutant.variant, mutant.form)
    program = build_alone(tmp_path, mutant.form, mutant.variant, known, mutant)
    arguments = [] if mutant.form == "plain" else ["--one-policy"]
    done = harness.run(program, mutant.variant, *arguments)
    assert done.returncode != 0, f"nobody noticed: {done.stdout}"


def test_shared_memory_of_each_gpu(tmp_path, sound):
    """A kernel that asks for more than some GPU has is caught for those, and for those alone."""
    known = sound(IGEMM_FPROP, "plain")
    asks = "igemm_shared_bytes<TILE, DGRAD, VECTOR>"
    more = Mutant("cuda/igemm/igemm_pixels.h", f"{asks}, args.stream", f"{asks} + 56 * 1024, args.stream", "", "")
    program = build_alone(tmp_path, "plain", IGEMM_FPROP, known, more)
    for sm, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (120, 99)):
        done = harness.run(program, IGEMM_FPROP, "--one-policy", "--case", "direct_3x3", "--sm", str(sm))
        assert (done.returncode == 0) == (kib > 104)
        assert done.returncode == 0 or f"on sm_{sm} it may have {kib * 1024}" in done.stdout
