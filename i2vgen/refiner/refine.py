"""The second stage: a finished clip, noised and denoised again by a network that reads a short text only.

    clip - fitting - vae.encode - noise or inversion - solver(unet) - vae.decode - clip
    refine prompt + suffix - CLIP text ------------------------^

The idea is SDEdit's (Meng et al. 2022); the two public networks are MS-Vid2Vid-XL and SR600, see
docs/cascade.md. They see nothing of the first stage's picture or prompt, only the noised clip.

Axes: b batch, f frames, c channels, h w latent rows and columns.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from i2vgen.diffusion.noise import SampleNoise
from i2vgen.diffusion.sampler import OnStep, Predict, at_least_float32, guided_pair
from i2vgen.diffusion.schedule import Schedule
from i2vgen.fast import machine, runtime, savings
from i2vgen.fast.unet import both_branches, projected, under
from i2vgen.files import checkpoint, given, video
from i2vgen.memory import plans
from i2vgen.memory.free import free_memory
from i2vgen.memory.offload import OffloadedPart
from i2vgen.model.clip import ClipEncoders
from i2vgen.model.conditioning import Conditions, Prepared, Unconditional
from i2vgen.model.unet import UNet
from i2vgen.model.vae import AutoencoderKL
from i2vgen.refiner import fitting
from i2vgen.refiner import sampler as sampling
from i2vgen.refiner.sampler import Levels
from i2vgen.settings import config as settings
from i2vgen.settings.config import Config
from i2vgen.settings.merge import second_stage


@dataclass
class Refiner:
    """The parts of the second stage; `config` is `merge.second_stage` of the job."""

    config: Config
    unet: UNet
    vae: AutoencoderKL
    clip: ClipEncoders
    device: torch.device
    offloaded: dict[str, OffloadedPart] = field(
        default_factory=dict
    )  # parts on the CPU until they are needed

    def __call__(
        self, frames: np.ndarray, prompt: str, *, seed: int = 0, on_step: OnStep | None = None
    ) -> np.ndarray:
        """A clip, uint8 [f h w 3] of any size -> the refined clip, uint8 [f H W 3]."""
        if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(
                f"the clip is {frames.dtype} {frames.shape}; give uint8 [f h w 3], none of them 0"
            )
        refined = refine(self, frames, given.prompt(prompt), seed, on_step=on_step)
        drop = self.config.save.grey_last_frame == "drop"
        return video.drop_grey_last_frame(refined) if drop else refined


@torch.no_grad()
def refine(
    model: Refiner, frames: np.ndarray, prompt: str, seed: int, *, on_step: OnStep | None = None
) -> np.ndarray:
    """A clip uint8 [f h w 3], its prompt and seed -> uint8 [f H W 3]: the whole second stage."""
    config, job = model.config, model.config.refine
    frames = frames[: job.frames or None]
    shape = geometry(config, (frames.shape[2], frames.shape[1]))
    draws = SampleNoise(seed)
    table = levels(config)

    with plans.on_device(model.offloaded, "vae"):
        given = encode(model, frames, shape, draws)
    latents = repeat(given, "c f h w -> 1 c (f r) h w", r=job.repeat_frames)
    states = texts(model, prompt)
    with plans.on_device(model.offloaded, "unet"):
        kinds = zip((Conditions, Unconditional), states, strict=True)
        cond, uncond = (
            projected(model.unet, model.unet.prepare(kind(one[None], None, None, None), 1))
            for kind, one in kinds
        )
        if job.start == "noise":
            noise = job.noise * draws.draw(tuple(latents.shape[1:])).to(latents)
            start = table.noised(latents, noise, job.noise_level - 1)
        else:
            start = sampling.invert(
                windows(model, under(model.unet, uncond)),
                latents,
                inversion_schedule(config),
                total=job.noise_level,
                steps=job.steps,
                on_step=on_step,
            )
        latents = sampling.refine(
            windows(model, network(model, cond, uncond)),
            start,
            table,
            grid(config),
            solver=job.solver,
            start=job.start_scale,
            eta=job.eta,
            noise=lambda x: draws.draw(tuple(x.shape[1:])).to(x),
            on_step=on_step,
        )
    with plans.on_device(model.offloaded, "vae"):
        return decode(model, latents[0, :, :: job.repeat_frames], shape, frames, given)


def geometry(config: Config, size: tuple[int, int]) -> fitting.Geometry:
    """A clip's (width, height) -> all its sizes on the way."""
    job, factor = config.refine, config.vae.factor
    return fitting.geometry(
        size,
        (job.width, job.height),
        job.fit,
        multiple=factor * config.unet.factor,
        rest=factor * config.unet.margin(config.use),
    )


def encode(model: Refiner, frames: np.ndarray, shape: fitting.Geometry, draws: SampleNoise) -> Tensor:
    """Frames uint8 [f h w 3] -> latents [c f h w], a few frames at a time, in at least float32."""
    job, chunk, latents = model.config.refine, model.config.runtime.vae_chunk, []
    width, height = (side // model.config.vae.factor for side in shape.legal)
    for start in range(0, len(frames), chunk):
        part = frames[start : start + chunk]
        pixels = prepared(model, part, shape)
        noise = None
        if job.posterior == "sample":  # one draw per frame, as officially: `vae_chunk` changes nothing
            latent = (model.config.vae.embed_dim, height, width)
            noise = torch.cat([draws.draw(latent) for _ in part]).to(model.device)
        latents.append(at_least_float32(model.vae.encode(pixels, noise)))
    return rearrange(torch.cat(latents), "f c h w -> c f h w")


def decode(
    model: Refiner, latents: Tensor, shape: fitting.Geometry, clip: np.ndarray, given: Tensor
) -> np.ndarray:
    """Latents [c f h w] -> uint8 [f H W 3], a few frames at a time; only the bytes are kept.

    With `refine.restore` what the autoencoder loses of the `clip`, uint8 [f h w 3] with latents `given`, is
    added again, so that only the network's changes remain.
    """
    frames, chunk, restore = [], model.config.runtime.vae_chunk, model.config.refine.restore
    for start in range(0, latents.shape[1], chunk):
        part = slice(start, start + chunk)
        pixels = model.vae.decode(rearrange(latents[:, part], "c f h w -> f c h w"))
        if restore > 0:
            seen = model.vae.decode(rearrange(given[:, part], "c f h w -> f c h w"))
            pixels = pixels + restore * (prepared(model, clip[part], shape) - seen)
        pixels = rearrange(fitting.cropped(pixels, shape), "f c h w -> c f h w")
        frames.append(video.to_uint8(pixels, rounding=model.config.save.rounding).cpu())
    return torch.cat(frames).numpy()


def prepared(model: Refiner, frames: np.ndarray, shape: fitting.Geometry) -> Tensor:
    """Frames uint8 [f h w 3] -> the pixels that are encoded, [f 3 H W] on the device."""
    job = model.config.refine
    return fitting.prepared(frames, shape, antialias=job.antialias, resize=job.resize).to(model.device)


def texts(model: Refiner, prompt: str) -> Tensor:
    """What the network reads with the prompt and its suffix, and with the negative prompt: [2 k d]"""
    config = model.config
    tell_lost_words(model.clip, prompt, config.refine_suffix)
    model.clip.tell_unknown_words(prompt + config.refine_suffix)
    with warnings.catch_warnings():  # the note above has said so, in terms of this stage
        warnings.simplefilter("ignore")
        tokens = model.clip.tokenize([prompt + config.refine_suffix, config.refine_negative_prompt])
    with plans.on_device(model.offloaded, "clip"):
        return model.clip.text(tokens.to(model.device))


def tell_lost_words(clip: ClipEncoders, prompt: str, suffix: str) -> None:
    """A note if prompt and suffix do not fit into CLIP's tokens together: which words are lost, and whose."""
    tokens, room = clip.tokenizer.encode(prompt + suffix), clip.settings.text_length - 2
    if len(tokens) <= room:
        return
    own, lost = len(clip.tokenizer.encode(prompt)), clip.tokenizer.decode(tokens[room:]).strip()
    whose = "the suffix" if own <= room else "the prompt and of all the suffix"
    warnings.warn(
        f"the refine prompt has {own} tokens and the quality suffix {len(tokens) - own}, CLIP reads {room}; "
        f"of {whose} this is lost: {lost!r} (shorten refine_prompt=, or give a refine_suffix= of your own)",
        stacklevel=2,
    )


def network(model: Refiner, cond: Prepared, uncond: Prepared) -> Predict:
    """The UNet under rescaled guidance; the part that reads no text runs once for both branches."""
    job = model.config.refine
    if job.guidance == 1.0:
        return under(model.unet, cond)
    return guided_pair(both_branches(model.unet, cond, uncond), job.guidance, rescale=job.rescale)


def windows(model: Refiner, predict: Predict) -> Predict:
    return sampling.windowed(predict, model.config.refine.window, model.config.refine.overlap)


# ---------------------------------------------------------------------------------------------------
# Noise


def levels(config: Config) -> Levels:
    """The table of the weights: the refiners' own, or any other kind. ValueError unless they predict v."""
    schedule = config.schedule
    if schedule.prediction != "v":
        raise ValueError(f"schedule.prediction is {schedule.prediction}; the refining sampler needs v")
    if schedule.kind == "logsnr_cosine":
        return sampling.refiner_levels(schedule.num_timesteps, schedule.logsnr_shift)
    return Levels.of(Schedule.of(schedule))


def grid(config: Config) -> sampling.Grid:
    job = config.refine
    return sampling.make_grid(
        levels(config),
        total=job.noise_level,
        steps=job.steps,
        solver=job.solver,
        spacing=job.spacing,
        form=job.grid,
    )


def inversion_schedule(config: Config) -> Schedule:
    """The table on which a clip is inverted: the sampler's, or the plain cosine that SR600 takes."""
    if config.refine.inversion_table == "refiner":
        return levels(config).schedule()
    cosine = settings.Schedule(num_timesteps=config.schedule.num_timesteps, zero_terminal_snr=False)
    return Schedule.of(cosine)


# ---------------------------------------------------------------------------------------------------
# Before any long work


def refuse_unrefinable(config: Config) -> None:
    """ValueError for settings of a second stage that cannot run; `config` is that of `second_stage`."""
    job = config.refine
    grid(config)
    if job.start == "inversion" and job.noise != 1:
        raise ValueError(f"refine.noise is {job.noise} but refine.start=inversion adds none; leave it at 1")
    if job.start == "inversion" and job.steps > job.noise_level:
        raise ValueError(f"refine.steps is {job.steps}, more than refine.noise_level = {job.noise_level}")
    if job.solver == "heun" and job.eta != settings.Refine().eta:
        raise ValueError(
            f"refine.eta is {job.eta} but refine.solver=heun adds no noise; leave refine.eta out"
        )
    for name, width in (("in", config.unet.in_channels), ("out", config.unet.out_channels)):
        if width != config.vae.embed_dim:
            raise ValueError(f"unet.{name}_channels is {width} but vae.embed_dim is {config.vae.embed_dim}")


def check(job: Config, size: tuple[int, int], frames: int) -> None:
    """ValueError for all that could stop a job's second stage on clips of (width, height), before the first.

    Weights files are looked for but not read.
    """
    config = second_stage(job)
    refuse_unrefinable(config)
    homes_of(job, config)
    machine.refuse_missing(config, runtime.device(config.runtime))
    choose_plan(config, size, frames)


def choose_plan(config: Config, size: tuple[int, int], frames: int) -> tuple[Config, plans.Estimate]:
    """Settings for clips of (width, height) and so many frames -> those of a memory plan, and what it takes.

    `sample` has the size and the frames that the network sees at once. ValueError if no plan fits.
    """
    job = config.refine
    width, height = geometry(config, size).legal
    at_once = min(min(frames, job.frames or frames) * job.repeat_frames, job.window)
    sized = dataclasses.replace(
        config,
        sample=dataclasses.replace(
            config.sample, width=width, height=height, frames=at_once, guidance=job.guidance
        ),
        runtime=dataclasses.replace(config.runtime, batch=1),
    )
    ledger, free = plans.Ledger(sized), free_memory(runtime.device(config.runtime))
    settled, estimate = plans.fastest(sized, ledger, free)
    if config.runtime.check_memory and estimate.total > free:
        plan = plans.leaner(sized, ledger, free)
        advice = "give a smaller refine.width and refine.height or refine.window"
        raise ValueError(
            f"the second stage at {width} x {height}, {at_once} frames at once, needs {estimate} and "
            f"{plans.amount(free)} are free; {advice if plan is None else f'memory={plan} would fit'} "
            "(runtime.check_memory=false runs anyway)"
        )
    return settled, estimate


# ---------------------------------------------------------------------------------------------------
# Weights


def load(
    job: Config,
    size: tuple[int, int] | None = None,
    frames: int = 0,
    tell: Callable[[plans.Estimate], None] | None = None,
) -> Refiner:
    """Settings of a job with `refine_weights` -> the second stage on its device. ValueError if it cannot run.

    The VAE and CLIP that both stages share may lie in either folder. The memory plan is for clips of a `size`
    (width, height) and so many frames, by default for the largest; `tell` is called with it.
    """
    config = second_stage(job)
    refuse_unrefinable(config)
    homes = homes_of(job, config)
    if settings.RANDOM in homes.values():
        warnings.warn(
            "refine_weights=random: an untrained refiner makes NOISE, which only shows that it runs",
            stacklevel=2,
        )
    device = runtime.device(config.runtime)
    machine.refuse_missing(config, device)
    largest = (config.refine.width, config.refine.height)
    sized, estimate = choose_plan(config, size or largest, frames or config.refine.window)
    if tell is not None:
        tell(estimate)
    config = dataclasses.replace(config, runtime=sized.runtime)
    parts = load_parts(config, homes, device)
    plans.prepare_unet(parts["unet"], sized, device)
    savings.apply(parts["vae"], config.runtime, device)
    return Refiner(config, **parts, device=device, offloaded=plans.offloaded_parts(parts, config, device))


def load_parts(config: Config, homes: dict[str, str], device: torch.device) -> dict[str, nn.Module]:
    place = "cpu" if config.runtime.offload != "none" else device
    return {
        part: checkpoint.load(
            part,
            dataclasses.replace(config, weights=homes[part]),
            device=place,
            dtype=plans.dtype(part, config.runtime),
        )
        for part in checkpoint.PARTS
    }


def homes_of(job: Config, config: Config) -> dict[str, str]:
    """Part -> the weights folder that holds it: the refiner's, or for VAE and CLIP the first stage's."""
    if job.refine_weights == settings.RANDOM:
        return dict.fromkeys(checkpoint.PARTS, settings.RANDOM)
    missing = checkpoint.missing_parts(job.refine_weights)
    homes = {part: job.refine_weights for part in checkpoint.PARTS if part not in missing}
    others = job.weights not in ("", settings.RANDOM, settings.SHIPPED, settings.LAB)
    for part in missing:
        shared = part != "unet" and getattr(job, part) == getattr(config, part)
        if not (others and shared and part not in checkpoint.missing_parts(job.weights)):
            raise ValueError(
                f"refine_weights={job.refine_weights} lacks the {part}; convert the refiner together with "
                "the VAE and CLIP files, or give weights= a folder that holds the same ones"
            )
        homes[part] = job.weights
    return homes
