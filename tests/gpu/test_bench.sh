#!/bin/sh
# `keepsake bench --device cuda` over the shim: every operation is compared with the CPU there, in both types, and the times that mean
# nothing give no shares. Usage: test_bench.sh KEEPSAKE_OVER_THE_SHIM
set -eu
bin=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# bench NAME argument...
bench() {
  name=$1
  shift
  "$bin" bench ops --device cuda --shape 260k --rows 16 --seconds 0 --samples 1 --csv "$work/$name.csv" --jsonl "$work/$name.jsonl" "$@" \
    >"$work/$name.txt" 2>"$work/$name.err" || {
    echo "FAILED: bench $name ended with $?"
    grep incorrect "$work/$name.txt" || true
    cat "$work/$name.err"
    exit 1
  }
  # Every row of a case is "ok", "noisy" or says why not; no share of a ceiling.
  awk -F, -v name="$name" '
    NR == 1 { for (i = 1; i <= NF; i++) column[$i] = i; next }
    { n++; for (i = 1; i <= NF; i++) if ($i ~ /^"(incorrect|suspect)"$/) { print "FAILED: " name ": " $0; bad = 1 } }
    END { if (n == 0) { print "FAILED: " name ": no rows"; bad = 1 } exit bad }' "$work/$name.csv"
  echo "ok: $name, $(($(wc -l <"$work/$name.csv") - 1)) rows"
}

bench both --dtype f32,bf16
bench blocks --dtype q8_0,q4_0,nf4
bench variants --dtype bf16 --variants all --only attention_forward
grep -q "times mean nothing" "$work/both.txt" || { echo "FAILED: the shim is not named"; exit 1; }
grep -q "attention_forward=" "$work/variants.csv" || { echo "FAILED: no variant is named"; exit 1; }
operations=$("$bin" ls operations | awk '/^  / { print $1 }')
for operation in $operations; do
  grep -q ",\"$operation\"," "$work/both.csv" || { echo "FAILED: $operation is not measured"; exit 1; }
done
