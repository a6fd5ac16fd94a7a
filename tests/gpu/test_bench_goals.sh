#!/bin/sh
# `keepsake bench goals` with every size small: each case of the list has a row that was checked, with its parameters; on the CPU, or over
# the shim. Usage: test_bench_goals.sh KEEPSAKE DEVICE LIST [NAMES]   (NAMES as --only has them, matched with fixed beginnings here)
set -eu
bin=$1 device=$2 list=$3 names=${4-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
  echo "FAILED: $*"
  cat "$work/err"
  exit 1
}

"$bin" bench goals --device "$device" --scale 512 --seconds 0 --jsonl "$work/rows.jsonl" ${names:+--only "$names"} >"$work/out" 2>"$work/err" ||
  fail "ended with $?: $(grep incorrect "$work/out" || true)"

# The names of the list that were asked for, and those of the rows.
sed -n 's/^KS_CASE(\([a-z0-9_]*\), \([A-Za-z0-9_.]*\), .*/\1 \2/p' "$list" |
  awk -v names="$names" 'BEGIN { n = split(names, one, ",") }
    n == 0 { print $2; next }
    { for (i = 1; i <= n; i++) { p = one[i]; star = sub(/\*$/, "", p); if (star ? index($1, p) == 1 || index($2, p) == 1 : $1 == p || $2 == p) { print $2; next } } }' |
  sort >"$work/wanted"
sed -n 's/.*"name":"\([^"]*\)".*/\1/p' "$work/rows.jsonl" | sort >"$work/got"
[ -s "$work/wanted" ] || fail "the list has nothing of $names"
diff "$work/wanted" "$work/got" || fail "rows and the list differ"

grep '"name"' "$work/rows.jsonl" | grep -v '"case":{"op":"[a-z_]*",' && fail "a row without its parameters"
bad=$(grep -c '"verdict":"\(incorrect\|suspect\|unsupported\|skipped(memory)\)"' "$work/rows.jsonl" || true)
[ "$bad" -eq 0 ] || fail "$bad rows are not right"
skipped=$(grep '"verdict":"skipped' "$work/rows.jsonl" | sed 's/.*"name":"\([^"]*\)".*/\1/' | tr '\n' ' ')
if [ "$device" = cpu ]; then
  [ "$skipped" = "run.3b " ] || fail "skipped on the CPU: $skipped"
  "$bin" bench goals --device cpu >"$work/out" 2>"$work/err" && fail "the CPU took sizes of a GPU"
  grep -q -- "--scale" "$work/err" || fail "it does not say what to do"
else
  [ -z "$skipped" ] || fail "skipped: $skipped"
  # Training: one graph and one wait a step, and memory of its own.
  grep '"op":"lora_step"' "$work/rows.jsonl" | grep -v '"launches":0.0,"graphs":1.0,"waits":1.0' && fail "a step is no graph"
  grep '"op":"lora_step"' "$work/rows.jsonl" | grep '"memory_mb":null' && fail "a step without its memory"
fi
echo "ok: $(wc -l <"$work/got") rows on $device"
