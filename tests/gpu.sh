#!/bin/sh
# Tests and measures Keepsake on a GPU host that need not build anything.
#
#   tests/gpu.sh bundle DIR [--archs "90"] [--build FOLDER] [--jobs N] [--shim]
#       on a machine with nvcc: builds program and tests with the CUDA backend into FOLDER (default: build/gpu) and puts into
#       DIR what a host needs that has a driver, the CUDA libraries and a C library not older than this machine's: programs, the
#       shared libraries that they use, configs, datasets, fixtures, and this script. --archs: as KS_CUDA_ARCHS ("" for
#       all). --shim: programs over the shim of tests/cuda_on_cpu/, to try this script where there is no GPU.
#   DIR/tests/gpu.sh run DIR OUT [--only PARTS] [--suites "NAMES"] [--limit SECONDS] [--budget SECONDS] [--bench "ARGUMENTS"]
#                                [--worst N] [--goals "ARGUMENTS"] [--peers "ARGUMENTS"] [--append yes] [--config FILE]
#       on the GPU host: runs the parts (those of a list as "suites,bench"; without one all but bench) and fills OUT:
#         suites      every kernels/ suite and the whole-model suites, on backend cuda
#         quickstart  configs/quickstart.cfg on the CPU and on the GPU: the same selections, `keepsake check` on the rest
#         reruns      the quickstart on the GPU again, and again without CUDA graphs: equal bits
#         goals       keepsake bench goals in turn with experiments/bench_peers.py; alone where python3 has no PyTorch
#         variants    bench goals again with kernels that no default takes: head_loss=wgmma, similarity=wgmma, linear_*=wgmma where
#                     the device has compute capability 9.0, head_loss=fused and decoding with KS_CUDA_PDL=1 from there on; else
#                     skipped
#         profile     ncu of the N cases that are furthest from their goals (5); skipped without it
#         sanitizer   compute-sanitizer memcheck, racecheck, initcheck, synccheck on the operations' suites; skipped without it
#         bench       keepsake bench, and each variant of each operation
#         report      OUT/report.md: each goal, ours, the peer, the verdict; then a table for each of the variants
#       --limit: seconds for one program (3600; a sanitizer run that does not end in time counts as unfinished, not as failed).
#       --budget: seconds for everything. Each part gets its share of what is left; samples are taken for a shorter time, then
#       rounds, cases and the last parts are dropped, and the summary says which. 0: none.
#       --append yes: goals are added to those of earlier calls with the same OUT (--peers "--groups head"), where one call is short.
#       --config: a file of DIR for quickstart and reruns, instead of configs/quickstart.cfg.
#       --bench, --goals, --peers: arguments instead of (--bench), or after (the others) the default ones. $PYTHON: python3.
#   tests/gpu.sh all OUT [--bundle DIR] [--archs "90"] [options of run]
#       everything in one call: makes the bundle where nvcc and CMake are (else --bundle, or the one that this script lies in),
#       and runs all parts of it but bench (--only takes that too).
# Exit codes: 0; 1 when anything failed; 2 for wrong use; 3 without what is needed.
set -u

self=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)/$(basename -- "$0")
root=$(dirname -- "$(dirname -- "$self")")
model_suites="test_llama_fixtures test_forward test_generate test_train test_adapter"
say() { printf 'gpu.sh: %s\n' "$*" >&2; }
die() { status=$1; shift; say "$@"; exit "$status"; }
usage() { sed -n '2,/^set -u/s/^# \{0,1\}//p' "$self" | sed '/^set -u/d' >&2; exit 2; }

# ---------------------------------------------------------------- bundle

op_suites() { for f in "$root"/tests/kernels/test_*.c; do basename "$f" .c; done; }

# Shared libraries of the programs but for the C library's own and the driver's, which must be the host's.
copy_libraries() { # DIR
  for program in "$1"/bin/*; do ldd "$program"; done | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
    while read -r library; do
      case $(basename "$library") in
        libc.so.* | libm.so.* | libpthread.so.* | libdl.so.* | librt.so.* | libresolv.so.* | ld-linux*) ;;
        libcuda.so.* | libnvidia-* | libasan.so.* | libubsan.so.*) ;;
        *) cp -L "$library" "$1/lib/" ;;
      esac
    done
  strip --strip-unneeded "$1"/lib/* 2>/dev/null
}

bundle() { # DIR options
  [ $# -ge 1 ] || usage
  dir=$1 build=$root/build/gpu archs="" jobs=$(getconf _NPROCESSORS_ONLN) shim=""
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --archs) [ $# -gt 1 ] || usage; archs=$2; shift ;;
      --build) [ $# -gt 1 ] || usage; build=$2; shift ;;
      --jobs) [ $# -gt 1 ] || usage; jobs=$2; shift ;;
      --shim) shim=yes ;;
      *) usage ;;
    esac
    shift
  done
  [ ! -e "$dir" ] || [ -f "$dir/MANIFEST" ] || die 2 "$dir is there and is no bundle; name a new folder"
  suites="$(op_suites | tr '\n' ' ')"
  cuda=ON shared=ON suffix="" program=keepsake-bin
  if [ -n "$shim" ]; then cuda=OFF shared=OFF suffix=_cuda_on_cpu program=keepsake-cuda-on-cpu models=""; else models=$model_suites; fi
  set -- -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DKS_TESTS=ON -DKS_CUDA=$cuda "-DKS_CUDA_ARCHS=$archs" -DKS_RUN_DIR=. -DKS_SHARED_KERNELS=$shared \
    "-DCMAKE_BUILD_RPATH=\$ORIGIN/../lib" -DCMAKE_EXE_LINKER_FLAGS=-Wl,--disable-new-dtags # DT_RPATH: libraries of libraries too
  command -v ninja >/dev/null 2>&1 && [ ! -f "$build/CMakeCache.txt" ] && set -- "$@" -G Ninja
  cmake "$@" || die 3 "CMake failed"
  targets="$program same_selections"
  for suite in $suites $models; do targets="$targets $suite$suffix"; done
  # shellcheck disable=SC2086  # a list of words
  cmake --build "$build" --parallel "$jobs" --target $targets || die 3 "the build failed"
  rm -rf "$dir"
  mkdir -p "$dir/bin" "$dir/lib" "$dir/tests" || die 3 "$dir: cannot write"
  for name in $targets; do
    [ "$name" = keepsake-bin ] && name=keepsake
    from=$(find "$build" -type f -name "$name" -perm -u+x | head -n 1)
    to=$dir/bin/$(printf %s "$name" | sed 's/_cuda_on_cpu$//; s/^keepsake-cuda-on-cpu$/keepsake/')
    { cp "$from" "$to" && strip "$to"; } || die 3 "$name: not built"
  done
  copy_libraries "$dir"
  cp -R "$root/configs" "$root/datasets" "$dir/"
  mkdir -p "$dir/experiments"
  cp "$root"/experiments/bench_peers*.py "$root/experiments/bench_goals.def" "$dir/experiments/"
  cp -R "$root/tests/fixtures" "$root/tests/system" "$root/tests/gpu_report.py" "$self" "$dir/tests/"
  {
    echo "commit=$(git -C "$root" describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)"
    echo "shim=$shim"
    echo "archs=$archs"
    echo "built_with=$(sed -n 's/^CMAKE_C_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt") $(uname -m)"
    echo "suites=$suites"
    echo "models=$models"
  } >"$dir/MANIFEST"
  mib=$(du -sm "$dir" | cut -f1)
  say "$dir: $mib MiB"
  [ "$mib" -le 64 ] || say "more than 64 MiB: choose fewer architectures with --archs"
}

# ---------------------------------------------------------------- run

passed=0 failed=0 skipped=0 unfinished=0
note() { # passed|failed|skipped|unfinished what
  case $1 in
    passed) passed=$((passed + 1)) ;;
    failed) failed=$((failed + 1)) ;;
    skipped) skipped=$((skipped + 1)) ;;
    unfinished) unfinished=$((unfinished + 1)) ;;
  esac
  printf '%-10s %s\n' "$1" "$2" | tee -a "$out/results.txt"
}

# How a program ended that had a limit.
note_status() { # STATUS what LOG
  case $1 in
    0) note passed "$2" ;;
    124 | 137) note unfinished "$2, out of time" ;;
    *) note failed "$2, exit code $1: logs/$3.log" ;;
  esac
}

# What is left of a session: children of a program that was stopped would go on using the GPU.
end_session() { # LEADER
  for stat in /proc/[0-9]*/stat; do
    session=$(sed 's/.*) //' "$stat" 2>/dev/null | cut -d' ' -f4)
    process=${stat#/proc/}
    [ "$session" = "$1" ] && kill -KILL "${process%/stat}" 2>/dev/null
  done
  return 0
}

now() { date +%s; }

# What is left of the part that runs, in seconds; --limit where there is no budget.
seconds_left() {
  if [ "$part_end" -eq 0 ]; then
    echo "$limit"
  else
    left=$((part_end - $(now)))
    [ $left -lt "$limit" ] || left=$limit
    echo $((left > 0 ? left : 0))
  fi
}

has_time() { [ "$part_end" -eq 0 ] || [ "$(seconds_left)" -gt 5 ]; }

# Runs a command into OUT/logs/NAME.log, within the limit. Status 124: out of time.
logged() { # NAME command...
  name=$1
  shift
  time_left=$(seconds_left)
  [ "$time_left" -gt 0 ] || { echo "gpu.sh: no time left" >"$out/logs/$name.log"; return 124; }
  # shellcheck disable=SC2016  # the inner shell's own number
  setsid -w sh -c 'echo $$ >"$0"; exec timeout -k 20 "$@"' "$out/session" "$time_left" "$@" >"$out/logs/$name.log" 2>&1 </dev/null
  result=$?
  end_session "$(cat "$out/session")"
  return $result
}

manifest() { sed -n "s/^$1=//p" "$dir/MANIFEST"; }

describe_host() {
  {
    echo "time: $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "commit: $(manifest commit)"
    echo "architectures: $(manifest archs)"
    echo "host: $(uname -srm), $(getconf _NPROCESSORS_ONLN) processors"
    if [ -n "$(manifest shim)" ]; then
      echo "device: none, the shim: no number here says anything about a GPU"
    else
      nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,ecc.mode.current,mig.mode.current \
        --format=csv 2>&1 | sed 's/^/device: /'
    fi
  } >"$out/device.txt"
  clocks before
  cat "$out/device.txt"
  [ -n "$(manifest shim)" ] || nvidia-smi -q >"$out/nvidia-smi.txt" 2>&1
}

# Clocks, heat, power, and what slows the card down, before and after all parts.
clocks() { # before|after
  [ -n "$(manifest shim)" ] && return
  for query in clocks.sm,clocks.mem,temperature.gpu,power.draw clocks_throttle_reasons.active ecc.errors.uncorrected.volatile.total; do
    nvidia-smi --query-gpu=$query --format=csv 2>&1 | sed "s/^/$1: /"
  done >>"$out/device.txt"
}

check_gpu() {
  [ -n "$(manifest shim)" ] && return
  command -v nvidia-smi >/dev/null 2>&1 || die 3 "there is no nvidia-smi: is the NVIDIA driver installed?"
  nvidia-smi -L 2>&1 | grep -q '^GPU ' || die 3 "nvidia-smi sees no GPU: $(nvidia-smi -L 2>&1 | head -n 1)"
  "$dir/bin/keepsake" bench ops --device cuda --shape 260k --rows 8 --seconds 0 --samples 1 --only harness >"$out/logs/probe.log" 2>&1 ||
    die 3 "the program cannot use the GPU: $(tail -n 1 "$out/logs/probe.log")"
}

# "12 tests" of a Criterion log; nothing when it did not get to its end.
tested() { sed -n 's/.*Tested: \([0-9]*\).*/\1 tests/p' "$1" | tail -n 1; }

run_suites() {
  for suite in ${suites:-$(manifest suites) $(manifest models)}; do
    start=$(now)
    KS_TEST_BACKEND=cuda logged "suite_$suite" "$dir/bin/$suite" --jobs 1 --color=never
    status=$?
    what="suite $suite: $(tested "$out/logs/suite_$suite.log"), $(($(now) - start)) s"
    if [ $status -eq 0 ]; then
      note passed "$what"
    elif [ $status -eq 124 ] && [ "$part_end" -ne 0 ]; then
      note unfinished "suite $suite: out of time"
    else
      note failed "$what, exit code $status: logs/suite_$suite.log"
    fi
  done
}

# A program of the toolkit; over the shim only one that PATH names, as a test puts there.
tool() { # NAME
  command -v "$1" && return
  [ -n "$(manifest shim)" ] || ls "/usr/local/cuda/bin/$1" 2>/dev/null
}

run_sanitizer() {
  sanitizer=$(tool compute-sanitizer)
  if [ -z "$sanitizer" ]; then
    note skipped "compute-sanitizer: not on this machine"
    return
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    for suite in ${suites:-$(manifest suites)}; do
      log=$out/logs/${tool}_$suite.log
      has_time || { note skipped "$tool $suite: no time left"; continue; }
      KS_TEST_BACKEND=cuda logged "${tool}_$suite" "$sanitizer" --tool $tool --target-processes all --print-limit 20 \
        "$dir/bin/$suite" --jobs 1 --color=never
      status=$?
      errors=$(sed -n 's/.*ERROR SUMMARY: \([0-9]*\) error.*/\1/p; s/.*RACECHECK SUMMARY: \([0-9]*\) hazard.*/\1/p' "$log" |
        awk '{ sum += $1; n++ } END { print n ? sum : "none" }')
      if [ "$errors" != none ] && [ "$errors" -gt 0 ]; then
        note failed "$tool $suite: $errors errors: logs/${tool}_$suite.log"
      elif [ $status -eq 124 ] || [ $status -eq 137 ]; then
        note unfinished "$tool $suite: out of time; nothing found until then"
      elif [ "$errors" = none ]; then
        note failed "$tool $suite: it gave no summary (exit code $status): logs/${tool}_$suite.log"
      elif [ $status -ne 0 ]; then
        note failed "$tool $suite: no errors, but the suite's exit code is $status: logs/${tool}_$suite.log"
      else
        note passed "$tool $suite"
      fi
    done
  done
}

# A whole run of an experiment into OUT/runs/NAME.
experiment() { # NAME DEVICE
  rm -rf "$out/runs/$1"
  logged "run_$1" "$dir/bin/keepsake" run "$dir/$config" --quiet --device "$2" --set "experiment.output=$out/runs/$1"
}

run_quickstart() {
  for device in cpu cuda; do
    start=$(now)
    if experiment $device $device; then
      note passed "$config on $device, $(($(now) - start)) s"
    else
      note failed "$config on $device: logs/run_$device.log"
      return
    fi
  done
  if logged selections "$dir/bin/same_selections" "$out/runs/cpu" "$out/runs/cuda"; then
    note passed "selections: $(tail -n 1 "$out/logs/selections.log")"
  else
    note failed "selections: $(tail -n 1 "$out/logs/selections.log")"
  fi
  "$dir/bin/keepsake" show "$out/runs/cpu" --csv >"$out/runs/cpu.csv"
  if logged check "$dir/bin/keepsake" check "$out/runs/cuda" "$out/runs/cpu.csv"; then
    note passed "keepsake check: counts equal, losses and ROUGE-1 within tolerance of the CPU's"
  else
    note failed "keepsake check: logs/check.log"
  fi
}

digests() { "$dir/bin/keepsake" show --digest "$out/runs/$1"; }

run_reruns() {
  [ -d "$out/runs/cuda" ] || experiment cuda cuda || { note failed "reruns: logs/run_cuda.log"; return; }
  for again in again without_graphs; do
    if [ $again = without_graphs ]; then export KS_CUDA_NO_GRAPHS=1; fi
    experiment $again cuda
    status=$?
    unset KS_CUDA_NO_GRAPHS
    if [ $status -ne 0 ]; then
      note failed "rerun $again: logs/run_$again.log"
    elif [ "$(digests cuda)" = "$(digests $again)" ]; then
      note passed "rerun $again: the same bits"
    else
      note failed "rerun $again: other bits"
    fi
  done
}

bench_once() { # NAME arguments...
  name=$1
  shift
  rm -f "$out/$name.csv" "$out/$name.jsonl"
  # shellcheck disable=SC2086  # a list of words
  logged "$name" "$dir/bin/keepsake" bench --device cuda --csv "$out/$name.csv" --jsonl "$out/$name.jsonl" "$@"
  status=$?
  rows=$(awk 'END { print NR > 0 ? NR - 1 : 0 }' "$out/$name.csv" 2>/dev/null || echo 0)
  bad=$(grep -c '"incorrect"' "$out/$name.csv" 2>/dev/null)
  note_status $status "$name: $rows rows, ${bad:-0} incorrect" "$name"
}

run_bench() {
  if [ -n "$bench_arguments" ]; then
    # shellcheck disable=SC2086
    bench_once bench $bench_arguments
    return
  fi
  bench_once bench --shape 135m,1b,3b --dtype f32,bf16 lora_step prefill decode embed ops
  bench_once bench_blocks --shape 1b --dtype q8_0,q4_0,nf4 lora_step decode ops
  bench_once bench_variants --shape 1b --dtype f32,bf16 --variants all ops
}

# ---------------------------------------------------------------- goals

python=${PYTHON:-python3}

# Seconds for the samples of a case: what a budget leaves, for some hundred cases, twice, ours and the peers'.
sample_seconds() {
  [ "$part_end" -eq 0 ] && { echo 1; return; }
  awk -v left="$(seconds_left)" 'BEGIN { s = left / 1000; print s > 1 ? 1 : s < 0.05 ? 0.05 : s }'
}

goal_rows() { # FILE: how many
  grep -c '"name"' "$1" 2>/dev/null || [ -f "$1" ] || echo 0
}

run_goals() {
  [ "$append" = yes ] || rm -f "$out/goals.jsonl" "$out/peers.jsonl"
  # Two rounds are taken together, so that half the usual samples are enough in each.
  ours="--device cuda --seconds $(sample_seconds) --samples 8" theirs="--device cuda --seconds $(sample_seconds)"
  [ -z "$(manifest shim)" ] || ours="--device cuda --scale 512 --seconds 0 --samples 1" theirs="--device cpu --scale 512 --no-compile --samples 2 --seconds 0"
  if ! command -v "$python" >/dev/null 2>&1 || ! "$python" -c 'import torch' >/dev/null 2>&1; then
    note skipped "peers: $python has no PyTorch"
    # shellcheck disable=SC2086  # lists of words
    logged goals "$dir/bin/keepsake" bench goals $ours $goals_arguments --jsonl "$out/goals.jsonl"
  else
    # shellcheck disable=SC2086
    TORCHINDUCTOR_CACHE_DIR=$out/runs/inductor logged goals "$python" "$dir/experiments/bench_peers.py" $theirs --jsonl "$out/peers.jsonl" \
      --keepsake "$dir/bin/keepsake" --keepsake-arguments "$ours $goals_arguments" --ours "$out/goals.jsonl" \
      --budget "$([ "$part_end" -eq 0 ] && echo 0 || echo $(($(seconds_left) * 9 / 10)))" --limit 300 $peers_arguments
  fi
  status=$?
  rm -rf "$out/runs/inductor"
  note_status $status "goals: $(goal_rows "$out/goals.jsonl") rows, $(goal_rows "$out/peers.jsonl") of peers" goals
}

# What no default takes: NAME, MAJOR.MINOR of the devices (a + behind it: and later), cases, arguments, settings of the environment.
variants() {
  cat <<'END'
head_wgmma 9.0 head_* --variants=head_loss=wgmma
head_fused 9.0+ head_* --variants=head_loss=fused
similarity_wgmma 9.0 similarity* --variants=similarity=wgmma
linear_wgmma 9.0 train_*,step_* --variants=linear_forward=wgmma,linear_backward=wgmma
decode_pdl 9.0+ decode_3b,decode_1b - KS_CUDA_PDL=1
END
}

capability() {
  [ -n "$(manifest shim)" ] || nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1
}

suits() { # MAJOR.MINOR[+]
  case $1 in
    *+) awk -v have="$(capability)" -v want="${1%+}" 'BEGIN { exit !(have + 0 >= want + 0) }' ;;
    *) [ "$(capability)" = "$1" ] ;;
  esac
}

run_variants() {
  [ "$append" = yes ] || rm -f "$out"/goals_*.jsonl
  while read -r kernel device cases arguments setting <&3; do
    if ! suits "$device"; then
      note skipped "variant $kernel: for compute capability $device, this device has $(capability | grep . || echo none)"
      continue
    fi
    has_time || { note skipped "variant $kernel: no time left"; continue; }
    [ "$arguments" != - ] || arguments=""
    # shellcheck disable=SC2086  # an argument or none
    logged "goals_$kernel" env $setting "$dir/bin/keepsake" bench goals --device cuda --seconds "$(sample_seconds)" --samples 8 \
      --only "$cases" $arguments --jsonl "$out/goals_$kernel.jsonl"
    status=$?
    note_status $status "variant $kernel: $(goal_rows "$out/goals_$kernel.jsonl") rows" "goals_$kernel"
  done 3<<END
$(variants)
END
}

report() { # FILE options
  rows=$1
  shift
  [ -s "$rows" ] || return 3
  scaled=$([ -z "$(manifest shim)" ] || echo --allow-scaled)
  peers=$([ ! -s "$out/peers.jsonl" ] || printf %s "--peers $out/peers.jsonl")
  # shellcheck disable=SC2086
  "$python" "$dir/tests/gpu_report.py" --goals "$dir/experiments/bench_goals.def" --ours "$rows" $peers --partial $scaled "$@"
}

report_variants() {
  while read -r kernel _ _ arguments setting <&3; do
    [ "$(goal_rows "$out/goals_$kernel.jsonl")" -gt 0 ] || continue
    chosen=${arguments#--variants=}
    [ "$chosen" != - ] || chosen=""
    if report "$out/goals_$kernel.jsonl" --measured --variant "$chosen" --out "$out/report_$kernel.md" >"$out/logs/report_$kernel.log" 2>&1; then
      { printf '\n## %s\n\n' "${chosen:-$setting}"; cat "$out/report_$kernel.md"; } >>"$out/report.md"
      note passed "report_$kernel.md: $(sed -n 's/^Goals: \(.*\)\. Times.*/\1/p' "$out/report_$kernel.md")"
    else
      note failed "report_$kernel.md: $(tail -n 1 "$out/logs/report_$kernel.log")"
    fi
  done 3<<END
$(variants)
END
}

run_report() {
  if report "$out/goals.jsonl" --out "$out/report.md" >"$out/logs/report.log" 2>&1; then
    note passed "report.md: $(sed -n 's/^Goals: \(.*\)\. Times.*/\1/p' "$out/report.md")"
    report_variants
  elif [ ! -s "$out/goals.jsonl" ]; then
    note skipped "report.md: no goals were measured"
  else
    note failed "report.md: $(tail -n 1 "$out/logs/report.log")"
  fi
}

# The kernels of a case, as ncu chooses them by name: a pattern a run, with @ and how many of these launches to pass over: the prompt
# and what comes first of an answer, a first pass. Training: products and adapters, then what only a backward pass and the loss have.
kernels_of() { # CASE
  case $1 in
    attn_*) echo attention ;;
    head_*) echo 'head|gemm|nvjet|linear' ;;
    sim_*) echo sim ;;
    norm_*) echo rmsnorm ;;
    rope* | swiglu* | entropy* | pool* | adamw*) echo "$1" | sed 's/[^a-z].*//' ;;
    decode*) echo 'linear_few|linear_wide|decode_shrink@1000 attention_decode|attention_few@300 sample@10 norm|rope|swiglu@300' ;;
    prefill*) echo 'linear|gemm|nvjet|cutlass@200 attention@30 norm|rope|swiglu@100' ;;
    run*) echo 'lora|gemm|nvjet|cutlass@200 linear_few|linear_wide|decode_shrink@1000 attention@100 sample@10 norm|rope|swiglu@100 entropy|sim|pool' ;;
    *) echo 'linear|lora|gemm|nvjet|cutlass attention_back|_backward|gradient|head' ;;
  esac
}

profile_case() { # CASE PATTERN LOG LAUNCHES_TO_SKIP
  small=$([ -z "$(manifest shim)" ] || echo "--scale 512")
  # shellcheck disable=SC2086
  KS_CUDA_NO_GRAPHS=1 logged "$3" "$ncu" --clock-control none --section SpeedOfLight --section Occupancy --section WarpStateStats \
    --section MemoryWorkloadAnalysis --section LaunchStats --kernel-name "regex:$2" --launch-skip "$4" --launch-count 40 \
    "$dir/bin/keepsake" bench goals --device cuda --only "$1" --seconds 0 --samples 1 $small
  status=$?
  cp "$out/logs/$3.log" "$out/ncu/$3.txt"
  if grep -q ERR_NVGPUCTRPERM "$out/ncu/$3.txt"; then
    note skipped "profile $1: this user may not read the GPU's counters"
  elif grep -q 'No kernels were profiled' "$out/ncu/$3.txt"; then
    note failed "profile $1 ($2): it has no such kernels: ncu/$3.txt"
  elif [ $status -eq 0 ]; then
    note passed "profile $1 ($2): ncu/$3.txt"
  else
    note unfinished "profile $1 ($2): exit code $status: ncu/$3.txt"
  fi
}

run_profile() {
  ncu=$(tool ncu)
  if [ -z "$ncu" ]; then
    note skipped "profile: there is no ncu"
    return
  fi
  report "$out/goals.jsonl" --worst "$worst" >"$out/worst.txt" 2>"$out/logs/worst.log" || { note skipped "profile: no goals to choose by"; return; }
  mkdir -p "$out/ncu"
  while read -r row <&3; do
    n=0
    for words in $(kernels_of "$row"); do
      n=$((n + 1)) pattern=${words%@*} skip=${words#"${words%@*}"}
      skip=${skip#@}
      if has_time; then profile_case "$row" "$pattern" "ncu_$row.$n" "${skip:-0}"; else note skipped "profile $row ($pattern): no time left"; fi
    done
  done 3<"$out/worst.txt"
}

# ---------------------------------------------------------------- parts

# Of what is left of a budget, in percent, what a part may take.
share_of() { # PART
  case $1 in
    suites) echo 30 ;;
    quickstart | reruns) echo 15 ;;
    goals) echo 60 ;;
    variants) echo 40 ;;
    profile) echo 50 ;;
    bench) echo 60 ;;
    *) echo 95 ;;
  esac
}

run_part() { # PART
  part_end=0
  if [ "$budget" -gt 0 ]; then
    left=$((began + budget - $(now)))
    if [ $left -lt 10 ] && [ "$1" != report ]; then
      note skipped "$1: the budget of $budget s is spent"
      return
    fi
    [ "$1" = report ] || part_end=$(($(now) + left * $(share_of "$1") / 100))
  fi
  "run_$1"
}

write_summary() {
  {
    echo "# Keepsake on a GPU"
    echo
    sed 's/^/- /' "$out/device.txt"
    echo
    echo "$passed passed, $failed failed, $unfinished unfinished, $skipped skipped; parts: $(echo "$parts" | tr ',' ' ')."
    echo
    echo '```'
    cat "$out/results.txt"
    echo '```'
  } >"$out/summary.md"
}

run() { # DIR OUT options
  [ $# -ge 2 ] || usage
  dir=$1 out=$2 parts=suites,quickstart,reruns,goals,variants,profile,sanitizer,report limit=3600 budget=0 worst=5 append=no
  bench_arguments="" goals_arguments="" peers_arguments="" suites="" config=configs/quickstart.cfg
  shift 2
  while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || usage
    case $1 in
      --only) parts=$2 ;;
      --limit) limit=$2 ;;
      --budget) budget=$2 ;;
      --bench) bench_arguments=$2 ;;
      --goals) goals_arguments=$2 ;;
      --peers) peers_arguments=$2 ;;
      --worst) worst=$2 ;;
      --append) append=$2 ;;
      --config) config=$2 ;;
      --suites) suites=$2 ;;
      *) usage ;;
    esac
    shift 2
  done
  for value in "$limit" "$budget" "$worst"; do
    case $value in *[!0-9]* | "") die 2 "\"$value\" is no whole number" ;; esac
  done
  [ -f "$dir/MANIFEST" ] || die 2 "$dir is no bundle; make one with: tests/gpu.sh bundle $dir"
  for part in $(echo "$parts" | tr ',' ' '); do
    case $part in suites | sanitizer | quickstart | reruns | bench | goals | variants | profile | report) ;; *) die 2 "there is no part \"$part\"" ;; esac
  done
  dir=$(CDPATH='' cd -- "$dir" && pwd -P)
  mkdir -p "$out/logs" "$out/runs" || die 3 "$out: cannot write"
  out=$(CDPATH='' cd -- "$out" && pwd -P)
  : >"$out/results.txt"
  cd "$dir" || exit 3
  export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64" # cuBLASLt, where nobody told the loader
  began=${began:-$(now)} part_end=0
  check_gpu
  describe_host
  for part in $(echo "$parts" | tr ',' ' '); do run_part "$part"; done
  clocks after
  write_summary
  echo "$passed passed, $failed failed, $unfinished unfinished, $skipped skipped: $out/summary.md"
  [ $failed -eq 0 ]
}

# One call: a bundle, made here or found, and all parts of it.
all() { # OUT options
  [ $# -ge 1 ] || usage
  case $1 in -*) usage ;; esac
  all_out=$1 from="" archs=""
  began=$(now)
  shift
  while [ $# -gt 1 ]; do
    case $1 in
      --bundle) from=$2 ;;
      --archs) archs=$2 ;;
      *) break ;;
    esac
    shift 2
  done
  if [ -z "$from" ] && [ -f "$root/MANIFEST" ]; then
    from=$root
  elif [ -z "$from" ]; then
    command -v cmake >/dev/null 2>&1 || die 3 "there is no CMake to build with; name a bundle: --bundle DIR"
    mkdir -p "$all_out" || die 3 "$all_out: cannot write"
    from=$all_out/bundle
    bundle "$from" --archs "${archs:-native}" --build "$all_out/build"
  fi
  run "$from" "$all_out" "$@"
}

[ $# -ge 1 ] || usage
verb=$1
shift
case $verb in
  bundle) bundle "$@" ;;
  run) run "$@" ;;
  all) all "$@" ;;
  *) usage ;;
esac
