#!/bin/sh
# resources.sh spills.allow logs...: what the kernels take, from the logs of ptxas (kernels/cuda/nvcc.sh). A line a kernel, a
# column an architecture: registers, then static shared memory as +sN, stack as +fN, spilled bytes (stores/loads) as !N/N.
# Exits with 1 when a kernel spills that the list of exceptions does not name.
set -eu
allow=$1
shift
demangle=cat
command -v c++filt >/dev/null 2>&1 && demangle='c++filt'
table=$(mktemp)
trap 'rm -f "$table"' EXIT

# kernel \t sm \t registers \t static shared \t stack \t spill stores \t spill loads
awk '
  function flush() { if (name != "" && regs != "") print name "\t" sm "\t" regs "\t" smem "\t" stack "\t" st "\t" ld; name = "" }
  /Compiling entry function/ { flush(); split($0, q, "\047"); name = q[2]; sm = q[4]; regs = ""; smem = 0; stack = st = ld = 0 }
  /bytes stack frame/ { stack = $1; st = $5; ld = $9 }
  /Used [0-9]+ registers/ {
    for (i = 1; i <= NF; i++) { if ($i == "Used") regs = $(i + 1); if ($i == "smem" || $i == "smem,") smem = $(i - 2) }
    flush()
  }' "$@" | sed 's/\tsm_/\t/' | $demangle >"$table"
[ -s "$table" ] || { echo "resources.sh: no kernel in the logs" >&2; exit 1; }

sort -t"$(printf '\t')" -k1,1 -k2,2n "$table" | awk -F'\t' -v allow="$allow" '
  BEGIN {
    while ((getline line < allow) > 0) if (line !~ /^#/ && line !~ /^[ \t]*$/) patterns[++n_patterns] = line
  }
  {
    name = $1
    sub(/^void /, "", name); sub(/\(.*$/, "", name)
    gsub(/ks_bf16/, "bf16", name)
    if (!(name in seen)) { seen[name] = 1; names[++n] = name; if (length(name) > width) width = length(name) }
    if (!($2 in sms)) { sms[$2] = 1; order[++n_sm] = $2 + 0 }
    cell = $3 ($4 > 0 ? "+s" $4 : "") ($5 > 0 ? "+f" $5 : "") ($6 + $7 > 0 ? "!" $6 "/" $7 : "")
    cells[name, $2 + 0] = cell
    total++
    if ($6 + $7 > 0) {
      spilling++
      ok = 0
      for (i = 1; i <= n_patterns; i++) if ((name " sm_" $2) ~ patterns[i]) ok = 1
      if (!ok) bad[++n_bad] = name " sm_" $2 " spills " $6 " bytes of stores, " $7 " of loads"
    }
  }
  END {
    for (i = 1; i <= n_sm; i++) for (j = i + 1; j <= n_sm; j++) if (order[j] < order[i]) { t = order[i]; order[i] = order[j]; order[j] = t }
    if (width > 72) width = 72
    printf "%-*s", width, "registers of each kernel"
    for (i = 1; i <= n_sm; i++) printf " %9s", "sm_" order[i]
    printf "\n"
    for (k = 1; k <= n; k++) {
      printf "%-*s", width, names[k]
      for (i = 1; i <= n_sm; i++) printf " %9s", ((names[k], order[i]) in cells) ? cells[names[k], order[i]] : "-"
      printf "\n"
    }
    printf "%d kernels, %d with architectures, %d spill\n", n, total, spilling
    for (i = 1; i <= n_bad; i++) print "not in spills.allow: " bad[i]
    exit n_bad > 0
  }'
