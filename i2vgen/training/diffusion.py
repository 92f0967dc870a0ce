"""The diffusion training step: frozen VAE and CLIP encode the clips, the UNet is trained with the v-loss.

With `train.text_encoder`, CLIP's text tower is trained together with the UNet.

Axes: b batch, f frames, c channels, h w latent rows and columns, H W pixel rows and columns, k context
tokens, d width, s side of CLIP's picture; t is the timestep.
"""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from i2vgen import pipeline
from i2vgen.adapt import lora
from i2vgen.diffusion.loss import draw_offset_noise, training_loss
from i2vgen.diffusion.noise import SampleNoise
from i2vgen.diffusion.schedule import Schedule
from i2vgen.fast import runtime
from i2vgen.fast.checkpointing import set_checkpointing
from i2vgen.fast.compiled import compile_training
from i2vgen.files import checkpoint, video
from i2vgen.model.clip import ClipEncoders
from i2vgen.model.conditioning import Conditions, Unconditional
from i2vgen.model.conditioning import Encoded as ConditionPair
from i2vgen.model.moved import spread
from i2vgen.model.spatial import Downsample, ResBlock, SpatialTransformer, Upsample
from i2vgen.model.unet import UNet
from i2vgen.model.vae import AutoencoderKL
from i2vgen.settings.config import RANDOM, Config
from i2vgen.training import refiner_clips, shards, validation
from i2vgen.training.draws import Clips, Encoded, Source
from i2vgen.training.loop import Part, precision
from i2vgen.training.prepared import Prepared
from i2vgen.training.settings import Bucket, Train, buckets

INHERITED = (ResBlock, SpatialTransformer, Downsample, Upsample)
STRIP_CLIPS = 4
MOST_PIXELS = 2**20  # encoded at once: 16 frames of 256 x 256, one of 1280 x 704


class DiffusionLoss(nn.Module):
    """The UNet and its loss as one module, because data parallelism wraps a single forward.

    With `clip`, its text tower is trained too, and `conditions.text` holds token ids, int64 [b k]. With
    `flow_weight`, the distance of the UNet's flow from the true one, times this weight, is added.
    """

    def __init__(
        self,
        unet: UNet,
        schedule: Schedule,
        clip: ClipEncoders | None = None,
        flow_weight: float = 0.0,
    ):
        super().__init__()
        self.unet, self.schedule, self.clip, self.flow_weight = unet, schedule, clip, flow_weight
        self.flow: Tensor | None = None  # what `unet.flow_out` returned last
        if flow_weight:
            unet.flow_out.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.flow = output[..., : 2 * self.unet.grid**2]

    def forward(
        self,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        conditions: Conditions,
        weight: Tensor | None = None,
        flow: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """x0, noise [b c f h w], t int64 [b] on the CPU, weight [b] of each clip -> {"loss": scalar}

        With the true flow and its shares [b 3 f h w], also `flow_error`.
        """
        if self.clip is not None:
            conditions = conditions._replace(text=self.clip.text(conditions.text))
        prepared = self.unet.prepare(conditions, x0.shape[2])

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.unet(x, t.to(x.device), prepared)

        loss = training_loss(predict, x0, t, noise, self.schedule, weight=weight).mean()
        if flow is None:
            return {"loss": loss}
        made = rearrange(self.flow.float(), "(b f) h w c -> b c f h w", b=len(flow))
        error, self.flow = flow_error(spread(made, self.unet.grid), flow), None
        return {"loss": loss + self.flow_weight * error, "flow_error": error}


def flow_error(made: Tensor, true: Tensor) -> Tensor:
    """Mean distance of a flow [b 2 f h w] from the true one and its shares, [b 3 f h w]; a scalar.

    It is the usual end-point error, smooth below a hundredth of the frame, where it is as good as right.
    """
    distance = ((made - true[:, :2]).square().sum(1) + 0.02**2).sqrt() - 0.02
    return (distance * true[:, 2]).mean()


class Encoding:
    """Clips -> the arguments of `DiffusionLoss`: latents, timesteps, noise, conditions after dropout.

    Prepared clips need no `vae`, and `clip` only if its text tower is trained; without it, `negative_text`
    [1 k d] stands for the negative prompt.
    """

    def __init__(
        self,
        config: Config,
        train: Train,
        vae: AutoencoderKL | None,
        clip: ClipEncoders | None,
        device: torch.device,
        first_stage: refiner_clips.FirstStage | None = None,
        negative_text: Tensor | None = None,
    ):
        self.config, self.train, self.vae, self.clip, self.device = config, train, vae, clip, device
        self.first_stage = first_stage
        self.num_timesteps = config.refine.noise_level if first_stage else config.schedule.num_timesteps
        self.clip_dtype = clip_dtype(config, train)
        if negative_text is not None:
            self.negative_text = negative_text.to(device, self.clip_dtype)

    @functools.cached_property
    def negative_text(self) -> Tensor:
        """Its text tokens [1 k d]."""
        return self.clip.text(self.negative)

    @functools.cached_property
    def negative(self) -> Tensor:
        """Token ids of the negative prompt, int64 [1 k]."""
        return self.clip.tokenize([self.config.negative_prompt]).to(self.device)

    def encode(self, clips: Clips) -> Encoded:
        mean, std = self.posterior(clips.pixels)
        start = vector = tokens = None
        if self.first_stage:
            start = self.config.vae.scale * self.posterior(self.first_stage(clips.pixels, clips.captions))[0]
        if self.config.use.global_tokens:
            vector = self.vector(clips.pixels)
        if self.config.use.text:
            tokens = self.clip.tokenize(clips.captions).to(self.device)
        return Encoded(mean, std, vector, tokens, clips.fps, start, captions=clips.captions, flow=clips.flow)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Clips [b c f H W] -> mean and std of their latents, unscaled, both [b c f h w]."""
        b, frames = len(pixels), rearrange(pixels, "b c f h w -> (b f) c h w")
        size = chunk_size(self.train, *pixels.shape[-2:])
        found = [self.vae.posterior(chunk.to(self.device)) for chunk in frames.split(size)]
        both = (torch.cat([p.mean for p in found]), torch.cat([p.std for p in found]))
        mean, std = (rearrange(one.float(), "(b f) c h w -> b c f h w", b=b) for one in both)
        return mean, std

    def vector(self, pixels: Tensor) -> Tensor:
        """Clips [b c f H W] -> CLIP vectors of their first frames [b d]"""
        self.clip.model.visual.eval()  # it is frozen, even where the text tower beside it is in training mode
        return self.clip.image(clip_pixels(pixels[:, :, 0], self.config).to(self.device))

    def __call__(
        self, clips: Clips | Encoded, draw: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Conditions] | tuple[Tensor, Tensor, Tensor, Conditions, Tensor]:
        encoded = self.ready(clips)
        b = len(encoded.mean)
        posterior = tuple(torch.randn(shape, generator=draw) for shape in self.posterior_shapes(encoded))
        t = draw_timesteps(b, self.num_timesteps, self.train.timestep_power, draw)
        noise = self.offset_noise(encoded, draw)
        drop_text = torch.rand(b, generator=draw) < self.train.text_dropout
        drop_image = torch.rand(b, generator=draw) < self.train.image_dropout
        return self.arguments(encoded, posterior, t, noise, drop_text, drop_image)

    def fixed(self, clips: Encoded, seeds: Sequence[int], t: Tensor) -> tuple:
        """The same for validation: each clip has a seed of its own for its noise, and nothing is dropped."""
        encoded, draws = self.ready(clips), [torch.Generator().manual_seed(seed) for seed in seeds]
        shapes = [(1, *shape[1:]) for shape in self.posterior_shapes(encoded)]
        rows = [
            (*(torch.randn(shape, generator=draw) for shape in shapes), self.offset_noise(encoded, draw, 1))
            for draw in draws
        ]
        latent, first, noise = (torch.cat(parts) for parts in zip(*rows, strict=True))
        kept = torch.zeros(len(t), dtype=torch.bool)
        return self.arguments(encoded, (latent, first), t, noise, kept, kept)

    def ready(self, clips: Clips | Encoded) -> Encoded:
        """Encoded, on the device, in CLIP's precision."""
        encoded = clips if isinstance(clips, Encoded) else self.encode(clips)
        moved = {
            name: tensor.to(self.device, self.clip_dtype if name in ("vector", "text") else None)
            for name, tensor in encoded._asdict().items()
            if isinstance(tensor, Tensor)
        }
        return encoded._replace(**moved)

    def posterior_shapes(self, encoded: Encoded) -> tuple[torch.Size, torch.Size]:
        """Of the clips' latents and of their first frames': two samples of one posterior."""
        return encoded.mean.shape, encoded.mean[:, :, 0].shape

    def offset_noise(self, encoded: Encoded, draw: torch.Generator, b: int | None = None) -> Tensor:
        shape = (b or len(encoded.mean), *encoded.mean.shape[1:])
        return draw_offset_noise(shape, strength=self.train.offset_noise, generator=draw)

    def arguments(
        self,
        encoded: Encoded,
        posterior: tuple[Tensor, Tensor],
        t: Tensor,
        noise: Tensor,
        drop_text: Tensor,
        drop_image: Tensor,
    ) -> tuple:
        x0, first = self.latents(encoded, *posterior)
        noise, weight = noise.to(self.device), None
        if encoded.start is not None:
            noise = refiner_clips.shifted_noise(
                noise, x0, encoded.start, refiner_clips.start_noise_level(self.config)
            )
            weight = refiner_clips.weight_per_clip(noise)
        use = self.config.use
        conditions = Conditions(
            self.text(encoded, drop_text) if use.text else None,
            encoded.vector.masked_fill(drop_image.to(self.device)[:, None], 0.0)
            if use.global_tokens
            else None,
            first,
            torch.full((len(t),), encoded.fps, device=self.device),
        )
        if encoded.flow is not None:
            return x0, t, noise, conditions, weight, encoded.flow
        return (x0, t, noise, conditions) if weight is None else (x0, t, noise, conditions, weight)

    def latents(self, encoded: Encoded, noise: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Noise [b c f h w], [b c h w] -> latents and first-frame latents of the same shapes."""
        mean, std, scale = encoded.mean, encoded.std, self.config.vae.scale
        return (
            scale * (mean + std * noise.to(self.device)),
            scale * (mean[:, :, 0] + std[:, :, 0] * first.to(self.device)),
        )

    def text(self, encoded: Encoded, drop: Tensor) -> Tensor:
        """bool [b] -> text tokens [b k d]; token ids [b k] if the text tower is trained.

        A dropped caption becomes the negative prompt, which the sampler uses for its unconditional branch.
        """
        if self.train.text_encoder:
            return torch.where(drop.to(self.device)[:, None], self.negative, encoded.tokens)
        return self.tokens_of(encoded, drop)

    def tokens_of(self, encoded: Encoded, drop: Tensor) -> Tensor:
        """bool [b] -> text tokens [b k d], whether or not the text tower is trained."""
        drop = drop.to(self.device)
        if encoded.text is not None:
            return torch.where(drop[:, None, None], self.negative_text, encoded.text)
        return self.clip.text(torch.where(drop[:, None], self.negative, encoded.tokens))


def draw_timesteps(b: int, num_timesteps: int, power: float, draw: torch.Generator) -> Tensor:
    """-> int64 [b] in 0 to num_timesteps - 1. The last one is included; its target is v = -x0.

    Uniform for power 1, else num_timesteps (1 - (1 - u)^power) with u uniform in [0, 1). A power of 2 draws
    the noisiest fifth, where the caption decides what moves, 2.2 times as often.
    """
    if power == 1:
        return torch.randint(0, num_timesteps, (b,), generator=draw)
    fraction = 1 - (1 - torch.rand(b, generator=draw, dtype=torch.float64)) ** power
    return (num_timesteps * fraction).long().clamp(max=num_timesteps - 1)


class Cached:
    """A source of encoded clips that draws and encodes each batch once and keeps it in memory.

    It needs a fixed set of `num_clips` clips of the world, whose batches repeat. The run's figures are the
    same with and without it.
    """

    def __init__(self, source: Source, encoding: Encoding, num_clips: int):
        self.source, self.encoding, self.num_clips = source, encoding, num_clips
        self.kept: dict[tuple[Bucket, int], Encoded] = {}

    def __call__(
        self, bucket: Bucket, positions: Sequence[int], drawn: Callable[[], Clips] | None = None
    ) -> Encoded:
        """`drawn` returns the clips if another process has drawn them already."""
        key = bucket, positions[0] % self.num_clips
        if key not in self.kept:
            clips = drawn() if drawn else self.source(bucket, positions)
            self.kept[key] = self.encoding.encode(clips)
        return self.kept[key]


def chunk_size(train: Train, height: int, width: int) -> int:
    """How many frames the VAE encodes at once: `train.encode_chunk`, and fewer where frames are large."""
    return max(1, min(train.encode_chunk, MOST_PIXELS // (height * width)))


def clip_pixels(pixels: Tensor, config: Config) -> Tensor:
    """First frames [b 3 H W] in [-1, 1] -> CLIP's input [b 3 s s], prepared exactly as for sampling."""
    return torch.stack([pipeline.prepare_views(picture(frame), config).clip_pixels for frame in pixels])


def picture(frame: Tensor) -> Image.Image:
    """A frame [3 H W] in [-1, 1] -> PIL image."""
    levels = ((frame.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(rearrange(levels, "c h w -> h w c").contiguous().numpy())


def inherited_parameters(unet: UNet) -> frozenset[str]:
    """Names of the parameters inherited from Stable Diffusion's image UNet, 682 at full size."""
    places = [name for name, module in unet.named_modules() if isinstance(module, INHERITED)]
    places += ["conv_in", "norm_out", "conv_out"]
    starts = tuple(f"{place}." for place in places)
    return frozenset(name for name, _ in unet.named_parameters() if name.startswith(starts))


def make(config: Config, train: Train, source: Source, device: torch.device) -> Part:
    """VAE and CLIP of `weights=`, with its UNet or, if there is none, a new one.

    ValueError if `weights=` lacks the VAE or CLIP, or if settings contradict each other.
    """
    if config.weights in ("", RANDOM):
        raise ValueError(
            "train.part=diffusion is trained on latents; weights= must name a folder with vae and clip, but "
            f"it is {config.weights!r}"
        )
    missing = checkpoint.missing_parts(config.weights)
    if lacking := [part for part in ("vae", "clip") if part in missing]:
        raise ValueError(
            f"weights folder {config.weights} lacks {' and '.join(lacking)}, which train.part=diffusion needs"
        )
    if train.flow_weight and (config.use.output != "moved" or not config.use.concat):
        raise ValueError(
            f"train.flow_weight = {train.flow_weight} is for a UNet that says where each pixel "
            "of the picture moves; set use.output=moved (and use.concat=true), or leave it at 0"
        )
    if train.text_encoder and not config.use.text:
        raise ValueError(
            "train.text_encoder trains a text tower that use.text=false does not read; leave one of them out"
        )
    if isinstance(source, Prepared):
        vae, clip = None, None
        others = {part: checkpoint.stored(config.weights, part) for part in ("vae", "clip")}
        if train.text_encoder:
            clip = load_clip(config, train, device)
            others["clip"] = ChainMap(keep_text_tower(clip), others["clip"])
    else:
        vae, clip = load_vae(config, device), load_clip(config, train, device)
        others = {"vae": vae, "clip": clip}
    if train.shard == "full":
        unet = shards.make_unet(config, train, device, precision(train, device))
    else:
        unet = load_or_create("unet", config, train, device)
        set_checkpointing(unet, train.checkpointing)
        if train.compile:
            compile_training(unet, len(buckets(config, train)), device)
    adapters = adapt(unet, config, train) if train.lora_rank else None
    bucket = buckets(config, train)[0]
    first_stage = refiner_clips.load_first_stage(config, train, device) if train.first_stage else None
    negative = negative_text(source, config, train, device) if isinstance(source, Prepared) else None
    encoding = Encoding(config, train, vae, clip, device, first_stage, negative)
    held = hold_out(source.held_out, encoding) if train.validate else None
    schedule = refiner_clips.schedule(config) if first_stage else pipeline.make_schedule(config)
    model: nn.Module = unet if adapters is None else adapters
    slow = inherited_parameters(unet) if adapters is None else frozenset()
    if train.text_encoder:
        model = nn.ModuleDict({"unet": unet, "text": clip.text_path().requires_grad_(True)})
        slow = frozenset(f"unet.{name}" for name in slow)

    def strip() -> np.ndarray:
        first = list(range(STRIP_CLIPS))
        if held or vae is None:
            shown = held.shown if held else source(bucket._replace(batch=STRIP_CLIPS), first)
            return sampled_and_true(encoding, unet, shown, held and held.pixels)
        clips = source(bucket._replace(batch=STRIP_CLIPS), first)
        whole = pipeline.I2VGenXL(config, unet, vae, clip, device)
        pictures = [picture(frame) for frame in clips.pixels[:, :, 0]]
        frames = pipeline.generate(whole, pictures, clips.captions, first).cpu()
        return rearrange(frames, "b f h w c -> (b h) (f w) c").numpy()

    return Part(
        name="unet" if adapters is None else "adapter",
        model=model,
        step=DiffusionLoss(unet, schedule, clip if train.text_encoder else None, train.flow_weight),
        inputs=encoding,
        source=Cached(source, encoding, train.num_clips) if train.cache else source,
        slow=slow,
        saved=unet,
        others=others,
        strip=strip,
        write=None if adapters is None else lambda folder, origin: adapters.save(folder, origin=origin),
        held_out=held,
    )


def load_vae(config: Config, device: torch.device) -> AutoencoderKL:
    return checkpoint.load("vae", config, device=device, dtype=runtime.DTYPES[config.runtime.vae_dtype])


def load_clip(config: Config, train: Train, device: torch.device) -> ClipEncoders:
    return checkpoint.load("clip", config, device=device, dtype=clip_dtype(config, train))


def clip_dtype(config: Config, train: Train) -> torch.dtype:
    return torch.float32 if train.text_encoder else runtime.DTYPES[config.runtime.encoder_dtype]


def keep_text_tower(clip: ClipEncoders) -> dict[str, Tensor]:
    """Drop the image tower, in place -> the weights that are left, which training changes."""
    clip.model.visual = None
    return checkpoint.inner(clip).state_dict()


@torch.no_grad()
def negative_text(source: Prepared, config: Config, train: Train, device: torch.device) -> Tensor | None:
    """Text tokens of the negative prompt [1 k d]: those that were prepared, or those of another prompt."""
    if train.text_encoder or not config.use.text:
        return None
    if source.facts["negative_prompt"] == config.negative_prompt:
        return source.negative
    clip = load_clip(config, train, device)
    return clip.text(clip.tokenize([config.negative_prompt]).to(device))


@torch.no_grad()
def hold_out(source: Source, encoding: Encoding) -> validation.HeldOut:
    """Encode the clips for validation, once, with the parts of `encoding` or, where it has none, others."""
    config, train, device = encoding.config, encoding.train, encoding.device
    encoder, taken = encoding, []
    if encoding.vae is None and not isinstance(source, Prepared):
        parts = load_vae(config, device), load_clip(config, train, device)
        encoder = Encoding(config, train, *parts, device)

    first, *_ = kinds = buckets(config, train)

    def encode(clips: Clips) -> Encoded:
        if (clips.pixels.shape[2], clips.fps) == (first.frames, first.fps):
            taken.append(clips.pixels[:STRIP_CLIPS])
        encoded = encoder.encode(clips)
        if encoded.tokens is None or train.text_encoder:
            return encoded
        return encoded._replace(text=encoder.clip.text(encoded.tokens))

    batches = validation.collect(source, kinds, train.validate_clips, encode)
    alike = [one for one in batches if (one.mean.shape[2], one.fps) == (first.frames, first.fps)]
    shown = validation.first_of(alike, STRIP_CLIPS)
    pixels = torch.cat(taken)[:STRIP_CLIPS] if taken else None
    return validation.HeldOut(batches, encoding.fixed, encoding.num_timesteps, shown, pixels)


@torch.no_grad()
def sampled_and_true(encoding: Encoding, unet: UNet, shown: Encoded, pixels: Tensor | None) -> np.ndarray:
    """Each clip in two rows, uint8 [H W 3]: sampled from its first frame and caption, and as it is.

    Without `pixels` [b 3 f H W] the autoencoder shows the true clip.
    """
    config, device = encoding.config, encoding.device
    vae = encoding.vae or load_vae(config, device)
    model = pipeline.I2VGenXL(config, unet, vae, encoding.clip, device)
    shown, b = encoding.ready(shown), len(shown.mean)
    noise = pipeline.posterior_noise(model, [SampleNoise(seed) for seed in range(b)])
    mean = shown.mean[:, :, 0]
    noise = torch.zeros_like(mean) if noise is None or config.sample.posterior != "sample" else noise
    first = config.vae.scale * (mean + shown.std[:, :, 0] * noise.to(device))
    fps = torch.full((b,), config.sample.fps, device=device)
    text = negative = None
    if config.use.text:
        text, negative = (encoding.tokens_of(shown, torch.full((b,), drop)) for drop in (False, True))
    vector = shown.vector if config.use.global_tokens else None
    zeros = None
    if vector is not None and config.sample.negative_image == "zeros":
        zeros = torch.zeros_like(vector)
    conditions = ConditionPair(
        Conditions(text, vector, first, fps), Unconditional(negative, zeros, first, fps)
    )
    blank = [""] * b
    sampled = pipeline.decode(model, pipeline.sample(model, blank, blank, range(b), conditions=conditions))
    if pixels is None:
        true = pipeline.decode(model, config.vae.scale * shown.mean)
    else:
        true = torch.stack([video.to_uint8(clip[None], rounding=config.save.rounding)[0] for clip in pixels])
    rows = [rearrange(clips.cpu(), "b f h w c -> b h (f w) c") for clips in (sampled, true)]
    widest = max(row.shape[2] for row in rows)
    rows = [F.pad(row, (0, 0, 0, widest - row.shape[2])) for row in rows]
    return rearrange(torch.stack(rows, 1), "b two h w c -> (b two h) w c").numpy()


def adapt(unet: UNet, config: Config, train: Train) -> lora.Adapters:
    """Freeze the UNet and attach new adapters to it; ValueError if `weights=` holds no trained UNet."""
    if "unet" in checkpoint.missing_parts(config.weights):
        raise ValueError(
            f"train.lora_rank adapts a trained UNet, but the weights folder {config.weights} holds none"
        )
    unet.requires_grad_(False)
    if train.frozen == "bf16":
        unet.bfloat16()
    torch.manual_seed(train.seed)
    return lora.attach(unet, train.lora_modules, rank=train.lora_rank)


def load_or_create(name: str, config: Config, train: Train, device: torch.device) -> nn.Module:
    """The part from `weights=`, or a new one from `train.seed`; float32, all parameters trainable."""
    if config.weights == RANDOM:
        raise ValueError("weights=random cannot be trained on; leave weights out to start from new weights")
    if config.weights and name not in checkpoint.missing_parts(config.weights):
        model = checkpoint.load(name, config, device=device, dtype=torch.float32)
    else:
        torch.manual_seed(train.seed)
        model = checkpoint.construct(name, config).to(device)
    return model.requires_grad_(True)


def other_parts(name: str, config: Config) -> dict[str, dict[str, Tensor]]:
    """The other parts of `weights=`, which are saved together with the trained one."""
    if not config.weights:
        return {}
    missing = checkpoint.missing_parts(config.weights)
    return {
        part: dict(checkpoint.read_part(config.weights, part))
        for part in checkpoint.PARTS
        if part != name and part not in missing
    }
