"""What the sections of `benchmarks/kernels.py` share: the file of rows, ratios, distances, the chip's ceilings."""

from __future__ import annotations

import json
import statistics
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vislr.kernels import tune
from vislr.kernels.tucker_conv import roofline

Call = Callable[[], Any]


class Book:
    """Rows of figures, written to a file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, section: str, name: str, **figures: Any) -> None:
        row = {"section": section, "name": name, **figures}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def attempt(self, section: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Run one measurement; an error becomes a row."""
        try:
            self.add(section, name, **work())
        except Exception as error:
            traceback.print_exc()
            self.add(section, name, error=f"{type(error).__name__}: {error}"[:200])


def ratio(ours: list[Call], theirs: list[Call], rounds: int = 3) -> tuple[float, float, float]:
    """(seconds of ours, of theirs, theirs / ours): medians over rounds in turn."""
    pairs = [(tune.seconds(ours), tune.seconds(theirs)) for _ in range(rounds)]
    quotient = statistics.median(b / a for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), quotient


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative distance in the Euclidean norm; inf for what is not finite."""
    far = ((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()
    return far if far == far else float("inf")


def ceilings(book: Book) -> None:
    """A large copy and a large product: what this chip gives."""

    def copy() -> dict[str, Any]:
        source = torch.randn(1 << 30, device=tune.DEVICE)
        target = torch.empty_like(source)
        return {"bytes_per_s": 2 * source.nbytes / tune.seconds([lambda: target.copy_(source)])}

    def matmul() -> dict[str, Any]:
        a, b = (torch.randn(8192, 8192, device=tune.DEVICE).bfloat16() for _ in range(2))
        return {"flops_per_s": 2 * 8192**3 / tune.seconds([lambda: a @ b])}

    book.attempt("ceilings", "copy", copy)
    book.attempt("ceilings", "matmul bf16", matmul)


def measured_ceilings(book: Book) -> tuple[float, float]:
    """(bytes/s, FLOP/s) of the first section, or the data sheet's."""
    rows = {row["name"]: row for row in book.read() if row["section"] == "ceilings"}
    memory = rows.get("copy", {}).get("bytes_per_s", roofline.PEAK_BYTES)
    return memory, rows.get("matmul bf16", {}).get("flops_per_s", roofline.PEAK_FLOPS)
