#!/usr/bin/env python3
"""The table of goals: this project's rows and its peers', joined by name, beside what experiments/bench_goals.def asks for.

    gpu_report.py --ours FILE [--peers FILE] [--goals DEF] [--ladder CSV [--kernels FOLDER]] [--partial]
                  [--measured] [--out FILE] [--readme FILE] [--worst N] [--variant NAMES]

--ours, --peers  lines of JSON as `keepsake bench goals --jsonl` and bench_peers.py write them, of one card and one commit. Runs
                 (lines with "run") may follow each other: the samples of a case are taken together.
--partial        cases without a row are "not measured"; else they are an error
--measured       cases without a row are left out
--out, --readme  the report as a file; and in place of what stands between two lines of a file:
                 <!-- goals: begin --> and <!-- goals: end -->
--worst N        instead: the names of the N cases that are furthest from their goals, a line each (0: all that missed)
--ladder         checks the CSV (kernel, version, commit, idea, predicted, came out, card) and adds it to the report; with
                 --kernels, every .cu with a ladder must have a row, and one for each of the versions that it numbers
--variant        rows of these kernels, as the program named them in its rows, instead of the default ones
--allow-scaled   rows of bench_peers.py --scale, for tries of the script itself

A goal is met, missed by a share of its threshold, not measured (with the reason), or suspect: over a measured ceiling, which
says that the row is wrong. "within noise": the quartiles of the samples are on both sides of the threshold.
Standard library only. Exit codes: 0; 2 with one message when the input is not what it should be.
"""
import argparse
import csv
import json
import math
import os
import re
import statistics
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CASE_LINE = re.compile(r'^KS_CASE\((\w+), ([\w.]+), (\w+), "([^"]*)"\)$')
GOAL_LINE = re.compile(r"^KS_GOAL\(([\w.]+), (\w+), (at_least|at_most|exactly), ([\d.]+), ([\w.]+)\)$")
BEGIN, END = "<!-- goals: begin -->", "<!-- goals: end -->"
TIMED = ("ok", "noisy", "throttled")
# measure: the field that has it, and how it is written
SHARES = {"matrix_share": "peak_share", "read_share": "read_share", "copy_share": "copy_share", "roofline_share": "roofline_share"}
COUNTS = ("launches", "graphs", "waits")
MEASURES = (*SHARES, *COUNTS, "device_us", "time_ratio", "rate_ratio", "idle_share", "peer_speed", "peer_memory")
WORDS = {"matrix_share": "of the matrix rate", "read_share": "of the read rate", "copy_share": "of the copy rate", "roofline_share": "of the roofline",
         "device_us": "us", "launches": "launches", "graphs": "graphs", "waits": "waits", "idle_share": "idle", "time_ratio": "x the time of",
         "rate_ratio": "x the rate of", "peer_speed": "x the speed of", "peer_memory": "x the memory of"}
SIGNS = {"at_least": ">=", "at_most": "<=", "exactly": "="}
LADDER_VERSION = re.compile(r"^ \* +((?:v|mma |decode )\d+)\b", re.M)
LADDER = ["kernel", "version", "commit", "idea", "predicted", "came out", "card"]


class Bad(Exception):
    """Input that is not what it should be."""


def read_goals(path):
    """({name: (group, op)}, [(name, measure, relation, threshold, against)])"""
    cases, goals = {}, []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            line = line.rstrip("\n")
            case, goal = CASE_LINE.match(line), GOAL_LINE.match(line)
            if case:
                if case.group(2) in cases:
                    raise Bad("%s:%d: %s is there twice" % (path, number, case.group(2)))
                cases[case.group(2)] = (case.group(1), case.group(3))
            elif goal:
                goals.append((goal.group(1), goal.group(2), goal.group(3), float(goal.group(4)), goal.group(5)))
            elif line.startswith(("KS_CASE(", "KS_GOAL(")):
                raise Bad("%s:%d: cannot be read: %s" % (path, number, line))
    for name, measure, _, _, against in goals:
        if name not in cases:
            raise Bad("%s: a goal of %s, which is no case" % (path, name))
        if measure not in MEASURES:
            raise Bad("%s: %s: there is no measure %s" % (path, name, measure))
        if measure in ("time_ratio", "rate_ratio") and against not in cases:
            raise Bad("%s: %s is compared with %s, which is no case" % (path, name, against))
    return cases, goals


def no_constant(word):
    raise ValueError("%s is no number here" % word)


def check_row(where, row, cases, is_peer):
    name, verdict = row.get("name"), row.get("verdict")
    if name not in cases:
        raise Bad("%s: there is no case %s in the list of goals" % (where, name))
    if not isinstance(verdict, str) or not verdict:
        raise Bad("%s: %s has no verdict" % (where, name))
    if is_peer and not row.get("peer"):
        raise Bad("%s: %s names no peer" % (where, name))
    if verdict not in TIMED:
        return
    samples = row.get("samples_ms")
    if not isinstance(samples, list) or not samples:
        raise Bad("%s: %s is %s and has no samples" % (where, name, verdict))
    for value in samples + [row.get("median_ms")]:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise Bad("%s: %s has a time of %s" % (where, name, value))


def read_rows(path, cases, is_peer, allow_scaled):
    """(runs, [rows]) of a file."""
    runs, rows, seen = [], [], set()
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except OSError as e:
        raise Bad(str(e)) from e
    for number, line in enumerate(text.splitlines(), 1):
        where = "%s:%d" % (path, number)
        try:
            row = json.loads(line, parse_constant=no_constant)
        except ValueError as e:
            raise Bad("%s: %s" % (where, "no number: " + str(e) if "no number" in str(e) else "the line is cut off, or is no JSON")) from e
        if not isinstance(row, dict):
            raise Bad("%s: no object" % where)
        if "run" in row:
            runs.append(row["run"])
            seen = set()
            continue
        if not runs:
            raise Bad("%s: a row before its run" % where)
        key = (row.get("name"), row.get("peer"), row.get("variant"))
        if key in seen:
            raise Bad("%s: %s is there twice in one run" % (where, " ".join(str(k) for k in key if k)))
        seen.add(key)
        check_row(where, row, cases, is_peer)
        if is_peer and row.get("scale", 1) != 1 and not allow_scaled:
            raise Bad("%s: %s was made smaller (--scale %s), which is for tries" % (where, row["name"], row["scale"]))
        rows.append(row)
    if not runs:
        raise Bad("%s: empty" % path)
    for field in ("device",) if is_peer else ("device", "commit"):
        if len({run.get(field) for run in runs}) > 1:
            raise Bad("%s: runs of more than one %s: %s" % (path, field, ", ".join(sorted({str(run.get(field)) for run in runs}))))
    return runs, rows


def quantile(values, q):
    s = sorted(values)
    at = q * (len(s) - 1)
    low = int(at)
    return s[low] + (s[min(low + 1, len(s) - 1)] - s[low]) * (at - low)


class Result:
    """All rows of one case (of one peer) taken together."""

    def __init__(self, rows):
        self.rows = [r for r in rows if r["verdict"] in TIMED]
        self.bad = next((r for r in rows if r["verdict"] == "incorrect"), None) or next((r for r in rows if r["verdict"] == "suspect"), None)
        self.reason = self.bad["verdict"] if self.bad else None
        if self.bad or not self.rows:
            worst = self.bad or rows[-1]
            self.reason = worst["verdict"] + (": " + worst["note"] if worst.get("note") and worst["verdict"] != "ok" else "")
            self.rows = []
        samples = [s for r in self.rows for s in r["samples_ms"]]
        self.n = len(samples)
        self.median, self.p25, self.p75 = (quantile(samples, q) if samples else None for q in (0.5, 0.25, 0.75))

    def field(self, name, choose=max):
        values = [r[name] for r in self.rows if isinstance(r.get(name), (int, float))]
        return choose(values) if values else None

    def ideal(self, share):
        """Milliseconds at the ceiling: a share times the time it was computed from, the median over the runs."""
        values = [r[share] * r["median_ms"] for r in self.rows if isinstance(r.get(share), (int, float))]
        return statistics.median(values) if values else None

    def work(self):
        values = [r["rate"] * r["median_ms"] for r in self.rows if isinstance(r.get("rate"), (int, float))]
        return statistics.median(values) if values else None


def group_rows(rows, key):
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {k: Result(v) for k, v in groups.items()}


def peer_results(peers, name, against):
    """Results of a peer, or of its several ways (faiss.f16, faiss.f32); or of another case's peer (lora.3b.peft_eager)."""
    own = {p: r for (n, p), r in peers.items() if n == name and (p == against or p.startswith(against + "."))}
    return own or {against: r for (n, p), r in peers.items() if n + "." + p == against}


def fastest(candidates):
    timed = {p: r for p, r in candidates.items() if r.median}
    return min(timed.items(), key=lambda pr: pr[1].median) if timed else (None, None)


def spread(ours, theirs):
    """theirs / ours: median, and from quartile to quartile."""
    return theirs.median / ours.median, theirs.p25 / ours.p75, theirs.p75 / ours.p25


def evaluate(goal, ours, peers):
    """(value, low, high, peer's name, why there is no value)"""
    name, measure, _, _, against = goal
    mine = ours.get(name)
    if mine is None or not mine.median:
        return None, None, None, None, mine.reason if mine else "no row"
    none = (None, None, None, None)
    if measure in SHARES:
        ideal = mine.ideal(SHARES[measure])
        return (*none, "the row has no %s" % SHARES[measure]) if ideal is None else (ideal / mine.median, ideal / mine.p75, ideal / mine.p25, None, None)
    if measure == "device_us":
        return mine.median * 1e3, mine.p25 * 1e3, mine.p75 * 1e3, None, None
    if measure in COUNTS or measure == "idle_share":
        value = mine.field(measure)
        return (*none, "the row has no %s" % measure) if value is None else (value, value, value, None, None)
    if measure in ("time_ratio", "rate_ratio"):
        other = ours.get(against)
        if other is None or not other.median:
            return (*none, "%s: %s" % (against, other.reason if other else "no row"))
        ratio, low, high = spread(other, mine)
        if measure == "time_ratio":
            return ratio, low, high, None, None
        work, base = mine.work(), other.work()
        if not work or not base:
            return (*none, "the row has no rate")
        return work / base / ratio, work / base / high, work / base / low, None, None
    candidates = peer_results(peers, name, against)
    peer, theirs = fastest(candidates)
    if not peer:
        return (*none, "%s: %s" % (against, "; ".join(sorted({r.reason or "?" for r in candidates.values()})) or "no row"))
    if measure == "peer_speed":
        return (*spread(mine, theirs), peer, None)
    mine_mb, peer_mb = mine.field("memory_mb"), theirs.field("memory_mb")
    if not mine_mb or not peer_mb:
        return None, None, None, peer, "no memory figure of %s" % (peer if mine_mb else "ours")
    return mine_mb / peer_mb, mine_mb / peer_mb, mine_mb / peer_mb, peer, None


def judge(goal, value, low, high):
    """(verdict, how far from the goal as a share of it: 0 when met)"""
    _, measure, relation, threshold, _ = goal
    if measure in SHARES and value > 1.02:
        return "suspect: over a ceiling", 0.0
    met = {"at_least": value >= threshold, "at_most": value <= threshold, "exactly": value == threshold}[relation]
    noise = ", within noise" if relation != "exactly" and low < threshold < high else ""
    if met:
        return "met" + noise, 0.0
    if threshold == 0:
        return "missed", math.inf
    short = abs(value - threshold) / threshold
    return "missed by %.1f %%%s" % (100 * short, noise), short


def number(value):
    return "%.4g" % value if abs(value) < 1e4 else "%.0f" % value


def value_words(measure, value):
    if measure in SHARES or measure == "idle_share":
        return "%.1f %%" % (100 * value)
    return "%.3g" % value if measure not in COUNTS else "%g" % value


def time_words(r):
    return "-" if r is None or not r.median else "%s ms (%s to %s)" % (number(r.median), number(r.p25), number(r.p75))


def share_words(r):
    """The share of the ceiling that bounds the case: the largest of them."""
    if r is None or not r.median:
        return "-"
    shares = [(r.ideal(field) / r.median, WORDS[m].split()[2]) for m, field in SHARES.items() if m != "roofline_share" and r.ideal(field)]
    return "%.1f %% (%s)" % (100 * max(shares)[0], max(shares)[1]) if shares else "-"


def goal_words(goal):
    _, measure, relation, threshold, against = goal
    words = "%s %s %s" % (SIGNS[relation], value_words(measure, threshold), WORDS[measure])
    return words + (" " + against if measure in ("time_ratio", "rate_ratio", "peer_speed", "peer_memory") else "")


def table(cases, goals, ours, peers):
    """([lines], {name: worst shortfall}, counts)"""
    lines = ["| case | ours | peer | ratio | share of ceiling | goal | verdict |", "|---|---|---|---:|---:|---|---|"]
    worst, counts = {}, {"met": 0, "missed": 0, "not measured": 0, "suspect": 0}
    for name in cases:
        mine, shown = ours.get(name), set()
        for goal in (g for g in goals if g[0] == name):
            value, low, high, peer, why = evaluate(goal, ours, peers)
            verdict, short = ("not measured: " + why, None) if why else judge(goal, value, low, high)
            counts[next(k for k in counts if verdict.startswith(k))] += 1
            if short:
                worst[name] = max(worst.get(name, 0), short)
            theirs = peer_results(peers, name, goal[4]).get(peer)
            shown.add(peer)
            ratio = "-" if value is None or goal[1] in SHARES else value_words(goal[1], value)
            lines.append("| %s | %s | %s | %s | %s | %s | %s |" % (name, time_words(mine), "%s %s" % (peer, time_words(theirs)) if peer else "-", ratio,
                                                               value_words(goal[1], value) if value is not None and goal[1] in SHARES else share_words(mine),
                                                               goal_words(goal), verdict))
        others = {p: r for (n, p), r in peers.items() if n == name and p not in shown and r.median}
        for peer, theirs in others.items():
            ratio = "%.3g" % (theirs.median / mine.median) if mine and mine.median else "-"
            lines.append("| %s | %s | %s %s | %s | %s | - | - |" % (name, time_words(mine), peer, time_words(theirs), ratio, share_words(mine)))
        if not others and not any(g[0] == name for g in goals):
            lines.append("| %s | %s | - | - | %s | - | %s |" % (name, time_words(mine), share_words(mine),
                                                               "-" if mine and mine.median else "not measured: " + (mine.reason if mine else "no row")))
    return [line.replace("\n", " ") for line in lines], worst, counts


def heading(our_runs, peer_runs, counts):
    run = our_runs[-1]
    lines = ["%s, driver %s, commit %s, %s to %s, %d run(s)." % (run.get("device", "?"), run.get("driver", "?"), run.get("commit", "?"), our_runs[0].get("time", "?"),
                                                              run.get("time", "?"), len(our_runs))]
    rates = ["%s %s" % (k, number(run[k])) for k in ("copy_gbytes", "read_gbytes", "matrix_f32_gflops", "matrix_bf16_gflops") if run.get(k)]
    if run.get("backend") == "shim" or any(p.get("scale", 1) != 1 for p in peer_runs):
        lines.insert(0, "A try of the scripts without a GPU or with small sizes: no number here says anything about speed.")
    if rates:
        lines.append("Ceilings measured: %s (GB/s, GFLOP/s)." % ", ".join(rates))
    if peer_runs:
        p = peer_runs[-1]
        rates = ["%s %s" % (k, number(p[k])) for k in ("copy_gbytes", "read_gbytes", "matrix_bf16_gflops") if p.get(k)]
        lines.append("Peers: PyTorch %s, transformers %s, PEFT %s, faiss %s; their ceilings: %s." % (p.get("torch"), p.get("transformers"), p.get("peft"), p.get("faiss"), ", ".join(rates) or "-"))
    lines.append("Goals: " + ", ".join("%d %s" % (n, k) for k, n in counts.items()) + ". Times: medians, with quartiles; ratio: what the goal compares, else the peer's time over ours.")
    return lines


def read_ladder(path, kernels):
    try:
        with open(path, encoding="utf-8", newline="") as f:
            rows = list(csv.reader(f))
    except OSError as e:
        raise Bad(str(e)) from e
    if not rows or rows[0] != LADDER:
        raise Bad("%s: the first line is not %s" % (path, ",".join(LADDER)))
    for number_, row in enumerate(rows[1:], 2):
        if len(row) != len(LADDER) or not all(row):
            raise Bad("%s: row %d has not all of its %d columns" % (path, number_, len(LADDER)))
    have = {row[0] for row in rows[1:]}
    if kernels:
        for name in sorted(os.listdir(kernels)):
            if not name.endswith(".cu"):
                continue
            with open(os.path.join(kernels, name), encoding="utf-8") as f:
                ladder = re.search(r"^ \* Ladder.*?\*/", f.read(), re.M | re.S)
            if ladder and name[:-3] not in have:
                raise Bad("%s: %s has a ladder and no row here" % (path, name))
            for version in LADDER_VERSION.findall(ladder.group()) if ladder else ():
                if not any(row[0] == name[:-3] and re.match(version + r"\b", row[1]) for row in rows[1:]):
                    raise Bad("%s: %s has a version %s and no row of it here" % (path, name, version))
        for name in sorted(have):
            if not os.path.exists(os.path.join(kernels, name + ".cu")):
                raise Bad("%s: there is no %s.cu" % (path, name))
    return rows


def ladder_lines(rows):
    escape = lambda cell: cell.replace("|", "\\|")
    return ["| " + " | ".join(map(escape, rows[0])) + " |", "|" + "---|" * len(rows[0])] + ["| " + " | ".join(map(escape, r)) + " |" for r in rows[1:]]


def write(path, text):
    with open(path + ".new", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".new", path)


def replace_block(path, lines):
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except OSError as e:
        raise Bad(str(e)) from e
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise Bad("%s: needs one line %s and after it one %s" % (path, BEGIN, END))
    write(path, text[:text.index(BEGIN)] + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + text[text.index(END):])


def same_card(ours, peers):
    a, b = str(ours[-1].get("device")), str(peers[-1].get("device"))
    if not a.startswith(b):
        raise Bad("ours ran on %s, the peers on %s" % (a, b))


def report(args):
    cases, goals = read_goals(args.goals)
    our_runs, our_rows = read_rows(args.ours, cases, False, args.allow_scaled)
    peer_runs, peer_rows = read_rows(args.peers, cases, True, args.allow_scaled) if args.peers else ([], [])
    if peer_runs and not args.allow_scaled:
        same_card(our_runs, peer_runs)
    ours = group_rows([r for r in our_rows if (r.get("variant") or "") == args.variant], lambda r: r["name"])
    peers = group_rows(peer_rows, lambda r: (r["name"], r["peer"]))
    if args.measured:
        cases = {name: case for name, case in cases.items() if name in ours}
    missing = [name for name in cases if name not in ours]
    if missing and not args.partial:
        raise Bad("%s: no row of %s%s; --partial takes them as not measured" % (args.ours, ", ".join(missing[:5]), " and %d more" % (len(missing) - 5) if len(missing) > 5 else ""))
    lines, worst, counts = table(cases, goals, ours, peers)
    if args.worst is not None:
        names = sorted(worst, key=lambda n: (-worst[n], n))
        print("\n".join(names[:args.worst] if args.worst else names))
        return
    text = heading(our_runs, peer_runs, counts) + [""] + lines
    if args.ladder:
        text += ["", "The ladder: each version, what was predicted, what came out.", ""] + ladder_lines(read_ladder(args.ladder, args.kernels))
    if args.readme:
        replace_block(args.readme, text)
    if args.out:
        write(args.out, "\n".join(text) + "\n")
    if not args.readme and not args.out:
        print("\n".join(text))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goals", default=os.path.join(ROOT, "experiments", "bench_goals.def"))
    parser.add_argument("--ours")
    for name in ("--peers", "--out", "--readme", "--ladder", "--kernels"):
        parser.add_argument(name)
    parser.add_argument("--worst", type=int)
    parser.add_argument("--variant", default="")
    parser.add_argument("--partial", action="store_true")
    parser.add_argument("--measured", action="store_true")
    parser.add_argument("--allow-scaled", action="store_true")
    args = parser.parse_args(argv)
    try:
        if args.ours:
            report(args)
        elif args.ladder:
            print("\n".join(ladder_lines(read_ladder(args.ladder, args.kernels))))
        else:
            parser.error("--ours FILE, or --ladder CSV alone")
    except (Bad, OSError) as e:
        print("gpu_report.py: %s" % e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
