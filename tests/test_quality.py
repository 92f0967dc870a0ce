"""Fewer and cheaper network calls: guidance in some of the steps, its rescale, the deep cache, presets."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from i2vgen import pipeline
from i2vgen.diffusion.sampler import StepInfo, Watch, between, ddim, guided, guided_pair, rescaled
from i2vgen.diffusion.schedule import Schedule, make_betas
from i2vgen.diffusion.solvers import dpmpp_2m
from i2vgen.fast import savings
from i2vgen.fast.deep_cache import DeepCache
from i2vgen.fast.unet import Deep, projected, shared
from i2vgen.files import records
from i2vgen.model.conditioning import Conditions
from i2vgen.model.unet import UNet
from i2vgen.settings import config, merge
from i2vgen.settings.config import QUALITIES, Sample
from i2vgen.settings.merge import load_config


def released():
    return Schedule(make_betas(kind="cosine", num_timesteps=1000, zero_terminal_snr=True))


def noise(seed=0, *, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 2, 3, 4, generator=generator, dtype=torch.float64).to(dtype)


# --- guidance


def test_rescale_brings_the_contrast_of_the_conditional_prediction_back():
    x = noise(batch=2)
    cond, uncond = (lambda x, t: 0.5 * x + 0.1), (lambda x, t: 0.2 * x)
    plain = guided(cond, uncond, 9.0)(x, None)
    whole = guided(cond, uncond, 9.0, rescale=1.0)(x, None)
    axes = (1, 2, 3, 4)
    torch.testing.assert_close(whole.std(axes), cond(x, None).std(axes))
    assert (plain.std(axes) > 2 * whole.std(axes)).all()
    # Linear between both, each sample by itself, in at least float32.
    part = guided(cond, uncond, 9.0, rescale=0.7)(x, None)
    torch.testing.assert_close(part, 0.7 * whole + 0.3 * plain)
    torch.testing.assert_close(guided(cond, uncond, 9.0, rescale=0.7)(x[1:], None), part[1:])
    assert rescaled(x.half(), x.half(), 0.5).dtype == torch.float32
    assert torch.equal(guided(cond, uncond, 9.0, rescale=0.0)(x, None), plain)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="guidance rescale"):
            guided_pair(cond, 2.0, rescale=bad)


def test_between_asks_one_of_two():
    calls = []
    inside = lambda x, t: calls.append("in") or x  # noqa: E731
    outside = lambda x, t: calls.append("out") or x  # noqa: E731
    ddim(between(300.0, 700.0, inside, outside), noise(), released(), steps=10)
    assert calls == ["out"] * 3 + ["in"] * 4 + ["out"] * 3  # 901 to 1
    calls.clear()
    ddim(between(401, 401, inside, outside), noise(), released(), steps=5)
    assert calls == ["out", "out", "in", "out", "out"]


@pytest.fixture
def counted(road, with_config):
    """counted(sample settings) -> (frames, contexts per call of the UNet)"""

    def run(picture, **sample):
        model, contexts = with_config(road, sample=sample), []
        savings.apply(road.unet, config.Runtime())
        hook = road.unet.register_forward_pre_hook(
            lambda _, inputs: contexts.append(len(inputs[2].context) // len(inputs[0]))
        )
        frames = pipeline.generate(model, [picture], ["a star"], [3])
        hook.remove()
        return frames, contexts

    yield run
    savings.remove(road.unet)


def test_outside_of_the_interval_there_is_one_branch(counted, picture):
    everywhere, contexts = counted(picture, steps=4, guidance_interval=(0.0, 1.0))
    assert contexts == [2] * 4
    noisy_half, contexts = counted(picture, steps=4, guidance_interval=(0.5, 1.0))
    assert contexts == [2, 2, 1, 1]  # 751, 501, 251, 1
    nowhere, contexts = counted(picture, steps=4, guidance_interval=(0.8, 0.9))
    assert contexts == [1] * 4
    unguided, _ = counted(picture, steps=4, guidance=1.0)
    assert torch.equal(nowhere, unguided)
    assert not torch.equal(everywhere, noisy_half) and not torch.equal(noisy_half, nowhere)


def test_the_settings_reach_the_sampler(counted, picture):
    plain, _ = counted(picture, steps=4)
    for change in (
        {"sampler": "dpmpp_2m"}, {"sampler": "dpmpp_2m_sde"}, {"sampler": "unipc"}, {"sampler": "heun"},
        {"guidance_rescale": 0.7}, {"deep_cache": 2, "deep_cache_blocks": 1},
        {"sampler": "euler", "spacing": "trailing"}, {"sampler": "euler", "final_alpha": "one"},
    ):  # fmt: skip
        assert not torch.equal(counted(picture, steps=4, **change)[0], plain), change
    near, _ = counted(picture, steps=4, sampler="euler")
    assert (near.int() - plain.int()).abs().max() <= 1  # DDIM in other words


def test_noise_of_a_solver_follows_the_seed_not_the_batch(road, with_config, picture):
    model = with_config(road, sample={"sampler": "dpmpp_2m_sde", "steps": 3})
    both = pipeline.generate(model, [picture] * 2, ["a star"] * 2, [1, 2])
    alone = pipeline.generate(model, [picture], ["a star"], [2])
    assert (both[1].int() - alone[0].int()).abs().max() <= 1 and not torch.equal(both[0], both[1])


# --- the deep cache


@pytest.fixture
def prepared(make_unet, make_inputs):
    """A UNet in float64, latents, and the conditions of both branches of guidance."""
    unet = make_unet(blocks_per_level=2)
    x, t, conditions = make_inputs(batch=2)
    other = conditions._replace(text=-conditions.text)
    savings.apply(unet, config.Runtime())
    with torch.no_grad():
        return unet, x, t, unet.prepare(conditions, 4), unet.prepare(other, 4)


@pytest.mark.parametrize("outer", [1, 2, 3])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("project_once", [False, True])
@torch.no_grad()
def test_features_of_the_same_input_change_nothing(prepared, outer, batched, project_once):
    unet, x, t, *branches = prepared
    savings.apply(unet, config.Runtime(batch_guidance=batched))
    both = shared(unet, [projected(unet, branch) if project_once else branch for branch in branches])
    plain = unet(x, t, both)
    out, features = unet(x, t, both, deep=Deep(outer))
    assert torch.equal(out, plain) and len(features) == (1 if batched else 2)
    deep = Deep(outer, features)
    torch.testing.assert_close(unet(x, t, both, deep=deep)[0], plain, rtol=0, atol=1e-12)
    # The entrance and the outer blocks are new at every step, the rest is old.
    moved = unet(x + 0.1, t, both, deep=deep)[0]
    assert not torch.allclose(moved, plain, atol=1e-3)
    assert not torch.allclose(moved, unet(x + 0.1, t, both), atol=1e-6)
    # The planted mistake: the other branch's features.
    if not batched:
        swapped = Deep(outer, features[::-1])
        assert not torch.allclose(unet(x, t, both, deep=swapped)[0], plain, atol=1e-4)


@torch.no_grad()
def test_only_the_outer_blocks_run(prepared):
    unet, x, t, branch, _ = prepared
    ran = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, part in unet.named_modules()
        if type(part).__name__ in ("Block", "Downsample", "Upsample")
    ]
    _, features = unet(x, t, branch, deep=Deep(2))
    whole, expected = len(ran), ["down.0.blocks.0", "up.0.blocks.1", "up.0.blocks.2"]
    ran.clear()
    unet(x, t, branch, deep=Deep(2, features))
    assert ran == expected and whole == len(hooks)


@torch.no_grad()
def test_what_an_outer_call_costs_of_a_whole_one_at_full_size():
    settings = config.Config()
    with torch.device("meta"):
        unet = UNet(settings.unet, settings.use).eval()
        savings.apply(unet, settings.runtime)
        texts, vector = torch.empty(1, 77, 1024), torch.empty(1, 1024)
        conditions = Conditions(texts, vector, torch.empty(1, 4, 88, 160), torch.empty(1))
        x, t, prepared = torch.empty(1, 4, 16, 88, 160), torch.zeros(1), unet.prepare(conditions, 16)
        for outer, share in ((1, 0.12), (2, 0.30)):
            features, flops = None, []
            for _ in range(2):
                with FlopCounterMode(display=False) as counter:
                    _, features = unet(x, t, prepared, deep=Deep(outer, features))
                flops.append(counter.get_total_flops())
            assert flops[1] / flops[0] == pytest.approx(share, abs=0.01)


class Counting:
    """Stands for the UNet: notes whether a call was whole, and returns some features."""

    def __init__(self):
        self.whole = []

    def __call__(self, x, t, prepared, deep):
        self.whole.append(deep.features is None)
        return 0.5 * x, [x]


def test_the_interval_of_the_cache():
    def whole(interval, sampler=ddim, parts=None, steps=8):
        unet, cache = Counting(), DeepCache(interval, 1)
        predict = cache.over(unet, None) if parts is None else parts(cache, unet)
        sampler(predict, noise(), released(), steps=steps)
        return unet.whole

    assert whole(1) == [True] * 8
    assert whole(3) == [True, False, False, True, False, False, True, False]
    # Branches called one by one: each has its own, and two calls at one t are one step.
    pair = lambda cache, unet: guided(cache.over(unet, None), cache.over(unet, None), 2.0)  # noqa: E731
    assert whole(2, parts=pair, steps=4) == [True, True, False, False] * 2
    # Coming back after some steps without: what was kept is too old.
    unet, cache = Counting(), DeepCache(3, 1)
    inside, outside = cache.over(Counting(), None), cache.over(unet, None)
    ddim(between(300, 700, inside, outside), noise(), released(), steps=10)
    assert unet.whole == [True, False, False, True, False, False]


@torch.no_grad()
def test_an_interval_of_one_is_the_network_itself(road, with_config, picture):
    noises = torch.zeros(1, road.config.vae.embed_dim, *road.config.latent_size)
    conds = pipeline.encode(road, [picture], ["a"], noises)
    unet, x = road.unet, torch.randn(1, 4, 3, *road.config.latent_size, dtype=torch.float64)
    savings.apply(unet, config.Runtime())
    plain = pipeline.generate(with_config(road, sample={"steps": 3}), [picture], ["a"], [1])
    both = shared(unet, [unet.prepare(c, 3) for c in conds])
    t = torch.tensor([500])
    assert torch.equal(DeepCache(1, 1).over(unet, both)(x, t), unet(x, t, both))
    off = pipeline.generate(with_config(road, sample={"steps": 3, "deep_cache": 1}), [picture], ["a"], [1])
    assert torch.equal(off, plain)
    # What one sampling kept is gone with it: the same call twice gives the same.
    model = with_config(road, sample={"steps": 3, "deep_cache": 2, "deep_cache_blocks": 1})
    first, second = (pipeline.generate(model, [picture], ["a"], [1]) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, plain)
    savings.remove(unet)
    with pytest.raises(ValueError, match=r"sample\.deep_cache needs .*runtime\.savings=none"):
        pipeline.reader(model)


def test_another_network_cannot_be_cached(road, with_config, picture):
    class Mine(UNet):
        def forward(self, x, t, prepared):
            return x

    model = with_config(road, sample={"deep_cache": 2, "deep_cache_blocks": 1})
    model.unet = Mine.__new__(Mine)
    with pytest.raises(ValueError, match=r"a Mine with a forward of its own; use sample\.deep_cache=0"):
        pipeline.reader(model)


# --- presets


def test_a_preset_stands_where_it_is_given(tmp_path):
    fast = QUALITIES["fast"]
    file = tmp_path / "mine.yaml"
    file.write_text("steps: 11\nsampler: heun\nguidance: 2\n")
    got = load_config(file, ["quality=fast"]).sample  # over the file
    assert (got.quality, got.steps, got.sampler, got.guidance) == ("fast", fast["steps"], fast["sampler"], 2)
    for words in (
        ["quality=fast", "steps=30"],
        ["steps=30", "quality=fast"],
    ):  # under what is named beside it
        got = load_config(file, words).sample
        assert (got.steps, got.sampler) == (30, fast["sampler"])
    file.write_text("quality: draft\nsample:\n  steps: 30\n")  # in a file
    got = load_config(file).sample
    assert (got.steps, got.sampler) == (30, QUALITIES["draft"]["sampler"])
    got = load_config(file, ["quality=exact"]).sample  # one overrides another completely
    assert dataclasses.replace(got, quality="exact") == Sample()
    assert load_config(file, ["sampler=ddim"]).sample.sampler == "ddim"


def test_the_official_file_takes_a_preset(root):
    got = load_config(root / "configs" / "i2vgen_xl.yaml", ["quality=fast"]).sample
    assert got == dataclasses.replace(
        merge.with_quality(config.Config(), "fast").sample, width=got.width, height=got.height
    )


def test_presets_name_the_same_settings_and_exact_is_the_default():
    names = {*QUALITIES["exact"]}
    assert all({*preset} == names for preset in QUALITIES.values())
    for name, value in QUALITIES["exact"].items():
        default = getattr(Sample(), name)
        assert (list(default) if isinstance(default, tuple) else default) == value
    for quality in QUALITIES:
        made = merge.with_quality(config.Config(), quality)
        assert made == load_config(None, [f"quality={quality}"])
        pipeline.refuse_unsampleable(made)
    assert load_config().sample.quality == "exact"


def test_settings_that_were_recorded_come_back_as_they_are():
    made = load_config(None, ["quality=fast", "steps=7", "guidance_interval=[0.2,0.9]"])
    assert merge.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_what_it_was_made_with_stands_beside_the_video(road, with_config, picture, tmp_path):
    sample = dataclasses.replace(
        merge.with_quality(road.config, "draft").sample, deep_cache_blocks=1, steps=3
    )
    model = with_config(road, sample=dataclasses.asdict(sample))
    path = model(picture, "a star").save(tmp_path / "clip.png")
    settings = records.read(path)["settings"]["sample"]
    assert settings["quality"] == "draft" and settings["steps"] == 3
    assert settings["sampler"] == QUALITIES["draft"]["sampler"]
    assert settings["guidance_interval"] == QUALITIES["draft"]["guidance_interval"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quality=best"], "'best', expected exact or fast or draft"),
        (["quality=[fast]"], "sample.quality"),
        (["sampler=dpm"], "expected ddim or .*dpmpp_2m"),
        (["sampler=unipc", "eta=0.5"], r"sample\.eta is 0\.5, but sample\.sampler=unipc"),
        (["quality=fast", "eps_form=recovered"], r"sample\.eps_form is recovered, but sample\.sampler="),
        (["guidance_interval=[0.5,0.5]"], "two increasing numbers"),
        (["guidance_interval=[-1,0.5]"], "two increasing numbers"),
        (["guidance_interval=[0.4]"], "guidance_interval"),
        (["guidance_rescale=2"], r"sample\.guidance_rescale is 2"),
        (["deep_cache=-1"], r"sample\.deep_cache is -1"),
        (
            ["deep_cache=2", "deep_cache_blocks=4"],
            r"deep_cache_blocks is 4, but with unet\.blocks_per_level = 2",
        ),
    ],
)
def test_refusals(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, words)


def test_solvers_need_a_signal_where_they_divide_by_it():
    words = ["sampler=unipc", "spacing=trailing", "schedule.prediction=eps"]
    with pytest.raises(ValueError, match="divide by zero"):
        pipeline.refuse_unsampleable(load_config(None, words))


# --- the loop around the network


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
def test_a_step_costs_few_operations_outside_of_the_network(sampler):
    def count(steps):
        with Operations() as operations:
            sampler(lambda x, t: x, noise(dtype=torch.float32), released(), steps=steps)
        return operations.count

    assert (count(20) - count(10)) / 10 <= 50


def test_elsewhere_than_on_a_cpu_finiteness_is_looked_up_once():
    watch, seen = Watch(released(), None, True), []
    bad = torch.full((1,), float("nan"), device="meta")
    watch.step(StepInfo(0, 2, 501, bad, bad))  # on a CPU this would ask at once; `meta` has no answer
    assert len(watch.waiting) == 1 and seen == []
    watch.waiting = [(info, torch.tensor(False)) for info, _ in watch.waiting]
    with pytest.raises(FloatingPointError, match=r"after step 1 of 2 \(t = 501\)"):
        watch.end()
