#!/bin/sh
# A whole experiment on backend "cuda" (over the shim) against the same on the CPU: the same arrivals are kept and asked about, losses
# agree within rounding, and a rerun gives the same bits. Usage: test_whole_run.sh KEEPSAKE_OVER_THE_SHIM
set -eu
bin=$1
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/small.cfg" <<'END'
experiment = { floor_and_ceiling = false; };
policy = ["sdss", "fifo"];
data = { source = "persona"; stream_size = 12; eval_size = 12; };
window = { size = 6; };
buffer = { bins = 4; bin_bytes = 2048; };
synth = { writer = "rules"; count = 1; };
lora = { rank = 4; alpha = 8.0; dropout = 0.1; targets = "q,v,down"; };
train = { learning_rate = 2e-3; batch_size = 4; epochs = 1; };
eval = { temperature = 0.0; max_new_tokens = 3; };
END

run() { # run OUTPUT DEVICE [option ...]
  out=$1
  device=$2
  shift 2
  "$bin" run "$work/small.cfg" --quiet --device "$device" --set "experiment.output=$work/$out" "$@" >"$work/$out.txt" 2>"$work/$out.err" || {
    echo "keepsake run ($out) failed with $?:"
    cat "$work/$out.err"
    exit 1
  }
}
digests() { # one line a cell
  for file in "$work/$1"/cells/*.h5; do
    "$bin" show --digest "$file"
  done
}

run cpu cpu
run cuda cuda
run again cuda
[ "$(digests cuda)" = "$(digests again)" ] || { echo "FAILED: a rerun gives other bits"; exit 1; }
echo "ok: a rerun gives the same bits"
[ "$(digests cuda)" != "$(digests cpu)" ] || { echo "FAILED: the very bits of the CPU: did it run there?"; exit 1; }

# Columns by name: what was kept and asked must be equal, losses near. Float32 rounding of some thousand additions
# (section "tolerance" of tests/README.md) through two short fine-tunings: 1e-3 of a loss lies far above it and far below what
# one different example makes.
awk -F, '
  FNR == 1 { for (i = 1; i <= NF; i++) column[$i] = i; next }
  NR == FNR { for (name in column) cpu[$1, name] = $column[name]; rows++; next }
  {
    n++
    for (name in column) {
      a = cpu[$1, name]; b = $column[name]
      if (name ~ /^(label|cells|sets_kept|bytes_used|annotations|acceptance)$/ && a != b) { print "FAILED: " $1 ": " name " is " b ", on the CPU " a; bad = 1 }
      if (name == "loss" && !((a - b) ^ 2 <= (1e-3 * a) ^ 2)) { print "FAILED: " $1 ": loss is " b ", on the CPU " a; bad = 1 }
    }
  }
  END { if (n != rows || n == 0) { print "FAILED: " n " rows, on the CPU " rows; bad = 1 } exit bad }
' "$work/cpu/table.csv" "$work/cuda/table.csv"
echo "ok: the same selections as on the CPU, losses within rounding"
