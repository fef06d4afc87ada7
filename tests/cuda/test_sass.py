"""The reader of machine code, on machine code written down here: no compiler, no disassembler, no GPU."""

from __future__ import annotations

import pytest

from convext.bench import sass

TILE = "igemm_pixels<Tile<__nv_bfloat16, 128, 128, 2, 4, 2, 2, 128>, false, true>"  # 64 matrix instructions a step

BODY = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   I2F.RP R1, R2 ;
.L_x_0:
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R45+0x800], desc[UR12][R18.64], !P1 ;
.L_x_1:
        /*0050*/                   IADD3 R4, R4, 0x8, RZ ;
        /*0060*/              @P1  BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   LDSM.16.M88.4 R16, [R40+0x2000] ;
%s
        /*0fd0*/                   HMMA.16816.F32.BF16 R104, R40, R20.reuse, R104 ;
        /*0fe0*/              @P0  BRA `(.L_x_2) ;
        /*0ff0*/             @!UP0 UIADD3 UR6, UR8, -0x8000, URZ ;
        /*1000*/              @P0  BRA `(.L_x_0) ;
        /*1010*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*1020*/                   EXIT ;
.L_x_3:
        /*1030*/                   BRA `(.L_x_3) ;
"""


def kernel(name=TILE, arch="sm_90", registers=128, threads=256, inside="", shared=1024):
    return sass.Kernel("symbol", name, arch, registers, 0, shared, threads, list(sass._instructions(BODY % inside)))


def test_instructions_and_their_pipes():
    found = {i.base: i for i in kernel().instructions}
    assert found["LDGSTS"].bytes == 16 and found["LDGSTS"].pipe == "copy"
    assert found["UIADD3"].pipe == "uniform" and found["IADD3"].pipe == "integer" and found["HMMA"].pipe == "tensor"
    assert found["STG"].opcode == "STG.E.128" and sass.Instruction("LDG.E.U16.CONSTANT", "").bytes == 2


def test_a_loop_of_mma_steps_counts_as_often_as_it_runs_and_others_not_at_all():
    k = kernel()
    # Itself: BAR, BRA, LDGSTS, UIADD3, BRA. In it, 64 times: LDSM, HMMA, BRA. The loop of IADD3 is left out.
    assert k.tile.warp_mmas == 64
    assert k.step == {"barrier": 1, "branch": 2 + 64, "copy": 1, "uniform": 1, "ldsm": 64, "tensor": 64}
    assert k.per_mma == pytest.approx((5 + 3 * 64) / 64)


def test_cycles_of_a_step():
    # 8 warps over 4 schedulers; 128*128*64 products; (128*4 + 128*2 + 128 + 128) rows of 128 bytes in shared memory.
    cycles = kernel().cycles()
    assert cycles["issue"] == (5 + 3 * 64) * 2
    assert cycles["tensor"] == pytest.approx(128 * 128 * 64 / (0.62 * 2048))
    assert cycles["shared"] == 1024


@pytest.mark.parametrize(
    ("arch", "where", "registers", "dynamic", "blocks"),
    [
        ("sm_90", "sm_90", 128, 73792, 2),  # registers: 65536 / (128 * 256)
        ("sm_90", "sm_90", 129, 73792, 1),  # 136, as they are dealt out
        ("sm_90", "sm_90", 64, 73792, 3),  # shared memory: 228 KiB / (73792 + 1024)
        ("sm_80", "sm_80", 64, 73792, 2),  # 164 KiB
        ("sm_80", "sm_86", 64, 73792, 1),  # 100 KiB
        ("sm_80", "sm_86", 32, 0, 6),  # 48 warps
        ("sm_90", "sm_90", 16, 0, 8),  # 64 warps
    ],
)
def test_occupancy(arch, where, registers, dynamic, blocks):
    k = kernel(arch=arch, registers=registers, shared=1024 if arch == "sm_90" else 0)
    assert k.blocks(dynamic, where) == blocks and k.warps(dynamic, where) == 8 * blocks


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("shared=73792 warps=16 per_mma=3.1", []),
        ("shared=73792 warps=17", ["16 warps a multiprocessor, 17 promised"]),
        ("shared=73792 warps=16 per_mma=3", ["3.08 instructions a matrix instruction, 3 promised"]),
        ("shared=0 stores=16", ["no access at all in a loop, stores of 16 bytes promised"]),
    ],
)
def test_promises(tmp_path, line, said):
    (tmp_path / "a.h").write_text(f"// @sass igemm_pixels<.*, 128, 128, .*, true> {line}\n")
    (promise,) = sass.promises(tmp_path)
    found = promise.broken_by(kernel())
    assert [text.split("): ")[1] for text in found] == said
    assert sass.promised(kernel(), [promise]) is promise and sass.promised(kernel("simt<float>"), [promise]) is None


@pytest.mark.parametrize("line", ["igemm", "igemm blocks=3", "igemm warps"])
def test_a_line_that_is_no_promise_is_an_error(tmp_path, line):
    (tmp_path / "a.cu").write_text(f"// @sass {line}\n")
    with pytest.raises(ValueError, match=r"a\.cu:1"):
        sass.promises(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["S2R R0, SR_TID.X", "S2UR UR11, SR_CgaCtaId", "MUFU.RCP R0, R0", "LDL R8, [R1]", "CALL.REL.NOINC `($div)"],
)
def test_what_has_no_place_in_a_main_loop(text):
    assert sass.slow_in_main_loop(kernel()) == []  # what is before the loop may stand there
    (wrong,) = sass.slow_in_main_loop(kernel(inside=f"        /*0080*/                   {text} ;"))
    assert text in wrong
    jump = "        /*0080*/                   CALL.REL.NOINC `(.L_x_3) ;"
    assert sass.slow_in_main_loop(kernel(inside=jump)) == []


def test_variants():
    assert sass.variant(kernel()) == "fprop_igemm_bf16_128x128x64_sm80"
    gather = "igemm_wgrad<Tile<float, 64, 32, 2, 2, 4, 4, 64>, false>"
    assert sass.variant(kernel(gather)) == "wgrad_igemm_tf32_64x32x16_gather_sm80"
    assert sass.variant(kernel("simt<float>")) is None


STEM = """.L_x_0:
        /*0000*/                   LDG.E.64.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_1:
        /*0020*/                   LDS.64 R92, [R115] ;
        /*0030*/                   LDS.128 R36, [R114] ;
%s
        /*0100*/              @P0  BRA `(.L_x_1) ;
        /*0110*/              @P0  BRA `(.L_x_0) ;
"""


def test_of_a_tile_of_one_stage_the_main_loop_only_multiplies():
    name = "stem_fprop<StemTile<__nv_bfloat16, 128, 32, 4, 1, 1, 4, 32> >"
    body = STEM % ("        /*0040*/                   HMMA.16816.F32.BF16 R64, R8, R36, R64 ;\n" * 8)
    k = sass.Kernel("symbol", name, "sm_90", 117, 0, 1024, 128, list(sass._instructions(body)))
    assert k.tile.warp_mmas == 8 and k.step == {"shared": 2, "tensor": 8, "branch": 1}
    # Four warps, each a load of 32 * 8 bytes and one of 32 * 16.
    assert k.cycles() == {"issue": 11, "tensor": pytest.approx(128 * 32 * 16 / (0.62 * 2048)), "shared": 4 * 768 / 128}
    assert sass.variant(k) == "fprop_stem_bf16_128x32x16_sm80"


def test_the_cost_models_table():
    said = [sass.Promise("here", "igemm_pixels<", {"shared": 73792})]
    text = sass.machine_code([kernel(), kernel("simt<float>"), kernel(arch="sm_80")], said)
    assert text.count("CONVEXT_MACHINE_CODE(") == 1
    assert "CONVEXT_MACHINE_CODE(fprop_igemm_bf16_128x128x64_sm80, 394, 1024, 2)" in text


def test_tables():
    said = [sass.Promise("here", "igemm_pixels<", {"shared": 73792})]
    rows = sass.table([kernel(arch="sm_80", shared=0)], said).rows
    assert [row[1] for row in rows] == ["sm_80", "sm_86", "sm_89"] and [row[5] for row in rows] == ["2", "1", "1"]
    copy = """.L_x_0:
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/                   IADD3 R2, R2, 0x8, RZ ;
        /*0020*/                   STG.E.128 desc[UR4][R8.64], R4 ;
        /*0030*/              @P0  BRA `(.L_x_0) ;
"""
    copying = sass.Kernel("symbol", "normalise<float, 4>", "sm_90", 40, 0, 1024, 256, list(sass._instructions(copy)))
    (row,) = sass.accesses([copying, kernel()]).rows
    assert row == ["normalise<float, 4>", "sm_90", "40", "16", "16", "2.0"]  # 4 instructions for 32 bytes
