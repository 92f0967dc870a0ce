"""All settings of the project: frozen dataclasses whose defaults are the released model.

`merge.py` layers YAML files, weights folders and command lines over these defaults. `sample.quality` stands
for several settings: it overrides those of earlier layers, and settings given with it or later override it.

Impossible values and combinations raise a ValueError that names the fields, before any work. Sizes are in
pixels, in the order width, height; the latent is `vae.factor` times smaller.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import yaml

# The negative prompt that the released model is always sampled with.
NEGATIVE_PROMPT = (
    "Distorted, discontinuous, Ugly, blurry, low resolution, motionless, static, disfigured, "
    "disconnected limbs, Ugly faces, incomplete arms"
)
# The texts of MS-Vid2Vid-XL: suffix of the refine prompt, and prompt of the unconditional branch.
REFINE_SUFFIX = (
    ", cinematic, High Contrast, highly detailed, unreal engine, taken using a Canon EOS R camera, "
    "hyper detailed photo - realistic maximum detail, 32k, Color Grading, ultra HD, extreme meticulous "
    "detailing, skin pore detailing, hyper sharpness, perfect without deformations, Unreal Engine 5, "
    "4k render"
)
REFINE_NEGATIVE_PROMPT = (
    "worst quality, normal quality, low quality, low res, blurry, text, watermark, logo, banner, "
    "extra digits, cropped, jpeg artifacts, signature, username, error, sketch ,duplicate, ugly, "
    "monochrome, horror, geometry, mutation, disgusting"
)
MAX_FRAMES = 64
MAX_SEED = 2**63 - 1
# Larger numbers are slips: they would only fail later, after minutes, for want of memory or time.
MAX_SIDE = 2**16  # pixels
MAX_COUNT = 2**16  # channels, tokens, clips
MAX_LAYERS = 2**8  # of CLIP's towers
MAX_BLOCKS = 2**5  # per level
MAX_LEVELS = 16  # each halves the rows and columns
MAX_VOCABULARY = MAX_TIMESTEPS = 2**20
RANDOM = "random"  # `weights=random`: seeded random weights, to run the pipeline without a model
ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = str(ASSETS / "pictures")  # the model of every command that samples
LAB = str(ASSETS / "small")  # `weights=lab`: the smallest, for studies and tests
SHIPPED_REFINER = str(ASSETS / "small_refiner")  # the lab model's second stage
SETTINGS_FILE = "settings.json"
FORMAT = 1  # of native weights folders
# open_clip's defaults for values missing in a model's JSON; our own defaults are those of ViT-H-14.
OPEN_CLIP_VISION = {"image_size": 224, "patch_size": 16, "layers": 12, "width": 768, "head_width": 64}
OPEN_CLIP_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}


@dataclass(frozen=True)
class Use:
    """All ablation switches. A part that is switched off is not built, so its parameters do not exist.

    Loading finds out by itself which tensors of the released model are then left out, and which ones start
    untrained because a switch adds or replaces a part (`checkpoint.ablation`).
    """

    text: bool = True  # the prompt's tokens in cross-attention (77)
    global_tokens: bool = True  # CLIP image vector as tokens in cross-attention (4)
    local_tokens: bool = True  # first-frame latent as tokens in cross-attention (64)
    concat: bool = True  # first-frame latent and frame positions as extra input channels
    concat_temporal: bool = True  # the small transformer over frames in the concat branch
    fps: bool = True  # fps embedding added to the timestep embedding
    temporal_attention: bool = True  # all temporal transformers, including the one after the input conv
    temporal_convolution: bool = True  # the four temporal convolutions after every ResBlock
    temporal_second_attention: bool = True  # second self-attention of every temporal transformer
    frame_positions: bool = False  # position embeddings in temporal transformers (released model: none)
    # Factor on the concat branch. The official code adds it twice, in training too; diffusers adds it once.
    concat_gain: float = 2.0
    # Float32 formula of the sinusoidal embedding: `pow` (official) or `exp` (diffusers); they differ by up to
    # 6e-5.
    sinusoid: Literal["pow", "exp"] = "pow"
    # Dtype of the frame-position planes i/(f-1): float32 (official) or the network's (diffusers).
    frame_planes: Literal["float32", "network"] = "float32"
    # Input of the concat branch for frames after the first: a plane of the frame's position i/(f-1)
    # (official), zeros, or the picture again.
    later_frames: Literal["position", "zeros", "picture"] = "position"
    # "from_picture": the output is added to the first-frame latent in every frame, so that zero means a still
    # clip. "moved": a second output layer says where to each pixel of that latent moves, and where it is left
    # out, so that a moving thing need not be drawn anew. Both are for schedule.prediction=x0, belong to the
    # concat branch and go with it.
    output: Literal["plain", "from_picture", "moved"] = "plain"
    # "half": every level has half the rows and columns of the one above it. "margin" (the refiners): one
    # extra row at the top and bottom, removed when upsampling. It restricts the heights, see `UNet.margin`.
    resampling: Literal["half", "margin"] = "half"
    # Filter on backbone and skip in the decoder's first two blocks; "sr600" is SR600's.
    skip_filter: Literal["none", "sr600"] = "none"

    def __post_init__(self):
        if not (self.text or self.global_tokens or self.local_tokens):
            raise ValueError(
                "use.text, use.global_tokens and use.local_tokens are all off, so cross-attention has no "
                "context tokens; keep at least one of them"
            )
        if not math.isfinite(self.concat_gain):
            raise ValueError(f"use.concat_gain is {self.concat_gain}; give a finite number (official 2.0)")


# The two other networks of the lineage; their parameters are subsets of the released model's.
V1_USE = Use(text=False, local_tokens=False, concat=False)  # the preview base: image vector and fps only
REFINER_USE = Use(global_tokens=False, local_tokens=False, concat=False, fps=False, resampling="margin")
# Switches of `Use` that decide which parameters exist; the others change only the arithmetic, except that
# output=moved adds a layer.
STRUCTURAL_SWITCHES = tuple(f.name for f in dataclasses.fields(Use) if f.type == "bool")


@dataclass(frozen=True)
class UNet:
    """The spatio-temporal UNet. Per-level settings are parallel tuples, finest level first."""

    in_channels: int = 4
    out_channels: int = 4
    base_width: int = 320
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)  # spatial and temporal transformers
    head_width: int = 64
    first_temporal_heads: int = 8  # heads of the temporal transformer after the input conv
    context_width: int = 1024
    norm_groups: int = 32
    dropout: float = 0.1  # ResBlocks
    temporal_conv_dropout: float = 0.1
    # hierarchical image conditions
    image_channels: int = 4  # channels of the first-frame latent
    image_vector_width: int = 1024  # CLIP joint dimension
    num_global_tokens: int = 4
    local_grid: int = 32  # the latent is pooled to local_grid x local_grid; (local_grid / 4)^2 tokens
    local_widths: tuple[int, int] = (32, 64)
    concat_channels: int = 4
    concat_hidden: int = 16  # width of the concat branch's convolutions
    concat_layers: int = 1
    concat_heads: int = 2
    concat_head_width: int = 4
    concat_dropout: float = 0.05
    # use.output=moved: places per latent pixel, along each side, of the grid on which the picture moves. 1 is
    # the latent itself, too coarse for things that are a few of its pixels wide.
    moved_grid: int = 1

    def __post_init__(self):
        _positive(self, "unet")
        if self.moved_grid > 8:
            raise ValueError(f"unet.moved_grid is {self.moved_grid}; give 1 to 8 places per latent pixel")
        levels = len(self.width_multipliers)
        if levels == 0:
            raise ValueError("unet.width_multipliers is empty; give one multiplier per resolution level")
        if len(self.attention_levels) != levels:
            raise ValueError(
                f"unet.attention_levels has {len(self.attention_levels)} entries, "
                f"unet.width_multipliers {levels}; give one of each per level"
            )
        for level, width in enumerate(self.widths):
            if width % self.norm_groups:
                raise ValueError(
                    f"unet.base_width x unet.width_multipliers[{level}] = {width} is not a multiple of "
                    f"unet.norm_groups = {self.norm_groups}"
                )
            if width % self.head_width and (self.attention_levels[level] or level == levels - 1):
                raise ValueError(
                    f"unet.base_width x unet.width_multipliers[{level}] = {width} is not a multiple of "
                    f"unet.head_width = {self.head_width}"
                )
        if self.local_grid % 4:
            raise ValueError(
                f"unet.local_grid is {self.local_grid}; the local tokens halve it twice, use a multiple of 4"
            )
        for name in ("dropout", "temporal_conv_dropout", "concat_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"unet.{name} is {getattr(self, name)}; give a probability in [0, 1)")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base_width * multiplier for multiplier in self.width_multipliers)

    def context_tokens(self, text_length: int) -> int:
        """The number of context tokens of cross-attention, if all kinds are on."""
        return text_length + (self.local_grid // 4) ** 2 + self.num_global_tokens

    @property
    def embedding_width(self) -> int:
        return 4 * self.base_width

    @property
    def factor(self) -> int:
        """The latent's rows and columns must be multiples of this: a factor of two per downsampling."""
        return 2 ** (len(self.width_multipliers) - 1)

    def margin(self, use: Use) -> int:
        """The number of latent rows modulo `factor`; the number of columns modulo `factor` is always 0.

        With `use.resampling=margin`, h rows become h / 2 + 1 when downsampling and 2 h - 2 when upsampling.
        These agree at every level if and only if h = 2 modulo `factor`.
        """
        return 2 % self.factor if use.resampling == "margin" else 0


@dataclass(frozen=True)
class VAE:
    """The KL autoencoder of Stable Diffusion 2.1, or a smaller one of the same family."""

    channels: int = 3
    base_width: int = 128
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    z_channels: int = 4  # channels inside, before quant_conv
    embed_dim: int = 4  # channels of the latent
    resolution: int = 256  # of level 0; attention_resolutions lists the levels with attention, as resolutions
    attention_resolutions: tuple[int, ...] = ()
    norm_groups: int = 32
    scale: float = 0.18215  # latent = scale x posterior sample

    def __post_init__(self):
        _positive(self, "vae", skip=("attention_resolutions",))
        if not self.width_multipliers:
            raise ValueError("vae.width_multipliers is empty; give one multiplier per resolution level")
        for level, multiplier in enumerate(self.width_multipliers):
            if (self.base_width * multiplier) % self.norm_groups:
                raise ValueError(
                    f"vae.base_width x vae.width_multipliers[{level}] = {self.base_width * multiplier} is "
                    f"not a multiple of vae.norm_groups = {self.norm_groups}"
                )
        reached = {self.resolution // 2**level for level in range(len(self.width_multipliers))}
        if unknown := set(self.attention_resolutions) - reached:
            raise ValueError(
                f"vae.attention_resolutions contains {sorted(unknown)}, but vae.resolution = "
                f"{self.resolution} gives only levels of {sorted(reached, reverse=True)}"
            )

    @property
    def factor(self) -> int:
        return 2 ** (len(self.width_multipliers) - 1)


@dataclass(frozen=True)
class Clip:
    """An open_clip model; `vision` and `text` use open_clip's names. Default: ViT-H-14.

    `model` replaces the rest: an open_clip model name, or the path of a JSON file in open_clip's format.
    """

    model: Optional[str] = None  # noqa: UP045 (OmegaConf reads this annotation)
    embed_dim: int = 1024
    quick_gelu: bool = False
    vision: dict[str, Any] = field(
        default_factory=lambda: {
            "image_size": 224,
            "patch_size": 14,
            "layers": 32,
            "width": 1280,
            "head_width": 80,
        }
    )
    text: dict[str, Any] = field(
        default_factory=lambda: {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 1024,
            "heads": 16,
            "layers": 24,
        }
    )
    # A custom vocabulary for a small model: each of these words is one token, and other words are split into
    # parts of these and letters. Empty: open_clip's 49,408 tokens.
    words: tuple[str, ...] = ()
    text_layer: Literal["penultimate", "last"] = "penultimate"
    pad_token: int = 0  # padding after the end of the text; diffusers' tokenizer pads with 49407
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        for name, needed in (("vision", "image_size"), ("text", "width"), ("text", "layers")):
            if needed not in getattr(self, name):
                raise ValueError(f"clip.{name} lacks {needed!r}; give a complete open_clip {name}_cfg")
        for name in ("hf_model_name", "hf_tokenizer_name"):
            if self.text.get(name):
                raise ValueError(
                    f"clip.text.{name} is set, but text towers from Hugging Face are not supported; use an "
                    "open_clip model with its own text tower"
                )
        _at_most("clip.embed_dim", self.embed_dim, MAX_COUNT)
        counts = [("vision", "image_size")]
        counts += [("text", key) for key in ("context_length", "vocab_size", "layers", "width", "heads")]
        transformer = isinstance(self.vision.get("layers"), int)  # a ResNet has a list of stages
        if transformer:
            counts += [("vision", key) for key in ("patch_size", "width", "head_width")]
        for name, key in counts:
            value = getattr(self, name).get(key, 1)
            if type(value) is not int or value < 1:
                raise ValueError(f"clip.{name}.{key} is {value!r}; give a positive integer")
            most = {"layers": MAX_LAYERS, "vocab_size": MAX_VOCABULARY}.get(key, MAX_COUNT)
            _at_most(f"clip.{name}.{key}", value, most)
        if self.vision.get("patch_size", 1) > self.image_size:
            raise ValueError(
                f"clip.vision.patch_size is {self.vision['patch_size']} but clip.vision.image_size is "
                f"{self.image_size}; a patch cannot be larger than the picture"
            )
        if not all(std > 0 for std in self.image_std):
            raise ValueError(f"clip.image_std is {self.image_std}; all must be above 0")
        if self.text_length < 3:
            raise ValueError(f"clip.text.context_length is {self.text_length}; give at least 3 tokens")
        for name, part in (("text", "heads"), ("vision", "head_width"))[: 1 + transformer]:
            width, share = getattr(self, name).get("width", 0), getattr(self, name).get(part, 1)
            if width % share:
                raise ValueError(
                    f"clip.{name}.width is {width}, not a multiple of clip.{name}.{part} = {share}"
                )
        if not 0 <= self.pad_token < self.text.get("vocab_size", 1):
            raise ValueError(
                f"clip.pad_token is {self.pad_token}; give 0 to below clip.text.vocab_size = "
                f"{self.text.get('vocab_size')}"
            )
        if wrong := [w for w in self.words if not (w.isascii() and w.isalpha() and w.islower())]:
            raise ValueError(f"clip.words contains {wrong[0]!r}; give words of the letters a to z only")
        if self.words and self.text.get("tokenizer_kwargs"):
            raise ValueError("clip.words and clip.text.tokenizer_kwargs are both given; choose one of them")
        if self.text_layer == "penultimate" and self.text["layers"] < 2:
            raise ValueError(
                f"clip.text_layer is penultimate but clip.text.layers is {self.text['layers']}; "
                "use at least 2 layers or clip.text_layer=last"
            )

    @property
    def image_size(self) -> int:
        return self.vision["image_size"]

    @property
    def text_length(self) -> int:
        return self.text.get("context_length", 77)


@dataclass(frozen=True)
class Schedule:
    """The diffusion process that the weights were trained for."""

    # logsnr_cosine is the refiners' schedule and needs their sampler
    kind: Literal["cosine", "linear", "linear_sd", "quadratic", "logsnr_cosine"] = "cosine"
    num_timesteps: int = 1000
    cosine_s: float = 0.008
    init_beta: Optional[float] = None  # noqa: UP045
    last_beta: Optional[float] = None  # noqa: UP045
    logsnr_shift: tuple[float, float] = (2.0, 4.0)  # of logsnr_cosine, at the clean and at the noisy end
    zero_terminal_snr: bool = True
    prediction: Literal["v", "eps", "x0", "previous"] = "v"
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"

    def __post_init__(self):
        if self.num_timesteps < 2:
            raise ValueError(f"schedule.num_timesteps is {self.num_timesteps}; give at least 2")
        _at_most("schedule.num_timesteps", self.num_timesteps, MAX_TIMESTEPS)
        if not 0 <= self.cosine_s < 1:
            raise ValueError(f"schedule.cosine_s is {self.cosine_s}; give 0 to below 1 (official 0.008)")
        if len(self.logsnr_shift) != 2 or not all(0 < shift < math.inf for shift in self.logsnr_shift):
            raise ValueError(f"schedule.logsnr_shift is {self.logsnr_shift}; give two positive numbers")
        if self.kind == "linear_sd" and (self.init_beta is None or self.last_beta is None):
            raise ValueError(
                "schedule.kind is linear_sd, which has no default betas; give schedule.init_beta and "
                "schedule.last_beta (Stable Diffusion: 0.00085 and 0.012)"
            )
        if self.zero_terminal_snr and self.prediction == "eps" and self.kind != "cosine":
            raise ValueError(
                "schedule.prediction is eps and schedule.zero_terminal_snr is on: at the last timestep, eps "
                "does not determine the picture; use prediction=v or zero_terminal_snr=false"
            )


@dataclass(frozen=True)
class Sample:
    """How to sample. Sizes are in pixels; `fps` conditions the motion and is not the file's frame rate."""

    width: int = 1280
    height: int = 704
    frames: int = 16
    fps: int = 16
    # A preset (QUALITIES): "exact" is the official sampler, "fast" and "draft" make fewer, cheaper network
    # calls
    quality: Literal["exact", "fast", "draft"] = "exact"
    steps: int = 50
    # ancestral visits every timestep (steps=1000); heun calls the network twice per step
    sampler: Literal["ddim", "ancestral", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler", "heun"] = "ddim"
    guidance: float = 9.0  # 1.0 = one pass without the negative prompt
    eta: float = 0.0  # 0 = deterministic DDIM, 1 = as noisy as ancestral sampling
    noise_offset: float = 0.0  # scale of an extra normal number per channel and frame in the noise; v1: 0.1
    seed: tuple[int, ...] = (8888,)  # every picture-prompt pair is generated once per seed
    # "official" may make more steps than requested (31 for 30); the others make exactly `steps`
    spacing: Literal["official", "leading", "trailing", "linspace"] = "official"
    eps_form: Literal["direct", "recovered"] = "direct"  # official: recovered, which gives NaN at t = 999
    final_alpha: Literal["first", "one"] = (
        "first"  # the last step ends at abar[0] (official) or 1 (diffusers)
    )
    guidance_precision: Literal["float32", "network"] = "float32"  # official: the network's float16
    # Guidance only at timesteps within this fraction of the schedule, 0 clean to 1 noise; elsewhere a single
    # pass
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0  # 0 to 1: how far to undo guidance's increase of contrast; often 0.7
    deep_cache: int = 0  # compute the deep UNet blocks only every N-th step; 0, 1: off
    deep_cache_blocks: int = 2  # number of the finest level's up blocks that are computed in every step
    posterior: Literal["sample", "mode"] = "sample"  # of the first-frame latent; official: sample
    negative_image: Literal["zeros", "none"] = "zeros"  # CLIP image vector of the unconditional branch
    adapter_scale: float = 1.0  # strength of `adapter=`

    def __post_init__(self):
        if not 1 <= self.frames <= MAX_FRAMES:
            raise ValueError(f"sample.frames is {self.frames}; give 1 to {MAX_FRAMES}")
        if self.fps < 1:
            raise ValueError(f"sample.fps is {self.fps}; give at least 1 (the released model: 8 or 16)")
        for name, most in (("width", MAX_SIDE), ("height", MAX_SIDE), ("fps", MAX_COUNT)):
            _at_most(f"sample.{name}", getattr(self, name), most)
        if not math.isfinite(self.guidance):
            raise ValueError(f"sample.guidance is {self.guidance}; give a finite number (official 9.0)")
        if not math.isfinite(self.adapter_scale):
            raise ValueError(f"sample.adapter_scale is {self.adapter_scale}; give a finite number")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sample.eta is {self.eta}; give a number from 0 to 1")
        if self.sampler not in ("ddim", "ancestral"):
            for name, plain in (("eta", 0.0), ("eps_form", "direct")):
                if getattr(self, name) != plain:
                    raise ValueError(
                        f"sample.{name} is {getattr(self, name)}, but sample.sampler={self.sampler} does not "
                        f"support it; use sample.{name}={plain} or sample.sampler=ddim"
                    )
        if (
            len(self.guidance_interval) != 2
            or not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1
        ):
            raise ValueError(
                f"sample.guidance_interval is {list(self.guidance_interval)}; give two increasing numbers "
                "from 0 (clean) to 1 (noise), for example [0.4,1]"
            )
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(
                f"sample.guidance_rescale is {self.guidance_rescale}; give a number from 0 (off) to 1"
            )
        if self.deep_cache < 0:
            raise ValueError(f"sample.deep_cache is {self.deep_cache}; give an interval in steps, 0 for off")
        if not 0 <= self.noise_offset < math.inf:
            raise ValueError(f"sample.noise_offset is {self.noise_offset}; give 0 (none) or more (v1: 0.1)")
        if not self.seed:
            raise ValueError("sample.seed is empty; give at least one seed")
        for seed in self.seed:
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"sample.seed is {seed}; give an integer from 0 to {MAX_SEED}")


# The settings of each quality. All presets set the same fields, so that one overrides another completely.
QUALITIES: dict[str, dict[str, Any]] = {
    "exact": {
        "sampler": "ddim",
        "steps": 50,
        "spacing": "official",
        "final_alpha": "first",
        "eta": 0.0,
        "eps_form": "direct",
        "guidance_interval": [0.0, 1.0],
        "guidance_rescale": 0.0,
        "deep_cache": 0,
    },
    # Closer to the exact solution than 20 steps of DDIM, with a third of the network calls of "exact".
    "fast": {
        "sampler": "unipc",
        "steps": 20,
        "spacing": "trailing",
        "final_alpha": "one",
        "eta": 0.0,
        "eps_form": "direct",
        "guidance_interval": [0.3, 1.0],
        "guidance_rescale": 0.0,
        "deep_cache": 0,
    },
    # As close as 20 steps of DDIM, with half of the network calls of "fast".
    "draft": {
        "sampler": "unipc",
        "steps": 10,
        "spacing": "trailing",
        "final_alpha": "one",
        "eta": 0.0,
        "eps_form": "direct",
        "guidance_interval": [0.4, 1.0],
        "guidance_rescale": 0.0,
        "deep_cache": 0,
    },
}


@dataclass(frozen=True)
class Refine:
    """The second stage: adds noise to a finished clip at a larger size and denoises it with its own prompt.

    It runs if `refine_weights` is given. The defaults are those of MS-Vid2Vid-XL without the defects of the
    official code, whose behaviour the comments name. Converted refiner weights bring their own values.
    """

    width: int = 1280  # the result fits into width x height pixels
    height: int = 720
    fit: Literal["keep", "crop", "pad", "stretch"] = "keep"  # the clip's aspect ratio; official: stretch
    antialias: bool = True  # when a clip is downscaled; official: false
    resize: Literal["bilinear", "bicubic"] = "bilinear"  # bicubic keeps more detail; official: bilinear
    frames: int = 0  # use only the clip's first N frames; 0: all; official: 32
    repeat_frames: int = 1  # repeat every frame N times; SR600, trained on 32 frames, doubles clips of 16
    window: int = 32  # frames per pass; longer clips are split into overlapping windows and blended
    overlap: int = 8
    noise_level: int = 600  # starting timestep of 1000: 100 keeps the clip, 999 invents a new one; SR600: 700
    start: Literal["noise", "inversion"] = "noise"  # add noise, or invert with DDIM (SR600)
    noise: float = 1.0  # start=noise: factor on the noise added; below 1 keeps more of the clip
    inversion_table: Literal["refiner", "cosine"] = "refiner"  # schedule of the inversion; official: cosine
    solver: Literal["dpmpp_2m_sde", "heun"] = "dpmpp_2m_sde"
    steps: int = 30  # official for heun: 50, with two network calls per step except the last
    spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    eta: float = 1.0  # amount of fresh noise per step of dpmpp_2m_sde; 0: none
    guidance: float = 7.5  # 1.0 = one pass without the negative prompt; SR600: 9
    rescale: float = 0.2  # 0 to 1: how far to undo guidance's increase of contrast; SR600: 0.3
    # official: fractional levels with rounded timesteps, and one step too many for some step counts
    grid: Literal["clean", "official"] = "clean"
    # official: scales the start by s instead of 1 / alpha, so the network sees the clip 3 % too faint
    start_scale: Literal["clean", "official"] = "clean"
    skip_filter: Literal["stored", "none", "sr600"] = "stored"  # stored: use.skip_filter of the weights
    posterior: Literal["sample", "mode"] = "sample"  # of the clip's latents
    restore: float = 0.0  # fraction of the autoencoder's error on the input that is added back; official: 0
    fps: Literal["input", "save"] = "input"  # frame rate of the file; official: always 8, see save.fps

    def __post_init__(self):
        for name in ("width", "height", "repeat_frames", "window", "noise_level", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"refine.{name} is {getattr(self, name)}; give at least 1")
            _at_most(
                f"refine.{name}", getattr(self, name), MAX_FRAMES if name == "repeat_frames" else MAX_SIDE
            )
        if self.frames < 0:
            raise ValueError(f"refine.frames is {self.frames}; give a number of frames, 0 for all")
        if self.window > MAX_FRAMES:
            raise ValueError(f"refine.window is {self.window}; give at most {MAX_FRAMES} (trained on 32)")
        if not 0 <= self.overlap < self.window:
            raise ValueError(
                f"refine.overlap is {self.overlap} and refine.window {self.window}; give less than the window"
            )
        if not math.isfinite(self.guidance):
            raise ValueError(f"refine.guidance is {self.guidance}; give a finite number (official 7.5)")
        for name in ("eta", "rescale", "restore", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"refine.{name} is {getattr(self, name)}; give a number from 0 to 1")


@dataclass(frozen=True)
class Preprocess:
    """Input pictures. The official code ignores EXIF, alpha and profiles and may leave a black column."""

    crop: Literal["clean", "official"] = "clean"
    exif: Literal["apply", "ignore"] = "apply"
    alpha: Literal["white", "drop"] = "white"  # drop: the official plain conversion, without colour profiles


@dataclass(frozen=True)
class Save:
    """Output videos. `fps` is the frame rate of the file; the official code always writes 8."""

    fps: float = 8.0
    quality: int = 8  # 1 to 10, on the scale of the official writer; for mp4 and webp
    rounding: Literal["truncate", "nearest"] = "truncate"  # of floats to bytes; official: truncate
    grey_last_frame: Literal["keep", "drop"] = "keep"  # official: drop a last frame that is mostly mid-grey
    enlarge: int = 1  # side in file pixels of the square that shows one pixel, for small models

    def __post_init__(self):
        if not 0 < self.fps <= 1000:
            raise ValueError(f"save.fps is {self.fps}; give a number above 0, at most 1000")
        if not 1 <= self.quality <= 10:
            raise ValueError(f"save.quality is {self.quality}; give 1 (small) to 10 (best); official 8")
        if not 1 <= self.enlarge <= 64:
            raise ValueError(f"save.enlarge is {self.enlarge}; give 1 (as sampled) to 64")


# Name -> what an exact saving does. None of them has a backward: where gradients are wanted the plain forward
# runs. fast/savings.py applies them.
SAVINGS = {
    "kernels": "norms, gates and attention over short clips fused by Triton; on CUDA, if Triton is installed",
    "sum_in_place": "the residual sums of transformers inside the matrix products before them",
    "share_prefix": "guidance: one pass for both branches until they first read the context",
    "project_once": "keys and values of the context computed once per video instead of once per step",
    "fuse_projections": "q, k and v of self-attention by one matrix product",
    "subpixel_upsampling": "convolutions before the pixels are doubled instead of after",
    "in_place": "feed-forwards and SiLU without copies",
    "fold_products": "the last two products of a transformer as one, where it is twice as wide inside",
    "convolution_products": "on a CPU, convolutions over few pixels as one matrix product",
    "half_on_cpu": "half precision on a CPU: attention by products, norms in float32",
}


_SAVINGS = "use runtime.savings, which is all, none, or a list of names"
# Settings of earlier versions, and what to do instead.
REMOVED = {
    **{
        f"runtime.{name}": _SAVINGS
        for name in (
            "share_prefix", "project_once", "fuse_projections", "subpixel_upsampling", "in_place",
            "sum_in_place", "fold_products", "convolution_products", "kernels",
        )
    },
    "runtime.weight_layout": "weights are always laid out as the kernels read them; leave it out",
    "runtime.feed_forward_chunk": "use runtime.token_chunk",
}  # fmt: skip


@dataclass(frozen=True)
class Runtime:
    """Where and in which precision to compute. Nothing here changes what is computed beyond rounding."""

    device: str = "auto"  # auto: cuda where there is one, else cpu; mps is untested
    # auto: float16 on CUDA, as the official sampler; bfloat16 on CPUs with units for it, for UNets of 64
    # channels or more; else float32
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    encoder_dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"  # official: float32
    vae_dtype: Literal["float64", "float32", "bfloat16", "float16"] = (
        "float32"  # float16 can overflow to black
    )
    # auto: on CUDA the fastest, measured at start, elsewhere sdpa; sdpa: PyTorch's choice; math: the formula
    # as written; flash, cudnn, efficient, flash3: that kernel or an error.
    attention: Literal["auto", "sdpa", "math", "flash", "cudnn", "efficient", "flash3"] = "auto"
    vae_chunk: int = 2  # frames decoded at once; memory only, any value gives the same frames
    vae_tile: int = 0  # rows of a picture in a layer of the VAE at once; exact, memory only; 0: all
    batch: int = 1  # clips sampled at once; memory and speed only
    tf32: bool = False  # faster float32 products on recent GPUs, three digits less
    compile: bool = False  # torch.compile for each kind of the UNet's blocks
    cuda_graph: bool = False  # record a guidance step once per video and play it again: small sizes on CUDA
    check_memory: bool = True  # refuse a run whose estimate exceeds the free memory
    # A plan of the savings below (memory.py). auto: the fastest that fits into the free memory; full: none.
    # What you set yourself to another value than its default stays under every plan.
    memory: Literal["auto", "full", "balanced", "low"] = "auto"
    token_chunk: int = 0  # tokens in a layer at once, whole frames or whole pixels; exact; 0: all
    offload: Literal["none", "parts", "blocks"] = "none"  # what waits on the CPU until it is needed
    # How the UNet keeps its weights: int8 and float8 take half of float16 and are NOT exact.
    weight_storage: Literal["native", "int8", "float8"] = "native"
    # Exact savings, the same numbers up to rounding: `all` that this machine has, `none`, or a list of names
    # (fast/savings.py, docs/performance.md).
    savings: tuple[str, ...] = ("all",)
    # Guidance: both branches as one batch, faster at small sizes for more memory. null: where it pays.
    batch_guidance: Optional[bool] = None  # noqa: UP045
    # One clip on several cards, under torchrun: the branches of guidance, shares of the frames, or both; auto
    # takes what fits the number of processes (fast/parallel.py).
    parallel: Literal["none", "guidance", "frames", "both", "auto"] = "none"

    def __post_init__(self):
        if self.vae_chunk < 1:
            raise ValueError(f"runtime.vae_chunk is {self.vae_chunk}; give at least 1 frame")
        if self.batch < 1:
            raise ValueError(f"runtime.batch is {self.batch}; give at least 1 clip")
        _at_most("runtime.batch", self.batch, MAX_COUNT)
        if self.vae_tile < 0:
            raise ValueError(f"runtime.vae_tile is {self.vae_tile}; give a number of rows, 0 for all")
        if self.token_chunk < 0:
            raise ValueError(
                f"runtime.token_chunk is {self.token_chunk}; give a number of tokens, 0 to disable chunking"
            )
        known = ("all", "none", *SAVINGS)
        if unknown := [name for name in self.savings if name not in known]:
            raise ValueError(f"runtime.savings names {unknown[0]!r}; known are {', '.join(known)}")
        if len(self.savings) != 1 and {"all", "none"} & {*self.savings}:
            raise ValueError(
                f"runtime.savings is {list(self.savings)}; give all or none alone, or a list of the others"
            )
        unsplit = {"compile": False, "cuda_graph": False, "offload": "none", "token_chunk": 0}
        unsplit["weight_storage"] = "native"
        for name, value in unsplit.items() if self.parallel != "none" else ():
            if getattr(self, name) != value:
                raise ValueError(
                    f"runtime.parallel={self.parallel} splits the network over processes, which runtime."
                    f"{name}={getattr(self, name)} cannot follow; leave one of the two out"
                )
        if self.parallel != "none" and self.memory not in ("auto", "full"):
            raise ValueError(
                f"runtime.parallel={self.parallel} keeps the whole network on every card, but runtime.memory="
                f"{self.memory} moves or cuts it; use memory=full, or leave parallel= out"
            )
        for name in ("compile", "cuda_graph"):
            if self.offload == "blocks" and getattr(self, name):
                raise ValueError(
                    f"runtime.offload=blocks swaps weights while the UNet runs, which runtime.{name} cannot "
                    f"follow; use runtime.offload=parts or leave {name} out"
                )


@dataclass(frozen=True)
class Config:
    """All settings of a job; checks combinations across sections."""

    use: Use = field(default_factory=Use)
    unet: UNet = field(default_factory=UNet)
    vae: VAE = field(default_factory=VAE)
    clip: Clip = field(default_factory=Clip)
    schedule: Schedule = field(default_factory=Schedule)
    sample: Sample = field(default_factory=Sample)
    refine: Refine = field(default_factory=Refine)
    preprocess: Preprocess = field(default_factory=Preprocess)
    save: Save = field(default_factory=Save)
    runtime: Runtime = field(default_factory=Runtime)
    # The job. These are literal text and never parsed, so `a cat: it runs` and `no` are kept as they are.
    weights: str = ""
    image: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ()
    negative_prompt: str = NEGATIVE_PROMPT
    output: str = ""
    adapter: str = ""  # a folder of low-rank adapters (LoRA) for the UNet, ours or peft's
    items: str = ""  # a JSONL file of {"image", "prompt", "seed", "output"}, instead of image= and prompt=
    refine_weights: str = ""  # a refiner's native weights folder; if given, the second stage runs
    refine_prompt: str = ""  # a short prompt for the second stage; empty: the prompt
    refine_suffix: str = REFINE_SUFFIX
    refine_negative_prompt: str = REFINE_NEGATIVE_PROMPT
    video: str = ""  # a video file; if given, only the second stage runs
    plugins: tuple[str, ...] = ()  # Python files that change the model before it is loaded (files/plugins.py)

    def __post_init__(self):
        unet, vae, clip, sample = self.unet, self.vae, self.clip, self.sample
        if vae.embed_dim != unet.in_channels:
            raise ValueError(
                f"vae.embed_dim is {vae.embed_dim} but unet.in_channels is {unet.in_channels}; "
                "the UNet denoises the VAE's latent, so they must be equal"
            )
        if vae.embed_dim != unet.image_channels and (self.use.concat or self.use.local_tokens):
            raise ValueError(
                f"vae.embed_dim is {vae.embed_dim} but unet.image_channels is {unet.image_channels}; "
                "the UNet gets the first frame as the VAE's latent, so they must be equal"
            )
        if self.use.output != "plain" and self.schedule.prediction != "x0":
            raise ValueError(
                f"use.output is {self.use.output}, but schedule.prediction is {self.schedule.prediction}: "
                "only an estimate of the clean latent can start from the picture's; use "
                "schedule.prediction=x0"
            )
        if self.use.text and clip.text["width"] != unet.context_width:
            raise ValueError(
                f"clip.text.width is {clip.text['width']} but unet.context_width is {unet.context_width}; "
                "text tokens enter cross-attention unchanged, so they must be equal"
            )
        if self.use.global_tokens and clip.embed_dim != unet.image_vector_width:
            raise ValueError(
                f"clip.embed_dim is {clip.embed_dim} but unet.image_vector_width is "
                f"{unet.image_vector_width}; they must be equal"
            )
        if sample.negative_image == "none" and not (self.use.text or self.use.local_tokens):
            raise ValueError(
                "sample.negative_image is none while use.text and use.local_tokens are off, so the "
                "unconditional branch has no context tokens; use sample.negative_image=zeros"
            )
        if sample.deep_cache > 1 and not 1 <= sample.deep_cache_blocks <= unet.blocks_per_level + 1:
            raise ValueError(
                f"sample.deep_cache_blocks is {sample.deep_cache_blocks}, but with unet.blocks_per_level = "
                f"{unet.blocks_per_level} the finest level has {unet.blocks_per_level + 1} up blocks; give 1 "
                f"to {unet.blocks_per_level + 1}"
            )
        unsplit = {"sample.deep_cache": sample.deep_cache > 1, "refine_weights": bool(self.refine_weights)}
        for name, on in unsplit.items() if self.runtime.parallel != "none" else ():
            if on:
                raise ValueError(
                    f"runtime.parallel={self.runtime.parallel} splits the steps of the first stage, which "
                    f"{name} cannot follow; leave one of the two out"
                )
        multiple = self.size_multiple
        for name, rest in (("width", 0), ("height", self.height_rest)):
            size = getattr(sample, name)
            smallest = rest or multiple
            if size < smallest or size % multiple != rest:
                low = (size - rest) // multiple * multiple + rest
                high = low if low == size else low + multiple
                legal = [s for s in (low, high) if s >= smallest] or [smallest]
                more = f" and {rest} more (use.resampling=margin)" if rest else ""
                raise ValueError(
                    f"sample.{name} is {size} pixels; vae.factor x unet.factor = {vae.factor} x "
                    f"{unet.factor} needs a multiple of {multiple}{more}: the nearest is "
                    f"{' or '.join(map(str, dict.fromkeys(legal)))}"
                )
        if not 1 <= sample.steps <= self.schedule.num_timesteps:
            raise ValueError(
                f"sample.steps is {sample.steps}; give 1 to schedule.num_timesteps = "
                f"{self.schedule.num_timesteps}"
            )
        if sample.sampler == "ancestral" and sample.steps != self.schedule.num_timesteps:
            raise ValueError(
                f"sample.sampler=ancestral visits every timestep, but sample.steps is {sample.steps}; "
                f"use sample.steps={self.schedule.num_timesteps} or sample.sampler=ddim"
            )

    @property
    def size_multiple(self) -> int:
        return self.vae.factor * self.unet.factor

    @property
    def height_rest(self) -> int:
        """The height modulo `size_multiple`, see `UNet.margin`."""
        return self.vae.factor * self.unet.margin(self.use)

    @property
    def latent_size(self) -> tuple[int, int]:
        """(rows, columns) of the latent."""
        return self.sample.height // self.vae.factor, self.sample.width // self.vae.factor

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict with lists for tuples, as stored in weights folders and in records of videos."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        return yaml.dump(self.to_dict(), Dumper=_ShortLists, sort_keys=False, allow_unicode=True, width=100)


class _ShortLists(yaml.SafeDumper):
    """Lists take as few lines as they can: a vocabulary of one's own has a thousand words."""


_ShortLists.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)


SECTIONS = tuple(f.name for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING)
LITERALS = tuple(f.name for f in dataclasses.fields(Config) if f.name not in SECTIONS)
# Literal text on any command line, including commands with other settings.
TEXTS = (*LITERALS, "json")
LISTS = ("image", "prompt", "plugins")  # literals that may be given several times
# Literals that are paths, where ~ is the home folder.
PATHS = ("weights", "image", "output", "adapter", "items", "refine_weights", "video", "plugins")
# Literals that are stored in a weights folder: the texts that its model is always used with.
KEPT_TEXTS = ("negative_prompt", "refine_suffix", "refine_negative_prompt")
# Sections that a weights folder determines; contradicting them is an error.
ARCHITECTURE = ("unet", "vae", "clip")
# Fields of these sections that do not affect the shapes of tensors and may be changed.
FREE = ("unet.dropout", "unet.temporal_conv_dropout", "unet.concat_dropout", "clip.pad_token")
# `steps=20` is short for `sample.steps=20`; this works for all names of these two sections.
SHORT = {f.name: f"{section}.{f.name}" for section, cls in (("runtime", Runtime), ("sample", Sample))
         for f in dataclasses.fields(cls)}  # fmt: skip

# diffusers' names of settings -> ours.
FOREIGN = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "num_frames": "frames",
    "target_fps": "fps",
    "num_videos_per_prompt": "seed",
    "generator": "seed",
    "decode_chunk_size": "vae_chunk",
    "torch_dtype": "dtype",
}
# What a call in Python has another way for, diffusers' arguments among them -> what to write.
IN_A_CALL = {
    **{f"{name}s": f"{name}= takes one or a list" for name in ("prompt", "negative_prompt", "seed", "image")},
    "pictures": "image= takes one or a list",
    "clips": "a list of pictures, prompts or seeds makes several",
    **{name: f"here it is {FOREIGN[name]}=" for name in list(FOREIGN)[:4]},
    "num_videos_per_prompt": "give a list of seeds, seed=[1, 2, 3]",
    "generator": "a seed names its own: seed=7",
    "decode_chunk_size": 'frames decoded at once are set when loading: overrides=["vae_chunk=1"]',
    "latents": "the initial noise is noise=, [c f h w]",
    "output_type": 'here it is output="video", "frames", "pil", "tensor" or "latents"',
    "prompt_embeds": "embeddings are given as conditions=, see model.encode",
    "negative_prompt_embeds": "embeddings are given as conditions=, see model.encode",
    **dict.fromkeys(("callback", "callback_on_step_end"), "here it is on_step="),
    "return_dict": "a call returns the clip itself",
    "cross_attention_kwargs": "the strength of adapters is model.lora(folder, scale=...)",
    "clip_skip": 'the layer of the text tower is set when loading: overrides=["clip.text_layer=last"]',
    "image_path": "here it is image=",
    "adapter_scale": "adapters are merged when loading; model.lora(folder, scale=...) attaches one",
    "seeds": "here it is seed=",
    "negative_prompts": "here it is negative_prompt=",
}


def _positive(config: Any, section: str, skip: tuple[str, ...] = ()) -> None:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if f.name in skip or f.name.endswith("dropout"):
            continue
        if any(not isinstance(n, bool) and not 0 < n < math.inf for n in numbers):  # also catches NaN
            raise ValueError(f"{section}.{f.name} is {value}; it must be positive")
        most = MAX_BLOCKS if f.name in ("blocks_per_level", "concat_layers") else MAX_COUNT
        _at_most(f"{section}.{f.name}", max(numbers, default=0), most)
    _at_most(f"the number of {section}.width_multipliers", len(config.width_multipliers), MAX_LEVELS)
    widest = config.base_width * max(config.width_multipliers, default=0)
    _at_most(f"{section}.base_width times the largest of {section}.width_multipliers", widest, MAX_COUNT)


def _at_most(what: str, value: float, most: int) -> None:
    if value > most:
        raise ValueError(f"{what} is {value}; give at most {most}")


DEFAULTS = Config()
