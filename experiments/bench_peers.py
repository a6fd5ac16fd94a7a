#!/usr/bin/env python3
"""PyTorch, transformers and PEFT (and faiss where it can be imported) on the cases of experiments/bench_goals.def: the same
names, shapes and steps as `keepsake bench goals`, on the same card, in turn with it.

    bench_peers.py [--keepsake PROGRAM --ours FILE] [--jsonl FILE] [--rounds 2] [--budget SECONDS] [--only REGEX] [--groups REGEX]
    bench_peers.py --device cpu --scale 64        # everything tiny: tries the code, says nothing about speed

Group by group: the peers are built and checked, then each round runs `keepsake bench goals` for the group and samples each
peer, so that clocks and heat are shared. Rows are appended to --jsonl group by group; the ratios are printed at the end of a
group, the verdicts by tests/gpu_report.py.

Each peer is checked before it is timed (finite results, against float32 or against another formulation; training: gradient
norm > 0, loss falling) and what it computes is what its row says. Training: adapters of rank 8 in bf16 (PEFT's default is
float32 adapters, slower), dropout 0, loss over all positions, clip_grad_norm_, AdamW(fused), zero_grad(set_to_none); optimizer
and autograd see adapters only. peft_checkpointed recomputes activations (gradient checkpointing), the others keep them.

Times: CUDA events around each call, after warm-up. Operations are cold (but for those with cache=warm): a 1 GiB array is
written between samples, which also hides the host's time of the launches; hot_ms is one of a batch without; step_ms, for short ones, one in a CUDA graph. Whole
models are hot. Memory: torch.cuda.max_memory_allocated of one step, weights, adapters and optimizer among it.

faiss is used if it can be imported. Its wheels (faiss-gpu-cu12) need the CUDA 12 libraries (cuBLAS 12, and cuRAND) beside
those of a newer toolkit: pip install faiss-gpu-cu12 nvidia-cublas-cu12 and add the folder of the latter to LD_LIBRARY_PATH, or
build faiss for the toolkit at hand. Without it its rows say so.

Exit codes: 0; 1 when a check failed; 2 for wrong use; 3 without PyTorch or the device.
"""
import argparse
import gc
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
CASE_LINE = re.compile(r'^KS_CASE\((\w+), ([\w.]+), (\w+), "([^"]*)"\)$')
SHAPES = {  # hidden, layers, heads, kv heads, intermediate, vocabulary, rope theta, tied head, eps
    "1b": (2048, 16, 32, 8, 8192, 128256, 5e5, True, 1e-5),
    "3b": (3200, 26, 32, 32, 8640, 32000, 1e4, False, 1e-6),
}
TARGETS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class Skipped(Exception):
    """A peer that cannot run here, with the reason."""


class Wrong(Exception):
    """A peer whose results are not right."""


def read_cases(path):
    """[{group, name, op, parameters}] in the order of the file."""
    cases = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.startswith("KS_CASE("):
                continue
            match = CASE_LINE.match(line.rstrip("\n"))
            if not match:
                raise ValueError("%s:%d: a KS_CASE that cannot be read" % (path, number))
            pairs = dict(word.split("=", 1) for word in match.group(4).split())
            values = {k: int(v) if v.isdigit() else v for k, v in pairs.items()}
            cases.append({"group": match.group(1), "name": match.group(2), "op": match.group(3), "parameters": values})
    if not cases:
        raise ValueError("%s: no case" % path)
    return cases


def scaled(op, p, scale):
    """Parameters divided for a try without a GPU; the structure (adapters, heads, kinds) stays."""
    if scale == 1:
        return dict(p)
    least = {"rows": 8, "n_out": 64, "n_cols": 32, "n_keys": 64, "seq_len": 16, "n_seqs": 2, "batch": 2, "new": 3, "prompt": 4, "n_adapters": 0}
    out = dict(p)
    for key, floor in least.items():
        if isinstance(out.get(key), int):
            out[key] = min(out[key], max(floor, out[key] // scale))
    for key, most in (("n_heads", 4), ("n_kv_heads", 4 if p.get("n_heads") == p.get("n_kv_heads") else 2), ("best_k", 8)):
        if key in out:
            out[key] = min(out[key], most)
    if p.get("n_adapters"):
        out["n_adapters"] = min(2, p["n_adapters"])
    if op.startswith("attention") or op == "pool":
        out["rows"] = 2 * out["seq_len"]
    return out


class Env:
    """The device, and how to time on it."""

    def __init__(self, args):
        import torch

        self.torch, self.args = torch, args
        self.cuda = args.device == "cuda"
        if self.cuda and not torch.cuda.is_available():
            raise Skipped("PyTorch sees no GPU")
        self.device = torch.device(args.device)
        self.scale, self.dtype, self.compiles = args.scale, torch.bfloat16, args.compile
        self.flush_room = torch.empty((1 << 30) if self.cuda else (1 << 20), dtype=torch.uint8, device=self.device)
        self.began = time.monotonic()

    def left(self):
        return self.args.budget - (time.monotonic() - self.began) if self.args.budget else math.inf

    def config(self, shape):
        hidden, layers, heads, kv, inter, vocab, theta, tied, eps = SHAPES[shape]
        if self.scale != 1:
            hidden, layers, heads, kv, inter, vocab = 64, 2, 4, 4 if heads == kv else 2, 96, 256
        return {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
                "intermediate_size": inter, "vocab_size": vocab, "tie_word_embeddings": tied, "rms_norm_eps": eps,
                "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "max_position_embeddings": 2048}

    def sync(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def empty(self):
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()

    def compile(self, fn, **options):
        if not self.compiles:
            raise Skipped("not compiled: --no-compile")
        return self.torch.compile(fn, dynamic=False, **options)

    def timed(self, fn):
        """Milliseconds of one call on the device."""
        if not self.cuda:
            begin = time.perf_counter()
            fn()
            return (time.perf_counter() - begin) * 1e3
        first, last = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        fn()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    def before(self, cold):
        """What the device does before a sample of an operation, while the host queues it."""
        if cold:
            self.flush_room.fill_(1)
        elif self.cuda and hasattr(self.torch.cuda, "_sleep"):
            self.torch.cuda._sleep(300000)

    def memory_of(self, fn, resident):
        """MB at the peak of a call: what it takes beside what is there, which other peers share, and what is its own."""
        if not self.cuda:
            fn()
            return None
        self.sync()
        self.torch.cuda.reset_peak_memory_stats()
        before = self.torch.cuda.memory_allocated()
        fn()
        self.sync()
        return (self.torch.cuda.max_memory_allocated() - before + resident) / 1e6

    def graph_ms(self, fn, n=32):
        """One of n in a CUDA graph, or None where it cannot be captured."""
        if not self.cuda:
            return None
        torch = self.torch
        try:
            graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                fn()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                for _ in range(n):
                    fn()
            graph.replay()
            return statistics.median(self.timed(graph.replay) for _ in range(5)) / n
        except Exception:  # pylint: disable=broad-except  # whatever it does that a graph cannot hold
            self.sync()
            return None


def shared(make):
    """make() once for all peers of a case; a failure is each peer's own."""
    kept = []

    def get():
        if not kept:
            kept.append(make())
        return kept[0]

    return get


class Peer:
    """One peer of one case. build() returns an object with:
      step()      one call, queued on the device (waits for nothing)
      check()     raises Wrong; returns a note
      after()     optional: checked again after the samples
      divide      samples are divided by this (decoding: positions); or sample() returns milliseconds itself
    """

    def __init__(self, case, name, build, is_op):
        self.case, self.name, self.build = case, name, build
        self.mode = "hot" if not is_op else "warm" if case["parameters"].get("cache") == "warm" else "cold"
        self.work, self.verdict, self.note = None, None, ""
        self.samples, self.rounds = [], []
        self.hot_ms = self.step_ms = self.memory_mb = None


class Limit:
    """SIGALRM around what may take too long (compilation, above all)."""

    def __init__(self, seconds, what):
        self.seconds, self.what = seconds, what

    def __enter__(self):
        def late(*_):
            raise Skipped("%s took longer than %.0f s" % (self.what, self.seconds))

        if math.isfinite(self.seconds):
            self.old = signal.signal(signal.SIGALRM, late)
            signal.alarm(max(1, int(self.seconds)))

    def __exit__(self, *_):
        if math.isfinite(self.seconds):
            signal.alarm(0)
            signal.signal(signal.SIGALRM, self.old)


def guarded(env, peer, fn, what):
    """Runs a part of a peer's life; what goes wrong becomes its verdict."""
    torch = env.torch
    try:
        with Limit(min(env.args.limit or math.inf, max(env.left(), 1)), what):
            return fn()
    except Skipped as e:
        peer.verdict, peer.note = "skipped", str(e)
    except Wrong as e:
        peer.verdict, peer.note = "incorrect", str(e)
    except torch.OutOfMemoryError as e:
        peer.verdict, peer.note = "skipped", "memory: " + str(e).split(". ")[0]
    except Exception as e:  # pylint: disable=broad-except  # a peer that fails is a row, not the end
        peer.verdict, peer.note = "skipped", "%s: %s: %s" % (what, type(e).__name__, (str(e).strip().splitlines() or ["no message"])[0][:300])
    peer.work = None
    env.empty()
    return None


def prepare(env, peer):
    def work():
        peer.work = peer.build()
        peer.note = peer.work.check() or ""
        for _ in range(2):
            one_sample(env, peer)
        if hasattr(peer.work, "resident"):
            peer.memory_mb = env.memory_of(peer.work.step, peer.work.resident())

    guarded(env, peer, work, "preparing")


def one_sample(env, peer):
    if hasattr(peer.work, "sample"):
        return peer.work.sample()
    if peer.mode != "hot":
        env.before(peer.mode == "cold")
    return env.timed(peer.work.step) / getattr(peer.work, "divide", 1)


def sample(env, peer, n, seconds):
    def work():
        one_sample(env, peer)  # after something else had the device
        taken, begin = [], time.monotonic()
        while len(taken) < n or (time.monotonic() - begin < seconds and len(taken) < 30 * n):
            taken.append(one_sample(env, peer))
            if time.monotonic() - begin > 30 * max(seconds, 0.1) and len(taken) >= 3:
                break
        peer.samples += taken
        peer.rounds.append(len(taken))

    guarded(env, peer, work, "sampling")


def finish(env, peer):
    def work():
        if peer.mode != "hot":
            fn = peer.work.step
            batch = max(1, min(64, int(20 / max(statistics.median(peer.samples), 0.01))))
            peer.hot_ms = env.timed(lambda: [fn() for _ in range(batch)]) / batch
            if statistics.median(peer.samples) < 0.2 and getattr(peer.work, "graphable", True):
                peer.step_ms = env.graph_ms(fn)
        if hasattr(peer.work, "after"):
            peer.note = "; ".join(filter(None, (peer.note, peer.work.after())))
        s = sorted(peer.samples)
        if not s[0] > 0:
            raise Skipped("a sample of %g ms: noise is larger than what is measured" % s[0])
        peer.verdict = "noisy" if len(s) >= 5 and s[len(s) * 8 // 10] > 1.25 * s[len(s) * 2 // 10] else "ok"

    guarded(env, peer, work, "the check after the samples")


def quantile(values, q):
    s = sorted(values)
    at = q * (len(s) - 1)
    low = int(at)
    high = min(low + 1, len(s) - 1)
    return s[low] + (s[high] - s[low]) * (at - low)


def row_of(env, peer):
    case = peer.case
    row = {"name": case["name"], "peer": peer.name, "group": case["group"], "op": case["op"],
           "case": dict(op=case["op"], **case["parameters"]), "scale": env.scale, "dtype": "bf16",
           "mode": peer.mode, "n": len(peer.samples), "min_ms": None, "p25_ms": None, "median_ms": None, "p75_ms": None,
           "hot_ms": peer.hot_ms, "step_ms": peer.step_ms, "memory_mb": peer.memory_mb, "verdict": peer.verdict, "note": peer.note,
           "rounds": peer.rounds, "samples_ms": [round(s, 6) for s in peer.samples]}
    if peer.samples and peer.verdict in ("ok", "noisy"):
        row.update(min_ms=min(peer.samples), p25_ms=quantile(peer.samples, 0.25), median_ms=statistics.median(peer.samples),
                   p75_ms=quantile(peer.samples, 0.75))
    return row


def ceilings(env):
    """Copy and read of 1 GiB, and a bf16 product of 8192: GB/s and GFLOP/s."""
    torch = env.torch
    n, m = (1 << 30, 8192) if env.cuda and env.scale == 1 else (1 << 22, 256)
    x = torch.randint(0, 255, (n,), dtype=torch.uint8, device=env.device)
    y = torch.empty_like(x)
    words = x.view(torch.int32)
    a, b = (torch.randn(m, m, device=env.device, dtype=env.dtype) for _ in range(2))
    out = torch.empty(m, m, device=env.device, dtype=env.dtype)

    def best(fn):
        for _ in range(3):
            fn()
        return min(env.timed(fn) for _ in range(10)) / 1e3

    found = {"copy_gbytes": 2 * n / best(lambda: y.copy_(x)) / 1e9, "read_gbytes": n / best(words.amax) / 1e9,
             "matrix_bf16_gflops": 2 * m**3 / best(lambda: torch.mm(a, b, out=out)) / 1e9}
    return {k: round(v, 3) for k, v in found.items()}


def describe(env):
    torch = env.torch
    run = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if env.cuda else "cpu", "scale": env.scale,
           "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "arguments": " ".join(sys.argv[1:])}
    for name in ("transformers", "peft", "triton", "faiss"):
        try:
            run[name] = __import__(name).__version__
        except Exception as e:  # pylint: disable=broad-except
            run[name] = "none: %s" % (str(e).splitlines() or [""])[0]
    if env.cuda:
        run["cuda"], run["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    run.update(ceilings(env))
    return run


def append(path, lines):
    if path:
        with open(path, "a", encoding="utf-8") as f:
            for line in lines:
                f.write(json.dumps(line) + "\n")


def run_ours(args, env, group):
    """One round of this project's program for a group; its rows go to args.ours."""
    if not args.keepsake:
        return
    env.empty()
    env.sync()
    command = args.keepsake.split() + ["bench", "goals"] + args.keepsake_arguments.split() + ["--only", group, "--jsonl", args.ours]
    limit = min(args.limit or math.inf, max(env.left(), 1))
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False,
                              timeout=limit if math.isfinite(limit) else None)
        text = (done.stdout + done.stderr).strip().splitlines()
        if done.returncode != 0:
            print("ours, %s: exit code %d: %s" % (group, done.returncode, text[-1] if text else ""), file=sys.stderr)
            env.ours_failed = True
    except subprocess.TimeoutExpired:
        print("ours, %s: stopped after %.0f s" % (group, limit), file=sys.stderr)
        env.ours_failed = True
    except OSError as e:
        print("ours, %s: %s" % (group, e), file=sys.stderr)
        env.ours_failed = True


def our_medians(path):
    """{name: milliseconds} over all rounds so far."""
    samples = {}
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                row = json.loads(line)
                if row.get("verdict") in ("ok", "noisy", "throttled"):
                    samples.setdefault(row["name"], []).extend(row.get("samples_ms") or [])
    except (OSError, ValueError):
        pass
    return {k: statistics.median(v) for k, v in samples.items() if v}


def print_group(args, peers):
    ours = our_medians(args.ours) if args.keepsake else {}
    for peer in peers:
        name, mine = peer.case["name"], ours.get(peer.case["name"])
        if peer.verdict in ("ok", "noisy"):
            theirs = statistics.median(peer.samples)
            ratio = "%6.2f x" % (theirs / mine) if mine else "       -"
            print("%-24s %-20s %10.4f ms  ours %10s ms  %s  %s" % (name, peer.name, theirs, "%.4f" % mine if mine else "-", ratio, peer.note), flush=True)
        else:
            print("%-24s %-20s %s: %s" % (name, peer.name, peer.verdict, peer.note), flush=True)


def run_group(args, env, group, cases, makers):
    """Rows of all peers of a group, and this project's rounds between them."""
    peers = []
    for case in cases:
        of_case = dict(case, parameters=scaled(case["op"], case["parameters"], env.scale))
        peers += [Peer(of_case, name, build, is_op) for name, build, is_op in makers(env, of_case) if re.search(args.peers, name)]
    for peer in peers:
        if env.left() < args.reserve:
            peer.verdict, peer.note = "skipped", "the budget of %.0f s is spent" % args.budget
        else:
            env.torch.manual_seed(sum(map(ord, peer.case["name"])))
            prepare(env, peer)
    for r in range(args.rounds):
        if r > 0 and env.left() < args.reserve:
            print("group %s: %d of %d rounds, the budget is nearly spent" % (group, r, args.rounds), file=sys.stderr)
            break
        run_ours(args, env, group)
        for peer in peers:
            if peer.work:
                sample(env, peer, max(1, -(-args.samples // args.rounds)), args.seconds / args.rounds)
    for peer in peers:
        if peer.work:
            finish(env, peer)
    rows = [row_of(env, peer) for peer in peers]
    print_group(args, peers)
    for peer in peers:
        peer.work = peer.build = None
    if env.compiles:
        env.torch._dynamo.reset()  # one group's recompilations are not the next one's
    env.empty()
    return rows


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goals", default=os.path.join(HERE, "bench_goals.def"), help="the list of cases")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes; for tries")
    parser.add_argument("--only", default="", help="cases whose names match")
    parser.add_argument("--groups", default="", help="groups whose names match")
    parser.add_argument("--peers", default="", help="peers whose names match")
    parser.add_argument("--jsonl", help="append the run and its rows")
    parser.add_argument("--keepsake", default="", help="this project's program, run in turn")
    parser.add_argument("--keepsake-arguments", default="--device cuda", help="after `bench goals`")
    parser.add_argument("--ours", help="where the program appends its rows (with --keepsake)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=10, help="of each peer, at least")
    parser.add_argument("--seconds", type=float, default=2, help="for the samples of each peer")
    parser.add_argument("--budget", type=float, default=0, help="seconds in all; then rounds and the last groups are dropped. 0: none")
    parser.add_argument("--reserve", type=float, default=20, help="seconds of the budget that a new step must leave")
    parser.add_argument("--limit", type=float, default=0, help="seconds for building, compiling or sampling one peer. 0: none")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--list", action="store_true", help="cases and their peers")
    args = parser.parse_args(argv)
    if args.keepsake and not args.ours:
        parser.error("--keepsake needs --ours FILE")
    if args.rounds < 1 or args.samples < 1 or args.scale < 1:
        parser.error("--rounds, --samples and --scale are at least 1")
    return args


def in_order(cases):
    """Groups: the training step first, then what is quick, so that a budget drops the rest of the whole models."""
    rank = {}
    for case in cases:
        rank.setdefault(case["group"], 0 if case["group"] == "train_3b" else 2 if "shape" in case["parameters"] else 1)
    return sorted(rank, key=rank.get)


def load_makers():
    """{op: function of the environment and a case, which gives [(peer's name, build, whether it is a single operation)]}"""
    sys.modules.setdefault("bench_peers", sys.modules[__name__])
    import bench_peers_models
    import bench_peers_ops

    return {**bench_peers_models.MAKERS, **bench_peers_ops.MAKERS}


def main(argv):
    args = parse(argv)
    try:
        cases = [c for c in read_cases(args.goals) if re.search(args.only, c["name"]) and re.search(args.groups, c["group"])]
        re.compile(args.peers)
    except (OSError, ValueError, re.error) as e:
        print("bench_peers.py: %s" % e, file=sys.stderr)
        return 2
    if not cases:
        print("bench_peers.py: no case matches --only and --groups", file=sys.stderr)
        return 2
    try:
        env = Env(args)
    except (ImportError, Skipped) as e:
        print("bench_peers.py: %s" % e, file=sys.stderr)
        return 3
    makers = load_makers()
    peers_of = lambda env, case: makers[case["op"]](env, case) if case["op"] in makers else []

    env.ours_failed = False
    if args.list:
        for case in cases:
            print("%-16s %-24s %s" % (case["group"], case["name"], " ".join(name for name, _, _ in peers_of(env, case)) or "-"))
        return 0
    run = describe(env)
    print(json.dumps(run), flush=True)
    append(args.jsonl, [{"run": run}])
    bad = 0
    for group in in_order(cases):
        rows = run_group(args, env, group, [c for c in cases if c["group"] == group], peers_of)
        append(args.jsonl, rows)
        bad += sum(r["verdict"] == "incorrect" for r in rows)
    return 1 if bad or env.ours_failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
