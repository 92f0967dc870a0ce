"""Fused kernels: right by Triton's interpreter, built for real GPUs, refused where they cannot run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from i2vgen.fast import kernels, savings

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")
CPU, META, CUDA = (torch.device(name) for name in ("cpu", "meta", "cuda"))


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_by_the_interpreter(which):
    """In a process of their own: Triton reads the variable when it is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-m", which, str(INTERPRETED)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=INTERPRETED.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= (1 if which == "slow" else 25)


# Pointers to numbers of the network's type are `x`, to float32 `w`, sizes `i`, in the order of the arguments.
BUILDS = {
    "channel_moments": ("xwwiiii", {"ROWS": 64, "CHANNELS": 64}),
    "group_moments": ("wwxwwiiiiii", {"EPS": 1e-5, "SHIFTED": True, "RUNS": 32, "WIDTH": 16}),
    "normalise": ("xxwwxxxiiiiii", {"SHIFTED": True, "SILU": True, "ROWS": 64, "CHANNELS": 64}),
    "gate": ("xxi", {"GATE": 1024}),
    "norm_rows": ("xxxxxii", {"EPS": 1e-5, "ROWS": 4, "CHANNELS": 512}),
    "attend_frames": ("xxxxiiiiiii", {"SCALE": 0.125, "FRAMES": 16, "WIDTH": 64}),
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", BUILDS)
def test_the_kernels_build_for_a_gpu(name, capability):
    """Down to machine code, which needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from i2vgen.fast import triton_kernels

    kernel = getattr(triton_kernels, name)
    pointers, constants = BUILDS[name]
    constants = constants | {"WIDE": triton.language.float32}
    kinds = iter({"x": "*bf16", "w": "*fp32", "i": "i32"}[letter] for letter in pointers)
    signature = {n: "constexpr" if n in constants else next(kinds) for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=places)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert built.asm["cubin"] and "st.local" not in built.asm["ptx"]  # no register is spilled


def test_who_gets_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    monkeypatch.setattr(kernels, "installed", lambda: True)
    assert ["kernels" in savings.chosen(("all",), where) for where in (CPU, META, CUDA)] == [
        False,
        False,
        True,
    ]
    assert not any(savings.chosen(("none",), where) for where in (CPU, META, CUDA))
    assert [savings.chosen(("kernels",), where) for where in (META, CUDA)] == [{"kernels"}] * 2
    with pytest.raises(ValueError, match=r"kernels, which need a CUDA device, but this one is cpu"):
        savings.chosen(("kernels",), CPU)
    monkeypatch.setattr(kernels, "installed", lambda: False)
    assert "kernels" not in savings.chosen(("all",), CUDA)
    with pytest.raises(ValueError, match=r"need the package triton \(pip install triton\)"):
        savings.chosen(("kernels",), CUDA)


def test_operators_without_triton():
    """On a CPU they are PyTorch's own operations, and PyTorch finds nothing wrong with them."""
    x, w = torch.randn(4, 3, 5, 8), torch.randn(8)
    shift, qkv = torch.randn(2, 8), torch.randn(3, 2, 4, 5, 8)
    rows = x + shift.repeat_interleave(2, 0)[:, None, None]
    wanted = F.silu(F.group_norm(rows.permute(0, 3, 1, 2), 2, w, w, 1e-5)).permute(0, 2, 3, 1)
    torch.testing.assert_close(kernels.group_norm(x, 2, w, w, 1e-5, True, shift), wanted)
    value, opening = x.chunk(2, dim=-1)
    torch.testing.assert_close(kernels.geglu(x), value * F.gelu(opening))
    torch.testing.assert_close(kernels.layer_norm(x, w, w, w, 1e-5), F.layer_norm(x + w, (8,), w, w, 1e-5))
    ops = torch.ops.i2vgen
    for op, inputs in (
        (ops.group_norm, (x, 2, w, w, 1e-5, True, shift)),
        (ops.geglu, (x,)),
        (ops.layer_norm, (x, w, w, w, 1e-5)),
        (ops.frame_attention, (*qkv, 2)),
    ):
        torch.library.opcheck(op.default, inputs, test_utils=("test_schema", "test_faketensor"))
