#!/bin/sh
# nvcc.sh log nvcc arguments...: runs nvcc and keeps what it and ptxas say in the log; says it only when that is more than notes.
log=$1
shift
if "$@" >"$log.new" 2>&1; then
  grep -v '^ptxas info \|^    [0-9]* bytes stack frame\|^ *$' "$log.new" | grep -v '^[0-9]* bytes stack' >&2
  mv -f "$log.new" "$log"
else
  status=$?
  grep -v '^ptxas info \|^    [0-9]* bytes stack frame' "$log.new" >&2
  exit "$status"
fi
