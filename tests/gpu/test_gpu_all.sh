#!/bin/sh
# tests/gpu.sh run and all, over a bundle of programs that only pretend: no GPU, no toolkit, no PyTorch.
# Usage: test_gpu_all.sh FOLDER_OF_THE_SOURCES
set -eu
root=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "FAILED: $1"; [ ! -f "$work/out/results.txt" ] || cat "$work/out/results.txt"; exit 1; }

# ---- a bundle: a suite, the program, tools
mkdir -p "$work/kit/bin" "$work/kit/tests" "$work/kit/experiments" "$work/kit/configs" "$work/tools"
cp "$root/tests/gpu.sh" "$root/tests/gpu_report.py" "$work/kit/tests/"
cp "$root"/experiments/bench_peers*.py "$work/kit/experiments/"
printf 'commit=abc\nshim=yes\narchs=90-real\nsuites=test_one\nmodels=\n' >"$work/kit/MANIFEST"
cat >"$work/kit/experiments/bench_goals.def" <<'END'
KS_CASE(g, norm_f.1b, rmsnorm_forward, "rows=64 n_cols=32")
KS_CASE(g, lora.3b, lora_step, "shape=3b n_seqs=2")
KS_CASE(g, rope.1b, rope, "rows=64")
KS_CASE(head_1b, head_loss.1b, head_loss, "rows=64")
KS_CASE(decode_1b, decode.1b, decode, "shape=1b")
KS_GOAL(norm_f.1b, copy_share, at_least, 0.85, copy)
KS_GOAL(lora.3b, matrix_share, at_least, 0.55, bf16)
KS_GOAL(rope.1b, copy_share, at_least, 0.85, copy)
KS_GOAL(head_loss.1b, matrix_share, at_least, 0.6, bf16)
END
printf '#!/bin/sh\necho "[====] Synthesis: Tested: 3 | Passing: 3"\n' >"$work/kit/bin/test_one"
cat >"$work/kit/bin/keepsake" <<'END'
#!/bin/sh
echo "$*" >>"$KEEPSAKE_LOG"
jsonl="" chosen="" cases=norm_f.1b
while [ $# -gt 0 ]; do
  case $1 in
    --jsonl) jsonl=$2 ;;
    --only) cases=$2 ;;
    --variants=*) chosen=${1#--variants=} ;;
  esac
  shift
done
[ -n "$jsonl" ] || exit 0
row='{"name":"%s","verdict":"ok","median_ms":2.0,"samples_ms":[1.9,2.0,2.1],"peak_share":%s,"copy_share":%s,"rate":5,"variant":"'$chosen'"}\n'
{
  echo '{"run":{"device":"a card","driver":"1","commit":"abc","time":"now"}}'
  case $cases in
    head*) printf "$row" head_loss.1b 0.7 null; exit ;;
    decode*) printf "$row" decode.1b null "${KS_CUDA_PDL:-null}"; exit ;;
    sim*) exit 1 ;;
    train*) sleep 30 ;;
  esac
  printf "$row" norm_f.1b null 0.9
  printf "$row" lora.3b 0.11 null
  printf "$row" rope.1b null 0.8
} >>"$jsonl"
END
cat >"$work/tools/ncu" <<'END'
#!/bin/sh
echo "ncu $*"
case $* in *attention_back*) echo "==WARNING== No kernels were profiled." ;; esac
END
cat >"$work/tools/nvidia-smi" <<'END'
#!/bin/sh
case $* in -L) echo "GPU 0: a card" ;; *compute_cap,*) ;; *compute_cap*) echo "$CAPABILITY" ;; esac
END
cat >"$work/tools/compute-sanitizer" <<'END'
#!/bin/sh
case $2 in racecheck) echo "RACECHECK SUMMARY: 0 hazards displayed" ;; synccheck) sleep 30 ;; *) echo "ERROR SUMMARY: 0 errors" ;; esac
END
printf '#!/bin/sh\nexit 1\n' >"$work/tools/no_python"
chmod +x "$work"/kit/bin/* "$work"/tools/*
export PATH="$work/tools:$PATH" KEEPSAKE_LOG="$work/calls"
python=$(command -v python3 || true)
[ -n "$python" ] || { echo "skipped: no python3"; exit 0; }
# A python without PyTorch, whatever this machine has.
printf '#!/bin/sh\n[ "$1" != -c ] || exit 1\nexec %s "$@"\n' "$python" >"$work/tools/plain_python"
chmod +x "$work/tools/plain_python"
run() { PYTHON=plain_python sh "$work/kit/tests/gpu.sh" "$@" >"$work/log" 2>&1; }
has() { grep -q -- "$2" "$work/out/$1" || fail "$1 says nothing of: $2"; }

run run "$work/kit" "$work/out" --only suites,goals,variants,profile,sanitizer,report --limit 2 --worst 2 && fail "a profile of nothing passed"
has results.txt 'passed     suite test_one: 3 tests'
has results.txt 'skipped    peers: plain_python has no PyTorch'
has results.txt 'passed     goals: 3 rows, 0 of peers'
has results.txt 'passed     memcheck test_one'
has results.txt 'passed     racecheck test_one'
has results.txt 'unfinished synccheck test_one: out of time'
has results.txt 'passed     profile lora.3b (linear|lora|gemm|nvjet|cutlass): ncu/ncu_lora.3b.1.txt'
has results.txt 'failed     profile lora.3b (attention_back|_backward|gradient|head): it has no such kernels'
has results.txt 'skipped    variant head_wgmma: for compute capability 9.0, this device has none'
has results.txt 'passed     profile rope.1b (rope)'
has results.txt 'passed     report.md: 1 met, 2 missed, 1 not measured, 0 suspect'
has ncu/ncu_rope.1b.1.txt '--clock-control none --section SpeedOfLight .*--kernel-name regex:rope --launch-skip 0 --launch-count 40 .*bench goals --device cuda --only rope.1b'
has report.md '| lora.3b | 2 ms (1.95 to 2.05) | - | - | 11.0 % | >= 55.0 % of the matrix rate | missed by 80.0 % |'
has device.txt 'commit: abc'
has summary.md 'parts: suites goals variants profile sanitizer report'
[ "$(head -n 1 "$work/out/worst.txt")" = lora.3b ] || fail "the worst case is not the first"
echo "ok: all parts"

# A budget that is spent drops parts and says so.
run run "$work/kit" "$work/out" --only suites,goals,report --budget 1 || fail "a spent budget ended with $?"
has results.txt 'skipped    suites: the budget of 1 s is spent'
has results.txt 'skipped    report.md: no goals were measured\|passed     report.md'
echo "ok: budget"

# What no default takes, on the devices that have it; each into rows and a table of its own.
sed 's/shim=yes/shim=/' "$work/kit/MANIFEST" >"$work/manifest" && mv "$work/manifest" "$work/kit/MANIFEST"
export CAPABILITY=9.0
run run "$work/kit" "$work/out" --only goals,variants,report --limit 5 && fail "a variant that fails passed"
has results.txt 'passed     variant head_wgmma: 1 rows'
has results.txt 'failed     variant similarity_wgmma: .*exit code 1'
has results.txt 'unfinished variant linear_wgmma: .*out of time'
has results.txt 'passed     variant decode_pdl: 1 rows'
has results.txt 'passed     report_head_wgmma.md: 1 met, 0 missed, 0 not measured, 0 suspect'
has report.md '## head_loss=wgmma'
has report.md '| head_loss.1b | 2 ms (1.95 to 2.05) | - | - | 70.0 % | >= 60.0 % of the matrix rate | met |'
has report.md '## KS_CUDA_PDL=1'
has goals_decode_pdl.jsonl '"copy_share":1,'
[ ! -e "$work/out/report_similarity_wgmma.md" ] || fail "a report of a variant that failed"
export CAPABILITY=10.0
run run "$work/kit" "$work/out" --only variants || fail "variants ended with $?: $(tail -n 3 "$work/log")"
has results.txt 'skipped    variant linear_wgmma: for compute capability 9.0, this device has 10.0'
has results.txt 'passed     variant decode_pdl: 1 rows'
sed 's/shim=/shim=yes/' "$work/kit/MANIFEST" >"$work/manifest" && mv "$work/manifest" "$work/kit/MANIFEST"
echo "ok: variants"

# all finds the bundle that the script lies in.
run all "$work/out2" --only report || fail "all ended with $?: $(tail -n 3 "$work/log")"
grep -q 'skipped    report.md: no goals were measured' "$work/out2/results.txt" || fail "all did not run"
run run "$work/kit" "$work/out" --only nothing && fail "an unknown part was taken"
[ "$(tail -n 1 "$work/log")" = 'gpu.sh: there is no part "nothing"' ] || fail "$(cat "$work/log")"
run run "$work/kit" "$work/out" --budget soon && fail "a budget that is no number was taken"
echo "ok: all, wrong use"
