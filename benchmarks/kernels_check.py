"""The checks of `benchmarks/kernels.py`: every kernel on the GPU against its reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kernels_book import Book, distance

from vislr import kernels
from vislr.kernels import tune
from vislr.kernels.tucker_conv import roofline

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# (head size, tokens), and (channels, side, rank, stride, padding, dilation).
HEADS = ((64, 1000), (40, 577), (80, 300), (128, 256), (160, 130))
CONVS = ((320, 61, 64, 1, 1, 1), (96, 33, 80, 2, 1, 1), (64, 40, 8, 1, 2, 2))
KEPT = 100
# M, N, K of the linears, and C, Co, H, W of the convolution.
LINEAR = (300, 520, 1024)
CONV = (70, 90, 31, 29)
KERNEL = "kernel"


def is_float(x: Any) -> bool:
    return torch.is_tensor(x) and x.is_floating_point()


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=tune.DEVICE).to(dtype)


def compare(function: Callable[..., Any], inputs: list[torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Output and gradients of the kernel against those of the reference in float64."""
    sets = []
    for mode, given in ((KERNEL, inputs), ("reference", [x.double() for x in inputs])):
        leaves = [x.detach().requires_grad_() for x in given]
        with kernels.use(mode):
            out = function(*leaves)
        torch.manual_seed(1)
        out.backward(random(*out.shape, dtype=dtype).to(out.dtype))
        sets.append([out, *(x.grad for x in leaves)])
    worst = max(distance(a, b) for a, b in zip(*sets, strict=True))
    return {"distance": worst, "ok": worst < TOLERANCE[dtype]}


def ranks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """Column sums, nearest kept tokens, gathered attention."""
    exact = [x.double() for x in (q, k, v)]
    s = torch.rand(q.shape[:3], device=tune.DEVICE)
    keep = torch.rand(q.shape[0], q.shape[2], device=tune.DEVICE).argsort(1)[:, :KEPT].contiguous()
    _, lse = kernels.attention_with_lse(q, k, v)
    total = kernels.attention_column_sum(q, k, lse, s)
    nearest = kernels.nearest_kept(q, k, lse, keep)
    few, _ = kernels.gathered_attention(q, k, v, keep, keep)
    with kernels.use("reference"):
        _, sums = kernels.attention_with_lse(*exact)
        wanted = kernels.attention_column_sum(*exact[:2], sums, s.double())
        same = (nearest == kernels.nearest_kept(*exact[:2], sums, keep)).double().mean().item()
        chosen, _ = kernels.gathered_attention(*exact, keep, keep)
    far, gathered = distance(total, wanted), distance(few, chosen)
    ok = far < 2e-3 and same > 0.995 and gathered < TOLERANCE[q.dtype]
    return {"distance": far, "same_nearest": same, "gathered": gathered, "ok": ok}


def tucker(path: str, dtype: torch.dtype, channels: int, side: int, rank: int, *geometry: int) -> dict[str, Any]:
    """One path of the convolution: inference, and with gradients."""
    stride, padding, dilation = geometry
    torch.manual_seed(0)
    x, down, core, up, _ = (t.to(dtype) for t in tune.tucker_inputs(channels, side, rank))
    out = (side + 2 * padding - dilation * 2 - 1) // stride + 1
    base = random(2, channels, out, out, dtype=dtype).contiguous(memory_format=torch.channels_last)
    given = [x, down, core, up, base]

    def run(*t: Any) -> Any:
        return kernels.tucker_convolution(*t, 0.5, stride, padding, dilation)

    choose = roofline.choose
    roofline.choose = lambda shape, size=2: path if path != "full" or shape.has_down else "tail"
    try:
        with torch.no_grad():
            with kernels.use("reference"):
                wanted = run(*(t.double() for t in given))
            far = distance(run(*given), wanted)
        found = compare(run, given, dtype)
    finally:
        roofline.choose = choose
    return {"distance": max(far, found["distance"]), "ok": found["ok"] and far < TOLERANCE[dtype]}


def integers() -> dict[str, Any]:
    """All integer products; those of int8 codes are exact up to the last rounding."""
    rows, columns, depth = LINEAR
    x, weight = tune._codes(rows, depth - 24), tune._codes(columns, depth - 24)
    zeros = [torch.randint(-128, 128, (n,), device=tune.DEVICE, dtype=torch.int32) for n in (rows, columns)]
    scales = [torch.rand(n, device=tune.DEVICE) for n in (rows, columns)]
    packed, scale = tune.four_bits(columns, depth)
    halves = random(77, depth, dtype=torch.bfloat16)
    codes, row_scale = kernels.quantize_rows(halves)
    inside, out, height, width = CONV
    pixels, taps = tune._codes(2, inside, height, width), tune._codes(out, inside, 3, 3)
    convolved = (pixels, taps, scales[0][:2], scales[1][:out], None, zeros[0][:2], zeros[1][:out])
    exact = torch.float32
    calls = {
        "w8a8": lambda: kernels.linear_w8a8(x, weight, *scales, dtype=exact),
        "w8a8 zeros": lambda: kernels.linear_w8a8(x, weight, *scales, None, *zeros, dtype=exact),
        "conv": lambda: kernels.conv_w8a8(*convolved, padding=1, dtype=exact),
        "w4a8": lambda: kernels.linear_w4a8(codes, packed, row_scale, scale, dtype=exact),
        "w4a16": lambda: kernels.linear_w4a16(halves, packed, scale),
        "quantize": lambda: kernels.quantize_rows(halves)[0].float(),
    }
    far = {}
    for name, call in calls.items():
        with kernels.use("reference"):
            wanted = call()
        far[name] = distance(call(), wanted)
    limit = {"w4a16": 1e-2, "quantize": 1e-3}
    return {**far, "ok": all(value < limit.get(name, 1e-6) for name, value in far.items())}


def compiled() -> dict[str, Any]:
    """torch.compile keeps one graph and the numbers."""
    given = tune.tucker_inputs(*CONVS[0][:3])

    def function(*t: Any) -> Any:
        return kernels.tucker_convolution(*t, padding=1).relu()

    with torch.no_grad():
        far = distance(torch.compile(function, fullgraph=True)(*given), function(*given))
    return {"distance": far, "ok": far < 1e-2}


def attentions(book: Book, dtype: torch.dtype) -> None:
    for size, tokens in HEADS if dtype == torch.bfloat16 else HEADS[:2]:
        given = [random(2, tokens, 3, size, dtype=dtype).transpose(1, 2) for _ in range(3)]
        book.attempt(
            "check",
            f"attention D={size} {dtype}",
            lambda given=given: compare(lambda *x: kernels.attention_with_lse(*x)[0], given, dtype),
        )
        book.attempt("check", f"ranking D={size} {dtype}", lambda given=given: ranks(*given))


def tuckers(book: Book, dtype: torch.dtype) -> None:
    for conv in CONVS:
        for path in roofline.PATHS:
            name = f"tucker {path} C={conv[0]} r={conv[2]} stride={conv[3]} {dtype}"
            book.attempt("check", name, lambda path=path, conv=conv: tucker(path, dtype, *conv))


# Parts that run at the same time, each in its process: most of their time is compiling.
PARTS = {
    **{f"attention {dtype}": lambda book, dtype=dtype: attentions(book, dtype) for dtype in DTYPES},
    **{f"tucker {dtype}": lambda book, dtype=dtype: tuckers(book, dtype) for dtype in DTYPES},
    "integers": lambda book: book.attempt("check", "integers", integers),
    "compiled": lambda book: book.attempt("check", "torch.compile, one graph", compiled),
}


def check(book: Book, part: str) -> None:
    """One of PARTS; products of float32 in full precision."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    PARTS[part](book)
