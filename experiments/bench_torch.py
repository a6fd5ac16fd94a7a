#!/usr/bin/env python3
"""Keepsake beside PyTorch on the same shapes, in turn, with the ratios.

    python3 experiments/bench_torch.py [--shapes 15m,110m] [--dtypes f32,bf16] [--rounds 3] [--threads 2] [--keepsake ./keepsake]

Each round runs `keepsake bench` and a PyTorch process one after the other, so that a machine whose speed drifts is fair to both; medians over
the rounds are printed with the ratio ours / PyTorch (speed: above 1 is faster; memory: below 1 is less). PyTorch runs a plain Llama of its own
modules (scaled_dot_product_attention, no padding, no dropout, frozen weights without gradients), which is leaner than transformers + PEFT, with
malloc tuned so that large blocks stay mapped. Needs torch (any version from 1.13).
"""
import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

SHAPES = {  # hidden, layers, heads, kv heads, intermediate, vocabulary
    "15m": (288, 6, 6, 6, 768, 32000),
    "110m": (768, 12, 12, 12, 2048, 32000),
    "135m": (576, 30, 9, 3, 1536, 49152),
}
RANK, ALPHA = 8, 16
CASES = {  # name: (sequences, tokens of each)
    "lora_step": (8, 256),
    "lora_step_small": (1, 128),
    "prefill128": (1, 128),
    "prefill512": (1, 512),
}


def build(shape, dtype, lora):
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    d, n_layers, n_heads, n_kv, ff, vocab = SHAPES[shape]
    hd = d // n_heads

    class Linear(nn.Module):
        def __init__(self, n_in, n_out):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(n_out, n_in, dtype=dtype) * 0.02, requires_grad=False)
            self.lora = lora
            if lora:
                self.a = nn.Parameter(torch.randn(RANK, n_in, dtype=dtype) / math.sqrt(n_in))
                self.b = nn.Parameter(torch.zeros(n_out, RANK, dtype=dtype))

        def forward(self, x):
            y = F.linear(x, self.weight)
            return y + F.linear(F.linear(x, self.a), self.b) * (ALPHA / RANK) if self.lora else y

    def norm(x, w):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w

    def rotate(x, cos, sin):
        x1, x2 = x.chunk(2, -1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = Linear(d, n_heads * hd), Linear(d, n_kv * hd), Linear(d, n_kv * hd)
            self.o, self.gate, self.up, self.down = Linear(n_heads * hd, d), Linear(d, ff), Linear(d, ff), Linear(ff, d)
            self.norms = nn.Parameter(torch.ones(2, d, dtype=dtype), requires_grad=False)

        def forward(self, h, cos, sin):
            b, t, _ = h.shape
            x = norm(h, self.norms[0])
            q = rotate(self.q(x).view(b, t, n_heads, hd).transpose(1, 2), cos, sin)
            k = rotate(self.k(x).view(b, t, n_kv, hd).transpose(1, 2), cos, sin)
            v = self.v(x).view(b, t, n_kv, hd).transpose(1, 2)
            if n_kv != n_heads:
                k, v = (z.repeat_interleave(n_heads // n_kv, 1) for z in (k, v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True) if hasattr(F, "scaled_dot_product_attention") else plain(q, k, v)
            h = h + self.o(a.transpose(1, 2).reshape(b, t, n_heads * hd))
            x = norm(h, self.norms[1])
            return h + self.down(F.silu(self.gate(x)) * self.up(x))

    def plain(q, k, v):
        t = q.shape[-2]
        s = q @ k.transpose(-1, -2) / math.sqrt(hd)
        s = s.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
        return s.softmax(-1) @ v

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Parameter(torch.randn(vocab, d, dtype=dtype) * 0.02, requires_grad=False)
            self.layers = nn.ModuleList(Layer() for _ in range(n_layers))
            self.final = nn.Parameter(torch.ones(d, dtype=dtype), requires_grad=False)

        def forward(self, tokens):
            t = tokens.shape[1]
            angle = torch.arange(t)[:, None] * (10000.0 ** (-torch.arange(0, hd, 2) / hd))[None]
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            h = self.embedding[tokens]
            for layer in self.layers:
                h = layer(h, cos, sin)
            return norm(h, self.final)

    return Llama()


def worker(args):
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    n, t = CASES[args.case]
    training = args.case.startswith("lora")
    model = build(args.shape, dtype, training)
    vocab = SHAPES[args.shape][5]
    tokens = torch.randint(vocab, (n, t))
    facts = {}

    if training:
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.01)

        def step():
            logits = F.linear(model(tokens[:, :-1]), model.embedding)
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            facts["norm"] = float(torch.nn.utils.clip_grad_norm_(trainable, 1.0))
            optimizer.step()
            facts["loss"] = float(loss)
            facts.setdefault("first_loss", facts["loss"])
    else:

        @torch.no_grad()
        def step():
            F.linear(model(tokens)[:, -1], model.embedding)

    step()
    step()
    samples, begin = [], time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - begin < args.seconds:
        s = time.perf_counter()
        step()
        samples.append(time.perf_counter() - s)
    if training:
        assert facts["norm"] > 0 and facts["loss"] < facts["first_loss"], facts
    print(json.dumps({"rate": n * t / statistics.median(samples), "n": len(samples), "torch": torch.__version__}))


def measured(command, environment=None):
    """Runs a command; its standard output and peak resident bytes."""
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(command, stdout=out, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        if status != 0:
            sys.exit(f"{' '.join(command)} failed with {os.waitstatus_to_exitcode(status)}")
        out.seek(0)
        return out.read(), usage.ru_maxrss * 1024


def run_torch(args, case, shape, dtype):
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="4294967296", MALLOC_TRIM_THRESHOLD_="17179869184", OMP_NUM_THREADS=str(args.threads))
    command = [sys.executable, __file__, "--worker", case, "--shapes", shape, "--dtypes", dtype, "--threads", str(args.threads), "--seconds", str(args.seconds)]
    text, peak = measured(command, environment)
    facts = json.loads(text.splitlines()[-1])
    return facts["rate"], peak, facts["torch"]


def run_ours(args, case, shape, dtype):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.csv")
        kind = "lora_step" if case.startswith("lora") else "prefill"
        command = [args.keepsake, "bench", kind, "--only", f"{case}.{shape}", "--shape", shape, "--dtype", dtype, "--threads", str(args.threads), "--seconds", str(args.seconds), "--csv", path]
        _, peak = measured(command)
        with open(path) as f:
            row = next(r for r in csv.DictReader(f) if r["name"] == f"{case}.{shape}")
        return float(row["rate"]), peak, float(row["peak_share"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="15m")
    parser.add_argument("--dtypes", default="f32")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--keepsake", default=os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "keepsake"))
    parser.add_argument("--worker", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.case, args.shape, args.dtype = args.worker, args.shapes, args.dtypes
        return worker(args)
    print(f"{'case':<22} {'type':<5} {'ours/s':>9} {'torch/s':>9} {'ratio':>6} {'peak':>6} {'ours MB':>8} {'torch MB':>8} {'ratio':>6}")
    version = "?"
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(","):
            for case in args.cases.split(","):
                rounds = []
                for _ in range(args.rounds):
                    ours = run_ours(args, case, shape, dtype)
                    theirs = run_torch(args, case, shape, dtype)
                    version = theirs[2]
                    rounds.append((ours, theirs))
                rate, their_rate = (statistics.median(r[i][0] for r in rounds) for i in (0, 1))
                memory, their_memory = (max(r[i][1] for r in rounds) for i in (0, 1))
                ratio = statistics.median(r[0][0] / r[1][0] for r in rounds)
                share = statistics.median(r[0][2] for r in rounds)
                print(f"{case + '.' + shape:<22} {dtype:<5} {rate:9.0f} {their_rate:9.0f} {ratio:6.2f} {100 * share:5.1f}% {memory / 1e6:8.0f} {their_memory / 1e6:8.0f} {memory / their_memory:6.2f}", flush=True)
    print(f"PyTorch {version}, {args.threads} thread(s), {args.rounds} rounds in turn; MB: peak resident memory of the whole process")


if __name__ == "__main__":
    main()
