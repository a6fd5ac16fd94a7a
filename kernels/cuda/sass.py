#!/usr/bin/env python3
"""What the kernels became: a Markdown table from the disassembly, and the blocks that fit on a multiprocessor.

    sass.py [--arch sm_90] [--tools FOLDER] [--launches FILE] [--only REGEX] [--out FILE] OBJECT...

OBJECT: what nvcc made (build/cuda_archs/*.o) or a cubin. Needs cuobjdump, which is looked for in --tools, KS_CUDA_TOOLS,
PATH, and beside nvcc. c++filt, where there is one, makes the names readable.

Counted in the whole kernel, then in its hottest loop: the innermost of those with matrix instructions (with none: with fused
multiply-adds or loads of global memory, then of shared memory), of several the one with the most, without loops inside it.
A static count: what a loop costs is measured by a profiler, not here.
Blocks per multiprocessor: the least of what registers, shared memory, threads and the hardware's own limit allow, by the
rules of the CUDA occupancy calculator. Threads are the launch bounds; shared memory that is asked for at the launch is in
no object: --launches names a file with lines `REGEX THREADS DYNAMIC_BYTES` (0 threads: the launch bounds; the first line
that matches the readable name counts; # begins a comment). A kernel without a line shows the blocks for its static shared
memory with a ~ when it uses shared memory whose size only its launch knows.

Exit codes: 0; 1 when the disassembly cannot be read; 2 for wrong use; 3 without cuobjdump.
"""
import argparse
import glob
import os
import re
import shutil
import subprocess
import sys

# threads, blocks, registers, shared memory, largest shared memory of a block, bytes that each block costs beside its own
SM = {
    "sm_75": (1024, 16, 65536, 64 << 10, 64 << 10, 0),
    "sm_80": (2048, 32, 65536, 164 << 10, 163 << 10, 1024),
    "sm_87": (1536, 16, 65536, 164 << 10, 163 << 10, 1024),
    "sm_89": (1536, 24, 65536, 100 << 10, 99 << 10, 1024),
    "sm_90": (2048, 32, 65536, 228 << 10, 227 << 10, 1024),
    "sm_100": (2048, 32, 65536, 228 << 10, 227 << 10, 1024),
    "sm_110": (1536, 24, 65536, 228 << 10, 227 << 10, 1024),
}
# name: opcodes that count. The first that matches takes an instruction.
KINDS = [
    ("HGMMA", r"[HQIB]GMMA|UTC\w*MMA"),
    ("HMMA", r"[HIQDB]MMA"),
    ("FFMA", r"FFMA2?"),
    ("LDG.128", r"LDG\.\S*128"),
    ("LDG other", r"LDG"),
    ("LDGSTS", r"LDGSTS|UBLKCP|UTMALDG"),
    ("LDSM", r"LDSM"),
    ("LDS", r"LDS"),
    ("STS", r"STS|STSM"),
    ("STG", r"STG|UTMASTG"),
    ("LDL", r"LDL"),
    ("STL", r"STL"),
    ("BAR", r"BAR|SYNCS"),
]
KIND_RES = [(name, re.compile(r"(?:%s)(?=\.|$)" % pattern)) for name, pattern in KINDS]
NAMES = [name for name, _ in KINDS]
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
FUNCTION = re.compile(r"^\s*Function : (\S+)")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


def find_tool(name, folder):
    for place in (folder, os.environ.get("KS_CUDA_TOOLS")):
        if place:
            path = os.path.join(place, name)
            if os.access(path, os.X_OK):
                return path
            return None  # asked for by name: another one would be a surprise
    path = shutil.which(name)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    beside = os.path.join(os.path.dirname(nvcc), name)
    return path or (beside if os.access(beside, os.X_OK) else None)


def run(tool, *arguments):
    done = subprocess.run([tool, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError("%s %s: %s" % (os.path.basename(tool), " ".join(arguments), done.stderr.strip() or done.returncode))
    return done.stdout


def kind_of(opcode):
    for name, pattern in KIND_RES:
        if pattern.match(opcode):
            return name
    return None


def parse_sass(text):
    """{function: [(address, opcode, operands)]}"""
    functions, current = {}, None
    for line in text.splitlines():
        match = FUNCTION.match(line)
        if match:
            current = functions.setdefault(match.group(1), [])
            continue
        match = INSTRUCTION.match(line)
        if match and current is not None:
            current.append((int(match.group(1), 16), match.group(2), match.group(3).strip()))
    return functions


def parse_resources(text):
    """{function: (registers, static shared memory, stack)}"""
    found, name = {}, None
    for line in text.splitlines():
        match = re.match(r"\s*Function (\S+):", line)
        if match:
            name = match.group(1)
        match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)
        if match and name:
            found[name] = (int(match.group(1)), int(match.group(3)), int(match.group(2)))
            name = None
    return found


def parse_elf(text):
    """{function: threads of its launch bounds}"""
    threads, name, wanted = {}, None, False
    for line in text.splitlines():
        section = re.match(r"^\.nv\.info\.(\S+)$", line)
        if section:
            name = section.group(1)
        wanted = wanted or "EIATTR_MAX_THREADS" in line
        value = re.match(r"^\s*Value:\s+(0x[0-9a-f]+) (0x[0-9a-f]+) (0x[0-9a-f]+)\s*$", line)
        if wanted and value and name:
            x, y, z = (int(v, 16) for v in value.groups())
            threads[name], wanted = x * y * z, False
    return threads


def count(instructions):
    counts = dict.fromkeys(NAMES, 0)
    for _, opcode, _ in instructions:
        kind = kind_of(opcode)
        if kind:
            counts[kind] += 1
    return counts


def loops(instructions):
    """(first, last, own instructions) of each loop: from a branch's target back up to the branch, without the loops within."""
    spans = set()
    for address, opcode, operands in instructions:
        target = TARGET.search(operands)
        if opcode.split(".")[0] in ("BRA", "BRX", "JMP") and target and int(target.group(1), 16) < address:
            spans.add((int(target.group(1), 16), address))  # a branch to itself ends the code: no loop
    # From behind the loop back into its middle: a wait's slow path, kept out of the way.
    spans = {s for s in spans if not any(o[0] < s[0] <= o[1] < s[1] for o in spans)}
    found = []
    for low, high in sorted(spans):
        within = [s for s in spans if s != (low, high) and low <= s[0] and s[1] <= high]
        own = [i for i in instructions if low <= i[0] <= high and not any(s[0] <= i[0] <= s[1] for s in within)]
        found.append((low, high, own))
    return found


# What makes a loop hot; the first line of which any loop has something.
HEAT = [{"HGMMA": 1, "HMMA": 1}, {"FFMA": 1, "LDG.128": 8, "LDGSTS": 8, "LDG other": 1}, {"LDS": 1, "LDSM": 1, "STS": 1}]


def hottest_loop(instructions):
    """Counts and length of the loop that the docstring describes, or (None, 0)."""
    counted = [(low, high, count(own), len(own)) for low, high, own in loops(instructions)]
    for weights in HEAT:
        hot = [(sum(n * loop[2][k] for k, n in weights.items()), loop) for loop in counted]
        hot = [(heat, loop) for heat, loop in hot if heat]
        inner = [(heat, l) for heat, l in hot if not any(o is not l and l[0] <= o[0] and o[1] <= l[1] for _, o in hot)]
        if inner:
            _, best = max(inner, key=lambda h: (h[0], -h[1][3]))  # of equals the shorter: without checks of each element
            return best[2], best[3]
    return None, 0


def blocks_per_sm(arch, registers, threads, shared):
    """Blocks that fit, and what bounds them."""
    max_threads, max_blocks, all_registers, all_shared, block_shared, reserved = SM[arch]
    if shared > block_shared or threads < 1 or threads > 1024 or registers > 255:
        return 0, "does not fit"
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256  # given out in pieces of 256, and to warps in fours
    limits = {"blocks": max_blocks, "threads": max_threads // (warps * 32)}
    limits["registers"] = (all_registers // max(of_warp, 1)) // 4 * 4 // warps if registers else max_blocks
    taken = -(-(shared + reserved) // 128) * 128 if arch != "sm_75" else -(-max(shared, 1) // 256) * 256
    limits["shared memory"] = all_shared // taken
    least = min(limits, key=lambda k: (limits[k], k))
    return limits[least], least


def readable(names):
    tool = shutil.which("c++filt")
    if not tool or not names:
        return {n: n for n in names}
    out = subprocess.run([tool], input="\n".join(names) + "\n", stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    short = {}
    for name, full in zip(names, out):
        full = re.sub(r"^void ", "", full)
        depth, end = 0, len(full)
        for i, c in enumerate(full):
            depth += (c in "<") - (c in ">")
            if c == "(" and depth == 0:
                end = i
                break
        short[name] = full[:end].replace("ks_bf16", "bf16").replace(", ", ",")
    return short


def read_launches(path):
    rules = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            words = line.split("#")[0].split()
            if not words:
                continue
            if len(words) != 3 or not words[1].isdigit() or not words[2].isdigit():
                raise ValueError("%s:%d: not `REGEX THREADS DYNAMIC_BYTES`" % (path, number))
            rules.append((re.compile(words[0]), int(words[1]), int(words[2])))
    return rules


def report_object(tool, arch, code, path):
    """Facts of each kernel of an object, a list of dicts. code: arch, or with its own instructions, as sm_90a."""
    sass = parse_sass(run(tool, "-arch", code, "-sass", path))
    resources = parse_resources(run(tool, "-arch", code, "-res-usage", path))
    threads = parse_elf(run(tool, "-arch", code, "-elf", path))
    rows = []
    for name, instructions in sass.items():
        if name not in resources:
            continue
        hot, hot_n = hottest_loop(instructions)
        registers, shared, stack = resources[name]
        reserved = SM[arch][5] if shared >= SM[arch][5] else 0  # the driver's own, counted with those that use any
        rows.append({"file": re.sub(r"\.(cu\.)?(o|cubin)$", "", os.path.basename(path)), "name": name, "registers": registers,
                     "shared": shared - reserved, "uses_shared": shared > 0, "stack": stack, "threads": threads.get(name, 0), "n": len(instructions),
                     "all": count(instructions), "hot": hot, "hot_n": hot_n})
    return rows


def place(row, arch, rules):
    """Adds blocks per multiprocessor and what bounds them."""
    rule = next((r for r in rules if r[0].search(row["readable"])), None)
    row["threads"] = rule[1] if rule and rule[1] else row["threads"]
    row["dynamic"] = rule[2] if rule else None if row["uses_shared"] else 0
    row["blocks"], row["bound"] = None, "threads unknown"
    if row["threads"]:
        row["blocks"], row["bound"] = blocks_per_sm(arch, row["registers"], row["threads"], row["shared"] + (row["dynamic"] or 0))


def cell(counts, name):
    return "-" if counts is None or counts[name] == 0 else str(counts[name])


def print_table(rows, arch, command, sources, out):
    w = lambda *words: print(*words, sep="", file=out)
    w("# Kernels in machine code, ", arch)
    w()
    w("Computed from the disassembly, nothing here ran on a GPU. ", "Sources: %s. " % sources if sources else "", "Made by:")
    w()
    w("```sh\n", command, "\n```")
    w()
    w("regs: registers a thread. smem: static + dynamic shared memory a block, in bytes; ? where only the launch knows it. blocks: a")
    w("multiprocessor holds, bounded by; ~ without the dynamic shared memory. warps: resident then. Then instructions of the whole kernel")
    w("and of its hottest loop (`loop`: instructions in it; per mma: instructions a matrix instruction). LDL and STL are spills or indexed arrays.")
    last = None
    for row in rows:
        if row["file"] != last:
            last = row["file"]
            w()
            w("## ", last, ".cu")
            w()
            w("| kernel | regs | smem | threads | blocks | bound by | warps | all | " + " | ".join(NAMES) + " | loop | per mma | " + " | ".join(NAMES) + " |")
            w("|---|" + "---:|" * 4 + "---|" + "---:|" * (4 + 2 * len(NAMES)))
        smem = str(row["shared"]) + ("+?" if row["dynamic"] is None else "+%d" % row["dynamic"] if row["dynamic"] else "")
        blocks = "-" if row["blocks"] is None else ("~" if row["dynamic"] is None else "") + str(row["blocks"])
        warps = "-" if row["blocks"] is None else row["blocks"] * -(-row["threads"] // 32)
        mma = row["hot"]["HGMMA"] + row["hot"]["HMMA"] if row["hot"] else 0
        w("| `", row["readable"], "` | ", row["registers"], ("+%d stack" % row["stack"]) if row["stack"] else "", " | ", smem, " | ",
          row["threads"] or "-", " | ", blocks, " | ", row["bound"], " | ", warps, " | ", row["n"], " | ",
          " | ".join(cell(row["all"], n) for n in NAMES), " | ", row["hot_n"] or "-", " | ", "%.1f" % (row["hot_n"] / mma) if mma else "-", " | ",
          " | ".join(cell(row["hot"], n) for n in NAMES), " |")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", choices=sorted(SM))
    parser.add_argument("--tools", help="folder of cuobjdump")
    parser.add_argument("--launches", help="file of threads and dynamic shared memory")
    parser.add_argument("--only", default="", help="kernels whose readable names match")
    parser.add_argument("--out", help="file instead of standard output")
    parser.add_argument("--sources", help="what the objects were made from, as a commit")
    parser.add_argument("--command", default="ninja ks_cuda_sass", help="named in the table as what made it")
    parser.add_argument("objects", nargs="+")
    args = parser.parse_args(argv)
    tool = find_tool("cuobjdump", args.tools)
    if not tool:
        print("sass.py: there is no cuobjdump (CUDA's binary utilities); say where it is: --tools FOLDER or KS_CUDA_TOOLS. No table.", file=sys.stderr)
        return 3
    try:
        rules = read_launches(args.launches) if args.launches else []
        only = re.compile(args.only)
    except (OSError, ValueError, re.error) as e:
        print("sass.py: %s" % e, file=sys.stderr)
        return 2
    rows = []
    try:
        for path in sorted(p for name in args.objects for p in (sorted(glob.glob(name)) or [name])):
            for code in re.findall(r"\.(%sa?)\.cubin" % args.arch, run(tool, "--list-elf", path))[:1]:
                rows += report_object(tool, args.arch, code, path)
    except (OSError, RuntimeError) as e:
        print("sass.py: %s" % e, file=sys.stderr)
        return 1
    names = readable([r["name"] for r in rows])
    for row in rows:
        row["readable"] = names[row["name"]]
        place(row, args.arch, rules)
    rows = sorted((r for r in rows if only.search(r["readable"])), key=lambda r: (r["file"], r["readable"]))
    if not rows:
        print("sass.py: no kernel for %s in the objects" % args.arch, file=sys.stderr)
        return 1
    if args.out:
        with open(args.out + ".new", "w", encoding="utf-8") as f:
            print_table(rows, args.arch, args.command, args.sources, f)
        os.replace(args.out + ".new", args.out)
        print("%s: %d kernels" % (args.out, len(rows)))
    else:
        print_table(rows, args.arch, args.command, args.sources, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
