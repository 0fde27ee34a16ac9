"""The timings of `benchmarks/kernels.py`: every kernel against the strongest other way in torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import kernels_model as models
import torch
import torch.nn.functional as F
from kernels_book import Book, Call, measured_ceilings, ratio

from vislr import kernels
from vislr.kernels import tune
from vislr.kernels.attention.reference import gather_tokens
from vislr.kernels.tucker_conv import roofline

# (channels, side, ranks) of 3x3 convolutions, batch 2; (head size, heads, tokens) of attentions, batch 2.
CONVS = (
    (320, 128, (8, 16, 32, 64, 80, 128, 160, 320)),
    (640, 64, (8, 32, 64, 128, 160, 320)),
    (1280, 32, (8, 32, 128, 160, 320)),
)
TRAINED = ((320, 128, 64), (640, 64, 64), (1280, 32, 64))
HEADS = ((64, 10, 4096), (64, 20, 1024), (40, 8, 4096), (128, 24, 4096))
INTEGER_CONVS = ((320, 128), (640, 64), (1280, 32))
# Output and input channels, and rows, of a layer that SaRA trains.
SPARSE = (1280, 1280, 8192)
MODEL_RANK = 32


def tucker(book: Book) -> None:
    """Against three cuDNN convolutions with a separate add, and against making the weight as LyCORIS does."""

    def row(channels: int, side: int, rank: int) -> dict[str, Any]:
        sets = [tune.tucker_inputs(channels, side, rank) for _ in range(4)]

        def chain(x: Any, down: Any, core: Any, up: Any, base: Any) -> Any:
            h = F.conv2d(F.conv2d(x, down[:, :, None, None]), core, None, 1, 1)
            return base + F.conv2d(h, up[:, :, None, None])

        def rebuild(x: Any, down: Any, core: Any, up: Any, base: Any) -> Any:
            return base + F.conv2d(x, torch.einsum("ab,bcij,cd->adij", up, core, down), None, 1, 1)

        def calls(function: Callable[..., Any]) -> list[Call]:
            return [lambda given=given: function(*given) for given in sets]

        ours = calls(lambda *t: kernels.tucker_convolution(*t, padding=1))
        seconds, separate, gain = ratio(ours, calls(chain))
        shape = roofline.Shape(2 * side**2, 2 * side**2, channels, rank, rank, channels, 9)
        ideal = shape.seconds("separate") / min(shape.seconds(path) for path in roofline.PATHS)
        bare = roofline.Shape(2 * side**2, 2 * side**2, channels, rank, rank, channels, 9, has_base=False)
        memory, flops = measured_ceilings(book)
        size = 2 * (sum(t.numel() for t in sets[0]) + sets[0][4].numel())
        floor = max(size / memory, shape.flops() / flops)
        return {
            "us": seconds * 1e6, "baseline_us": separate * 1e6, "ratio": gain, "goal": 1.4 if rank <= 160 else None,
            "ideal_ratio": ideal, "of_ideal": gain / ideal, "roofline_share": floor / seconds,
            "ideal_fused_over_unfused": bare.seconds("chain") / bare.seconds("full"),
            "path": roofline.choose(shape), "lycoris_us": tune.seconds(calls(rebuild)) * 1e6,
        }  # fmt: skip

    def training(channels: int, side: int, rank: int) -> dict[str, Any]:
        given = [t.requires_grad_() for t in tune.tucker_inputs(channels, side, rank)]
        grad = torch.randn_like(given[4])

        def chain(x: Any, down: Any, core: Any, up: Any, base: Any) -> Any:
            h = F.conv2d(F.conv2d(x, down[:, :, None, None]), core, None, 1, 1)
            return base + F.conv2d(h, up[:, :, None, None])

        def step(function: Callable[..., Any]) -> Call:
            return lambda: torch.autograd.grad(function(*given), given, grad)

        ours = [step(lambda *t: kernels.tucker_convolution(*t, padding=1))] * 3
        seconds, theirs, gain = ratio(ours, [step(chain)] * 3)
        return {"us": seconds * 1e6, "baseline_us": theirs * 1e6, "ratio": gain}

    for channels, side, ranks in CONVS:
        for rank in ranks:
            name = f"{channels}@{side} r={rank}"
            book.attempt("tucker", name, lambda c=channels, s=side, r=rank: row(c, s, r))
    for channels, side, rank in TRAINED:
        name = f"{channels}@{side} r={rank} forward+backward"
        book.attempt("tucker", name, lambda c=channels, s=side, r=rank: training(c, s, r))


def attention(book: Book) -> None:
    """Against SDPA: with log-sum-exp, the ranking pass, kept tokens, recovery."""
    _, flops = measured_ceilings(book)
    for size, number, tokens in HEADS:
        what = f"D={size} H={number} N={tokens}"
        sets = [tune.heads(2, number, tokens, size) for _ in range(3)]
        work = 4 * 2 * number * tokens**2 * size
        sdpa = [lambda given=given: F.scaled_dot_product_attention(*given) for given in sets]

        def forward(sets: Any = sets, sdpa: Any = sdpa, work: int = work) -> dict[str, Any]:
            ours, theirs, gain = ratio([lambda g=g: kernels.attention_with_lse(*g) for g in sets], sdpa)
            return {"us": ours * 1e6, "baseline_us": theirs * 1e6, "ratio": gain, "roofline_share": work / flops / ours}

        def column(sets: Any = sets, sdpa: Any = sdpa, work: int = work) -> dict[str, Any]:
            given = [(q, k, kernels.attention_with_lse(q, k, v)[1]) for q, k, v in sets]
            calls = [
                lambda g=g: kernels.attention_column_sum(*g, torch.full_like(g[2], 1 / g[2].shape[-1])) for g in given
            ]
            ours, theirs, gain = ratio(calls, sdpa)
            share = work / 2 / flops / ours
            return {
                "us": ours * 1e6,
                "baseline_us": theirs * 1e6,
                "ratio": gain,
                "goal": 1 / 0.6,
                "roofline_share": share,
            }

        def kept(share: float, sets: Any = sets, sdpa: Any = sdpa) -> dict[str, Any]:
            length = sets[0][0].shape[2]
            keep = torch.rand(2, length, device=tune.DEVICE).argsort(1)[:, : int(share * length)].contiguous()

            def gather(q: Any, k: Any, v: Any) -> Any:
                return F.scaled_dot_product_attention(*(gather_tokens(x, keep) for x in (q, k, v)))

            calls = [lambda g=g: kernels.gathered_attention(*g, keep, keep) for g in sets]
            ours, theirs, gain = ratio(calls, [lambda g=g: gather(*g) for g in sets])
            whole = tune.seconds([lambda g=g: kernels.attention_with_lse(*g) for g in sets])
            scaling = whole * share**2 / ours
            return {
                "us": ours * 1e6,
                "baseline_us": theirs * 1e6,
                "ratio": gain,
                "goal": 1.0,
                "of_ideal_scaling": scaling,
            }

        def back(sets: Any = sets) -> dict[str, Any]:
            q, k, v = sets[0]
            _, lse = kernels.attention_with_lse(q, k, v)
            keep = torch.rand(2, q.shape[2], device=tune.DEVICE).argsort(1)[:, : q.shape[2] // 2].contiguous()
            values = tune._normal(2, keep.shape[1], q.shape[1] * q.shape[3])
            ours = tune.seconds([lambda: kernels.recover_by_attention(values, keep, q, k, lse)] * 2)
            return {"us": ours * 1e6}

        def step(sets: Any = sets) -> dict[str, Any]:
            given = [x.detach().requires_grad_() for x in sets[0]]
            grad = torch.randn_like(given[0])
            run = lambda f: [lambda: torch.autograd.grad(f(*given), given, grad)] * 2  # noqa: E731
            ours, theirs, gain = ratio(
                run(lambda *x: kernels.attention_with_lse(*x)[0]), run(F.scaled_dot_product_attention)
            )
            return {"us": ours * 1e6, "baseline_us": theirs * 1e6, "ratio": gain}

        book.attempt("attention", f"with lse {what}", forward)
        book.attempt("attention", f"column sum {what}", column)
        for share in (0.5, 0.25):
            book.attempt("attention", f"gathered keep {share} {what}", lambda s=share, kept=kept: kept(s))
        book.attempt("attention", f"recover {what}", back)
        book.attempt("attention", f"forward+backward {what}", step)


def integer(book: Book) -> None:
    """Against bf16 products of cuBLAS and cuDNN."""
    memory, flops = measured_ceilings(book)
    for rows, columns, depth in tune.LINEARS:

        def eight(rows: int = rows, columns: int = columns, depth: int = depth) -> dict[str, Any]:
            halves = [(tune._normal(rows, depth), tune._normal(columns, depth)) for _ in range(3)]
            weight, scale = tune._codes(columns, depth), torch.rand(columns, device=tune.DEVICE)
            codes = [kernels.quantize_rows(x) for x, _ in halves]
            calls = [lambda c=c: kernels.linear_w8a8(c[0], weight, c[1], scale) for c in codes]
            theirs_calls = [lambda h=h: F.linear(*h) for h in halves]
            ours, theirs, gain = ratio(calls, theirs_calls)

            def whole(x: Any) -> Any:
                found, row_scale = kernels.quantize_rows(x)
                return kernels.linear_w8a8(found, weight, row_scale, scale)

            both = tune.seconds([lambda h=h: whole(h[0]) for h in halves])
            library = tune.seconds([lambda c=c: torch._int_mm(c[0], weight.mT) for c in codes])
            floor = max(
                2 * rows * columns * depth / (2 * flops), (rows * depth + columns * depth + 2 * rows * columns) / memory
            )
            return {
                "us": ours * 1e6, "baseline_us": theirs * 1e6, "ratio": gain, "goal": 1.6,
                "with_quantising_us": both * 1e6, "int_mm_us": library * 1e6, "roofline_share": floor / ours,
            }  # fmt: skip

        book.attempt("integer", f"w8a8 {rows}x{columns}x{depth}", eight)
    for rows, columns, depth in tune.FEW_ROWS:

        def four(rows: int = rows, columns: int = columns, depth: int = depth) -> dict[str, Any]:
            halves = [(tune._normal(rows, depth), tune._normal(columns, depth)) for _ in range(12)]
            packed = [tune.four_bits(columns, depth) for _ in halves]
            calls = [lambda h=h, p=p: kernels.linear_w4a16(h[0], *p) for h, p in zip(halves, packed, strict=True)]
            ours, theirs, gain = ratio(calls, [lambda h=h: F.linear(*h) for h in halves])
            codes = [(*kernels.quantize_rows(h[0]), *p) for h, p in zip(halves, packed, strict=True)]
            eight = tune.seconds([lambda c=c: kernels.linear_w4a8(c[0], c[2], c[1], c[3]) for c in codes])
            return {"us": ours * 1e6, "baseline_us": theirs * 1e6, "ratio": gain, "w4a8_us": eight * 1e6}

        book.attempt("integer", f"w4a16 {rows}x{columns}x{depth}", four)
    for channels, side in INTEGER_CONVS:

        def conv(channels: int = channels, side: int = side) -> dict[str, Any]:
            last = torch.channels_last
            codes = [tune._codes(2, channels, side, side).contiguous(memory_format=last) for _ in range(3)]
            taps = tune._codes(channels, channels, 3, 3).contiguous(memory_format=last)
            scales = torch.rand(2, device=tune.DEVICE), torch.rand(channels, device=tune.DEVICE)
            weight = tune._normal(channels, channels, 3, 3).contiguous(memory_format=last)
            halves = [x.bfloat16() for x in codes]
            calls = [lambda x=x: kernels.conv_w8a8(x, taps, *scales, padding=1) for x in codes]
            ours, theirs, gain = ratio(calls, [lambda x=x: F.conv2d(x, weight, padding=1) for x in halves])
            work = 2 * 2 * side**2 * 9 * channels**2
            return {
                "us": ours * 1e6,
                "baseline_us": theirs * 1e6,
                "ratio": gain,
                "roofline_share": work / (2 * flops) / ours,
            }

        book.attempt("integer", f"conv w8a8 {channels}@{side}", conv)


def sparse(book: Book) -> None:
    """SaRA's gradient: all of dY^T X and then the trained entries, against those entries alone."""
    for density in (0.05, 0.2):

        def row(density: float = density) -> dict[str, Any]:
            out, inside, rows = SPARSE
            grad, x = torch.randn(rows, out, device=tune.DEVICE), torch.randn(rows, inside, device=tune.DEVICE)
            index = torch.rand(out * inside, device=tune.DEVICE).argsort()[: int(density * out * inside)].sort().values
            halves = grad.bfloat16(), x.bfloat16()
            dense = tune.seconds([lambda: (halves[0].mT @ halves[1]).view(-1)[index]] * 2)
            mask = torch.zeros(out * inside, device=tune.DEVICE)
            mask[index] = 1
            pattern = mask.view(out, inside).to_sparse_csr()
            alone = statistics.median(
                _eager(lambda: torch.sparse.sampled_addmm(pattern, grad.mT, x, beta=0.0)) for _ in range(3)
            )
            return {"us": dense * 1e6, "baseline_us": alone * 1e6, "ratio": alone / dense}

        book.attempt("sparse", f"dense then gather, density {density}", row)


def _eager(call: Call) -> float:
    """Seconds of a call that cannot be captured in a graph."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def model(book: Book) -> None:
    """Unmerged FLoRA adapters on UNets of SD 1.5's and SDXL's shapes: inference and a training step."""
    for name in models.SIZES:
        torch.cuda.empty_cache()
        try:
            net, inputs = models.build(name, MODEL_RANK, tune.DEVICE)
        except Exception as error:
            book.add("model", name, error=f"{type(error).__name__}: {error}"[:200])
            continue
        trained = [p for p in net.parameters() if p.requires_grad]

        def infer(net: Any = net, inputs: Any = inputs) -> None:
            with torch.no_grad():
                net(*inputs)

        def step(net: Any = net, inputs: Any = inputs, trained: Any = trained) -> None:
            torch.autograd.grad(net(*inputs).float().square().mean(), trained, allow_unused=True)

        for task, work in (("inference", infer), ("training step", step)):

            def row(work: Call = work) -> dict[str, Any]:
                times: dict[str, list[float]] = {way: [] for way in models.WAYS}
                for _ in range(2):
                    for way in models.WAYS:
                        if way == "none" and work is not infer:
                            continue
                        models.AdaptedConv.way = way
                        times[way].append(tune.seconds([work], rounds=4))
                best = {way: min(found) * 1e6 for way, found in times.items() if found}
                return {
                    "us": best["kernels"],
                    "baseline_us": best["chain"],
                    "ratio": best["chain"] / best["kernels"],
                    **best,
                }

            if not (task == "training step" and name.startswith("SDXL") and torch.cuda.mem_get_info()[0] < 40e9):
                book.attempt("model", f"{name} FLoRA r={MODEL_RANK} {task}", row)
        del net, inputs, trained
