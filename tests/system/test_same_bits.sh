#!/bin/sh
# The same bits: on a rerun, with one thread or two, alone or in a cohort, in one shard or three, and after being killed at random
# moments and resumed. Usage: test_same_bits.sh KEEPSAKE
set -eu
bin=$1
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
config=$here/tiny.cfg
failures=0

run() { # run OUTPUT [option ...]
  out=$1
  shift
  "$bin" run "$config" --quiet --set "experiment.output=$work/$out" "$@" >"$work/$out.txt" 2>"$work/$out.err" || {
    echo "keepsake run ($out) failed with $?:"
    cat "$work/$out.err"
    exit 1
  }
}
digests() { # digests OUTPUT: one line a cell
  for file in "$work/$1"/cells/*.h5; do
    echo "$(basename "$file") $("$bin" show --digest "$file")"
  done
}
same() { # same OUTPUT WHAT: every cell of OUTPUT equals the reference's
  digests "$1" >"$work/$1.digests"
  if grep -v -x -F -f "$work/reference.digests" "$work/$1.digests" >"$work/differ"; then
    echo "FAILED: $2 changes results:"
    cat "$work/differ"
    failures=$((failures + 1))
  else
    echo "ok: $2 ($(wc -l <"$work/$1.digests") cells)"
  fi
}

run reference --set run.threads=2
digests reference >"$work/reference.digests"
[ "$(wc -l <"$work/reference.digests")" -eq 8 ] || { echo "the reference has not 8 cells"; exit 1; }
[ "$(cut -d' ' -f2 "$work/reference.digests" | sort -u | wc -l)" -eq 8 ] || { echo "two cells have the same digest: it says nothing"; exit 1; }

run again --set run.threads=2
same again "a rerun"
run one-thread --set run.threads=1
same one-thread "one thread"
for policy in sdss reservoir none all; do
  run "alone-$policy" --set "policy=$policy" --set seed=2 --set experiment.floor_and_ceiling=false
  same "alone-$policy" "running $policy alone"
done
for i in 0 1 2; do run shards --shard "$i/3"; done
same shards "three shards"
run small-passes --set run.max_rows=64 --set run.generate_batch=3 --set run.embed_rows=50
same small-passes "smaller passes"

# Kill -9 at random moments. The waits come from a fixed sequence; each try goes on where the last one was killed.
kills=0
try=0
while [ "$kills" -lt 12 ] && [ "$try" -lt 400 ]; do
  try=$((try + 1))
  wait_ms=$(((try * 7919 % 97) * ${KS_TEST_KILL_MS:-12} + 5))
  "$bin" run "$config" --quiet --set "experiment.output=$work/killed" >/dev/null 2>"$work/killed.err" &
  pid=$!
  sleep "$(printf '%d.%03d' $((wait_ms / 1000)) $((wait_ms % 1000)))"
  kill -KILL "$pid" 2>/dev/null || true
  status=0
  wait "$pid" 2>/dev/null || status=$?
  case $status in
  137) kills=$((kills + 1)) ;;
  0) rm -rf "$work/killed" ;; # it came to its end: start over, for more kills
  *)
    echo "FAILED: resuming after $kills kills ended with $status:"
    cat "$work/killed.err"
    exit 1
    ;;
  esac
done
[ "$kills" -ge 12 ] || { echo "FAILED: only $kills kills in $try tries"; exit 1; }
run killed
same killed "being killed $kills times and resumed"

exit "$failures"
