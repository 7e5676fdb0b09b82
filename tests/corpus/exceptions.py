"""Where a runtime or a gradient is missing on a corpus of exported models, as the tables of docs/corpus.md.

    python tests/corpus/exceptions.py CORPUS_DIR --vitrim PATH [--only GLOB[,GLOB]] [--jobs 2]

Python's standard library only. CORPUS_DIR has manifest.json (see run.sh); vitrim must be built with both runtimes. Every model is cut at
random (half of mlp, qk and channel, three quarters of vo, seed 7) and given to `vitrim verify --json`, whose `skipped` is the first
table; then `vitrim augment` is asked for a training graph with gates on mlp, qk and vo, and the second table has what it answers.
Exit status 1 where a result does not verify in any runtime although the manifest says that the original runs.
"""

import argparse
import concurrent.futures
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

KEEP = "mlp=0.5,qk=0.5,vo=0.75,channel=0.5"


def ask(args, command, *rest):
    """Exit status, the object on stdout (None where there is none), and the last line of stderr."""
    done = subprocess.run([args.vitrim, command, *map(str, rest)], capture_output=True, text=True, timeout=600)
    lines = done.stderr.strip().splitlines() or [""]
    try:
        told = json.loads(done.stdout)
    except json.JSONDecodeError:
        told = None
    return done.returncode, told, lines[-1]


def judge(entry, args):
    """Per model: whether it was cut, runtimes that checked, skipped runtimes with reasons, what `augment` answers."""
    path = args.corpus / (entry.get("file") or f"{entry['name']}.onnx")
    row = {"name": entry["name"], "runs": entry["check"] == "ok", "cut": False, "used": [], "skipped": {}, "augment": None}
    with tempfile.TemporaryDirectory() as work:
        plan, out, train = (Path(work) / name for name in ("plan.json", "out.onnx", "train.onnx"))
        if ask(args, "plan", path, "--by", "random", "--seed", 7, "--keep", KEEP, "-o", plan)[0] != 0:
            return row
        status, _, error = ask(args, "slice", path, "--plan", plan, "-o", out)
        if status != 0:
            sys.exit(f"{entry['name']}: slice: {error}")
        row["cut"] = True
        status, told, error = ask(args, "verify", out, "--against", path, "--json")
        if told is None or "checks" not in told:
            sys.exit(f"{entry['name']}: verify: {error}")
        row["pass"] = status == 0 and told["pass"]
        row["used"] = sorted({c["runtime"] for c in told["checks"]})
        row["skipped"] = {s["runtime"]: s["reason"] for s in told["skipped"]}
        status, told, error = ask(args, "augment", path, "-o", train, "--gates", "mlp,qk,vo", "--loss", "mse", "--json")
        row["augment"] = None if status == 0 else (told or {}).get("error", {}).get("message", error).removeprefix(f"{path}: ")
    return row


def plain(reason):
    """A reason in a table cell: one line, nothing of Markdown's."""
    return re.sub(r"\s+", " ", reason).replace("|", "\\|").replace("<", "\\<").replace("`", "'")


def table(head, rows):
    """Models that share a reason share a line."""
    by_reason = defaultdict(list)
    for name, *cells in rows:
        by_reason[tuple(map(plain, cells))].append(name)
    print(f"| models | {' | '.join(head)} |\n|---|{'---|' * len(head)}")
    for cells, names in sorted(by_reason.items(), key=lambda item: item[1]):
        print(f"| {', '.join(f'`{n}`' for n in names)} | {' | '.join(cells)} |")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--vitrim", default="target/debug/vitrim")
    parser.add_argument("--only", default="*")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    entries = [e for e in json.loads((args.corpus / "manifest.json").read_text())
               if e["check"] != "failed" and any(fnmatch.fnmatch(e["name"], g) for g in args.only.split(","))]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda e: judge(e, args), entries))
    cut = [r for r in rows if r["cut"]]
    used = {name: sum(name in r["used"] for r in cut) for name in ("ort", "tract")}
    print(f"{len(rows)} models, {len(cut)} with something to cut: ONNX Runtime checked {used['ort']}, tract {used['tract']}.\n")
    table(("runtime", "why it was left out"), [(r["name"], k, v) for r in cut for k, v in r["skipped"].items()])
    table(("what `vitrim augment` answers",), [(r["name"], r["augment"]) for r in cut if r["augment"]])
    wrong = [r["name"] for r in cut if r["runs"] and not r["pass"]]
    if wrong:
        sys.exit(f"not verified: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
