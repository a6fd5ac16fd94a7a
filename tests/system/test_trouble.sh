#!/bin/sh
# Trouble from outside: every case gives one clear message with place and remedy, the right exit code, and leaves earlier results unharmed.
# Usage: test_trouble.sh KEEPSAKE
set -eu
bin=$1
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
small="--set policy=fifo --set seed=1 --set experiment.floor_and_ceiling=false"

run() { # run OUTPUT [option ...]: small matrix
  out=$1
  shift
  # shellcheck disable=SC2086  # options without blanks
  "$bin" run "$here/tiny.cfg" --quiet $small --set "experiment.output=$work/$out" "$@"
}
expect() { # expect CODE TEXT WHAT command...
  code=$1 text=$2 what=$3
  shift 3
  status=0
  "$@" >"$work/out" 2>"$work/err" || status=$?
  if [ "$status" -ne "$code" ]; then
    echo "FAILED: $what: exit code $status, not $code"
  elif ! grep -q -e "$text" "$work/err"; then
    echo "FAILED: $what: the message lacks \"$text\""
  elif [ "$(wc -l <"$work/err")" -ne 1 ]; then
    echo "FAILED: $what: not one line"
  elif grep -q -i -e "internal error" -e "Sanitizer" "$work/err"; then
    echo "FAILED: $what: internal"
  else
    echo "ok: $what: $(cut -c1-150 "$work/err")"
    return 0
  fi
  cat "$work/err"
  failures=$((failures + 1))
}
digest() { "$bin" show --digest "$work/$1/cells/fifo-s1.h5"; }

run whole >/dev/null
good=$(digest whole)

# A full disk, stood in for by a limit on file sizes: in the middle of a run and at its very beginning.
limited() { (ulimit -f "$1" && shift && "$@"); }
expect 3 "free" "a disk that fills at the first checkpoint" limited 4 run full
rm -rf "$work/full"
cp -r "$work/whole" "$work/again"
expect 3 "free" "a disk that is full when results are replaced" limited 4 run again --fresh
[ "$(digest again)" = "$good" ] || { echo "FAILED: a full disk harmed earlier results"; failures=$((failures + 1)); }

# Results files that are not ours, of another schema, cut, or of another configuration.
for kind in foreign empty cut; do cp -r "$work/whole" "$work/$kind"; done
echo "not a results file" >"$work/foreign/cells/fifo-s1.h5"
expect 2 "fifo-s1.h5" "a foreign file in the results" run foreign
: >"$work/empty/cells/fifo-s1.h5"
expect 2 "fifo-s1.h5" "an empty file in the results" run empty
head -c 3000 "$work/whole/cells/fifo-s1.h5" >"$work/cut/cells/fifo-s1.h5"
expect 2 "fifo-s1.h5" "a cut file in the results" run cut
expect 2 "another configuration" "results of another configuration" run whole --set train.epochs=1
expect 2 "fifo-s1.h5" "show of a cut file" "$bin" show "$work/cut"
expect 2 "keepsake run" "show of an empty folder" "$bin" show "$here"
[ "$(digest whole)" = "$good" ] || { echo "FAILED: earlier results were harmed"; failures=$((failures + 1)); }

# Places.
: >"$work/file"
expect 3 "file" "an output folder that is a file" run file
expect 2 "nowhere.cfg" "a configuration that is not there" "$bin" run "$work/nowhere.cfg"
expect 2 "model.path" "a model that is not there" run x --set "model.path=$work/nowhere"
expect 2 "select.lexicon" "a lexicon that is not there" run x --set "select.lexicon=$work/nowhere"

# Data and models.
printf '[{"instruction": "a", "input": "", "output": ""}]' >"$work/row.json"
expect 2 "row.json" "a row without a response" run x --set data.source=alpaca --set "data.path=$work/row.json"
printf '[{"instruction": "a", "output": "b"}, {"instr' >"$work/cut.json"
expect 2 "cut.json" "a cut data file" run x --set data.source=alpaca --set "data.path=$work/cut.json"
printf '[{"instruction": "a\377", "output": "b"}]' >"$work/latin.json"
expect 2 "latin.json" "data that is not UTF-8" run x --set data.source=alpaca --set "data.path=$work/latin.json"
printf '[{"instruction": "a", "output": "b"}]' >"$work/one.json"
expect 2 "eval_size" "more held-out sets than there are" run x --set data.source=alpaca --set "data.path=$work/one.json"
head -c 100 /dev/zero >"$work/zero.bin"
expect 2 "zero.bin" "a model file of zeros" run x --set "model.path=$work/zero.bin" --set "model.tokenizer=$work/zero.bin"

# Two runs on one cell.
if command -v flock >/dev/null 2>&1; then
  expect 3 "another run" "a cell that another run writes" flock "$work/whole/cells/.fifo-s1.lock" "$bin" run "$here/tiny.cfg" --quiet --set policy=fifo --set seed=1 --set experiment.floor_and_ceiling=false --set "experiment.output=$work/whole"
fi

# Standard output that is closed or full.
if [ -c /dev/full ]; then
  full_stdout() { "$bin" show "$work/whole" 2>"$work/err2" >/dev/full; }
  status=0
  full_stdout || status=$?
  if [ "$status" -eq 3 ]; then echo "ok: a full standard output"; else echo "FAILED: a full standard output gives $status"; failures=$((failures + 1)); fi
fi
exit "$failures"
