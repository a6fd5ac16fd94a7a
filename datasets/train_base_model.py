#!/usr/bin/env python3
"""Trains the tiny base model of datasets/base/ on the population corpus of the persona generator.

    cmake --build build --target ks-corpus
    python3 datasets/train_base_model.py --corpus-tool build/ks-corpus --out datasets/base

The corpus (questions and generic answers, small talk, rewritings; no user's data) is written by ks-corpus from seeds, the
tokenizer is trained on it, then the model. Nothing else goes in. Made with torch 2.x, transformers 4.x / 5.x, sentencepiece
0.2; the exact versions, losses and seconds are written to training.json beside the model.
"""

import argparse
import json
import math
import platform
import random
import subprocess
import tempfile
import time
from pathlib import Path

import sentencepiece
import torch
import transformers

BOS, EOS = 1, 2


def write_corpus(tool, population_seed, seed, n_lines, folder):
    path = Path(folder) / f"population-{seed}.jsonl"
    subprocess.run([tool, "population", str(path), str(population_seed), str(seed), str(n_lines)], check=True)
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_tokenizer(rows, vocab_size, out):
    lines = [line for row in rows for line in (row["prompt"] + row["completion"]).split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(out / "tokenizer"), model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        character_coverage=1.0, num_threads=1, minloglevel=2)
    (out / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))


def encode(rows, sp):
    """(ids, start of the completion) of each row: bos prompt completion eos."""
    out = []
    for row in rows:
        prompt = [BOS] + sp.encode(row["prompt"])
        ids = [BOS] + sp.encode(row["prompt"] + row["completion"]) + [EOS]
        assert ids[: len(prompt)] == prompt, row
        out.append((ids, len(prompt)))
    return out


def batches(examples, tokens_per_batch, rng):
    """Batches of examples of similar length, in random order."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i][0]), rng.random()))
    groups, group = [], []
    for i in order:
        if group and len(examples[i][0]) * (len(group) + 1) > tokens_per_batch:
            groups.append(group)
            group = []
        group.append(i)
    groups.append(group)
    rng.shuffle(groups)
    return groups


def tensors(examples, group, prompt_weight):
    n = max(len(examples[i][0]) for i in group)
    ids = torch.zeros(len(group), n, dtype=torch.long)
    weight = torch.zeros(len(group), n)
    for row, i in enumerate(group):
        tokens, begin = examples[i]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weight[row, 1:begin] = prompt_weight
        weight[row, begin : len(tokens)] = 1
    return ids, weight


def loss_of(model, ids, weight):
    # Rows are padded on the right and attention is causal, so that padding changes nothing before it.
    logits = model(input_ids=ids[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weight[:, 1:].flatten()).sum(), weight[:, 1:].sum()


@torch.no_grad()
def validate(model, examples):
    model.eval()
    total = count = 0
    for group in batches(examples, 4096, random.Random(0)):
        s, n = loss_of(model, *tensors(examples, group, 0.0))
        total, count = total + s.item(), count + n.item()
    model.train()
    return total / count


def build(args, vocab_size):
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS,
        attention_bias=False, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def train(args, model, examples, held_out):
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.98))
    rng = random.Random(args.seed)
    begin, step, log = time.time(), 0, []
    groups = []
    while True:
        # The schedule follows the clock or the number of steps, whichever was asked.
        done = step / args.steps if args.steps else (time.time() - begin) / args.seconds
        if done >= 1:
            break
        if not groups:
            groups = batches(examples, args.batch_tokens, rng)
        lr = args.lr * min(1, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * done)) * 0.98 + 0.02)
        for g in optimizer.param_groups:
            g["lr"] = lr
        s, n = loss_of(model, *tensors(examples, groups.pop(), args.prompt_weight))
        loss = s / n
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            log.append((step, loss.item()))
            print(f"step {step} loss {loss.item():.4f} lr {lr:.2e} {time.time() - begin:.0f} s", flush=True)
    return step, time.time() - begin, validate(model, held_out)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--corpus-tool", required=True)
    p.add_argument("--out", default="datasets/base")
    p.add_argument("--population-seed", type=int, default=1)
    p.add_argument("--lines", type=int, default=200000)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--vocab", type=int, default=1536)
    p.add_argument("--hidden", type=int, default=96)
    p.add_argument("--intermediate", type=int, default=256)
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--heads", type=int, default=3)
    p.add_argument("--kv-heads", type=int, default=1)
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--batch-tokens", type=int, default=2048)
    p.add_argument("--prompt-weight", type=float, default=0.2)
    p.add_argument("--seconds", type=float, default=900, help="training time; ignored with --steps")
    p.add_argument("--steps", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = write_corpus(args.corpus_tool, args.population_seed, 1, args.lines, folder)
        held_out_rows = write_corpus(args.corpus_tool, args.population_seed, 2, 2000, folder)
    sp = train_tokenizer(rows[:30000], args.vocab, out)
    examples, held_out = encode(rows, sp), encode(held_out_rows, sp)
    model = build(args, sp.vocab_size())
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params} parameters, {sum(len(e[0]) for e in examples)} tokens", flush=True)
    steps, seconds, held_out_loss = train(args, model, examples, held_out)
    model = model.to(torch.bfloat16)
    stored_loss = validate(model.float(), held_out)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = 10000.0  # where transformers 4 and most other readers look for it
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)
    facts = {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("corpus_tool", "out")}, "parameters": n_params,
        "steps": steps, "seconds": round(seconds, 1), "held_out_loss_per_completion_token": round(held_out_loss, 4),
        "held_out_loss_as_stored_in_bfloat16": round(stored_loss, 4),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "sentencepiece": sentencepiece.__version__}}
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
