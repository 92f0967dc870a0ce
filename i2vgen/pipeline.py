"""The road from a picture and a sentence to a video, and the record of the parts it needs.

    image, prompt - images - encoders, vae.encode - unet.prepare - ddim(unet) - vae.decode - video

Axes: b batch, f frames, c channels, h w latent rows and columns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

import i2vgen
from i2vgen import checkpoint, images, runtime, speed, video
from i2vgen.conditioning import Conditions, Prepared, join
from i2vgen.config import RANDOM, SHIPPED, Config, load_config
from i2vgen.encoders import ClipEncoders
from i2vgen.sampler import OnStep, Predict, ancestral, ddim, ddim_invert, guided, guided_pair
from i2vgen.schedule import Schedule, make_betas, timesteps
from i2vgen.unet import UNet
from i2vgen.vae import AutoencoderKL


@dataclass
class Video:
    """A finished clip: `frames` uint8 [f h w 3], and everything needed to make it again."""

    frames: np.ndarray
    image: str
    prompt: str
    seed: int
    config: Config
    fps: float | None = None  # of the file; None: as the settings say

    def save(self, path: str | Path) -> Path:
        """Write the clip by the ending of `path` (.mp4, .gif, .webp, .png, else PNGs) and a JSON beside it.

        The JSON holds all settings, the seed, the versions that matter and the file's SHA-256.
        """
        save = self.config.save
        fps = save.fps if self.fps is None else self.fps
        path = video.save(self.frames, path, fps=fps, quality=save.quality, enlarge=save.enlarge)
        config = recorded_config(self.config, self.image, self.prompt, self.seed, path)
        frames, height, width, _ = self.frames.shape
        record = {
            "file": path.name,
            "sha256": sha256(path),
            "width": save.enlarge * width,
            "height": save.enlarge * height,
            "frames": frames,
            "fps": fps,
            "seed": self.seed,
            "settings": config.to_dict(),
            "versions": {
                "i2vgen": i2vgen.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        _write_whole(record_path(path), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return path


class I2VGenXL:
    """The four parts and their settings. Call it with a picture and a prompt: it returns a `Video`."""

    def __init__(
        self, config: Config, unet: UNet, vae: AutoencoderKL, clip: ClipEncoders, device: torch.device
    ):
        self.config, self.unet, self.vae, self.clip, self.device = config, unet, vae, clip, device
        self.schedule = make_schedule(config)
        self.parts = {"unet": unet, "vae": vae, "clip": clip}

    def __call__(
        self,
        image: str | Path | Image.Image,
        prompt: str,
        *,
        seed: int | None = None,
        on_step: OnStep | None = None,
    ) -> Video:
        """One clip. `seed` defaults to the first of `sample.seed`; `on_step` is told of every step."""
        seed = self.config.sample.seed[0] if seed is None else seed
        return self.generate([image], [prompt], [seed], on_step=on_step)[0]

    def generate(
        self,
        pictures: Sequence[str | Path | Image.Image],
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        noise: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> list[Video]:
        """One clip per (picture, prompt, seed), sampled as one batch; each depends on its own seed only.

        `noise` [b c f h w] replaces the initial noise that the seeds would draw, e.g. by that of `invert`.
        """
        config = self.config
        if not len(pictures) == len(prompts) == len(seeds):
            raise ValueError(
                f"got {len(pictures)} pictures, {len(prompts)} prompts, {len(seeds)} seeds; "
                "give as many of each"
            )
        opened = [open_picture(picture, config) for picture in pictures]
        dataclasses.replace(config.sample, seed=tuple(seeds))  # refuses a seed out of range
        frames = generate(self, opened, prompts, seeds, noise=noise, on_step=on_step)
        if config.save.grey_last_frame == "drop":
            clips = [video.drop_grey_last_frame(clip) for clip in frames]
        else:
            clips = list(frames)
            for clip in clips:
                if len(video.drop_grey_last_frame(clip)) < len(clip):
                    warnings.warn(
                        "the last frame is mostly mid-grey; the official code would drop it "
                        "(save.grey_last_frame=drop)",
                        stacklevel=2,
                    )
        names = [str(p) if isinstance(p, str | Path) else "<picture>" for p in pictures]
        return [Video(c.cpu().numpy(), *facts, config)
                for c, *facts in zip(clips, names, prompts, seeds, strict=True)]  # fmt: skip


@torch.no_grad()
def generate(
    model: I2VGenXL,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int | torch.Generator],
    *,
    noise: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """RGB pictures, prompts and seeds, b of each -> uint8 frames [b f H W 3]: the whole road.

    `noise` [b c f h w] replaces the initial noise that the seeds would draw.
    """
    config, sample = model.config, model.config.sample
    noises = [runtime.SampleNoise(seed) for seed in seeds]
    latent = (config.vae.embed_dim, *config.latent_size)

    # A network that never sees the first-frame latent draws nothing for it, as v1 does not.
    posterior = runtime.draw_all(noises, latent) if sees_latent(config) else None
    cond, uncond = encode(model, pictures, prompts, posterior)
    drawn = runtime.draw_all(noises, (latent[0], sample.frames, *latent[1:]))
    if sample.noise_offset:
        drawn = drawn + sample.noise_offset * runtime.draw_all(noises, (latent[0], sample.frames, 1, 1))
    start = (drawn if noise is None else noise).to(model.device)
    if start.shape != drawn.shape:
        raise ValueError(f"noise has shape {tuple(start.shape)}; this job needs {tuple(drawn.shape)}")

    predict = network(model, cond, uncond)

    def step_noise(x: Tensor) -> Tensor:
        return runtime.draw_all(noises, tuple(x.shape[1:])).to(x)

    if sample.sampler == "ancestral":
        latents = ancestral(predict, start, model.schedule, noise=step_noise, on_step=on_step)
    else:
        latents = ddim(
            predict,
            start,
            model.schedule,
            steps=sample.steps,
            spacing=sample.spacing,
            eta=sample.eta,
            eps_form=sample.eps_form,
            final_alpha=sample.final_alpha,
            noise=step_noise,
            on_step=on_step,
        )
    return decode(model, latents)


def network(model: I2VGenXL, cond: Conditions, uncond: Conditions) -> Predict:
    """The UNet under guidance as the samplers want it; its conditions are prepared here, once."""
    sample = model.config.sample
    positive = model.unet.prepare(cond, sample.frames)
    if sample.guidance == 1.0:
        return lambda x, t: model.unet(x, t, positive)
    negative = model.unet.prepare(uncond, sample.frames)
    both = None  # a network of one's own may prepare something else: it is called once for each branch
    if model.config.runtime.share_prefix and isinstance(positive, Prepared):
        both = join([positive, negative])
    if both is not None:
        return guided_pair(
            lambda x, t: model.unet(x, t, both), sample.guidance, precision=sample.guidance_precision
        )
    return guided(
        lambda x, t: model.unet(x, t, positive),
        lambda x, t: model.unet(x, t, negative),
        sample.guidance,
        precision=sample.guidance_precision,
    )


@torch.no_grad()
def invert(
    model: I2VGenXL,
    frames: np.ndarray,
    picture: Image.Image,
    prompt: str,
    *,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """A clip, uint8 [f H W 3], of the settings' size -> the noise [1 c f h w] that DDIM turns into it.

    `seed` draws the posterior noise of the conditioning picture. Give the result to `I2VGenXL.generate`.
    """
    sample = model.config.sample
    if frames.shape != (sample.frames, sample.height, sample.width, 3):
        raise ValueError(
            f"the clip has shape {frames.shape}; the settings say frames, height, width = "
            f"{sample.frames}, {sample.height}, {sample.width}"
        )
    draws = runtime.SampleNoise(seed)
    latent = (model.config.vae.embed_dim, *model.config.latent_size)
    cond, uncond = encode(model, [picture], [prompt], draws.draw(latent))
    pixels = rearrange(torch.from_numpy(frames).to(model.device), "f h w c -> f c h w") / 127.5 - 1
    latents = model.vae.encode(pixels, None, chunk=model.config.runtime.vae_chunk)
    return ddim_invert(
        network(model, cond, uncond),
        rearrange(latents, "f c h w -> 1 c f h w"),
        model.schedule,
        steps=sample.steps,
        eps_form=sample.eps_form,
        on_step=on_step,
    )


def encode(
    model: I2VGenXL,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    posterior_noise: Tensor | None,
) -> tuple[Conditions, Conditions]:
    """Pictures and prompts, b of each, posterior noise [b c h w] -> conditions with and without the prompt.

    Without: the negative prompt and a zero image vector; the first-frame latent and fps stay, as in training.
    """
    config, sample, device = model.config, model.config.sample, model.device
    views = [prepare_views(picture, config) for picture in pictures]
    latent = None
    if sees_latent(config):
        pixels = torch.stack([view.pixels for view in views]).to(device)
        noise = posterior_noise.to(device) if sample.posterior == "sample" else None
        latent = model.vae.encode(pixels, noise, chunk=1)
    fps = torch.full((len(pictures),), sample.fps, device=device)

    text, vector = (None, None), (None, None)
    if config.use.text:
        texts = [*prompts, config.negative_prompt]
        tokens = model.clip.text(model.clip.tokenize(texts).to(device))
        text = tokens[:-1], tokens[-1:].expand(len(prompts), -1, -1)
    if config.use.global_tokens:
        clip_pixels = torch.stack([view.clip_pixels for view in views]).to(device)
        vector_cond = model.clip.image(clip_pixels)
        vector = vector_cond, torch.zeros_like(vector_cond) if sample.negative_image == "zeros" else None
    return Conditions(text[0], vector[0], latent, fps), Conditions(text[1], vector[1], latent, fps)


def sees_latent(config: Config) -> bool:
    return config.use.concat or config.use.local_tokens


def prepare_views(picture: Image.Image, config: Config) -> images.Pictures:
    """RGB picture -> what the VAE and what CLIP sees of it under these settings."""
    return images.prepare(
        picture,
        width=config.sample.width,
        height=config.sample.height,
        clip_size=config.clip.image_size,
        clip_mean=config.clip.image_mean,
        clip_std=config.clip.image_std,
        mode=config.preprocess.crop,
    )


def decode(model: I2VGenXL, latents: Tensor) -> Tensor:
    """Latents [b c f h w] -> uint8 frames [b f H W 3]."""
    b = latents.shape[0]
    frames = rearrange(latents, "b c f h w -> (b f) c h w")
    pixels = model.vae.decode(frames, chunk=model.config.runtime.vae_chunk)
    pixels = rearrange(pixels, "(b f) c h w -> b c f h w", b=b)
    return video.to_uint8(pixels.float(), rounding=model.config.save.rounding)


def load(
    weights: str | Path = "",
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> I2VGenXL:
    """Settings and weights -> a model ready to be called.

    `weights` is a native weights folder or "random", by default the shipped small model; `config` a YAML
    file; `overrides` are what a command line takes, e.g. `["steps=20", "device=cuda"]`. ValueError for
    settings, weights or memory that cannot work.
    """
    literal = {"weights": str(weights)} if weights else {}
    return load_parts(load_config(config, overrides, default_weights=SHIPPED, **literal))


def load_parts(config: Config) -> I2VGenXL:
    """Check weights and memory first, then load UNet, VAE and CLIP onto the device."""
    if not config.weights:
        raise ValueError("no weights given; name a native weights folder with weights=, or weights=random")
    if config.weights == RANDOM:
        warnings.warn(
            "weights=random: the model is untrained, its output is NOISE and shows only that the road works",
            stacklevel=3,
        )
    elif missing := checkpoint.missing_parts(config.weights):
        raise ValueError(
            f"weights folder {config.weights} lacks {', '.join(missing)}, which generation needs"
        )
    refuse_unsampleable(config)  # impossible betas too, before anything is loaded
    device = runtime.device(config.runtime)
    runtime.check_memory(config, {part: checkpoint.build(part, config) for part in checkpoint.PARTS})
    unet = checkpoint.load("unet", config, device=device, dtype=runtime.dtype(config.runtime))
    vae = checkpoint.load("vae", config, device=device, dtype=runtime.DTYPES[config.runtime.vae_dtype])
    clip = checkpoint.load("clip", config, device=device, dtype=runtime.DTYPES[config.runtime.encoder_dtype])
    speed.apply(unet, config.runtime)
    if config.runtime.compile:
        runtime.compile_quickly()
        unet.compile()
    return I2VGenXL(config, unet, vae, clip, device)


def refuse_unsampleable(config: Config) -> None:
    """ValueError for settings that build a network but cannot sample with it."""
    if config.unet.out_channels != config.vae.embed_dim:
        raise ValueError(
            f"unet.out_channels is {config.unet.out_channels} but vae.embed_dim is {config.vae.embed_dim}; "
            "sampling needs one prediction per latent channel"
        )
    if config.vae.channels != 3:
        raise ValueError(f"vae.channels is {config.vae.channels}; pictures here have 3")
    sample, schedule = config.sample, make_schedule(config)
    divides = sample.eps_form == "recovered" or config.schedule.prediction == "eps"
    visited = timesteps(schedule.num_timesteps, sample.steps, sample.spacing)
    if divides and sample.sampler == "ddim" and schedule.abar[visited[0]] == 0:
        raise ValueError(
            f"sample.steps={sample.steps} with sample.spacing={sample.spacing} visits t = {visited[0]}, "
            "where no signal is left: sample.eps_form=recovered and schedule.prediction=eps divide by zero "
            "there, as the official code does; use sample.eps_form=direct with v, or another step count"
        )


def make_schedule(config: Config) -> Schedule:
    s = config.schedule
    if s.kind == "logsnr_cosine":
        raise ValueError(
            f"schedule.kind is logsnr_cosine, a refiner's: give {config.weights or 'its folder'} as "
            "refine_weights=, and the weights of a first stage as weights= or a clip as video="
        )
    betas = make_betas(
        kind=s.kind,
        num_timesteps=s.num_timesteps,
        cosine_s=s.cosine_s,
        init_beta=s.init_beta,
        last_beta=s.last_beta,
        zero_terminal_snr=s.zero_terminal_snr,
    )
    return Schedule(betas, prediction=s.prediction, variance=s.variance)


def open_picture(picture: str | Path | Image.Image, config: Config) -> Image.Image:
    """A path or a PIL image -> RGB, as `preprocess` says."""
    if isinstance(picture, Image.Image):
        return images.to_rgb(picture, alpha=config.preprocess.alpha)
    return images.open_picture(picture, exif=config.preprocess.exif, alpha=config.preprocess.alpha)


def record_path(path: Path) -> Path:
    """The JSON beside a video: clip.mp4 -> clip.json; a folder of PNGs -> folder.json beside it."""
    return path.with_suffix(".json") if path.suffix else path.with_name(path.name + ".json")


def recorded_config(config: Config, image: str, prompt: str, seed: int, output: Path) -> Config:
    """The settings of one clip alone, as its record keeps them."""
    return dataclasses.replace(
        config,
        image=(image,) if image else (),
        prompt=(prompt,) if image else (),
        output=str(output),
        items="",
        sample=dataclasses.replace(config.sample, seed=(seed,)),
    )


def sha256(path: Path) -> str:
    """Of a file, or of all files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
