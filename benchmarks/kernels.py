"""Build, check, tune and time every kernel on one GPU, in under nine minutes; a short table comes last.

    python benchmarks/kernels.py                 # everything; figures to $OUT/kernels.json, or ./kernels.json
    python benchmarks/kernels.py --only check    # e.g. under compute-sanitizer
    python benchmarks/kernels.py --no-tune

Needs torch and triton alone. Every section is a process of its own with a limit of its own: one kernel that
fails, or even takes the GPU's context with it, leaves the other figures. Times are medians of replayed CUDA
graphs over several inputs, both sides of a ratio in turn; roofline shares are of the two ceilings measured first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# At the end: a folder `kernels` in front would hide another package of that name.
sys.path.append(str(HERE.parent))

import kernels_book  # noqa: E402
import kernels_check  # noqa: E402
import kernels_time  # noqa: E402
import torch  # noqa: E402
from kernels_book import Book  # noqa: E402

from vislr.kernels import dispatch, tune  # noqa: E402

# Section -> seconds it may take; the first part of a section is its tuning.
LIMITS = {"ceilings": 20, "check": 95, "tucker": 135, "attention": 95, "integer": 85, "sparse": 15, "model": 65}
TUNING = {"tucker": ("tucker_conv", 75), "attention": ("attention", 50), "integer": ("integer_gemm", 45)}


SECTIONS = {
    "ceilings": kernels_book.ceilings,
    "check": kernels_check.check,
    "tucker": kernels_time.tucker,
    "attention": kernels_time.attention,
    "integer": kernels_time.integer,
    "sparse": kernels_time.sparse,
    "model": kernels_time.model,
}


def run_section(name: str, part: str, book: Book, with_tuning: bool) -> None:
    """One section, or one part of the checks, in this process."""
    torch.manual_seed(0)
    if name == "check":
        kernels_check.check(book, part)
        return
    if with_tuning and name in TUNING:
        folder, budget = TUNING[name]
        try:
            tune.tune([folder], budget)
            book.add("tables", folder, table=dispatch.table(folder))
        except Exception as error:
            traceback.print_exc()
            book.add("tables", folder, error=f"{type(error).__name__}: {error}"[:200])
    if name == "model":
        take_tables(book.read())
    SECTIONS[name](book)


def take_tables(rows: list[dict[str, Any]]) -> list[str]:
    """Use what other sections tuned; returns the folders."""
    found = [row for row in rows if row["section"] == "tables" and "table" in row]
    for row in found:
        for gpu, by_kernel in row["table"].items():
            for kernel, by_key in by_kernel.items() if gpu == dispatch.device_name() else ():
                for key, config in by_key.items():
                    dispatch.remember(row["name"], kernel, key, config)
    return [row["name"] for row in found]


def run_processes(name: str, book: Book, with_tuning: bool) -> None:
    """Start a section's processes (the checks are several at once) and stop them at the section's limit."""
    started = {}
    for part in kernels_check.PARTS if name == "check" else ("",):
        command = [sys.executable, __file__, "--section", name, "--part", part, "--book", str(book.path)]
        started[part] = subprocess.Popen(command + ["--no-tune"] * (not with_tuning))
    deadline = time.monotonic() + LIMITS[name]
    for part, process in started.items():
        try:
            if process.wait(max(0.1, deadline - time.monotonic())):
                book.add(name, f"the section {part}", error=f"left with code {process.returncode}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            book.add(name, f"the section {part}", error=f"stopped after {LIMITS[name]} s")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in lines that fit a terminal."""
    lines = [f"{'what':52s} {'us':>9s} {'other us':>9s} {'ratio':>6s} {'goal':>5s} {'roof':>5s} {'ideal':>5s}"]

    def number(row: dict[str, Any], key: str, form: str, width: int) -> str:
        value = row.get(key)
        return (form.format(value) if isinstance(value, (int, float)) else "").rjust(width)

    for row in rows:
        if "error" in row:
            lines.append(f"{row['section']} {row['name']}: {row['error']}"[:110])
        elif row["section"] not in ("check", "ceilings", "tables"):
            ideal = "of_ideal" if "of_ideal" in row else "of_ideal_scaling"
            lines.append(
                f"{row['section'][:6] + ' ' + row['name']:52.52s} {number(row, 'us', '{:.1f}', 9)} "
                f"{number(row, 'baseline_us', '{:.1f}', 9)} {number(row, 'ratio', '{:.2f}', 6)} "
                f"{number(row, 'goal', '{:.2f}', 5)} {number(row, 'roofline_share', '{:.0%}', 5)} "
                f"{number(row, ideal, '{:.0%}', 5)}"
            )
    checks = [row for row in rows if row["section"] == "check"]
    wrong = [row["name"] for row in checks if not row.get("ok")]
    for row in rows:
        if row["section"] == "ceilings" and "error" not in row:
            lines.append(
                f"ceiling {row['name']}: " + " ".join(f"{v / 1e12:.2f}e12 {k}" for k, v in row.items() if "_per_s" in k)
            )
    lines.append(
        f"checks: {len(checks) - len(wrong)} of {len(checks)} pass" + (f"; WRONG: {', '.join(wrong)}" if wrong else "")
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=[*SECTIONS], default=[*SECTIONS], help="sections; default: all")
    parser.add_argument("--no-tune", action="store_true", help="take the configurations of the tables")
    parser.add_argument("--write-tables", action="store_true", help="keep the tuned configurations with the kernels")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--book", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if dispatch.INTERPRETED or not dispatch.runs_kernel(torch.device("cuda")):
        print("needs a GPU with Triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    if options.section:
        run_section(options.section, options.part, Book(options.book), not options.no_tune)
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        book = Book(Path(folder) / "rows")
        for name in options.only:
            run_processes(name, book, not options.no_tune)
        rows = book.read()
    if options.write_tables:
        tune.write_tables(take_tables(rows))
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": __import__("triton").__version__,
        "seconds": time.monotonic() - start, "rows": rows,
    }  # fmt: skip
    target = Path(os.environ.get("OUT", ".")) / "kernels.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    versions = f"torch {result['torch']}, triton {result['triton']}"
    print(f"\n{result['device']}, {versions}, {result['seconds']:.0f} s; {target.name}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
