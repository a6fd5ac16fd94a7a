#!/usr/bin/env python3
"""Peak memory of a LoRA training step, computed without a GPU: transformers and PEFT on fake tensors, and this project by what
core/model/forward.h says a pass keeps.

    python3 experiments/bench_peers_memory.py [--shape 3b] [--n-seqs 32] [--seq-len 512] [--rank 8] [--targets q,k,v,o]

The peers' code runs whole (forward, loss, backward, AdamW) on tensors that have sizes and no contents; each storage counts from
its birth to its end, as torch.cuda.max_memory_allocated does, and the largest sum is the peak. Attention is PyTorch's flash
kernel for the CPU, which keeps what the GPU's keeps. Not computed: torch.compile (it chooses for itself what to make again), and
what an allocator loses. This project's 64 x 256 tokens with adapters on all seven maps took 39.5 GB on an H200 (results/gpu/);
computed: 39.4. Needs PyTorch, transformers and PEFT. Exit codes: 0; 2 for wrong use; 3 without these."""
import argparse
import sys
import warnings
import weakref

from bench_peers import SHAPES, TARGETS

BF16, F32 = 2, 4


def of_this_project(a, recompute):
    """Bytes: weights, adapters with gradient and moments, and a pass of all rows; workspaces (below 2 %) left out."""
    hidden, layers, heads, kv_heads, inter, vocab, _, tied, _ = SHAPES[a.shape]
    query, key = hidden, hidden // heads * kv_heads
    ends = {"q": (hidden, query), "k": (hidden, key), "v": (hidden, key), "o": (query, hidden), "gate": (hidden, inter), "up": (hidden, inter), "down": (inter, hidden)}
    weights = layers * (sum(n * m for n, m in ends.values())) + vocab * hidden * (1 if tied else 2)
    adapters = layers * sum(sum(ends[t]) for t in a.targets.split(",")) * a.rank
    mlp, rest = 2 * inter * BF16, (hidden + 2 * query + 2 * key) * BF16 + heads * F32
    own = hidden * BF16 + 2 * F32 + 7 * a.rank * BF16
    scratch = (6 * hidden + max(2 * inter, 2 * query + 2 * key) + 4 * a.rank) * BF16 + F32
    again = {"none": 0, "mlp": mlp, "layer": mlp + rest}[recompute]
    row = layers * (own + mlp + rest - again) + again + scratch
    return weights * BF16 + adapters * 4 * F32 + a.n_seqs * a.seq_len * row


def of_peer(a, torch, transformers, peft, checkpointing):
    """Bytes of PEFT's second step."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Living(TorchDispatchMode):
        """Bytes of the storages that are alive, and the most there were."""

        def __init__(self):
            super().__init__()
            self.known, self.now, self.peak = weakref.WeakSet(), 0, 0

        def count(self, tensors):
            for storage in (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)):
                if storage in self.known:
                    continue
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.end, storage.nbytes())
            self.peak = max(self.peak, self.now)

        def end(self, n):
            self.now -= n

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.count(tree_leaves(out))
            return out

    hidden, layers, heads, kv_heads, inter, vocab, _, tied, _ = SHAPES[a.shape]
    config = transformers.LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=inter,
                                      vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=2048)
    adapter = peft.LoraConfig(r=a.rank, lora_alpha=16, task_type="CAUSAL_LM", target_modules=[TARGETS[t] for t in a.targets.split(",")])
    living = Living()
    with FakeTensorMode():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").requires_grad_(False)
        moves = torch.nn.Module._apply
        torch.nn.Module._apply = lambda self, *_, **__: self  # fake parameters cannot be exchanged; nothing has to move
        try:
            model = peft.get_peft_model(model, adapter, autocast_adapter_dtype=False).train()
        finally:
            torch.nn.Module._apply = moves
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.data = p.data.to(torch.bfloat16)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW(trained)
        living.count([*model.parameters(), *model.buffers()])
        with living:
            for _ in range(2):
                living.peak = living.now
                tokens = torch.zeros(a.n_seqs, a.seq_len, dtype=torch.long)
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return living.peak


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="3b")
    for name, default in (("--n-seqs", 32), ("--seq-len", 512), ("--rank", 8)):
        p.add_argument(name, type=int, default=default)
    p.add_argument("--targets", default="q,k,v,o")
    a = p.parse_args()
    if min(a.n_seqs, a.seq_len, a.rank) < 1 or not set(a.targets.split(",")) <= set(TARGETS):
        p.error("sizes are at least 1; targets are some of %s" % ",".join(TARGETS))
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers renames what PEFT's users call
    try:
        import peft
        import torch
        import transformers
    except ImportError as e:
        print("bench_peers_memory.py: %s; install torch, transformers and peft" % e, file=sys.stderr)
        return 3
    rows = [("PEFT, eager", of_peer(a, torch, transformers, peft, False)), ("PEFT, gradient checkpointing", of_peer(a, torch, transformers, peft, True))]
    rows += [("ours, run.recompute=%s" % r, of_this_project(a, r)) for r in ("none", "mlp", "layer")]
    print("%s, %d x %d tokens, rank %d on %s; computed, not measured" % (a.shape, a.n_seqs, a.seq_len, a.rank, a.targets))
    for name, n in rows:
        print("%-30s %6.1f GB  %4.2f" % (name, n / 1e9, n / rows[0][1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
