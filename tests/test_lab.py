"""Taps, traces and summaries: what looks into a network from outside."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from i2vgen.adapt.taps import attention_by, attention_maps, controlled, taps
from i2vgen.fast import savings
from i2vgen.fast.unet import both_branches
from i2vgen.lab import summary, trace
from i2vgen.model.attention import attend
from i2vgen.model.unet import Residuals
from i2vgen.settings import config
from i2vgen.settings.merge import load_config

ROOT = Path(__file__).parents[1]
TINY = [ROOT / "configs" / "tiny.yaml", "weights=random"]


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
        pytest.warns(UserWarning, match="had no effect"),
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


def test_trace_script_finds_a_changed_setting(run_script, tmp_path):
    file = tmp_path / "trace.jsonl"
    small = [
        ROOT / "configs" / "tiny.yaml",
        "weights=random",
        "width=64",
        "height=64",
        "frames=3",
        "device=cpu",
    ]
    status, out = run_script("trace.py", *small, f"output={file}")
    assert status == 0 and "modules" in out
    assert f"written to {file}" in out
    status, out = run_script("trace.py", *small, f"against={file}")
    assert status == 0 and "only" not in out
    status, out = run_script("trace.py", *small, f"against={file}", "use.temporal_second_attention=false")
    assert re.search(rf"\d+ modules in {re.escape(str(file))} only, the first: temporal_in.norm2", out), out
    status, out = run_script("trace.py", *small, f"against={file}", "use.concat_gain=1.0")
    assert status == 1 and "at conv_in (call 0)" in out
    status, out = run_script("trace.py", *small, f"against={tmp_path / 'none.jsonl'}")
    assert status == 2 and "does not exist" in out
    file.write_text("no trace\n")
    assert "is no trace" in run_script("trace.py", *small, f"against={file}")[1]
    assert "calls is 0" in run_script("trace.py", *small, "calls=0")[1]


@pytest.mark.reference
def test_trace_beside_diffusers(run_script):
    pytest.importorskip("diffusers")
    shape = ["unet.image_vector_width=64", "clip.embed_dim=64", "width=64", "height=64", "frames=3"]
    words = [*TINY, *shape, "device=cpu", "dtype=float64", "against=diffusers"]
    status, out = run_script("trace.py", *words)
    assert status == 1 and "at conv_in (call 0)" in out  # the concat branch, twice here and once there
    port = ["use.concat_gain=1.0", "use.sinusoid=exp", "use.frame_planes=network", "tolerance=1e-9"]
    status, out = run_script("trace.py", *words, *port)
    assert status == 0 and "none differs" in out
    compared = int(out.split(" calls compared")[0].splitlines()[-1])
    assert compared > 800
    status, out = run_script("trace.py", *TINY, "against=diffusers")
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
def test_summary_script(run_script, part, tmp_path):
    file = tmp_path / "rows.json"
    status, out = run_script(
        "summary.py", ROOT / "configs" / "tiny.yaml", f"part={part}", "depth=1", f"json={file}"
    )
    assert status == 0 and "100.0%" in out
    rows = json.loads(file.read_text())
    assert rows[0]["path"] == "" and rows[0]["flops"] > 0 and rows[0]["parameters"] > 0


def test_summary_of_the_released_model_has_its_parameters(run_script):
    status, out = run_script("summary.py", "depth=1", "device=cpu")
    assert status == 0 and "1,420,469,224" in out


def test_summary_refuses(run_script):
    assert "there is no part=net" in run_script("summary.py", "part=net")[1]
    assert "depth is 0" in run_script("summary.py", "depth=0")[1]
    assert "did you mean unet.base_width" in run_script("summary.py", "unet.base_widht=3")[1]


# --- attention and residuals


@torch.no_grad()
def test_an_attention_of_ones_own(network):
    unet, call = network
    plain = call()
    with attention_by(unet, "*attention*", lambda q, k, v: attend(q, k, v, "math")):
        assert torch.allclose(call(), plain, rtol=0, atol=1e-12)
    with attention_by(unet, "mid1.spatial.self_attention", lambda q, k, v: v):
        assert not torch.allclose(call(), plain)
    assert torch.equal(call(), plain)
    with pytest.raises(ValueError, match="matches no attention"), attention_by(unet, "mid1.res", None):
        pass
    for uncalled in (attention_by(unet, "mid1.*", attend), attention_maps(unet, {"mid1.*": first_token})):
        with pytest.warns(UserWarning, match=r"mid1\.\*' had no effect") as told, uncalled:
            pass
        assert told[0].filename == __file__
    unet.mid1.temporal.attention1.backend = lambda q, k, v: attend(q, k, v, "math")
    assert torch.allclose(call(), plain, rtol=0, atol=1e-12)


@torch.no_grad()
def test_attention_maps_are_read_and_replaced(network):
    unet, call = network
    plain, seen = call(), {}
    paths = {
        "mid1.spatial.cross_attention": (1, 8, 3 * 6, 7 + 4 + 4),
        "mid1.temporal.attention1": (6, 8, 3, 3),
    }
    with attention_maps(unet, dict.fromkeys(paths, seen.setdefault)):
        assert torch.allclose(call(), plain, rtol=0, atol=1e-12)
    assert {path: tuple(m.shape) for path, m in seen.items()} == paths
    assert all(torch.allclose(m.sum(-1), torch.ones_like(m[..., 0])) for m in seen.values())
    # Looking at nothing but the first token is what the first token's value alone gives.
    with attention_maps(unet, {"mid1.spatial.cross_attention": first_token}):
        one = call()
    with attention_by(unet, "mid1.spatial.cross_attention", lambda q, k, v: v[:, :, :1].expand_as(q)):
        assert torch.allclose(call(), one, rtol=0, atol=1e-12)
    assert not torch.allclose(one, plain)


def first_token(path, probabilities):
    return torch.zeros_like(probabilities).index_fill_(-1, torch.tensor([0]), 1.0)


@torch.no_grad()
@pytest.mark.parametrize("place", ["entrance", "down", "skips", "middle", "up"])
def test_residuals_are_added_where_they_say(network, place):
    unet, call = network
    plain, shapes = call(), {}
    blocks = [f"{side}.{i}.blocks.{j}" for side, i, j in (("down", 0, 0), ("down", 1, 0), ("up", 1, 0),
              ("up", 1, 1), ("up", 0, 0), ("up", 0, 1))]  # fmt: skip
    with taps(unet, {p: lambda path, x: shapes.setdefault(path, x) for p in (*blocks, "conv_in", "mid2")}):
        call()
    ones = {path: 0.1 * torch.ones_like(x) for path, x in shapes.items()}
    entrance = ones["conv_in"].unflatten(0, (1, 3))
    down, up = [ones[p] for p in blocks[:2]], [ones[p] for p in blocks[2:]]
    given = {
        "entrance": entrance,
        "down": down,
        "skips": [entrance, down[0], 0.1 * torch.ones(1, 3, 2, 3, 32, dtype=torch.float64), down[1]],
        "middle": ones["mid2"],
        "up": up,
    }[place]
    with controlled(unet, lambda x, t: Residuals(**{place: given})):
        added = call()
    assert not torch.allclose(added, plain)
    assert torch.equal(call(), plain)
    by_hand = {"entrance": ["conv_in"], "down": blocks[:2], "middle": ["mid2"], "up": blocks[2:]}
    if place in by_hand:  # a skip alone cannot be reached by a tap
        with taps(unet, dict.fromkeys(by_hand[place], lambda path, x: x + ones[path].view_as(x))):
            assert torch.allclose(call(), added, rtol=0, atol=1e-12)


@torch.no_grad()
def test_residuals_reach_both_branches_of_guidance(network, make_inputs):
    unet, _ = network
    x, t, cond = make_inputs(2, 3)
    uncond = cond._replace(text=torch.randn_like(cond.text))
    alone = [unet.prepare(c, 3) for c in (cond, uncond)]
    with controlled(unet, lambda x, t: Residuals(middle=torch.ones(len(x), 3, 2, 3, 64, dtype=x.dtype))):
        expected = torch.cat([unet(x, t, one) for one in alone])
        for batched in (False, True):
            savings.apply(unet, config.Runtime(batch_guidance=batched))
            assert torch.allclose(both_branches(unet, *alone)(x, t), expected, rtol=0, atol=1e-12)


def test_an_adapter_does_not_become_a_part(network):
    unet, call = network
    adapter = torch.nn.Linear(2, 2)
    adapter.forward = lambda x, t: Residuals()
    names = list(unet.state_dict())
    seen = []
    with pytest.warns(UserWarning, match="no residual was given"), controlled(unet, adapter):
        seen += [call(), *unet.state_dict()]
    assert seen[1:] == names
    assert not unet._forward_pre_hooks


@torch.no_grad()
def test_an_adapter_for_another_network_is_refused(network):
    unet, call = network
    entrance = torch.ones(1, 3, 4, 6, 32, dtype=torch.float64)
    for given, message in (
        (Residuals(down=[None] * 3), r"3 residuals to `down`, but this network has 2"),
        (Residuals(skips=[None] * 3), r"3 residuals to `skips`, but this network has 4"),
        (Residuals(up=[None]), r"1 residuals to `up`, but this network has 4"),
        (Residuals(entrance=entrance[..., :16]), r"\[1, 3, 4, 6, 16\] is added to \[1, 3, 4, 6, 32\]"),
        (Residuals(entrance=entrance[:, :1]), "for another architecture or size"),
    ):
        with pytest.raises(ValueError, match=message), controlled(unet, lambda x, t, given=given: given):
            call()
    with pytest.warns(UserWarning, match="not called inside"), controlled(unet, lambda x, t: given):
        pass
    assert not unet._forward_pre_hooks
