"""The interpreter of PTX (tests/support/ptx*.py) on texts written here: no compiler, no GPU."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import Module, PtxError
from ptx_machine import Memory, launch

KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 room[];
.visible .entry kernel(.param .u64 in, .param .u64 out, .param .u32 count)
.maxntid 64, 1, 1
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<20>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    .reg .f64 %fd<9>;
    ld.param.u64 %rd1, [in];
    ld.param.u64 %rd2, [out];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %rd1, %r0, SIZE, %rd1;
    mad.wide.u32 %rd2, %r0, SIZE, %rd2;
BODY
    ret;
}
"""


def run(body: str, values: np.ndarray, result="u4") -> np.ndarray:
    """What each thread stores at [%rd2]; thread i has values[i] at [%rd1]."""
    size, threads = values.dtype.itemsize, len(values)
    memory = Memory()
    given, out = memory.put(values), memory.put(np.zeros(threads * size, np.uint8), writable=True)
    text = KERNEL.replace("BODY", body).replace("SIZE", str(size))
    parameters = np.array([given, out], np.uint64).tobytes() + np.uint32(threads).tobytes()
    launch(Module(text).kernel("kernel"), (1, 1, 1), (threads, 1, 1), 256, parameters, memory)
    return memory.read(out, result, threads)


NAN, INF = float("nan"), float("inf")


def of_words(line: str) -> str:
    return f"ld.global.u32 %r1, [%rd1]; {line}; st.global.u32 [%rd2], %r2;"


@pytest.mark.parametrize(
    ("line", "given", "wanted"),
    [
        ("add.s32 %r2, %r1, -1", [0, 5], [0xFFFFFFFF, 4]),
        ("sub.s32 %r2, 1, %r1", [3], [0xFFFFFFFE]),
        ("mul.lo.s32 %r2, %r1, 0x10001", [0x10001], [0x20001]),
        ("mul.hi.u32 %r2, %r1, -1", [3], [2]),
        ("mul.hi.s32 %r2, %r1, -1", [3], [0xFFFFFFFF]),
        ("mad.lo.s32 %r2, %r1, 3, %r1", [5], [20]),
        ("div.s32 %r2, %r1, 2", [7, 0xFFFFFFF9], [3, 0xFFFFFFFD]),
        ("rem.s32 %r2, %r1, 2", [7, 0xFFFFFFF9], [1, 0xFFFFFFFF]),
        ("div.u32 %r2, %r1, 2", [0xFFFFFFF9], [0x7FFFFFFC]),
        ("min.s32 %r2, %r1, 3", [2, 0xFFFFFFFF, 9], [2, 0xFFFFFFFF, 3]),
        ("max.u32 %r2, %r1, 3", [2, 0xFFFFFFFF], [3, 0xFFFFFFFF]),
        ("shl.b32 %r2, %r1, 31", [3], [0x80000000]),
        ("shl.b32 %r2, 1, %r1", [4, 32, 40], [16, 0, 0]),
        ("shr.s32 %r2, %r1, 40", [0x80000000, 5], [0xFFFFFFFF, 0]),
        ("shr.u32 %r2, %r1, 4", [0x80000000], [0x08000000]),
        ("shf.l.wrap.b32 %r2, %r1, 0x1, 4", [0xF0000000], [0x1F]),
        ("shf.r.clamp.b32 %r2, %r1, 0x1, 40", [0xF0000000], [1]),
        ("bfe.u32 %r2, %r1, 4, 8", [0x12345678], [0x67]),
        ("bfe.s32 %r2, %r1, 4, 4", [0x12345678, 0x000000F0], [7, 0xFFFFFFFF]),
        ("bfi.b32 %r2, %r1, -1, 4, 8", [0x12345678], [0xFFFFF78F]),
        ("bfi.b32 %r2, %r1, 0, 28, 8", [0xFF], [0xF0000000]),
        ("prmt.b32 %r2, %r1, 0x55667788, 0x4321", [0x11223344], [0x88112233]),
        ("prmt.b32 %r2, %r1, 0, 0x8888", [0x80, 0x70], [0xFFFFFFFF, 0]),
        ("lop3.b32 %r2, %r1, 0b1100, 0b1010, 0xCA", [0xFFFFFFFF, 0], [0b1100, 0b1010]),
        ("xor.b32 %r2, %r1, -1", [5], [0xFFFFFFFA]),
        ("not.b32 %r2, %r1", [5], [0xFFFFFFFA]),
        ("and.b32 %r2, %r1, 6; or.b32 %r2, %r2, 8", [5], [12]),
        ("mad.hi.u32 %r2, %r1, -1, 7", [3], [9]),
        ("neg.s32 %r2, %r1", [5], [0xFFFFFFFB]),
        ("mov.pred %p1, -1; selp.b32 %r2, 1, 2, %p1", [5], [1]),
        ("mov.b32 %f1, %r1; cvt.rn.bf16x2.f32 %r2, %f1, 0f3F800000", [0x40000000], [0x40003F80]),
        ("mov.b32 %f1, %r1; cvt.rn.f16x2.f32 %r2, %f1, 0f3F800000", [0x40000000], [0x40003C00]),
        ("cvt.u16.u32 %rs1, %r1; cvt.s32.s16 %r2, %rs1", [0x1FFFF, 0x7FFF], [0xFFFFFFFF, 0x7FFF]),
        ("cvt.s8.s32 %rs1, %r1; cvt.u32.u16 %r2, %rs1", [0x80], [0xFF80]),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1}", [0x12345678], [0x56781234]),
        ("setp.lt.s32 %p1, %r1, 0; selp.b32 %r2, 1, 2, %p1", [0x80000000, 5], [1, 2]),
        ("setp.lo.u32 %p1, %r1, 6; selp.b32 %r2, 1, 2, %p1", [0x80000000, 5], [2, 1]),
        ("setp.eq.s32 %p2, %r1, 3; setp.gt.or.s32 %p1, %r1, 4, !%p2; selp.b32 %r2, 1, 2, %p1", [3, 4, 5], [2, 1, 1]),
        ("setp.eq.s32 %p1|%p2, %r1, 3; selp.b32 %r2, 1, 2, %p2", [3, 4], [2, 1]),
        ("mov.u32 %r2, 7; setp.eq.s32 %p1, %r1, 3; @%p1 mov.u32 %r2, 8; @!%p1 add.s32 %r2, %r2, 2", [3, 4], [8, 9]),
        ("{ .reg .b32 %r1; mov.u32 %r1, 5; } mov.u32 %r2, %r1", [9], [9]),
    ],
)
def test_integers(line, given, wanted):
    assert run(of_words(line), np.array(given, np.uint32)).tolist() == wanted


def of_floats(line: str) -> str:
    return f"ld.global.f32 %f1, [%rd1]; {line}; st.global.f32 [%rd2], %f2;"


@pytest.mark.parametrize(
    ("line", "given", "wanted"),
    [
        ("add.f32 %f2, %f1, 0f3F800000", [1.5, NAN], [2.5, NAN]),
        ("fma.rn.f32 %f2, %f1, %f1, 0fBF800000", [1 + 2.0**-12], [2.0**-11 + 2.0**-24]),  # more than a product holds
        ("fma.rm.f32 %f2, %f1, 0f3F800000, 0f4B400000", [-0.4, 0.6], [12582911, 12582912]),
        ("cvt.sat.f32.f32 %f2, %f1", [-1, 0.5, 3, NAN], [0, 0.5, 1, 0]),
        ("mul.ftz.f32 %f2, %f1, 0f3F000000", [2.0**-126, 4], [0, 2]),
        ("rcp.rn.f32 %f2, %f1", [4, 0], [0.25, INF]),
        ("sqrt.rn.f32 %f2, %f1", [4, -1], [2, NAN]),
        ("ex2.approx.ftz.f32 %f2, %f1", [3, -INF], [8, 0]),
        ("max.f32 %f2, %f1, 0f00000000", [NAN, -1, 2], [0, 0, 2]),
        ("max.NaN.f32 %f2, %f1, 0f00000000", [NAN, -1, 2], [NAN, 0, 2]),
        ("abs.f32 %f2, %f1", [-2], [2]),
        ("copysign.f32 %f2, %f1, 0f40000000", [-5, 5], [-2, 2]),
        ("cvt.rzi.s32.f32 %r1, %f1; cvt.rn.f32.s32 %f2, %r1", [-1.7, 1.7, 1e20, NAN], [-1, 1, 2147483648, 0]),
        ("cvt.rni.f32.f32 %f2, %f1", [0.5, 1.5], [0, 2]),
        ("cvt.rn.f16.f32 %rs1, %f1; cvt.f32.f16 %f2, %rs1", [1 + 2.0**-11, 70000], [1, INF]),
        ("cvt.rn.bf16.f32 %rs1, %f1; cvt.f32.bf16 %f2, %rs1", [1 + 2.0**-8, 1 + 3 * 2.0**-8], [1, 1 + 2.0**-6]),
        ("cvt.rna.tf32.f32 %r1, %f1; mov.b32 %f2, %r1", [1 + 2.0**-11, 1 + 2.0**-12], [1 + 2.0**-10, 1]),
        ("cvt.f64.f32 %fd1, %f1; mul.f64 %fd1, %fd1, 0d3FB999999999999A; cvt.rn.f32.f64 %f2, %fd1", [10], [1]),
        ("setp.ne.f32 %p1, %f1, 0f3F800000; selp.f32 %f2, 0f3F800000, 0f40000000, %p1", [NAN, 1, 3], [2, 2, 1]),
        ("setp.neu.f32 %p1, %f1, 0f3F800000; selp.f32 %f2, 0f3F800000, 0f40000000, %p1", [NAN, 1, 3], [1, 2, 1]),
        ("setp.geu.f32 %p1, %f1, 0f3F800000; selp.f32 %f2, 0f3F800000, 0f40000000, %p1", [NAN, 1, 0], [1, 1, 2]),
        ("setp.nan.f32 %p1, %f1, %f1; selp.f32 %f2, 0f3F800000, 0f40000000, %p1", [NAN, 1], [1, 2]),
    ],
)
def test_floats(line, given, wanted):
    got = run(of_floats(line), np.array(given, np.float32), "f4")
    np.testing.assert_array_equal(got, np.array(wanted, np.float32))


@pytest.mark.parametrize(
    ("line", "given", "wanted"),
    [
        ("mul.lo.s64 %rd4, %rd3, %rd3", [1 << 33], [0]),
        ("mul.hi.u64 %rd4, %rd3, %rd3", [1 << 33], [4]),
        ("cvt.u32.u64 %r1, %rd3; cvt.s64.s32 %rd4, %r1", [0x1FFFFFFFF], [2**64 - 1]),
        ("mov.b64 {%r1, %r2}, %rd3; mov.b64 %rd4, {%r2, %r1}", [0x1122334455667788], [0x5566778811223344]),
        ("cvt.u32.u64 %r1, %rd3; mul.wide.s32 %rd4, %r1, -2", [3], [2**64 - 6]),
        ("mov.b64 %fd1, %rd3; fma.rn.f64 %fd2, %fd1, %fd1, 0dBFF0000000000000; mov.b64 %rd4, %fd2",
         [int(np.float64(1 + 2.0**-30).view(np.uint64))], [int(np.float64(2.0**-29 + 2.0**-60).view(np.uint64))]),
    ],
)  # fmt: skip
def test_64_bits(line, given, wanted):
    got = run(f"ld.global.u64 %rd3, [%rd1]; {line}; st.global.u64 [%rd2], %rd4;", np.array(given, np.uint64), "u8")
    assert got.tolist() == wanted


LANES = np.arange(32, dtype=np.uint32)


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("bfly.b32 %r2|%p1, %r1, 5, 31, -1", LANES ^ 5),
        ("down.b32 %r2|%p1, %r1, 1, 31, -1", np.minimum(LANES + 1, 31)),
        ("up.b32 %r2|%p1, %r1, 1, 0, -1", np.maximum(LANES.astype(int) - 1, 0)),
        ("idx.b32 %r2|%p1, %r1, 3, 0x1C1F, -1", LANES & 28 | 3),  # segments of four
    ],
)
def test_shuffles(how, wanted):
    assert run(of_words(f"shfl.sync.{how}"), LANES).tolist() == wanted.tolist()


def test_a_ballot():
    body = of_words("setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r2, %p1, -1")
    assert run(body, LANES).tolist() == [31] * 32


ROWS = """mov.u32 %r3, room; shl.b32 %r4, %r0, 4; add.s32 %r3, %r3, %r4; setp.lt.u32 %p1, %r0, 16;
@%p1 st.shared.v4.u32 [%r3], {%r1, %r1, %r1, %r1}; bar.sync 0;"""  # row i of 8 halves: i, 0, i, 0, ...


def test_matrices_from_shared_memory():
    """Lanes whose addresses are not asked for have none."""
    two = "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r2, %r5}, [%r3]; shl.b32 %r5, %r5, 16; add.s32 %r2, %r2, %r5"
    got = run(of_words(f"{ROWS} {two}"), LANES)
    assert got.tolist() == (LANES // 4 + (8 + LANES // 4 << 16)).tolist()
    got = run(of_words(f"{ROWS} ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {{%r2}}, [%r3]"), LANES)
    row, column = LANES % 4 * 2, LANES // 4
    assert got.tolist() == np.where(column % 2 == 0, row | row + 1 << 16, 0).tolist()


@pytest.mark.parametrize("space", ["shared", "local"])
def test_memory_by_its_own_address_and_by_a_generic_one(space):
    where = {"shared": "room", "local": "own"}[space]
    body = of_words(f""".local .align 8 .b8 own[16]; mov.u64 %rd3, {where}; cvta.{space}.u64 %rd4, %rd3;
    st.{space}.u32 [%rd3+4], %r1; ld.u32 %r2, [%rd4+4]; cvta.to.{space}.u64 %rd5, %rd4;
    st.v2.u32 [%rd4+8], {{%r2, %r2}}; ld.{space}.u8 %r3, [%rd5+8]; ld.{space}.s8 %r4, [%rd5+8];
    add.s32 %r2, %r3, %r4""")
    # Of local memory, each thread has its own; of shared memory the last one's value stays.
    assert run(body, np.array([3, 0x80], np.uint32)).tolist() == ([0, 0] if space == "shared" else [6, 0])


def test_threads_part_and_meet_again():
    # The number of halvings until zero, by a loop that threads leave one after another; and what they do after it.
    body = of_words("""mov.u32 %r2, 0;
$loop: setp.eq.u32 %p1, %r1, 0; @%p1 bra $done;
    and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra $even;
    add.s32 %r2, %r2, 100; bra.uni $next;
$even: add.s32 %r2, %r2, 1;
$next: shr.u32 %r1, %r1, 1; bra.uni $loop;
$done: bar.sync 0; shfl.sync.bfly.b32 %r2, %r2, 1, 31, -1""")
    values = np.arange(64, dtype=np.uint32)
    wanted = [100 * v.bit_count() + v.bit_length() - v.bit_count() for v in values.tolist()]
    assert run(body, values).tolist() == [wanted[i ^ 1] for i in range(64)]


def test_a_branch_by_table():
    body = of_words("""add.s32 %r2, %r1, 10; $table: .branchtargets $a, $b; brx.idx %r1, $table;
$a: mov.u32 %r2, 5; $b: add.s32 %r2, %r2, 1""")
    assert run(body, np.array([0, 1], np.uint32)).tolist() == [6, 12]


STAGE = "mov.u32 %r3, room; shl.b32 %r4, %r0, 2; add.s32 %r3, %r3, %r4;"


def test_copies_land_when_they_are_waited_for():
    copy = f"{STAGE} cp.async.ca.shared.global [%r3], [%rd1], 4; cp.async.commit_group;"
    load = "ld.shared.u32 %r2, [%r3]; st.global.u32 [%rd2], %r2;"
    values = np.array([1, 2, 3], np.uint32)
    assert run(f"{copy} cp.async.wait_group 0; {load}", values).tolist() == [1, 2, 3]
    assert run(f"{copy} cp.async.wait_group 1; {load}", values).tolist() == [0xFFFFFFFF] * 3
    assert run(f"{copy} cp.async.wait_all; {load}", values).tolist() == [1, 2, 3]
    some = "setp.eq.u32 %p1, %r0, 1; selp.b32 %r5, 4, 0, %p1; cp.async.ca.shared.global [%r3], [%rd1], 4, %r5;"
    assert run(f"{STAGE} {some} cp.async.wait_all; {load}", values).tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("frob.b32 %r1, %r2;", r"line \d+: frob\.b32 %r1, %r2: this instruction is not known here"),
        ("add.sat.s32 %r1, %r2, %r3;", r"add\.sat.*the modifier \.sat is not known here"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%fd1, %fd2}, {%fd3}, {%fd4}, {%fd5, %fd6};",
         "matrix product"),
        ("add.s32 %r1, %rd1, 2;", "%rd1 has 64 bits, .s32 wants 32"),
        ("mov.u32 %r1, nowhere;", "nowhere is not known here"),
        ("ld.global.u32 %r1, [%rd1+1];", "4 bytes at 0x.*which is no multiple"),
        ("ld.global.u32 %r1, [%rd1+4096];", "in nobody's memory"),
        ("st.global.u32 [%rd1], %r0;", "may only be read"),
        ("mov.u32 %r1, 0; ld.shared.u32 %r2, [%r1];", "outside of shared memory"),
        ("mov.u32 %r1, room; ld.shared.u32 %r2, [%r1+256];", "outside of shared memory"),
        ("setp.eq.u32 %p1, %r0, 0; @%p1 bra $end; bar.warp.sync 3; $end: bar.sync 0;", "deadlock.*bar.warp.sync"),
        ("shfl.sync.idx.b32 %r1, %r0, 5, 31, -1;", "a lane reads another that is not there"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_names_the_line(body, said):
    with pytest.raises(PtxError, match=said):
        run(body, np.array([1, 2], np.uint32))


def test_a_barrier_waits_for_those_that_are_left():
    body = "setp.eq.u32 %p1, %r0, 0; @%p1 ret; bar.sync 0; st.global.u32 [%rd2], %r0;"
    assert run(body, np.arange(64, dtype=np.uint32)).tolist() == list(range(64))
