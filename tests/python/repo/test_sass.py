# SPDX-License-Identifier: Apache-2.0
"""The hot loop that `make kernels` counts, found in code as nvdisasm prints it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from sass import hot_loops

# An outer loop of 9 instructions with a load and a store, an inner one that only multiplies, and code behind the loops.
CODE = """
\t.section\t.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/                   F2FP.BF16.F32.PACK_AB R9, R8, R9 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   F2F.F16.F32 R9, R9 ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*0070*/             @!UP0 BRA `(.L_x_3) ;
.L_x_3:
        /*0080*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0090*/                   BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4) ;
"""


def test_the_smallest_loop_that_multiplies_and_moves_data():
    loop = hot_loops(CODE)["kernel"]
    assert loop.instructions == 9
    assert loop.single_converts == 1
    assert loop.counts["HMMA"] == 1


def test_without_data_the_smallest_that_multiplies():
    loop = hot_loops(CODE.replace("LDG", "LDC").replace("STG", "STS"))["kernel"]
    assert (loop.instructions, loop.single_converts) == (3, 0)


def test_without_tensor_cores_the_smallest_that_moves_data():
    assert hot_loops(CODE.replace("HMMA", "FFMA"))["kernel"].instructions == 9


def test_without_loops_all_of_it():
    assert hot_loops(CODE.replace("BRA", "NOP"))["kernel"].instructions == 12
