"""Measure everything on one GPU of 80 to 141 GB, offline, with random weights: one command under ten minutes.

    python -m benchmarks.gpu.run --output gpu-results

Each part runs in a process of its own, so that one that fails costs the others nothing. `results.json` and a table
come out, with what was predicted by count and estimate beside each figure. It needs torch 2.11 with CUDA and
transformers 5.17, or later, and accelerate; peft (0.8 MB) for LoRA steps, and bitsandbytes (43 MB) for 4 bits.
`--debug` tries it on a CPU.
"""

import argparse
import importlib
import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Seconds that a part may take; correctness comes first.
PARTS = {"checks": 60, "kernels": 60, "step": 120, "quantised": 60, "big": 290}
PACKAGES = ("torch", "transformers", "triton", "accelerate", "peft", "bitsandbytes")


def run_part(name: str, path: Path, debug: bool) -> None:
    """Run a part in this process, and write its rows as they come: the time may run out."""
    from benchmarks.gpu.device import DEBUG, Sizes, write_rows

    module = importlib.import_module(f"benchmarks.gpu.{name}")
    rows = []
    for row in module.measure(DEBUG if debug else Sizes()):
        rows.append(row)
        write_rows(rows, path)


def machine() -> dict[str, Any]:
    """Return the GPU and the versions of packages."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": name, "packages": versions}


def show(results: dict[str, Any]) -> None:
    """Print one table."""
    print(f"\n{results['machine']}")
    print(f"{'part':10} {'what':62} {'value':>12} {'predicted':>10}  unit")
    for part, found in results["parts"].items():
        if "error" in found:
            print(f"{part:10} failed: {found['error']}")
        for row in found["rows"]:
            predicted = "" if row["predicted"] is None else f"{row['predicted']:.4g}"
            print(f"{part:10} {row['name']:62} {row['value']:12.5g} {predicted:>10}  {row['unit']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="folder for results.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="leave the others out")
    parser.add_argument("--debug", action="store_true", help="tiny sizes, also on a CPU: shows that it runs")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.part:
        run_part(args.part, args.output / f"{args.part}.json", args.debug)
        return
    results: dict[str, Any] = {"machine": machine(), "parts": {}}
    if results["machine"]["device"] == "CPU" and not args.debug:
        parser.error("there is no GPU here; use --debug to try the scripts on a CPU")
    for name in args.parts:
        start, path = time.perf_counter(), args.output / f"{name}.json"
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu.run", "--part", name, "--output", str(args.output)]
        try:
            subprocess.run(command + ["--debug"] * args.debug, check=True, timeout=PARTS[name])
            found: dict[str, Any] = {}
        except subprocess.SubprocessError as error:
            found = {"error": str(error)}
        rows = json.loads(path.read_text()) if path.exists() else []
        results["parts"][name] = {**found, "rows": rows, "seconds": time.perf_counter() - start}
        (args.output / "results.json").write_text(json.dumps(results, indent=1))
    show(results)


if __name__ == "__main__":
    main()
