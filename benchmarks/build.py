"""python -m benchmarks.build [--prompts 100000] [--answers 10] [--dir FOLDER]

Rows a second, of the clock and of one core, and peak memory of `wrpo build`, on candidates that are made here and come
in the worst order: one model's answers to all prompts, then the next model's. Needs room for the candidates three times
(about 150 bytes a row).
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.suite.flags import whole_number
from benchmarks.suite.results import writable_folder


def write_candidates(prompts: int, answers: int, path: str | Path) -> None:
    """JSON lines: half of the answers to a prompt from as many sources, the other half the target's."""
    rng = random.Random(0)
    sources = answers // 2
    with open(path, "w") as file:
        for number in range(answers):
            model, sample = (f"source-{number}", 0) if number < sources else ("target", number - sources)
            head = f'"model": "{model}", "sample": {sample}, "response": "answer {number} of {model}'
            file.writelines(
                f'{{"prompt_id": "{prompt:08d}", "prompt": "question {prompt}", {head} to {prompt}", '
                f'"reward": {rng.random():.4f}}}\n'
                for prompt in range(prompts)
            )


def measured(folder: str, candidates: str) -> str:
    """Build in this process and say what it took."""
    import resource

    from wrpo.building import BuildFiles, BuildSettings, build

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cpu = time.process_time()
    report, _, seconds = build(BuildSettings(), BuildFiles([candidates], folder, overwrite=True))
    cpu = time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{report.candidates:,} candidates, {report.prompts:,} prompts -> {report.sft:,} SFT rows, {report.triples:,} "
        f"triples: {seconds:.0f} s, {report.candidates / seconds:,.0f} rows/s ({cpu:.0f} s of one core, "
        f"{report.candidates / cpu:,.0f} rows/s), peak {peak:.0f} MiB ({before:.0f} MiB before the first row)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=whole_number, default=100_000)
    parser.add_argument("--answers", type=whole_number, default=10, help="answers a prompt, at least 4 (default: 10)")
    parser.add_argument(
        "--dir",
        type=writable_folder,
        help="folder for the candidates and the output (default: the system's temporary one)",
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # the fresh process
    options = parser.parse_args()
    if options.measure:
        print(measured(*options.measure))
        return
    if options.answers < 4:
        parser.error("argument --answers: expected at least 4, so that the target has a best and a worst answer")
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        candidates = f"{folder}/candidates.jsonl"
        write_candidates(options.prompts, options.answers, candidates)
        print(f"candidates: {Path(candidates).stat().st_size / 2**20:,.0f} MiB", flush=True)
        # In a fresh process: a peak is only a process's own.
        command = [sys.executable, "-m", "benchmarks.build", "--measure", f"{folder}/out", candidates]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
