"""kernels/cuda/sass.py over a cuobjdump that only pretends: counts, the hottest loop, and the blocks that fit."""
import contextlib
import io
import os
import sys
import tempfile
import unittest
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "kernels", "cuda"))
import sass  # noqa: E402

SASS = """	code for sm_90
		Function : mma_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0030*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/                   FFMA R1, R2, R3, R4 ;
        /*0070*/                   LDS R1, [R2] ;
        /*0080*/              @P1  BRA 0x70 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/              @!P0 BRA 0x30 ;
        /*00b0*/                   STL [R1], R2 ;
        /*00c0*/                   STG.E desc[UR4][R2.64], R5 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0 ;
		Function : copy_kernel
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA 0x10 ;
        /*0030*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0040*/              @P0  BRA 0x30 ;
        /*0050*/                   EXIT ;
"""
RESOURCES = """ Function mma_kernel:
  REG:168 STACK:8 SHARED:3072 LOCAL:0 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function copy_kernel:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ELF = """.nv.info.mma_kernel
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x80 0x1 0x1 
.nv.info.copy_kernel
"""
TOOL = """#!/bin/sh
case "$*" in
  *broken*) echo "cuobjdump fatal: not an ELF" >&2; exit 255 ;;
  *--list-elf*empty.o) echo "ELF file    1: empty.1.sm_80.cubin" ;;
  *--list-elf*) echo "ELF file    1: demo.1.sm_80.cubin"; echo "ELF file    2: demo.2.sm_90a.cubin" ;;
  *sm_90\ *) echo "no such code" >&2; exit 1 ;;
  *-sass*) cat "$(dirname "$0")/sass.txt" ;;
  *-res-usage*) cat "$(dirname "$0")/res.txt" ;;
  *-elf*) cat "$(dirname "$0")/elf.txt" ;;
esac
"""


class Sass(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        for name, text in (("cuobjdump", TOOL), ("sass.txt", SASS), ("res.txt", RESOURCES), ("elf.txt", ELF)):
            self.put(name, text)
        os.chmod(os.path.join(self.folder, "cuobjdump"), 0o755)

    def put(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
        return path

    def call(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = sass.main(list(arguments))
        return status, out.getvalue(), err.getvalue()

    def test_table(self):
        launches = self.put("launches.txt", "# a comment\ncopy 256 0\n")
        status, out, err = self.call("--tools", self.folder, "--launches", launches, "demo.cu.o")
        self.assertEqual((status, err), (0, ""))
        lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| `")]
        self.assertEqual(lines[0][:8], ["| `copy_kernel`", "32", "0", "256", "8", "registers", "64", "6"])
        self.assertEqual((lines[0][11], lines[0][12], lines[0][21], lines[0][26]), ("1", "2", "2", "1"))  # the loop with the vector
        # registers: 168 a thread are 5376 a warp, 12 warps, 3 blocks of 4; two mma in the loop without the loop of the LDS
        self.assertEqual(lines[1][:8], ["| `mma_kernel`", "168+8 stack", "2048+?", "128", "~3", "registers", "12", "15"])
        self.assertEqual(dict(zip(sass.NAMES, lines[1][8:])), {"HGMMA": "-", "HMMA": "2", "FFMA": "1", "LDG.128": "1", "LDG other": "-", "LDGSTS": "1", "LDSM": "1",
                                                             "LDS": "1", "STS": "-", "STG": "1", "LDL": "-", "STL": "1", "BAR": "1"})
        self.assertEqual(lines[1][21:23], ["6", "3.0"])
        self.assertEqual(lines[1][23:30], ["-", "2", "1", "-", "-", "-", "1"])

    def test_slow_path_is_no_loop(self):
        code = [(0x00, "SYNCS", ""), (0x10, "BRA", "0x50"), (0x20, "HGMMA.64x256x16.F32.BF16", ""), (0x30, "BRA", "0x0"), (0x40, "HGMMA.64x256x16.F32.BF16", ""),
                (0x50, "SYNCS", ""), (0x60, "BRA", "0x10")]
        counts, n = sass.hottest_loop(code)
        self.assertEqual((counts["HGMMA"], n), (1, 4))

    def test_blocks(self):
        for arch, registers, threads, shared, expected in (
                ("sm_90", 32, 256, 0, (8, "registers")), ("sm_90", 16, 32, 0, (32, "blocks")), ("sm_90", 24, 1024, 0, (2, "registers")),
                ("sm_90", 168, 384, 227 << 10, (1, "registers")), ("sm_90", 64, 128, 100 << 10, (2, "shared memory")), ("sm_90", 64, 128, 228 << 10, (0, "does not fit")),
                ("sm_75", 32, 512, 0, (2, "threads")), ("sm_89", 255, 128, 0, (2, "registers")), ("sm_90", 128, 1024, 0, (0, "registers"))):
            self.assertEqual(sass.blocks_per_sm(arch, registers, threads, shared), expected, (arch, registers, threads, shared))

    def test_out_and_nothing(self):
        path = os.path.join(self.folder, "table.md")
        status, out, _ = self.call("--tools", self.folder, "--out", path, "demo.o")
        self.assertEqual((status, out), (0, path + ": 2 kernels\n"))
        self.assertIn("no kernel", self.call("--tools", self.folder, "empty.o")[2])
        self.assertEqual(self.call("--tools", self.folder, "--only", "^nothing", "demo.o")[0], 1)
        status, _, err = self.call("--tools", self.folder, "broken.o")
        self.assertEqual((status, err), (1, "sass.py: cuobjdump --list-elf broken.o: cuobjdump fatal: not an ELF\n"))

    def test_wrong_use(self):
        for text in ("copy 256\n", "copy many 0\n", "( 1 0\n"):
            self.assertEqual(self.call("--tools", self.folder, "--launches", self.put("l.txt", text), "demo.o")[0], 2)

    def test_without_cuobjdump(self):
        with mock.patch.dict(os.environ, {"KS_CUDA_TOOLS": os.path.join(self.folder, "none")}):
            status, out, err = self.call("demo.o")
        self.assertEqual((status, out), (3, ""))
        self.assertIn("there is no cuobjdump", err)


if __name__ == "__main__":
    unittest.main()
