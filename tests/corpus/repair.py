"""Rotation and repair on a corpus of exported models, from outside: real files and the command line, nothing else of vitrim.

    python tests/corpus/repair.py CORPUS_DIR --vitrim PATH [--only GLOB[,GLOB]] [--jobs 2] [--json OUT]

Python's standard library only. CORPUS_DIR has manifest.json (see run.sh). Every float32 model that runs is given random inputs and sliced
twice with what those say of it:
  full  a plan that keeps all units, in the basis of the data: equal to the original within 1e-5 of the output's range;
  half  half of mlp, qk, vo and channel in the basis of the data, repaired: equal to its twin (`vitrim verify`), and no layer's error on
        images that were kept out of the fit larger than that of the plain cut.
A group that cannot be rotated is no failure; why it cannot is counted. Exit status 1 where something else than that was seen.
"""

import argparse
import array
import collections
import concurrent.futures
import fnmatch
import json
import math
import random
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

KEEP = "mlp=0.5,qk=0.5,vo=0.5,channel=0.5"
# Of the output's range: what a change of basis may make.
SAME = 1e-5
# `vitrim verify` allows this share of the output's range to float32.
TOLERANCE = 1e-4


class Failed(Exception):
    """What was seen instead."""


def vitrim(args, command, *rest, ok=(0,)):
    """The object on stdout; Failed with the last line of stderr on another exit status."""
    done = subprocess.run([args.vitrim, command, *map(str, rest), "--json"], capture_output=True, text=True, timeout=900)
    if done.returncode not in ok:
        lines = done.stderr.strip().splitlines() or ["(no message)"]
        raise Failed(f"{command} ended with {done.returncode}: {lines[-1]}")
    return json.loads(done.stdout)


def npy(descr, shape, data):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({', '.join(map(str, shape))},), }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def write_data(entry, path):
    """Random inputs as an .npz, the same for the same model."""
    numbers = random.Random(entry["name"])
    sizes = entry["runs"][0]["sizes"] if entry.get("runs") else {}
    shapes = {m["name"]: [sizes.get(d, d) for d in m["shape"][1:]] for m in entry["inputs"]}
    samples = 24 if max(math.prod(s) for s in shapes.values()) < 50_000 else 8
    with zipfile.ZipFile(path, "w") as archive:
        for meta in entry["inputs"]:
            shape = [samples, *shapes[meta["name"]]]
            count = math.prod(shape)
            if meta["dtype"] == "float32":
                descr, values = "<f4", array.array("f", (numbers.gauss(0, 1) for _ in range(count)))
            elif meta["dtype"] == "int64":
                low, high = meta.get("range", [0, 2])
                descr, values = "<i8", array.array("q", (numbers.randrange(low, high) for _ in range(count)))
            else:
                raise Failed(f"no data of type {meta['dtype']}")
            archive.writestr(f"{meta['name']}.npy", npy(descr, shape, values.tobytes()))


def difference(told):
    """The largest difference of `verify --json`, as a share of the output's range."""
    checks = [c for c in told["checks"] if c["runtime"] != "weights"]
    shares = [math.inf if c["max_abs"] is None else c["max_abs"] / max(c["tolerance"], 1e-30) * TOLERANCE for c in checks]
    if not shares:
        raise Failed(f"no runtime could check: {told['skipped']}")
    return max(shares)


def judge(entry, args):
    path = args.corpus / (entry.get("file") or f"{entry['name']}.onnx")
    row = {"name": entry["name"], "rotated": 0, "refused": {}, "repairs": 0, "full": None, "error": None}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data, run = ("--data", work / "data.npz"), ("--run", work / "run")
        try:
            write_data(entry, work / "data.npz")
            (work / "whole.json").write_text(json.dumps({"schema_version": 1, "model_sha256": "", "groups": {}}))
            told = vitrim(args, "slice", path, "--plan", work / "whole.json", "--basis", "auto", *data, *run, "-o", work / "full.onnx")
            row["rotated"], row["refused"] = len(told["rotated"]), {r["group"]: r["reason"] for r in told["not_rotated"]}
            # Against a plan without edits the weights differ, which is told apart from what the outputs do.
            told = vitrim(args, "verify", work / "full.onnx", "--against", path, "--plan", work / "whole.json", *data,
                          "--runtimes", "ort", ok=(0, 1))
            row["full"] = difference(told)
            if row["full"] > SAME:
                raise Failed(f"rotated at full rank it differs by {row['full']:.1e} of the range")
            if not vitrim(args, "inspect", path)["groups"]:
                return row
            vitrim(args, "plan", path, "--by", "magnitude", "--keep", KEEP, "-o", work / "plan.json")
            told = vitrim(args, "slice", path, "--plan", work / "plan.json", "--basis", "auto", "--compensate", *data, *run,
                          "-o", work / "half.onnx")
            row["repairs"] = sum(r["is_refitted"] for r in told["repairs"])
            worse = [r for r in told["repairs"] if r["error"] > r["error_plain"]]
            if worse:
                raise Failed(f"a repair made an error larger: {worse[0]}")
            told = vitrim(args, "verify", work / "half.onnx", "--against", path, *data, "--runtimes", "ort", ok=(0, 1))
            if not told["pass"]:
                reasons = [c.get("reason") for c in told["checks"] if not c["pass"]] or told["skipped"]
                raise Failed(f"half rank does not verify: {reasons}")
        except Failed as e:
            row["error"] = str(e).replace(str(work), "WORK")
        except Exception as e:
            row["error"] = f"{type(e).__name__}: {e}"
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--vitrim", default="target/debug/vitrim")
    parser.add_argument("--only", default="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    entries = [e for e in json.loads((args.corpus / "manifest.json").read_text()) if e["check"] == "ok" and e["dtype"] == "float32"
               and any(fnmatch.fnmatch(e["name"], g) for g in args.only.split(","))]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda e: judge(e, args), entries))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    failed = [r for r in rows if r["error"]]
    worst = max((r["full"] or 0.0 for r in rows), default=0.0)
    print(f"{len(rows)} models, {len(rows) - len(failed)} as they should be; {sum(r['rotated'] > 0 for r in rows)} with rotated groups "
          f"({sum(r['rotated'] for r in rows)}), {sum(r['repairs'] > 0 for r in rows)} with refitted layers "
          f"({sum(r['repairs'] for r in rows)}); full rank differs by {worst:.1e} of the range at most")
    reasons = collections.defaultdict(list)
    for row in rows:
        for reason in set(row["refused"].values()):
            reasons[reason].append(row["name"])
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"  not rotated in {len(names)} models ({', '.join(names[:3])}): {reason}")
    for row in failed:
        print(f"FAILED {row['name']}: {row['error']}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
