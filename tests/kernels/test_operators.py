"""Operators inside torch: opcheck, one graph, export, FLOPs; the switch and the tables."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from tiny import tiny_unet
from torch.utils.flop_counter import FlopCounterMode

from vislr import anatomy, kernels
from vislr.kernels import dispatch

OPS = torch.ops.vislr


def attention(seed=0):
    torch.manual_seed(seed)
    return [torch.randn(1, 2, 12, 16) for _ in range(3)]


def tucker():
    torch.manual_seed(0)
    shapes = [(1, 8, 5, 5), (4, 8), (4, 4, 3, 3), (6, 4), (1, 6, 5, 5)]
    return [torch.randn(shape) for shape in shapes]


def four_bits():
    packed = kernels.pack_int4(torch.randint(0, 16, (6, 64)), 64)
    return packed, torch.rand(6, 1)


def calls():
    """Operator -> its arguments, with gradients asked for where the operator has them."""
    q, k, v = (x.requires_grad_() for x in attention())
    x, down, core, up, base = (t.requires_grad_() for t in tucker())
    lse, keep = torch.randn(1, 2, 12), torch.tensor([[3, 7, 1]])
    eight = torch.randint(-128, 128, (6, 64), dtype=torch.int8)
    packed, scale = four_bits()
    ones = torch.ones(6)
    pixels = torch.randint(-128, 128, (1, 4, 5, 5), dtype=torch.int8)
    taps = torch.randint(-128, 128, (6, 4, 3, 3), dtype=torch.int8)
    plain = [t.detach() for t in (q, k, v)]
    geometry = [1, 1], [1, 1], [1, 1]
    return {
        "attention_forward": (q, k, v, keep, None, 0.25),
        "attention_backward": (plain[0], *plain, plain[0], lse, 0.25),
        "attention_column_sum": (*plain[:2], lse, lse, 0.25),
        "attention_nearest": (torch.randn(1, 3, 5, requires_grad=True), keep, *plain[:2], lse, 0.25),
        "tucker_conv": (x, base, down, core, up, 0.5, *geometry, True),
        "quantize_rows": (torch.randn(3, 20),),
        "linear_w8a8": (eight, eight, ones, ones, None, None, None, torch.float32),
        "linear_w4a16": (torch.randn(3, 50, requires_grad=True), packed, scale, None, None, 64),
        "linear_w4a8": (eight, packed, ones, scale, None, None, 64, torch.float32),
        "conv_w8a8": (pixels, taps, ones[:1], ones, None, None, None, *geometry, torch.float32),
        "exact_linear": (eight.float(), eight.float()),
        "exact_conv2d": (pixels.float(), taps.float(), *geometry),
    }


@pytest.mark.parametrize("name", calls())
def test_opcheck(name):
    # Operators are registered when their folder is imported.
    for folder in ("attention", "integer_gemm", "tucker_conv"):
        importlib.import_module(f"vislr.kernels.{folder}.ops")
    torch.library.opcheck(getattr(OPS, name).default, calls()[name])


def ranking(q, k, v, values):
    """What token pruning does with the operators."""
    out, lse = kernels.attention_with_lse(q, k, v)
    score = kernels.attention_column_sum(q, k, lse, torch.full_like(lse, 1 / lse.shape[-1])).mean(1)
    keep = score.topk(5).indices
    few, _ = kernels.gathered_attention(q, k, v, keep, keep)
    whole, _ = kernels.recover_by_attention(values[:, :5], keep, q, k, lse)
    return out.sum() + few.sum() + whole.sum()


def adapted(x, down, core, up, base):
    return kernels.tucker_convolution(x, down, core, up, base, 0.5, 1, 1)


def integers(x):
    codes, scale = kernels.quantize_rows(x)
    return kernels.linear_w8a8(codes, codes, scale, scale, dtype=torch.float32)


PROGRAMS = {
    "ranking": (ranking, lambda: (*attention(), torch.randn(1, 12, 7))),
    "adapted": (adapted, tucker),
    "integers": (integers, lambda: (torch.randn(6, 20),)),
}


@pytest.mark.parametrize("mode", ["reference", "kernel"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_compiled_as_one_graph_and_exported(program, mode):
    function, draw = PROGRAMS[program]
    torch.manual_seed(0)
    given = draw()
    with kernels.use(mode):
        expected = function(*given)
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*given), expected)
        if program != "integers":
            mine, theirs = ([x.clone().requires_grad_() for x in given] for _ in range(2))
            compiled(*mine).sum().backward()
            function(*theirs).sum().backward()
            for a, b in zip(mine, theirs, strict=True):
                assert torch.allclose(a.grad, b.grad, atol=1e-6)

        class Whole(torch.nn.Module):
            def forward(self, *inputs):
                return function(*inputs)

        exported = torch.export.export(Whole(), tuple(given))
        assert torch.equal(exported.module()(*given), expected)
        names = {str(node.target) for node in exported.graph.nodes}
        assert any(name.startswith("vislr.") for name in names) == (mode == "kernel")


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path):
    """A package of AOTInductor runs the reference on a CPU."""
    given = tuple(tucker())

    class Whole(torch.nn.Module):
        def forward(self, *inputs):
            return adapted(*inputs)

    exported = torch.export.export(Whole(), given)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "tucker.pt2"))
    run = torch._inductor.aoti_load_package(package)
    assert torch.allclose(run(*given), adapted(*given), atol=1e-5)


def counted(function, *given):
    with FlopCounterMode(display=False) as counter:
        function(*given)
    return counter.get_total_flops()


def test_flops_of_kernel_and_reference_agree():
    q, k, v = attention()
    x, down, core, up, base = tucker()
    eight = torch.randint(-128, 128, (6, 64), dtype=torch.int8)
    packed, scale = four_bits()
    ones = torch.ones(6)
    pixels, taps = torch.ones(1, 4, 5, 5, dtype=torch.int8), torch.ones(6, 4, 3, 3, dtype=torch.int8)
    attend = 4 * 2 * 12 * 12 * 16
    expected = {
        "attention": (lambda: kernels.attention_with_lse(q, k, v), attend),
        "column sum": (lambda: kernels.attention_column_sum(q, k, q[..., 0], q[..., 0]), 2 * 2 * 12 * 12 * 17),
        "tucker": (lambda: adapted(x, down, core, up, base), 2 * 25 * (8 * 4 + 9 * 16 + 4 * 6)),
        "w8a8": (lambda: kernels.linear_w8a8(eight, eight, ones, ones), 2 * 6 * 6 * 64),
        "conv": (lambda: kernels.conv_w8a8(pixels, taps, ones[:1], ones), 2 * 6 * 9 * 4 * 9),
        "w4a16": (lambda: kernels.linear_w4a16(torch.ones(3, 64), packed, scale, group=64), 2 * 3 * 6 * 64),
    }
    for name, (call, number) in expected.items():
        with kernels.use("kernel"):
            assert counted(call) == number, name
        if name != "w8a8":  # torch has no formula for its integer product
            assert counted(call) == number, name


class Processor:
    """diffusers' attention by `attention_with_lse`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = [
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        ]
        out, _ = kernels.attention_with_lse(*heads)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def test_anatomy_counts_a_model_with_these_operators():
    model = tiny_unet()
    before = anatomy.flops(model)
    model.set_attn_processor(Processor())
    assert anatomy.flops(model) == before


def test_modes():
    x = torch.ones(1)
    assert dispatch.mode() == "auto"
    assert not dispatch.use_kernel(x)
    with kernels.use("kernel"):
        assert dispatch.use_kernel(x)
        with pytest.raises(kernels.KernelError, match=r"no kernel for torch\.float64 on cpu"):
            dispatch.use_kernel(x.double())
    with kernels.use("reference"):
        assert not dispatch.use_kernel(x)
    with pytest.raises(kernels.KernelError, match="choose from auto, reference, kernel"):
        kernels.set_mode("fast")
    assert dispatch.mode() == "auto"


@pytest.mark.parametrize(("value", "message"), [("reference", "reference"), ("quick", "VISLR_KERNELS is 'quick'")])
def test_environment_variable(value, message):
    code = "from vislr.kernels import dispatch; print(dispatch.mode())"
    environment = os.environ | {"VISLR_KERNELS": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert message in done.stdout + done.stderr
    assert (done.returncode == 0) == (value == "reference")


def test_the_table_steers_a_kernel():
    """A configuration in the table is what the kernel runs with, and results stay."""
    q, k, v = attention()
    key = f"D={q.shape[-1]}"
    with kernels.use("kernel"):
        before, _ = kernels.attention_with_lse(q, k, v)
        dispatch.remember("attention", "forward", key, {"BLOCK_Q": 16, "BLOCK_K": 16})
        try:
            from vislr.kernels.attention.ops import config_of

            assert config_of("forward", 16, torch.float32)["BLOCK_Q"] == 16
            after, _ = kernels.attention_with_lse(q, k, v)
        finally:
            dispatch.forget("attention", "forward", key)
    assert torch.allclose(before, after, atol=1e-6)
    assert dispatch.tuned("attention", "forward", key) == {}


def test_kernels_need_torch_alone():
    """Of the libraries of vislr none but torch is loaded (which may load triton)."""
    code = (
        "import sys, vislr.kernels as k; k.attention_with_lse; k.tucker_convolution; k.linear_w8a8; "
        "print(sorted({'diffusers', 'transformers', 'peft', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
