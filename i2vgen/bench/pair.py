"""Both implementations with the same random weights and the same inputs, each taking a guidance step.

Axes: b batch, f frames, c channels, h w latent rows and columns, k text tokens, d their width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from i2vgen import pipeline
from i2vgen.bench.count import their_unet
from i2vgen.bench.peer import Peer
from i2vgen.files import checkpoint
from i2vgen.memory import plans
from i2vgen.model.conditioning import Conditions
from i2vgen.settings.config import Config, Use

# Where the two read the paper differently, theirs: else the outputs could not be compared.
THEIR_USE = Use(concat_gain=1.0, sinusoid="exp", frame_planes="network")
TIMESTEP = 500


@dataclass(frozen=True)
class Inputs:
    """x [b c f h w], t int64 [b], conditions with and without the prompt."""

    x: Tensor
    t: Tensor
    cond: Conditions
    uncond: Conditions


@dataclass(frozen=True)
class Pair:
    config: Config
    state: Mapping[str, Tensor]  # our names; both sides read these very tensors
    device: torch.device
    dtype: torch.dtype

    def ours(
        self, settings: Mapping[str, object], *, like: nn.Module | None = None, vae: nn.Module | None = None
    ) -> pipeline.I2VGenXL:
        """Our model under some settings of `runtime`; of its parts only the UNet, unless a VAE is given.

        With the weights of the UNet `like`, in the same memory, where it has been laid out already.
        """
        config = with_runtime(self.config, settings)
        unet = checkpoint.build("unet", config)
        if like is None:
            checkpoint.fill(unet, self.state, device=self.device)
        else:
            unet.load_state_dict(like.state_dict(), strict=True, assign=True)
        unet.eval().requires_grad_(False)
        plans.prepare_unet(unet, config, self.device)
        return pipeline.I2VGenXL(config, unet, vae, None, self.device)

    def all_ours(self, rows: Mapping[str, Mapping[str, object]]) -> dict[str, pipeline.I2VGenXL]:
        """One model for every row of settings, all with the same weights in memory."""
        models: dict[str, pipeline.I2VGenXL] = {}
        for name, settings in rows.items():
            first = next(iter(models.values()), None)
            models[name] = self.ours(settings, like=None if first is None else first.unet)
        return models

    def theirs(self, peer: Peer) -> nn.Module:
        with torch.device("meta"):
            unet = their_unet(peer.network, self.config)
        unet.load_state_dict(peer.convert(self.config.unet, self.state), strict=True, assign=True)
        return unet.eval().requires_grad_(False)

    def inputs(self, seed: int = 0) -> Inputs:
        return make_inputs(self.config, self.device, self.dtype, seed)


def make_pair(config: Config, device: torch.device, dtype: torch.dtype, *, seed: int = 1) -> Pair:
    config = dataclasses.replace(config, use=THEIR_USE)
    unet = checkpoint.build("unet", config)
    state = {
        name: tensor.to(device=device, dtype=dtype)
        for name, tensor in checkpoint.random_state(unet, seed=seed, device=device)
    }
    return Pair(config, state, device, dtype)


def random_part(
    name: str, config: Config, device: torch.device, dtype: torch.dtype, *, place: torch.device | str = ""
) -> nn.Module:
    """A part with random weights, drawn on the device and kept there or at `place`."""
    part = checkpoint.build(name, config)
    checkpoint.fill(
        part, checkpoint.random_state(part, seed=1, device=device), device=place or device, dtype=dtype
    )
    return part.eval().requires_grad_(False)


def make_inputs(config: Config, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """One clip: noise, and what the encoders might have given."""
    generator = torch.Generator().manual_seed(seed)
    unet, (h, w) = config.unet, config.latent_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(device=device, dtype=dtype)

    x, latent = normal(unet.in_channels, config.sample.frames, h, w), normal(unet.image_channels, h, w)
    text = [normal(config.clip.text_length, unet.context_width) for _ in range(2)]
    vector = normal(unet.image_vector_width)
    fps = torch.tensor([config.sample.fps], device=device)
    return Inputs(
        x,
        torch.tensor([TIMESTEP], device=device),
        Conditions(text[0], vector, latent, fps),
        Conditions(text[1], torch.zeros_like(vector), latent, fps),
    )


def with_runtime(config: Config, settings: Mapping[str, object]) -> Config:
    return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, **settings))


def our_step(model: pipeline.I2VGenXL, inputs: Inputs) -> Callable[[], Tensor]:
    """-> a call that gives one guided prediction [b c f h w]; what is done once per video is done here."""
    with torch.no_grad():
        predict = pipeline.network(model, inputs.cond, inputs.uncond)

    @torch.no_grad()
    def step() -> Tensor:
        return predict(inputs.x, inputs.t)

    return step


def their_step(unet: nn.Module, inputs: Inputs, guidance: float) -> Callable[[], Tensor]:
    """The same as diffusers' pipeline takes it: both branches as one batch, conditions in every call."""
    predict = their_network(unet, inputs, guidance)

    @torch.no_grad()
    def step() -> Tensor:
        return predict(inputs.x, inputs.t)

    return step


def their_network(unet: nn.Module, inputs: Inputs, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    cond, uncond = inputs.cond, inputs.uncond
    planes = their_planes(cond.image_latent, inputs.x.shape[2]).repeat(2, 1, 1, 1, 1)
    fps = torch.cat([cond.fps, uncond.fps])
    vectors = torch.cat([uncond.image_vector, cond.image_vector])
    text = torch.cat([uncond.text, cond.text])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        both = unet(
            torch.cat([x, x]).to(text.dtype),
            timestep=t.to(x.device),  # samplers hold it on the CPU
            fps=fps,
            image_latents=planes,
            image_embeddings=vectors,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
        u, c = both.chunk(2)
        return u + guidance * (c - u)

    return predict


def their_planes(latent: Tensor, frames: int) -> Tensor:
    """[b c h w] -> [b c f h w]: the image latent, then planes of the frames' positions: its pipeline's."""
    planes = [latent] + [torch.full_like(latent, (k + 1) / (frames - 1)) for k in range(frames - 1)]
    return torch.stack(planes, dim=2)


def predictions(unet: nn.Module, step: Callable[[], Tensor], *, swap: bool = False) -> Tensor:
    """What the network itself gives in a step: [2 c f h w], with the prompt and without it.

    Guidance would enlarge the difference of the two, and with it their rounding. `swap`: the network gives
    the branch without the prompt first.
    """
    seen: list[Tensor] = []

    def listen(module: nn.Module, inputs: tuple, out: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(out if isinstance(out, Tensor) else out[0])

    handle = unet.register_forward_hook(listen)
    step()
    handle.remove()
    both = torch.cat(seen)
    return both.flip(0) if swap else both


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm()).item()
