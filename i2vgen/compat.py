"""diffusers' I2VGenXLPipeline on this implementation: a script of theirs changes one import line.

    from i2vgen.compat import I2VGenXLPipeline  # was: from diffusers import I2VGenXLPipeline

Arguments, defaults and outputs are theirs, the computation is ours. docs/from_diffusers.md tells what
differs, and what each argument is called in `i2vgen` itself, which can do more.

Axes: b clips, f frames, c channels, h w rows and columns; k tokens, d their width, v width of the CLIP
image vector.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from i2vgen import pipeline
from i2vgen.diffusion.sampler import StepInfo
from i2vgen.diffusion.schedulers import from_diffusers
from i2vgen.fast import runtime
from i2vgen.files import checkpoint, given
from i2vgen.memory import plans
from i2vgen.model.conditioning import Conditions, Encoded, Unconditional
from i2vgen.settings import config as settings
from i2vgen.settings import merge, shipped
from i2vgen.settings.wording import counted
from weights_conversion import convert, diffusers_configs, diffusers_layout, rules, sources, unet_diffusers
from weights_conversion import vae as vae_tables

OUTPUTS = ("pil", "np", "pt", "latent")
# What their pipeline does around the network, in our settings.
THEIR_WAY = {
    "sample": {"spacing": "leading", "final_alpha": "one"},
    "preprocess": {"crop": "official"},
    "save": {"rounding": "nearest"},
}
NUMBERS = {dtype: name for name, dtype in runtime.DTYPES.items()}
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class I2VGenXLPipelineOutput:
    """`frames`: b lists of f PIL pictures, or an array [b f h w c], or a tensor [b f c h w]."""

    frames: Any

    def __getitem__(self, name: str | int) -> Any:
        return self.to_tuple()[name] if isinstance(name, int | slice) else getattr(self, name)

    def to_tuple(self) -> tuple:
        return (self.frames,)


class I2VGenXLPipeline:
    """diffusers' pipeline of this name, on our model, which is `pipe.model`.

    Made by `from_pretrained`, or from diffusers' own parts: UNet and VAE are then ours with their weights,
    and their text and image towers are used as they are. ValueError for parts that our model cannot express.
    """

    def __init__(
        self,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        unet: Any = None,
        scheduler: Any = None,
        *,
        model: pipeline.I2VGenXL | None = None,
        defaults: settings.Sample | None = None,
    ):
        self.towers: TheirTowers | None = None
        if model is None:
            if None in (vae, text_encoder, tokenizer, image_encoder, feature_extractor, unet, scheduler):
                raise ValueError("give all seven parts of the pipeline, or use from_pretrained(FOLDER)")
            self.towers = TheirTowers(text_encoder, tokenizer, image_encoder, feature_extractor)
            model = model_of(unet, vae, scheduler, self.towers)
        self.model = model
        self.defaults = defaults or model.config.sample  # sizes of a call that names none
        self.scheduler = (
            scheduler if scheduler is not None else SimpleNamespace(config=self._scheduler_config())
        )
        self.bar: dict[str, Any] = {}

    # --- Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> I2VGenXLPipeline:
        """A native weights folder, a folder of diffusers', or OWNER/NAME on the Hugging Face hub.

        It loads onto the CPU, in float32 unless `torch_dtype` says otherwise; VAE and CLIP stay in float32.
        `use_safetensors` is ignored: reading never executes code. ValueError for what cannot be loaded.
        """
        if torch_dtype is not None and torch_dtype not in NUMBERS:
            raise ValueError(f"torch_dtype is {torch_dtype}; give one of {', '.join(map(str, NUMBERS))}")
        overrides = ["device=cpu", f"dtype={NUMBERS[torch_dtype or torch.float32]}"]
        source = shipped.weights(str(name))
        if not Path(source).exists():
            if local_files_only:
                raise ValueError(
                    f"{source} does not exist here, and local_files_only=True allows no download"
                )
            if sources.HUB.fullmatch(f"hf:{source}") is None:
                raise ValueError(f"{source} does not exist; give a folder, or OWNER/NAME of the hub")
            source = f"hf:{source}" + (f"@{revision}" if revision else "")
        elif (Path(source) / settings.SETTINGS_FILE).is_file():
            ways = [f"{section}.{k}={v}" for section, one in THEIR_WAY.items() for k, v in one.items()]
            cfg = merge.load_config(None, [*ways, *overrides], weights=source)
            return cls(model=pipeline.load_parts(dataclasses.replace(cfg, negative_prompt="")))
        try:
            found = sources.gather([source], variant=variant, compat="diffusers")
        except ValueError as error:
            if source.startswith("hf:"):
                raise ValueError(f"there is no folder {name} here, and {error}") from error
            raise
        cfg, states = convert.read(found, overrides, report := convert.Report(source))
        if report.missing:
            raise ValueError(f"{source} lacks {', '.join(report.missing)}, which sampling needs")
        for note in report.notes:
            if note.startswith("not supported: the folder"):
                warnings.warn(note, stacklevel=2)
        return cls(model=assembled(cfg, states, source), defaults=settings.Sample())

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write a new folder that their `from_pretrained`, and ours, load."""
        if self.towers is not None:
            raise ValueError(
                "a pipeline with text and image towers of transformers is saved by diffusers itself"
            )
        parts = {part: checkpoint.inner(one).state_dict() for part, one in self.model.parts.items()}
        diffusers_layout.write_folder(self.model.config, parts, folder, variant=variant)

    def _scheduler_config(self) -> dict[str, Any]:
        """Fit for `SomeScheduler.from_config(pipe.scheduler.config)`"""
        return diffusers_configs.scheduler_config(self.model.config.schedule, self.model.config.sample)

    # --- Where and how

    def to(self, *where: Any) -> I2VGenXLPipeline:
        """A device, a dtype, or both"""
        device = next((one for one in where if not isinstance(one, torch.dtype)), None)
        dtype = next((one for one in where if isinstance(one, torch.dtype)), None)
        self.model.to(device, dtype)
        if self.towers is not None:
            self.towers.to(self.model.device)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.unet.conv_in.weight.dtype

    @property
    def components(self) -> dict[str, Any]:
        """Our parts, and the scheduler"""
        return {**self.model.parts, "scheduler": self.scheduler}

    @property
    def unet(self) -> torch.nn.Module:
        return self.model.unet

    @property
    def vae(self) -> torch.nn.Module:
        return self.model.vae

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = "cuda") -> None:
        """Parts wait on the CPU until they are needed. Without a GPU there is nothing to do."""
        self._offload("balanced", gpu_id, device)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = "cuda") -> None:
        """Blocks wait on the CPU, and less memory is used elsewhere too"""
        self._offload("low", gpu_id, device)

    def _offload(self, memory: str, gpu_id: int | None, device: Any) -> None:
        if torch.cuda.is_available():
            self.model.to(str(device) if gpu_id is None else f"cuda:{gpu_id}", memory=memory)

    def enable_vae_slicing(self) -> None:
        """The VAE decodes `decode_chunk_size` frames at once in any case"""

    disable_vae_slicing = enable_vae_slicing

    def enable_vae_tiling(self) -> None:
        """The memory plan of a call tiles where it must, exactly"""

    disable_vae_tiling = enable_vae_tiling

    def enable_attention_slicing(self, slice_size: Any = "auto") -> None:
        """PyTorch's fused attention needs no slices"""

    def disable_attention_slicing(self) -> None:
        """See `enable_attention_slicing`"""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """See `enable_attention_slicing`"""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """See `enable_attention_slicing`"""

    def fuse_qkv_projections(self) -> None:
        """Fused from the start (runtime.savings)"""

    unfuse_qkv_projections = fuse_qkv_projections

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this I2VGenXLPipeline has no {name}; docs/from_diffusers.md says what there is instead"
        )

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        raise ValueError(
            "FreeU is not built here; use.skip_filter is a filter of the skips (docs/laboratory.md)"
        )

    def set_progress_bar_config(
        self, *, disable: bool = False, desc: str | None = None, leave: bool = True
    ) -> None:
        self.bar = {"disable": disable, "desc": desc, "leave": leave}

    def load_lora_weights(self, source: str | Path, *, scale: float = 1.0) -> None:
        """Adapters of a folder or file, in peft's names, ours, or converted ones"""
        self.model.lora(source, scale=scale)

    def unload_lora_weights(self) -> None:
        while self.model.adapters:
            self.model.adapters.popitem()[1].remove()

    # --- Sampling

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        target_fps: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 9.0,
        negative_prompt: str | Sequence[str] | None = None,
        eta: float = 0.0,
        num_videos_per_prompt: int | None = 1,
        decode_chunk_size: int | None = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        clip_skip: int | None = 1,
    ) -> I2VGenXLPipelineOutput | tuple:
        """Their call. Sizes default to theirs, 704 x 1280 and 16 frames; for a native folder, to its own.

        As there, the first-frame latent is drawn from PyTorch's global generator, and `generator` gives the
        noise. ValueError, before any computation, for what cannot work.
        """
        given.choice("output_type", output_type, OUTPUTS)
        if cross_attention_kwargs:
            raise ValueError("cross_attention_kwargs has no meaning here; adapters have pipe.model.lora(...)")
        texts, embeds = self._texts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        each = given.whole_number("num_videos_per_prompt", num_videos_per_prompt, 1)
        prompts = len(texts[0] or embeds[0])
        count = prompts * each
        pictures = self._pictures(image, prompts)
        changes = {
            "height": given.whole_number("height", height, self.defaults.height),
            "width": given.whole_number("width", width, self.defaults.width),
            "frames": given.whole_number("num_frames", num_frames, self.defaults.frames),
            "fps": given.whole_number("target_fps", target_fps, self.defaults.fps),
            "steps": given.whole_number("num_inference_steps", num_inference_steps, 50),
            "guidance": max(given.number("guidance_scale", guidance_scale), 1.0),
            "eta": given.number("eta", eta),
            "sampler": "ddim",
        }
        model = self.model.with_settings(clips=count, **changes)
        chunk = count * changes["frames"] if decode_chunk_size is None else decode_chunk_size
        model._config = dataclasses.replace(
            model.config, runtime=dataclasses.replace(model.config.runtime, vae_chunk=chunk)
        )
        c, f, h, w = shape = pipeline.latent_shape(model.config)
        if latents is not None:
            latents = given.noise(latents, (count, *shape))
        sampler = None
        if callable(getattr(self.scheduler, "set_timesteps", None)):
            sampler = from_diffusers(self.scheduler, eta=eta)

        encoded = self._encoded(model, pictures, texts, embeds, clip_skip)
        encoded = Encoded(*(type(one)(*(_repeated(t, each) for t in one)) for one in encoded))
        start = normal((count, c, f, h, w), generator) if latents is None else latents.float()

        def noise(x: Tensor) -> Tensor:
            # theirs draws frames as a batch
            if isinstance(generator, Sequence):
                drawn = torch.stack([normal((f, c, h, w), one) for one in generator])
            else:
                drawn = normal((count * f, c, h, w), generator).unflatten(0, (count, f))
            return rearrange(drawn, "b f c h w -> b c f h w").to(x)

        cond, uncond = encoded
        with plans.on_device(model.offloaded, "unet"), _Steps(self.bar) as step:
            made = (sampler or pipeline.named_sampler(model.config))(
                pipeline.network(model, cond, uncond), start.to(model.device), model.schedule,
                steps=num_inference_steps, noise=noise, on_step=step,
            )  # fmt: skip
        frames = made if output_type == "latent" else finished(pipeline.pixels(model, made), output_type)
        return I2VGenXLPipelineOutput(frames) if return_dict else (frames,)

    def _texts(
        self, prompt: Any, embeds: Any, negative: Any, negative_embeds: Any
    ) -> tuple[tuple[list[str], list[str]], tuple[Tensor | None, Tensor | None]]:
        """-> prompts and negative prompts, and embeddings in place of either"""
        for one, other, name in ((prompt, embeds, "prompt"), (negative, negative_embeds, "negative_prompt")):
            if one is not None and other is not None:
                raise ValueError(f"give {name} or {name}_embeds, not both")
        if prompt is None and embeds is None:
            raise ValueError("give prompt, or prompt_embeds in its place")
        for name, one in (("prompt_embeds", embeds), ("negative_prompt_embeds", negative_embeds)):
            if one is not None and not (isinstance(one, Tensor) and one.ndim == 3):
                raise ValueError(f"{name} must be a tensor [b k d]")
        if embeds is not None and negative_embeds is not None and embeds.shape != negative_embeds.shape:
            raise ValueError(
                f"prompt_embeds and negative_prompt_embeds have shapes {tuple(embeds.shape)} and "
                f"{tuple(negative_embeds.shape)}; give the same"
            )
        texts = [] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts and embeds is None:
            raise ValueError("prompt is an empty list; give one text or several")
        count = len(texts) or len(embeds)
        negatives = given.spread(negative, "", count) if negative_embeds is None else []
        return ([given.prompt(one) for one in texts], negatives), (embeds, negative_embeds)

    def _pictures(self, image: Any, count: int) -> list[Image.Image]:
        """PIL pictures or tensors [3 h w] from 0 to 1, one for all prompts or as many"""
        many = isinstance(image, list | tuple) or (isinstance(image, Tensor | np.ndarray) and image.ndim == 4)
        pictures = [given.picture(one, exif="ignore") for one in (image if many else [image])]
        if len(pictures) not in (1, count):
            got = counted(len(pictures), "picture")
            raise ValueError(f"got {got} for {counted(count, 'prompt')}; give one, or as many")
        return pictures * (count // len(pictures))

    def _encoded(
        self,
        model: pipeline.I2VGenXL,
        pictures: list[Image.Image],
        texts: tuple[list[str], list[str]],
        embeds: tuple[Tensor | None, Tensor | None],
        clip_skip: int | None,
    ) -> Encoded:
        """Conditions of every prompt"""
        c, _, h, w = pipeline.latent_shape(model.config)
        posterior = normal((len(pictures), c, h, w), None)
        views = [pipeline.prepare_views(picture, model.config) for picture in pictures]
        text = [
            self._text(model, given_texts, clip_skip) if own is None else own.to(model.device)
            for given_texts, own in zip(texts, embeds, strict=True)
        ]
        latent = pipeline.image_latent(model, views, posterior)
        clip_pixels = torch.stack([view.clip_pixels for view in views]).to(model.device)
        if self.towers is not None:
            vector = self.towers.image(clip_pixels)
        else:
            with plans.on_device(model.offloaded, "clip"):
                vector = model.clip.image(clip_pixels)
        fps = torch.full((len(pictures),), model.config.sample.fps, device=model.device)
        encoded = Encoded(
            Conditions(text[0], vector, latent, fps),
            Unconditional(text[1], torch.zeros_like(vector), latent, fps),
        )
        return given.conditions(encoded, model.config, len(pictures))

    def _text(self, model: pipeline.I2VGenXL, prompts: list[str], clip_skip: int | None) -> Tensor:
        """[b k d]"""
        if self.towers is not None:
            return self.towers.text(prompts, clip_skip)
        if clip_skip not in (None, 1):
            raise ValueError(f"clip_skip is {clip_skip}; give 1 (as trained) or None for the last layer")
        clip = copy.copy(model.clip)
        layer = "penultimate" if clip_skip else "last"
        clip.settings = dataclasses.replace(clip.settings, text_layer=layer)
        with plans.on_device(model.offloaded, "clip"):
            return clip.text(clip.tokenize(prompts).to(model.device))

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        device: Any = None,
        num_videos_per_prompt: int = 1,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """-> prompt_embeds and negative_prompt_embeds, each [b k d]"""
        texts, embeds = self._texts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        made = [
            self._text(self.model, one, clip_skip) if own is None else own
            for one, own in zip(texts, embeds, strict=True)
        ]
        return tuple(_repeated(one, num_videos_per_prompt).to(device or self.device) for one in made)


class _Steps:
    """A progress bar as `on_step`"""

    def __init__(self, options: Mapping[str, Any]):
        self.bar = tqdm(**options)

    def __enter__(self) -> _Steps:
        return self

    def __call__(self, info: StepInfo) -> None:
        if info.index == 0:
            self.bar.reset(total=info.num_steps)
        self.bar.update()

    def __exit__(self, *raised: object) -> None:
        self.bar.close()


class TheirTowers:
    """Text and image encoders of transformers, used as diffusers uses them."""

    def __init__(self, text_encoder: Any, tokenizer: Any, image_encoder: Any, feature_extractor: Any):
        self.encoder, self.tokenizer, self.image_encoder = text_encoder, tokenizer, image_encoder
        self.extractor = feature_extractor

    def to(self, device: torch.device) -> None:
        self.encoder.to(device)
        self.image_encoder.to(device)

    def text(self, prompts: list[str], clip_skip: int | None) -> Tensor:
        """[b k d]"""
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.encoder.device)  # fmt: skip
        if clip_skip is None:
            return self.encoder(ids)[0]
        layers = self.encoder(ids, output_hidden_states=True).hidden_states
        inside = getattr(self.encoder, "text_model", self.encoder)
        return inside.final_layer_norm(layers[-(clip_skip + 1)])

    def image(self, pixels: Tensor) -> Tensor:
        """[b 3 s s] -> [b v]"""
        return self.image_encoder(pixels.to(self.image_encoder.dtype)).image_embeds

    def settings(self) -> dict[str, Any]:
        """As much of our `clip` section as the rest of the model asks for"""
        width, side = self.encoder.config.hidden_size, self.extractor.crop_size["height"]
        return {
            "embed_dim": self.image_encoder.config.projection_dim,
            "image_mean": list(self.extractor.image_mean),
            "image_std": list(self.extractor.image_std),
            "text": {"width": width, "heads": 1, "layers": 2,
                     "context_length": self.tokenizer.model_max_length},
            "vision": {"image_size": side, "patch_size": side, "width": 8, "layers": 1, "head_width": 8},
        }  # fmt: skip


def model_of(unet: Any, vae: Any, scheduler: Any, towers: TheirTowers) -> pipeline.I2VGenXL:
    """diffusers' UNet, VAE and scheduler -> our model with their weights; its CLIP is never used."""
    schedule, notes = diffusers_configs.schedule_settings(dict(scheduler.config))
    for note in notes:
        warnings.warn(note, stacklevel=3)
    layout = {
        "unet": diffusers_configs.unet_settings(dict(unet.config)),
        "vae": diffusers_configs.vae_settings(dict(vae.config)),
        "use": {"concat_gain": 1.0, "sinusoid": "exp", "frame_planes": "network"},
        "schedule": schedule,
        "clip": towers.settings(),
        "runtime": {"device": str(unet.device), "dtype": NUMBERS[unet.dtype]},
        "negative_prompt": "",
    }
    cfg = merge.from_dict(layout | THEIR_WAY)
    tables = {"unet": unet_diffusers.rows(cfg.unet), "vae": vae_tables.diffusers_rows(cfg.vae)}
    parts = {"unet": unet, "vae": vae}
    states = {part: rules.to_ours(table, parts[part].state_dict()) for part, table in tables.items()}
    states["clip"] = dict(checkpoint.random_state(checkpoint.build("clip", cfg), seed=0))
    return assembled(cfg, states, "the parts given")


def assembled(cfg: settings.Config, states: Mapping[str, Any], source: str) -> pipeline.I2VGenXL:
    """Settings and state dicts -> a model, as `pipeline.load_parts` makes one from a native folder."""
    side = cfg.size_multiple
    small = dataclasses.replace(cfg.sample, width=side, height=side, frames=1)
    cfg = dataclasses.replace(cfg, sample=small, weights=source)
    pipeline.refuse_unsampleable(cfg)
    asked, ledger = cfg.runtime, plans.Ledger(cfg)
    cfg, _ = plans.choose(cfg, ledger=ledger)
    parts = {}
    for part in checkpoint.PARTS:
        parts[part] = checkpoint.build(part, cfg)
        checkpoint.fill(
            parts[part], states[part], device=asked.device, dtype=plans.dtype(part, cfg.runtime),
            source=f"{part} of {source}",
        )  # fmt: skip
        parts[part].eval().requires_grad_(False)
    model = pipeline.assemble(cfg, *parts.values(), torch.device(asked.device), asked)
    model.plan.ledger = ledger  # of the same model, should a call take more
    return model


def normal(shape: Sequence[int], generator: Generators) -> Tensor:
    """Standard normal float32, as diffusers draws it: on the generator's device, or one sample of each"""
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            got = counted(len(generator), "generator")
            raise ValueError(f"got {got} for {counted(shape[0], 'clip')}; give as many")
        return torch.cat([normal((1, *shape[1:]), one) for one in generator])
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"the generator is {given.kind(generator)}; give a torch.Generator, or a list of them"
        )
    device = "cpu" if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device)


def finished(pixels: Tensor, output_type: str) -> Any:
    """[b f 3 H W] from 0 to 1 -> what `output_type` names"""
    if output_type == "pt":
        return pixels
    array = pixels.movedim(2, -1).cpu().numpy()
    if output_type == "np":
        return array
    return [[Image.fromarray(frame) for frame in clip] for clip in np.rint(255 * array).astype(np.uint8)]


def _repeated(tensor: Tensor | None, n: int) -> Tensor | None:
    return None if tensor is None else tensor.repeat_interleave(n, dim=0)
