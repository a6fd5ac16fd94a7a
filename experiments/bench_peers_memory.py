#!/usr/bin/env python3
"""Peak memory of a LoRA training step, computed without a GPU: transformers and PEFT on fake tensors, and this project by what
core/model/forward.h says a pass keeps.

    python3 experiments/bench_peers_memory.py [--shape 3b] [--n-seqs 32] [--seq-len 512] [--rank 8] [--targets q,k,v,o]
                                              [--recompute 16,26] [--compiled]

The peers' code runs whole (forward, loss, backward, AdamW) on tensors that have sizes and no contents; each storage counts from
its birth to its end, as torch.cuda.max_memory_allocated does, and the largest sum is the peak. Attention is PyTorch's flash
kernel for the CPU, which keeps what the GPU's keeps. What an allocator loses is not computed. --recompute: values of
run.recompute_layers. --compiled: what torch.compile keeps of a layer, by its partitioner and real (CPU) layers, in place of what
the eager layers keep; takes a minute.

This project's 64 x 256 tokens with adapters on all seven maps took 39.5 GB on an H200 (results/gpu/); computed: 39.4. Needs
PyTorch, transformers and PEFT. Exit codes: 0; 2 for wrong use; 3 without these."""
import argparse
import sys
import warnings
import weakref

from bench_peers import SHAPES, TARGETS

BF16, F32 = 2, 4


def of_this_project(a, again):
    """Bytes on an H200: weights, adapters with gradient and moments, and a pass of all rows of which `again` layers are computed
    again; workspaces of products and adapters (below 2 %) left out."""
    hidden, layers, heads, kv_heads, inter, vocab, _, tied, _ = SHAPES[a.shape]
    query, key = hidden, hidden // heads * kv_heads
    ends = {"q": (hidden, query), "k": (hidden, key), "v": (hidden, key), "o": (query, hidden), "gate": (hidden, inter), "up": (hidden, inter), "down": (inter, hidden)}
    weights = layers * sum(n * m for n, m in ends.values()) + vocab * hidden * (1 if tied else 2)
    adapters = layers * sum(sum(ends[t]) for t in a.targets.split(",")) * a.rank
    kept = (hidden + 7 * a.rank) * BF16 + 2 * F32
    rest = (hidden + 2 * query + 2 * key + 2 * inter) * BF16 + heads * F32
    rows = a.n_seqs * a.seq_len
    phases = max(rows * max(2 * inter, 2 * query + 2 * key) * BF16, min(rows, 2048) * vocab * (F32 + BF16))  # never at one time: the head's logits, gradients
    row = layers * kept + (layers - min(again, layers) + (again > 0)) * rest + (6 * hidden + 4 * a.rank) * BF16 + F32
    return weights * BF16 + adapters * 4 * F32 + phases + rows * row


def peer_model(a, torch, transformers, peft, layers=None, vocab=None):
    hidden, all_layers, heads, kv_heads, inter, all_vocab, _, tied, _ = SHAPES[a.shape]
    config = transformers.LlamaConfig(hidden_size=hidden, num_hidden_layers=layers or all_layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                                      intermediate_size=inter, vocab_size=vocab or all_vocab, tie_word_embeddings=tied, max_position_embeddings=2048)
    adapter = peft.LoraConfig(r=a.rank, lora_alpha=16, task_type="CAUSAL_LM", target_modules=[TARGETS[t] for t in a.targets.split(",")])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").requires_grad_(False)
    moves = torch.nn.Module._apply
    torch.nn.Module._apply = lambda self, *_, **__: self  # fake parameters cannot be exchanged; nothing has to move
    try:
        model = peft.get_peft_model(model, adapter, autocast_adapter_dtype=False).train()
    finally:
        torch.nn.Module._apply = moves
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    return model


def kept_by_layer(a, torch, transformers, peft, compiled):
    """Bytes that a layer keeps for the backward pass, a token: of real layers, three less one."""
    tokens = torch.zeros(2, 256, dtype=torch.long)

    def kept(layers):
        torch._dynamo.reset()
        model = peer_model(a, torch, transformers, peft, layers, 1000)
        call = torch.compile(model, backend="aot_eager_decomp_partition") if compiled else model
        frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def keep(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        call(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()  # compiles
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = call(input_ids=tokens, labels=tokens, use_cache=False).loss
        n = sum(n for at, n in storages.items() if at not in frozen)
        loss.backward()
        return n

    return (kept(3) - kept(1)) / 2 / tokens.numel()


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

    living = Living()
    with FakeTensorMode():
        model = peer_model(a, torch, transformers, peft)
        trained = [p for p in model.parameters() if p.requires_grad]
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
    p.add_argument("--recompute", default="16,26")
    p.add_argument("--compiled", action="store_true")
    a = p.parse_args()
    if min(a.n_seqs, a.seq_len, a.rank) < 1 or not set(a.targets.split(",")) <= set(TARGETS) or not all(n.isdigit() for n in a.recompute.split(",")):
        p.error("sizes are at least 1; targets are some of %s; --recompute takes whole numbers" % ",".join(TARGETS))
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers renames what PEFT's users call
    try:
        import peft
        import torch
        import transformers
    except ImportError as e:
        print("bench_peers_memory.py: %s; install torch, transformers and peft" % e, file=sys.stderr)
        return 3
    parts = (a, torch, transformers, peft)
    rows = [("PEFT, eager", of_peer(*parts, False))]
    if a.compiled:
        less = kept_by_layer(*parts, False) - kept_by_layer(*parts, True)
        rows.append(("PEFT, compiled", rows[0][1] - less * SHAPES[a.shape][1] * a.n_seqs * a.seq_len))
    rows.append(("PEFT, gradient checkpointing", of_peer(*parts, True)))
    rows += [("ours, %d layers computed again" % n, of_this_project(a, n)) for n in (0, *map(int, a.recompute.split(",")))]
    print("%s, %d x %d tokens, rank %d on %s; computed, not measured" % (a.shape, a.n_seqs, a.seq_len, a.rank, a.targets))
    for name, n in rows:
        print("%-32s %6.1f GB  %4.2f" % (name, n / 1e9, n / rows[0][1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
