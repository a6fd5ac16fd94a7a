#!/usr/bin/env python3
"""Does the base model answer and rewrite, and can LoRA lift it to a user's own answers?

    python3 datasets/check_base_model.py --corpus-tool build/ks-corpus --model datasets/base --users 0

Prints greedy answers and rewritings, then ROUGE-1 of a user's held-out questions without fine-tuning (floor) and after
fine-tuning on subsets of the stream (--keep sizes; 0 is everything: ceiling). Needs torch, transformers, peft, rouge-score,
sentencepiece. It only checks the dataset from outside; the numbers of record come from keepsake itself.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
from pathlib import Path

import peft
import sentencepiece
import torch
import transformers
from rouge_score import rouge_scorer

BOS, EOS = 1, 2
SCORER = rouge_scorer.RougeScorer(["rouge1"])


def user_rows(tool, user, stream, held_out):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "user.jsonl"
        subprocess.run([tool, "user", str(path), "1", str(user), str(stream), str(held_out)], check=True)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in rows if r["part"] == "stream"], [r for r in rows if r["part"] == "eval"]


@torch.no_grad()
def generate(model, sp, prompts, max_new_tokens=48):
    model.eval()
    out = []
    for prompt in prompts:
        ids = [BOS] + sp.encode(prompt)
        n = len(ids)
        while len(ids) - n < max_new_tokens:
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == EOS:
                break
            ids.append(token)
        out.append(sp.decode(ids[n:]).strip())
    return out


def rouge1(model, sp, rows):
    answers = generate(model, sp, [f"Q: {r['question']}\nA:" for r in rows])
    scores = [SCORER.score(r["preferred"], a)["rouge1"].fmeasure for r, a in zip(rows, answers)]
    fact = [s for s, r in zip(scores, rows) if r["fact"] >= 0]
    style = [s for s, r in zip(scores, rows) if r["fact"] < 0]
    mean = lambda v: sum(v) / len(v) if v else float("nan")
    return mean(scores), mean(fact), mean(style), answers


def tune(model, sp, rows, args):
    config = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0,
                             target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(model, config)
    model.train()
    examples = []
    for r in rows:
        prompt = f"Q: {r['question']}\nA:"
        examples.append(([BOS] + sp.encode(prompt + " " + r["preferred"]) + [EOS], 1 + len(sp.encode(prompt))))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    rng, steps = random.Random(0), 0
    total = args.steps or args.epochs * -(-len(examples) // args.batch)
    order = []
    while steps < total:
        group = []
        while len(group) < min(args.batch, len(examples)):
            if not order:
                order = rng.sample(range(len(examples)), len(examples))
            group.append(examples[order.pop()])
        n = max(len(e[0]) for e in group)
        ids = torch.zeros(len(group), n, dtype=torch.long)
        labels = torch.full((len(group), n), -100)
        for row, (tokens, begin) in enumerate(group):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, begin : len(tokens)] = torch.tensor(tokens[begin:])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        for g in optimizer.param_groups:
            g["lr"] = args.lr * (1 - steps / total)
        optimizer.step()
        steps += 1
    return model, loss.item(), steps


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--corpus-tool", required=True)
    p.add_argument("--model", default="datasets/base")
    p.add_argument("--users", type=int, nargs="*", default=[0])
    p.add_argument("--keep", type=int, nargs="*", default=[32, 128, 0], help="sets drawn from the stream; 0: all")
    p.add_argument("--stream", type=int, default=480)
    p.add_argument("--held-out", type=int, default=64)
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--epochs", type=int, default=20)
    p.add_argument("--steps", type=int, default=0, help="instead of epochs")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--samples", type=int, default=6)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    load = lambda: transformers.LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(Path(args.model) / "tokenizer.model"))
    base = load()
    for user in args.users:
        stream, held_out = user_rows(args.corpus_tool, user, args.stream, args.held_out)
        questions = [r["question"] for r in held_out[: args.samples]]
        for q, a, w in zip(questions, generate(base, sp, [f"Q: {q}\nA:" for q in questions]),
                           generate(base, sp, [f"Rewrite: {q}\nR:" for q in questions])):
            print(f"Q {q}\n  A {a}\n  R {w}")
        all_, fact, style, _ = rouge1(base, sp, held_out)
        print(f"user {user} floor: ROUGE-1 {all_:.4f} (facts {fact:.4f}, style {style:.4f})", flush=True)
        for keep in args.keep:
            torch.manual_seed(0)
            rows = stream if keep == 0 else random.Random(user).sample(stream, keep)
            begin = time.time()
            model, loss, steps = tune(load(), sp, rows, args)
            seconds = time.time() - begin
            all_, fact, style, answers = rouge1(model, sp, held_out)
            print(f"user {user} keep {keep or 'all'}: ROUGE-1 {all_:.4f} (facts {fact:.4f}, style {style:.4f}) "
                  f"loss {loss:.3f} {steps} steps {seconds:.0f} s", flush=True)
        for r, a in list(zip(held_out, answers))[: args.samples]:
            print(f"  want {r['preferred']}\n  got  {a}")


if __name__ == "__main__":
    main()
