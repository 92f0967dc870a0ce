"""Taps, traces and summaries: what looks into a network from outside."""

import contextlib
import dataclasses
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from i2vgen import config
from i2vgen.config import load_config
from i2vgen.lab import summary, trace
from i2vgen.taps import taps

ROOT = Path(__file__).parents[1]
TINY = [ROOT / "configs" / "tiny.yaml", "weights=random"]


def run(script, *words):
    """Status and output of a script called with these words, in this process."""
    out, before = io.StringIO(), sys.argv
    sys.argv = [script, *map(str, words)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
        finally:
            sys.argv = before
    return status, out.getvalue()


@pytest.fixture
def network(make_unet, make_inputs):
    unet = make_unet()
    x, t, conditions = make_inputs(1, 3)
    return unet, lambda: unet(x, t, unet.prepare(conditions, 3))


# --- taps


@torch.no_grad()
def test_a_tap_reads_and_leaves_everything_as_it_was(network):
    unet, call = network
    plain, seen = call(), {}
    with taps(unet, {"*.temporal": seen.setdefault}):
        assert torch.equal(call(), plain)
    assert sorted(seen) == [p for p, _ in sorted(unet.named_modules()) if p.endswith(".temporal")]
    assert seen["mid1.temporal"].shape == (1, 3, 2, 3, 64)
    assert not any(module._forward_hooks for module in unet.modules())
    assert torch.equal(call(), plain)


@torch.no_grad()
def test_a_tap_replaces_what_goes_on(network):
    unet, call = network
    plain = call()
    with taps(unet, {"mid1.temporal": lambda path, x: 2 * x}):
        doubled = call()
    assert not torch.allclose(doubled, plain)
    # The same by hand: the module's own residual branch and its input, doubled.
    original = unet.mid1.temporal.forward
    unet.mid1.temporal.forward = lambda x: 2 * original(x)
    assert torch.equal(call(), doubled)


@torch.no_grad()
def test_taps_that_cannot_work_say_so(network):
    unet, call = network
    with (
        pytest.raises(ValueError, match=r"no module's path matches 'mid1.temporl'.*mid1.temporal"),
        taps(unet, {"mid1.temporl": lambda path, x: None}),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"mid1 returned a tensor of shape \(1,\)"),
        taps(unet, {"mid1": lambda path, x: torch.zeros(1)}),
    ):
        call()
    with (
        pytest.warns(UserWarning, match="changed and saw nothing"),
        taps(unet, {"mid1": lambda path, x: None}),
    ):
        pass
    assert not any(module._forward_hooks for module in unet.modules())


# --- traces


@torch.no_grad()
def test_two_runs_part_where_they_were_made_to(network):
    unet, call = network
    with trace.Trace(unet) as first:
        call()
    with trace.Trace(unet) as again:
        call()
    assert trace.compare(first.records, again.records, tolerance=1e-12)[0] is None
    unet.mid2.res.norm2.eps *= 1.01
    with trace.Trace(unet) as other:
        call()
    parting, compared = trace.compare(first.records, other.records, tolerance=1e-12)
    assert parting.first.path == "mid2.res.norm2" and compared == len(first.records)


def test_a_trace_counts_what_is_broken():
    one = trace.record("a", 0, torch.tensor([1.0, float("nan"), 3.0]))
    assert (one.broken, one.mean, one.low, one.high) == (1, 2.0, 1.0, 3.0)
    whole = trace.record("a", 0, torch.tensor([1.0, 2.0, 3.0]))
    assert trace.difference(one, whole) == float("inf")


def test_trace_script_finds_a_changed_setting(tmp_path):
    file = tmp_path / "trace.jsonl"
    small = [
        ROOT / "configs" / "tiny.yaml",
        "weights=random",
        "width=64",
        "height=64",
        "frames=3",
        "device=cpu",
    ]
    status, out = run("trace.py", *small, f"output={file}")
    assert status == 0 and "modules" in out
    assert run("trace.py", *small, f"against={file}")[0] == 0
    status, out = run("trace.py", *small, f"against={file}", "use.concat_gain=1.0")
    assert status == 1 and "at conv_in (call 0)" in out
    status, out = run("trace.py", *small, f"against={tmp_path / 'none.jsonl'}")
    assert status == 2 and "does not exist" in out
    file.write_text("no trace\n")
    assert "is no trace" in run("trace.py", *small, f"against={file}")[1]
    assert "calls is 0" in run("trace.py", *small, "calls=0")[1]


@pytest.mark.reference
def test_trace_beside_diffusers():
    pytest.importorskip("diffusers")
    shape = ["unet.image_vector_width=64", "clip.embed_dim=64", "width=64", "height=64", "frames=3"]
    words = [*TINY, *shape, "device=cpu", "dtype=float64", "against=diffusers"]
    status, out = run("trace.py", *words)
    assert status == 1 and "at conv_in (call 0)" in out  # the concat branch, twice here and once there
    port = ["use.concat_gain=1.0", "use.sinusoid=exp", "use.frame_planes=network", "tolerance=1e-9"]
    status, out = run("trace.py", *words, *port)
    assert status == 0 and "none differs" in out
    compared = int(out.split(" calls compared")[0].splitlines()[-1])
    assert compared > 800
    status, out = run("trace.py", *TINY, "against=diffusers")
    assert status == 2 and "unet.image_vector_width is 32" in out


# --- summaries


def test_a_summary_adds_up():
    settings = load_config(ROOT / "configs" / "tiny.yaml")
    settings = dataclasses.replace(settings, runtime=config.Runtime(device="cpu"))
    rows = {row.path: row for row in summary.summarise("unet", settings, depth=3)}
    whole = rows[""]
    top = [row for path, row in rows.items() if path and "." not in path]
    assert whole.parameters == sum(row.parameters for row in top) == rows[""].parameters
    assert whole.flops == sum(row.flops for row in top)
    assert rows["mid1"].shape == (1, 8, 1, 2, 128) and rows["mid1"].calls == 1
    assert rows["down"].calls == 0 and rows["down"].flops == sum(
        row.flops for path, row in rows.items() if path.startswith("down.") and path.count(".") == 1
    )
    # A linear layer by hand: tokens x in x out multiplications and as many additions.
    time = rows["time.linear1"]
    assert time.flops == 2 * 32 * 128 and time.shape == (1, 128)


@pytest.mark.parametrize("part", ["unet", "vae", "clip"])
def test_summary_script(part, tmp_path):
    file = tmp_path / "rows.json"
    status, out = run("summary.py", ROOT / "configs" / "tiny.yaml", f"part={part}", "depth=1", f"json={file}")
    assert status == 0 and "100.0%" in out
    rows = json.loads(file.read_text())
    assert rows[0]["path"] == "" and rows[0]["flops"] > 0 and rows[0]["parameters"] > 0


def test_summary_of_the_released_model_has_its_parameters():
    status, out = run("summary.py", "depth=1", "device=cpu")
    assert status == 0 and "1,420,469,224" in out


def test_summary_refuses():
    assert "there is no part=net" in run("summary.py", "part=net")[1]
    assert "depth is 0" in run("summary.py", "depth=0")[1]
    assert "did you mean unet.base_width" in run("summary.py", "unet.base_widht=3")[1]
