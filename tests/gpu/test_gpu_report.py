"""tests/gpu_report.py: rows in, an exact table out; what is wrong with them, in one message."""
import contextlib
import io
import json
import os
import sys
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tests"))
import gpu_report  # noqa: E402

DEF = """/* head */
KS_CASE(t, lora.3b, lora_step, "shape=3b n_seqs=32")
KS_CASE(t, frozen.3b, frozen_step, "shape=3b n_seqs=32")
KS_CASE(s, sim.1, similarity_top, "rows=1")
KS_CASE(e, norm.1, rmsnorm_forward, "rows=1")
KS_GOAL(lora.3b, matrix_share, at_least, 0.55, bf16)
KS_GOAL(lora.3b, peer_speed, at_least, 1.5, peft_eager)
KS_GOAL(lora.3b, peer_memory, at_most, 0.5, peft_eager)
KS_GOAL(lora.3b, time_ratio, at_most, 1.05, frozen.3b)
KS_GOAL(sim.1, device_us, at_most, 10, call)
KS_GOAL(sim.1, launches, exactly, 1, call)
KS_GOAL(sim.1, peer_speed, at_least, 1.3, faiss)
KS_GOAL(norm.1, copy_share, at_least, 0.85, copy)
"""
RUN = {"run": {"device": "NVIDIA H200 (sm_90)", "driver": "580", "commit": "abc", "time": "t0", "copy_gbytes": 4250.0}}
PEERS = {"run": {"device": "NVIDIA H200", "torch": "2.11", "transformers": "5.17", "peft": "0.2", "faiss": "none"}}


def row(name, samples, **more):
    s = sorted(samples)
    return dict({"name": name, "verdict": "ok", "median_ms": s[len(s) // 2], "samples_ms": samples, "variant": ""}, **more)


def ours():
    return [RUN, row("lora.3b", [100.0, 102.0, 104.0], peak_share=0.6, memory_mb=1000), row("frozen.3b", [99.0, 100.0, 101.0], peak_share=0.61),
            row("sim.1", [0.0120, 0.0120, 0.0120], launches=2), row("norm.1", [0.05, 0.06, 0.07], copy_share=0.86)]


def theirs():
    return [PEERS, row("lora.3b", [150.0, 160.0, 170.0], peer="peft_eager", memory_mb=2500), row("lora.3b", [130.0, 140.0, 150.0], peer="peft_compiled"),
            row("sim.1", [0.02, 0.02, 0.02], peer="faiss.f16"), row("sim.1", [0.018, 0.018, 0.018], peer="faiss.bf16"),
            {"name": "norm.1", "peer": "torch_eager", "verdict": "skipped", "note": "no reason", "samples_ms": []}]


class Report(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.put("goals.def", DEF)

    def put(self, name, text):
        if not isinstance(text, str):
            text = "".join(json.dumps(line) + "\n" for line in text)
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
        return path

    def call(self, our_lines, their_lines=None, *more):
        arguments = ["--goals", os.path.join(self.folder, "goals.def"), "--ours", self.put("ours", our_lines), *more]
        if their_lines is not None:
            arguments += ["--peers", self.put("peers", their_lines)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = gpu_report.main(arguments)
        return status, out.getvalue(), err.getvalue()

    def refuses(self, words, our_lines, their_lines=None, *more):
        status, out, err = self.call(our_lines, their_lines, *more)
        self.assertEqual((status, out), (2, ""), err)
        self.assertEqual(err.count("\n"), 1, err)
        self.assertIn(words, err)

    def test_table(self):
        status, out, err = self.call(ours(), theirs())
        self.assertEqual((status, err), (0, ""))
        self.assertEqual(out, """\
NVIDIA H200 (sm_90), driver 580, commit abc, t0 to t0, 1 run(s).
Ceilings measured: copy_gbytes 4250 (GB/s, GFLOP/s).
Peers: PyTorch 2.11, transformers 5.17, PEFT 0.2, faiss none; their ceilings: -.
Goals: 6 met, 2 missed, 0 not measured, 0 suspect. Times: medians, with quartiles; ratio: what the goal compares, else the peer's time over ours.

| case | ours | peer | ratio | share of ceiling | goal | verdict |
|---|---|---|---:|---:|---|---|
| lora.3b | 102 ms (101 to 103) | - | - | 60.0 % | >= 55.0 % of the matrix rate | met |
| lora.3b | 102 ms (101 to 103) | peft_eager 160 ms (155 to 165) | 1.57 | 60.0 % (matrix) | >= 1.5 x the speed of peft_eager | met |
| lora.3b | 102 ms (101 to 103) | peft_eager 160 ms (155 to 165) | 0.4 | 60.0 % (matrix) | <= 0.5 x the memory of peft_eager | met |
| lora.3b | 102 ms (101 to 103) | - | 1.02 | 60.0 % (matrix) | <= 1.05 x the time of frozen.3b | met |
| lora.3b | 102 ms (101 to 103) | peft_compiled 140 ms (135 to 145) | 1.37 | 60.0 % (matrix) | - | - |
| frozen.3b | 100 ms (99.5 to 100.5) | - | - | 61.0 % (matrix) | - | - |
| sim.1 | 0.012 ms (0.012 to 0.012) | - | 12 | - | <= 10 us | missed by 20.0 % |
| sim.1 | 0.012 ms (0.012 to 0.012) | - | 2 | - | = 1 launches | missed by 100.0 % |
| sim.1 | 0.012 ms (0.012 to 0.012) | faiss.bf16 0.018 ms (0.018 to 0.018) | 1.5 | - | >= 1.3 x the speed of faiss | met |
| sim.1 | 0.012 ms (0.012 to 0.012) | faiss.f16 0.02 ms (0.02 to 0.02) | 1.67 | - | - | - |
| norm.1 | 0.06 ms (0.055 to 0.065) | - | - | 86.0 % | >= 85.0 % of the copy rate | met, within noise |
""")

    def test_rounds_are_taken_together(self):
        second = ours()
        second[1] = row("lora.3b", [110.0, 112.0, 114.0], peak_share=0.6 * 102 / 112, memory_mb=1100)
        _, out, _ = self.call(ours() + second, theirs())
        self.assertIn("| lora.3b | 107 ms (102.5 to 111.5) | - | - | 57.2 % |", out)
        self.assertIn("2 run(s)", out)

    def test_variants(self):
        lines = ours() + [dict(ours()[1], variant="linear_forward=wgmma", median_ms=50.0, samples_ms=[50.0])]
        self.assertIn("| lora.3b | 102 ms", self.call(lines, theirs())[1])
        self.assertIn("| lora.3b | 50 ms", self.call(lines, theirs(), "--partial", "--variant", "linear_forward=wgmma")[1])

    def test_worst(self):
        status, out, _ = self.call(ours(), theirs(), "--worst", "5")
        self.assertEqual((status, out), (0, "sim.1\n"))

    def test_not_measured_and_suspect(self):
        lines = [l for l in ours() if l.get("name") not in ("frozen.3b", "norm.1", "sim.1")]
        lines.append(row("norm.1", [0.05], copy_share=1.2))
        lines.append({"name": "sim.1", "verdict": "skipped(memory)", "note": "no room", "samples_ms": None})
        status, out, _ = self.call(lines, None, "--partial")
        self.assertEqual(status, 0)
        self.assertIn("not measured: frozen.3b: no row |", out)
        self.assertIn("not measured: peft_eager: no row |", out)
        self.assertIn("not measured: skipped(memory): no room |", out)
        self.assertIn("suspect: over a ceiling |", out)
        self.assertIn("| frozen.3b | - | - | - | - | - | not measured: no row |", out)
        wrong = ours()
        wrong[1]["verdict"], wrong[1]["note"] = "incorrect", "nothing is learned"
        self.assertIn("not measured: incorrect: nothing is learned |", self.call(wrong, theirs())[1])

    def test_refused(self):
        self.refuses("no row of norm.1; --partial", ours()[:-1])
        self.refuses("ours:6: norm.1 is there twice in one run", ours() + [ours()[-1]])
        self.refuses("ours:2: there is no case sim.9 in the list of goals", [RUN, row("sim.9", [1.0])])
        self.refuses("ours:2: the line is cut off", json.dumps(RUN) + "\n" + json.dumps(ours()[1])[:-30] + "\n")
        self.refuses("ours:2: no number: NaN", json.dumps(RUN) + '\n{"name": "sim.1", "median_ms": NaN}\n')
        self.refuses("ours:2: sim.1 has a time of None", [RUN, row("sim.1", [1.0], median_ms=None)])
        self.refuses("ours:2: sim.1 has a time of -1", [RUN, row("sim.1", [1.0, -1])])
        self.refuses("ours:2: sim.1 is ok and has no samples", [RUN, dict(row("sim.1", [1.0]), samples_ms=[])])
        self.refuses("ours:1: a row before its run", ours()[1:])
        self.refuses("empty", "")
        self.refuses("runs of more than one commit: abc, def", ours() + [{"run": dict(RUN["run"], commit="def")}])
        self.refuses("peers:2: lora.3b names no peer", ours(), [PEERS, row("lora.3b", [1.0])])
        self.refuses("ours ran on NVIDIA H200 (sm_90), the peers on NVIDIA A100", ours(), [{"run": {"device": "NVIDIA A100"}}])
        self.refuses("was made smaller (--scale 64)", ours(), [PEERS, row("lora.3b", [1.0], peer="peft_eager", scale=64)])
        self.refuses("No such file", ours(), None, "--readme", os.path.join(self.folder, "none"))

    def test_goals_refused(self):
        for line, words in (("KS_GOAL(sim.2, launches, exactly, 1, call)", "a goal of sim.2"), ("KS_GOAL(sim.1, beauty, exactly, 1, call)", "no measure beauty"),
                            ("KS_CASE(sim.1)", "cannot be read"), ('KS_CASE(s, sim.1, x, "")', "is there twice")):
            self.put("goals.def", DEF + line + "\n")
            self.refuses(words, ours())

    def test_readme(self):
        path = self.put("README.md", "before\n%s\nold\n%s\nafter\n" % (gpu_report.BEGIN, gpu_report.END))
        self.assertEqual(self.call(ours(), theirs(), "--readme", path)[0], 0)
        with open(path, encoding="utf-8") as f:
            text = f.read()
        self.assertTrue(text.startswith("before\n" + gpu_report.BEGIN) and text.endswith(gpu_report.END + "\nafter\n"))
        self.assertNotIn("old", text)
        self.assertIn("| norm.1 |", text)
        self.assertEqual(self.call(ours(), theirs(), "--readme", path)[0], 0)  # again: the same
        with open(path, encoding="utf-8") as f:
            self.assertEqual(f.read(), text)
        self.refuses("needs one line", ours(), theirs(), "--readme", self.put("README.md", "nothing\n"))

    def test_ladder(self):
        kernels = os.path.join(self.folder, "kernels")
        os.mkdir(kernels)
        with open(os.path.join(kernels, "norm.cu"), "w", encoding="utf-8") as f:
            f.write("/* x\n * Ladder (times)\n *   v1  one\n *   v2 f32  two\n */\n * v3 no version\n")
        head = ",".join(gpu_report.LADDER) + "\n"
        good = self.put("ladder.csv", head + 'norm,v1,abc,"a | b",10 us,not measured yet,-\nnorm,v2 f32,-,c,d,e,-\n')
        status, out, _ = self.call(ours(), theirs(), "--ladder", good, "--kernels", kernels)
        self.assertEqual(status, 0)
        self.assertIn("| norm | v1 | abc | a \\| b | 10 us | not measured yet | - |", out)
        for text, words in ((head, "norm.cu has a ladder and no row"), (head + "norm,v1,a,b,c,d,e\nnorm,v22,a,b,c,d,e\n", "norm.cu has a version v2 and no row"), (head + "norm,v1\n", "row 2 has not all"), ("kernel\n", "the first line is not"),
                            (head + "norm,v1,a,b,c,d,e\nnorm,v2,a,b,c,d,e\nrope,v1,a,b,c,d,e\n", "there is no rope.cu")):
            self.refuses(words, ours(), theirs(), "--ladder", self.put("ladder.csv", text), "--kernels", kernels)

    def test_measured(self):
        lines = [RUN, dict(ours()[4], variant="norm=x")]
        status, out, _ = self.call(lines, None, "--measured", "--variant", "norm=x")
        self.assertEqual((status, [line for line in out.splitlines() if line.startswith("| ")][1:]), (
            0, ["| norm.1 | 0.06 ms (0.055 to 0.065) | - | - | 86.0 % | >= 85.0 % of the copy rate | met, within noise |"]))
        self.assertIn("Goals: 1 met, 0 missed, 0 not measured", out)

    def test_ladder_of_this_project(self):
        rows = gpu_report.read_ladder(os.path.join(ROOT, "results", "gpu", "ladder.csv"), os.path.join(ROOT, "kernels", "cuda"))
        self.assertGreater(len(rows), 50)

    def test_goals_of_this_project(self):
        cases, goals = gpu_report.read_goals(os.path.join(ROOT, "experiments", "bench_goals.def"))
        self.assertGreater(len(cases), 50)
        self.assertGreater(len(goals), 50)


if __name__ == "__main__":
    unittest.main()
