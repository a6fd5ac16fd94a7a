"""experiments/bench_peers.py: the list of cases, sizes for tries, and, where there is PyTorch, every case on a CPU, tiny."""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCRIPT = os.path.join(ROOT, "experiments", "bench_peers.py")
sys.path.insert(0, os.path.join(ROOT, "experiments"))
import bench_peers  # noqa: E402
import bench_peers_memory  # noqa: E402

HAS = {name: importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "peft", "faiss")}
# Each op, and each way that a case of it can go.
SOME = r"^(lora|lora16|frozen)\.3b$|^(decode|decode64_a1|decode64_a16_top_p|prefill\.128)\.1b$|^attn_(f\.h100|b\.h64g)\.256$|^head_.*2048\.3b$|^sim_.*\.768$|^sim_many.384$|^(norm|rope|swiglu|entropy|pool|adamw).*\.1b$"
OURS = """#!/bin/sh
while [ $# -gt 0 ]; do
  [ "$1" != --only ] || group=$2
  [ "$1" != --jsonl ] || jsonl=$2
  shift
done
[ "$group" != fails ] || exit 4
echo '{"run":{}}' >>"$jsonl"
echo '{"name":"norm_f.1b","verdict":"ok","samples_ms":[1000.0]}' >>"$jsonl"
"""


def run(*arguments):
    done = subprocess.run([sys.executable, SCRIPT, "--device", "cpu", "--scale", "512", "--seconds", "0", "--samples", "2", "--rounds", "2", *arguments],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False, env=dict(os.environ, OMP_NUM_THREADS="1"))
    return done.returncode, done.stdout, done.stderr


class Cases(unittest.TestCase):
    def test_list(self):
        cases = bench_peers.read_cases(os.path.join(ROOT, "experiments", "bench_goals.def"))
        ops = {c["op"] for c in cases} - {"whole_run"}
        known = bench_peers.load_makers()  # imports nothing of PyTorch
        self.assertEqual(ops - set(known), set())
        for case in cases:
            small = bench_peers.scaled(case["op"], case["parameters"], 64)
            self.assertEqual(set(small), set(case["parameters"]))
            self.assertEqual(bench_peers.scaled(case["op"], case["parameters"], 1), case["parameters"])
            for key, value in small.items():
                if isinstance(value, int):
                    self.assertLessEqual(value, case["parameters"][key])
            if "n_heads" in small and "n_kv_heads" in small:
                self.assertEqual(small["n_heads"] % small["n_kv_heads"], 0)
            if small.get("n_adapters") and "n_seqs" in small:
                self.assertEqual(small["n_seqs"] % small["n_adapters"], 0)

    def test_shapes_are_those_of_bench(self):
        with open(os.path.join(ROOT, "experiments", "bench.c"), encoding="utf-8") as f:
            text = "".join(f.read().split())
        for name, (hidden, layers, heads, kv, inter, vocab, *_) in bench_peers.SHAPES.items():
            at = text.index('{"%s",' % name)
            for part in ("n_layers=%d," % layers, "hidden_size=%d," % hidden, "intermediate_size=%d," % inter, "vocab_size=%d," % vocab, "n_heads=%d," % heads, "n_kv_heads=%d," % kv):
                self.assertIn("." + part, text[at:at + 400], name)

    def test_order(self):
        cases = bench_peers.read_cases(os.path.join(ROOT, "experiments", "bench_goals.def"))
        groups = bench_peers.in_order(cases)
        self.assertEqual(sorted(groups), sorted({c["group"] for c in cases}))
        self.assertEqual(groups[0], "train_3b")
        self.assertLess(groups.index("elements_1b"), groups.index("step_3b"))

    def test_unreadable(self):
        with tempfile.NamedTemporaryFile("w", suffix=".def") as f:
            f.write('KS_CASE(g, a, op, "x=1")\nKS_CASE(g, b)\n')
            f.flush()
            with self.assertRaisesRegex(ValueError, ":2: a KS_CASE that cannot be read"):
                bench_peers.read_cases(f.name)

    def test_memory_of_this_project(self):
        a = lambda **k: argparse.Namespace(**{"shape": "3b", "n_seqs": 64, "seq_len": 256, "rank": 8, "targets": "q,k,v,o,gate,up,down", **k})
        of = bench_peers_memory.of_this_project
        self.assertAlmostEqual(of(a(), 0) / 39.5e9, 1, delta=0.01)  # measured on an H200
        self.assertAlmostEqual(of(a(n_seqs=8), 0) / 11.2073e9, 1, delta=0.03)  # with smaller blocks of the head
        self.assertEqual(of(a(), 0), of(a(), 1))  # one shares its place with nobody
        self.assertGreater(of(a(), 1), of(a(), 2))
        self.assertEqual(of(a(), 26), of(a(), 100))

    def test_wrong_use(self):
        self.assertEqual(run("--only", "nothing")[0], 2)
        self.assertEqual(run("--only", "(")[0], 2)
        self.assertEqual(run("--rounds", "0")[0], 2)
        self.assertEqual(run("--keepsake", "x")[0], 2)


@unittest.skipUnless(HAS["torch"] and HAS["transformers"] and HAS["peft"], "needs PyTorch, transformers and PEFT")
class Tiny(unittest.TestCase):
    def test_memory(self):
        script = os.path.join(ROOT, "experiments", "bench_peers_memory.py")
        done = subprocess.run([sys.executable, script, "--n-seqs", "2", "--seq-len", "64"], stdout=subprocess.PIPE, text=True, check=True)
        figures = [float(line.split()[-1]) for line in done.stdout.splitlines()[1:]]
        self.assertEqual((len(figures), figures[0]), (5, 1))
        self.assertLess(figures[1], 1)  # checkpointing takes less
        self.assertEqual(subprocess.run([sys.executable, script, "--targets", "x"], stderr=subprocess.PIPE, check=False).returncode, 2)

    def measure(self, *arguments):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "rows.jsonl")
            status, out, err = run("--jsonl", path, *arguments)
            with open(path, encoding="utf-8") as f:
                lines = [json.loads(line) for line in f]
        self.assertIn("matrix_bf16_gflops", lines[0]["run"])
        return status, {(r["name"], r["peer"]): r for r in lines[1:]}, out, err

    def test_every_op(self):
        status, rows, _, err = self.measure("--no-compile", "--only", SOME)
        self.assertEqual(status, 0, err)
        cases = bench_peers.read_cases(os.path.join(ROOT, "experiments", "bench_goals.def"))
        op_of = {c["name"]: c["op"] for c in cases}
        self.assertEqual({op_of[name] for name, _ in rows}, set(op_of.values()) - {"whole_run"})
        for (name, peer), row in rows.items():
            if row["verdict"] == "skipped":
                self.assertRegex(row["note"], "--no-compile|faiss cannot be imported|No viable backend|without GPU|noise is larger", (name, peer))
            else:
                self.assertIn(row["verdict"], ("ok", "noisy"), (name, peer, row["note"]))
                self.assertEqual((row["n"], len(row["rounds"]), row["scale"]), (len(row["samples_ms"]), 2, 512))
                self.assertGreater(row["min_ms"], 0)
        self.assertRegex(rows["lora.3b", "peft_eager"]["note"], "loss .* to .*, gradient norm")

    def test_compiled(self):
        status, rows, _, err = self.measure("--only", r"^(frozen|norm_b)\.1b$", "--rounds", "1")
        self.assertEqual(status, 0, err)
        for key in (("frozen.1b", "torch_layers_compiled"), ("norm_b.1b", "torch_compiled")):
            self.assertIn(rows[key]["verdict"], ("ok", "noisy"), rows[key]["note"])

    def test_in_turn_with_ours(self):
        with tempfile.TemporaryDirectory() as folder:
            program, theirs = os.path.join(folder, "keepsake"), os.path.join(folder, "ours.jsonl")
            with open(program, "w", encoding="utf-8") as f:
                f.write(OURS)
            os.chmod(program, 0o755)
            status, _, out, err = self.measure("--only", r"norm_f\.1b", "--no-compile", "--keepsake", program, "--ours", theirs)
            self.assertEqual(status, 0, err)
            with open(theirs, encoding="utf-8") as f:
                self.assertEqual(sum("norm_f" in line for line in f), 2)  # a run a round
            self.assertRegex(out, r"norm_f\.1b +torch_eager .*ours +1000\.0000 ms +0\.00 x")
            status, _, _, err = self.measure("--only", r"norm_f\.1b", "--no-compile", "--keepsake", "false", "--ours", theirs)
            self.assertEqual(status, 1)
            self.assertIn("ours, elements_1b: exit code 1", err)

    def test_wrong_and_out_of_budget(self):
        status, rows, _, _ = self.measure("--only", "norm_f", "--no-compile", "--budget", "1", "--reserve", "5")
        self.assertEqual((status, {r["verdict"] for r in rows.values()}), (0, {"skipped"}))
        self.assertIn("the budget of 1 s is spent", rows["norm_f.1b", "torch_eager"]["note"])

    def test_what_is_wrong_is_found(self):
        import torch
        from bench_peers_ops import near

        x = torch.linspace(-1, 1, 64)
        near(x.bfloat16(), x, x.bfloat16(), "x")
        for bad in (x + 0.1, x * float("nan"), x[:63]):
            with self.assertRaises(bench_peers.Wrong):
                near(bad, x, x.bfloat16(), "x")


if __name__ == "__main__":
    unittest.main()
