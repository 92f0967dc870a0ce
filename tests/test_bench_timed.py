"""The timed cases of the benchmark: who is timed when, what is compared, and that every part of them runs."""

import dataclasses
import json

import pytest
import torch

from i2vgen.bench import cases, cpu, gpu, half, loop, memory, modes, pair, timing, train
from i2vgen.bench.peer import Options, Peer
from i2vgen.settings import config

Small = cpu.Case(gpu.dry_settings(), ((2, 4, 4), (3, 4, 4)), None, (2, 4, 4))


@pytest.fixture(scope="module")
def peer():
    diffusers = pytest.importorskip("diffusers")
    from weights_conversion import unet_diffusers

    return Peer(diffusers.I2VGenXLUNet, unet_diffusers.to_theirs, diffusers.__version__)


# ------------------------------------------------------------------------------------------ the clocks


def test_ways_take_turns_and_the_order_turns_round():
    order, seconds = [], {"a": 3.0, "b": 2.0, "c": 1.0}

    def clock(call):
        return seconds[call()]

    def way(name):
        return lambda: order.append(name) or name

    times = timing.interleaved({n: way(n) for n in seconds}, clock=clock, rounds=3, warmups=1)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert times.median("a") == 3 and times.best(["a", "b"]) == "b"
    assert times.ratio("a", "c") == 3


def test_the_ratio_is_of_neighbours():
    """A machine that slows down by the round disturbs both alike."""
    times = timing.Times({"slow": (2.0, 4.0, 40.0), "fast": (1.0, 2.0, 20.0)})
    assert times.ratio("slow", "fast") == 2
    assert timing.Times({"slow": (2.0, 4.0, 40.0), "fast": (1.0, 9.0, 20.0)}).ratio("slow", "fast") == 2
    assert times.spread("fast") == (1.0, 20.0)


def test_the_thread_clock_stands_still_while_the_thread_sleeps():
    import time

    slept = timing.thread_clock(lambda: time.sleep(0.2))
    worked = timing.thread_clock(lambda: sum(range(3_000_000)))
    assert slept < 0.1 and slept < worked


def test_what_is_outside_the_network_is_seen():
    ticks = iter([0.5, 0.25])
    timed = loop.Timed(lambda x, t: x + t, lambda call: call() or next(ticks))
    assert timed(torch.tensor(1), torch.tensor(2)) == 3 and timed(torch.tensor(2), torch.tensor(2)) == 4
    assert timed.seconds == [0.5, 0.25]


# -------------------------------------------------------------------------------------------- the pair


def test_both_sides_compute_the_same_until_a_weight_differs(peer):
    both = pair.make_pair(cpu.config_of(Small, (3, 4, 4)), torch.device("cpu"), torch.float32)
    inputs, theirs = both.inputs(), both.theirs(peer)
    step = pair.their_step(theirs, inputs, 9.0)
    expected = pair.predictions(theirs, step, swap=True)
    models = both.all_ours(modes.CPU)
    for model in models.values():
        got = pair.predictions(model.unet, pair.our_step(model, inputs))
        assert got.shape == expected.shape and pair.distance(got, expected) <= 5e-6
    assert pair.distance(pair.predictions(theirs, step), expected) > 0.1  # branches taken for each other
    first, *others = models.values()
    for name, parameter in first.unet.named_parameters():
        for other in others:  # the weights are in memory once
            assert other.unet.get_parameter(name).data_ptr() == parameter.data_ptr(), name
    with torch.no_grad():
        theirs.conv_in.weight[0, 0, 0, 0] += 0.1
    changed = pair.predictions(theirs, step, swap=True)
    assert pair.distance(changed, expected) > 1e-4


def test_every_mode_is_made_of_settings():
    known = {field.name for field in dataclasses.fields(config.Runtime)}
    for table in (modes.EAGER, modes.CPU, modes.COMPILED, modes.GRAPH):
        assert all(set(settings) <= known for settings in table.values())
    assert modes.EAGER["default"] == modes.CPU["default"] == {}


# --------------------------------------------------------------------------------------------- cpu-*


@pytest.fixture(scope="module")
def measured(peer):
    return cpu.measure(Small, "cpu-toy", peer, Options()).values


TOP = ("speedup_eager", "speedup_best_exact", "relative_l2", "roofline_fraction", "loop_overhead")


def test_a_cpu_case_says_what_it_found(measured):
    assert list(measured)[:7] == [
        "speedup_eager",
        "speedup_best_exact",
        "speedup_vs_compiled",
        "peak_memory_ratio",
        "relative_l2",
        "tflops_per_call",
        "roofline_fraction",
    ]
    assert all(measured[name] > 0 for name in TOP)
    assert measured["relative_l2"] <= 5e-6
    assert measured["speedup_vs_compiled"] is None and measured["peak_memory_ratio"] is None
    assert measured["seconds_per_video"] is None and measured["vae_decode_seconds"] >= 0
    assert measured["threads"] == 1 and json.dumps(measured)


def test_a_cpu_case_of_two_sizes_reports_the_worse(measured):
    sizes = measured["sizes"]
    assert [one["size"] for one in sizes] == [[2, 4, 4], [3, 4, 4]]
    assert measured["speedup_eager"] == min(one["speedup_eager"] for one in sizes)
    assert measured["relative_l2"] == max(one["relative_l2"] for one in sizes)
    for one in sizes:
        assert set(one["seconds"]) == {"diffusers", *modes.CPU}
        assert all(len(rounds) >= 5 for rounds in one["rounds"].values())
        assert one["speedup_best_exact"] >= 0.99 * one["speedup_eager"]
        assert one["our_tflops_per_call"] < one["tflops_per_call"]


def test_half_precision_is_timed_beside_float32_with_its_error(peer):
    sizes = [cpu.config_of(Small, size) for size in Small.sizes]
    found = half.steps("cpu-toy", sizes, peer, "bfloat16").values
    assert found["dtype"] == "bfloat16" and len(found["sizes"]) == 2
    for name in ("speedup_best_exact", "speedup_vs_float32", "error_ratio", "roofline_fraction"):
        assert found[name] > 0
    for one in found["sizes"]:
        ways = {f"{way} {dtype}" for way in ("diffusers", *modes.CPU) for dtype in ("float32", "bfloat16")}
        assert one["seconds"].keys() == one["errors"].keys() == ways
        assert one["errors"]["batched float32"] < 1e-5 < 1e-3 < one["errors"][one["best_exact"]] < 0.2
    assert found["speedup_vs_float32"] == min(one["speedup_vs_float32"] for one in found["sizes"])
    assert json.dumps(found)


def test_training_in_half_precision_is_timed(monkeypatch):
    for name, value in {"TRAINED": (32,), "CLIPS": 1, "FRAMES": 2, "SIDE": 4}.items():
        monkeypatch.setattr(half, name, value)
    found = half.training("bfloat16").values
    assert found["clips_per_second"]["base 32"] > 0
    assert found["speedup_vs_float32_training"]["base 32"] > 0


def test_training_is_compared_and_timed(peer, monkeypatch):
    monkeypatch.setattr(memory, "measurable", lambda: False)  # four processes more
    monkeypatch.setattr(train, "ROUNDS", 1)
    found = cpu.measure(Small, "cpu-toy", peer, Options(mode="train")).values
    assert found["relative_loss"] <= 1e-3
    assert set(found["samples_per_second"]) == set(train.WAYS)
    assert all(rate > 0 for rate in found["samples_per_second"].values())


def test_checkpointing_is_on_where_it_says_so(peer):
    both = pair.make_pair(cpu.config_of(Small, (2, 4, 4)), torch.device("cpu"), torch.float32)
    calls = []
    real = torch.utils.checkpoint.checkpoint

    def counted(*arguments, **settings):
        calls.append(1)
        return real(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("i2vgen.fast.checkpointing.checkpoint", counted)
        plain, kept = train.ways_of(both, peer, train.OURS).values()
        plain()
        assert calls == []
        kept()
        assert calls


# -------------------------------------------------------------------------------------------- memory


def test_growth_is_the_largest_size_of_a_step():
    if not memory.measurable():
        pytest.skip("this system does not tell a process' size")

    def step():
        torch.ones(128 << 20, dtype=torch.uint8)  # freed again at once

    assert 120 << 20 < memory.growth(step) < 160 << 20
    assert memory.growth(lambda: None) < 8 << 20


# --------------------------------------------------------------------------------------------- gpu-*


def dry(peer, *parts, **changes):
    return gpu.run("gpu-256p", peer, Options(dry=True, parts=parts, **changes))


@pytest.mark.slow
@pytest.mark.reference
def test_every_part_runs_dry(peer):
    saved = []
    report = dry(peer, save=lambda found: saved.append(json.dumps(found)))
    found = report.values
    assert found["failed"] == {} and list(found["parts"]) == list(gpu.PARTS)
    assert len(saved) == len(gpu.PARTS)  # a run that is cut off leaves what it found
    assert found["relative_l2"] <= 5e-6
    for name in ("speedup_eager", "speedup_best_exact", "speedup_vs_compiled", "roofline_fraction"):
        assert found[name] > 0, name
    assert found["speedup_best_exact"] >= found["speedup_eager"]
    assert set(found["parts"]["step"]["seconds"]) == {"diffusers", *modes.EAGER}
    assert set(modes.COMPILED) < set(found["parts"]["compiled"]["seconds"])
    micro = found["parts"]["micro"]
    assert all((ms is None) == (name in micro["refused"]) for name, ms in micro["milliseconds"].items())
    assert {"flash", "cudnn", "efficient"} <= {name.split(": ")[1] for name in micro["milliseconds"]}
    printed = "\n".join(map(str, report.tables))
    assert "speedup_eager" in printed.splitlines()[-len(gpu.TOP)]


def test_no_memory_for_one_part_stops_no_other(peer, monkeypatch):
    def greedy(state):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB\nand more")

    monkeypatch.setitem(gpu.PARTS, "micro", greedy)
    found = dry(peer, "ceilings", "micro", "vae").values
    assert found["failed"] == {"micro": "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 TiB"}
    assert found["parts"]["vae"]["chunk 2"]["seconds"] > 0
    assert found["speedup_eager"] is None


def test_a_mistake_is_not_hidden_in_a_dry_run(peer, monkeypatch):
    def wrong(state):
        raise RuntimeError("shapes differ")

    monkeypatch.setitem(gpu.PARTS, "micro", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        dry(peer, "micro")


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("gpu-704p", Options(), "needs a CUDA device"),
        (
            "gpu-256p",
            Options(dry=True, parts=("step", "lop")),
            "there is no part 'lop'; parts= takes ceilings",
        ),
        ("gpu-256p", Options(dry=True, mode="train"), "mode=infer only"),
        ("cpu-small", Options(parts=("step",)), "belong to the gpu cases"),
        ("cpu-small", Options(dry=True), "belong to the gpu cases"),
        ("cpu-full", Options(mode="train"), "use cpu-small or cpu-mid"),
        ("cpu-mid", Options(mode="train", full=True), "full=true"),
        ("count", Options(mode="train"), "only counts"),
        ("cpu-mid", Options(dtype="bfloat16", full=True), "leave mode=savings, full= out"),
        ("cpu-mid", Options(dtype="bfloat16", mode="savings"), "leave mode=savings, full= out"),
        ("gpu-256p", Options(dtype="bfloat16", dry=True), "has no dtype=; it belongs to cpu-small"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(name, options, complaint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=complaint):
        cases.check(name, options)


@pytest.mark.parametrize("name", [*cpu.CASES, "count"])
def test_what_can_be_done_is_not_refused(name):
    cases.check(name, Options())
