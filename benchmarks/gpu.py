"""minisr on one GPU: is it correct there, and how fast is it? At most eight minutes, without a network.

    python benchmarks/gpu.py                              # needs a GPU; SmolLM2-135M's shape
    python benchmarks/gpu.py --only responses profile     # some sections
    python benchmarks/gpu.py --device cpu --quick         # a minute, to see that every section runs

Without --model the weights are random, in SmolLM2-135M's shape: as fast as the real ones, but their text means nothing.
So the number of new tokens is fixed, or every k-th token of the vocabulary is a stop token. Sections (gpu_sections.py)
run in a process of their own. If one fails, its traceback is printed and the next one runs; one that exceeds its time
limit, or leaves the GPU unusable, costs a new process.
"""

import json
import sys
import time
import traceback
from contextlib import suppress

import torch
from gpu_sections import Sections
from sides import OneLineParser, Process, in_one_line

from minisr.interop.source import load_source

# Seconds that a section may take, in the order in which they run: what matters most comes first.
LIMITS = {"machine": 60, "tokens": 60, "responses": 90, "judging": 60, "profile": 60, "training": 60,
          "attention": 45, "float32": 45, "transformers": 90, "iteration": 120, "smoke": 120}
TOTAL = 480


class Worker(Process):
    """The process in which sections run."""

    def run(self, section: str, limit: float):
        """What the section returns; {"error": ...} if it fails."""
        self.pipe.send((section, ()))
        if not self.pipe.poll(limit):
            return {"error": f"not finished after {limit:.0f} seconds"}
        try:
            done, value = self.pipe.recv()
        except EOFError:
            return {"error": "its process died"}
        return value if done else {"error": value}

    def is_usable(self) -> bool:
        """Whether the process lives and can still use the GPU."""
        with suppress(OSError):
            return self.run("usable", 20) is True
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_sections(options) -> dict[str, dict]:
    """Every section's outcome, printed as it comes."""
    start, worker, outcomes = time.perf_counter(), None, {}
    for section in options.only or LIMITS:
        began = time.perf_counter()
        left = TOTAL - (began - start)
        try:
            worker = worker or Worker(Sections, options.device, options.quick, options.model)
            outcome = worker.run(section, min(left, LIMITS[section])) if left > 10 else {"error": "no time left"}
        except Exception:
            outcome = {"error": traceback.format_exc()}
        outcome["section_seconds"] = time.perf_counter() - began
        print_outcome(section, outcome)
        outcomes[section] = outcome
        if "error" in outcome and worker and not worker.is_usable():
            worker.kill()
            worker = None
    if worker:
        with suppress(OSError):
            worker.end()
    return outcomes


def print_outcome(section: str, outcome: dict) -> None:
    print(f"\n== {section} ({outcome['section_seconds']:.0f} s){' FAILED' * has_failed(outcome)}")
    for line in (*outcome.pop("lines", []), *table(outcome.get("results", []))):
        print(line)
    if "error" in outcome:
        print(outcome["error"])
    sys.stdout.flush()


def has_failed(outcome: dict) -> bool:
    return "error" in outcome or bool(outcome.get("failed"))


def table(results: list[dict]) -> list[str]:
    if not results:
        return []
    lines = [f"{'work':11}{'engine':13}{'rows':>5}{'tokens/s':>11}{'ms/step':>9}{'bandwidth':>11}{'matrix rate':>13}"
             f"{'first s':>9}{'graphs':>8}{'peak MB':>9}"]
    for r in results:
        step = f"{r['ms_per_step']:9.2f}" if "ms_per_step" in r else " " * 9
        lines.append(f"{r['work']:11}{r['engine']:13}{r['rows']:5}{r['tokens_per_s']:11,.0f}{step}"
                     f"{r['share_of_bandwidth']:11.1%}{r['share_of_matrix_rate']:13.1%}{r['first_seconds']:9.2f}"
                     f"{r.get('graphs', 0):8}{r['peak_mb']:9,.0f}")
    return lines


def main() -> None:
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="little work, to see that every section runs")
    parser.add_argument("--model", metavar="SOURCE", help="a model's folder, .gguf file or package:NAME; default: "
                        "random weights in SmolLM2-135M's shape")
    parser.add_argument("--only", nargs="+", choices=LIMITS, metavar="SECTION", help=", ".join(LIMITS))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; --device cpu --quick runs without one")
    if options.model:
        load_source(options.model)  # reports a wrong one before anything runs
    outcomes = run_sections(options)
    failed = [section for section, outcome in outcomes.items() if has_failed(outcome)]
    print(f"\nfailed: {', '.join(failed) or 'none'}")
    results = [result for outcome in outcomes.values() for result in outcome.pop("results", [])]
    machine = outcomes.get("machine", {}).pop("machine", None)
    print(json.dumps({"machine": machine, "device": options.device, "quick": options.quick, "model": options.model,
                      "failed": failed, "results": results, "sections": outcomes}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    in_one_line(main)
