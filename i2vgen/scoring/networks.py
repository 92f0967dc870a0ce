"""The networks that some scores need, all given by the user: CLIP, LPIPS, and the features of FVD.

None comes with the package and none is fetched. CLIP is weights alone, read as everywhere in this project:
nothing in the file runs. LPIPS and FVD are programs, and a program is trusted or not, so each is loaded only
where the user names it:

    FILE.py:NAME     a function or class in a file; called without arguments, it gives the network
    MODULE:NAME      the same from an installed package, for example lpips:LPIPS
    FILE             a TorchScript file (torch.jit.save). It runs no Python, but what it holds is a program of
                     torch operations, which can read and write files: load only what you trust
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from i2vgen.files import checkpoint, images
from i2vgen.model.clip import ClipEncoders
from i2vgen.settings.merge import first_line, load_config

Network = Callable[..., Tensor]
FVD_SIDE = 224  # what every I3D of the literature was trained on
BATCH = 16  # frames at once
# What the road asks of its own CLIP (widths of tokens, a block before the last) does not bind a judge.
JUDGE = ("use.text=false", "use.global_tokens=false", "clip.text_layer=last")
# The three arguments of the TorchScript I3D that most published FVDs come from (StyleGAN-V's).
I3D_WORDS = {"rescale": False, "resize": False, "return_features": True}


class Sizes(NamedTuple):
    """What CLIP wants of a picture."""

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# ---------------------------------------------------------------------------------------------------
# CLIP


class ClipJudge:
    """Unit vectors of pictures and texts by an open_clip model."""

    def __init__(self, encoders: ClipEncoders):
        settings = encoders.settings
        self.encoders = encoders
        self.sizes = Sizes(settings.image_size, settings.image_mean, settings.image_std)

    @torch.no_grad()
    def pictures(self, frames: Sequence[np.ndarray]) -> Tensor:
        """uint8 [h w 3] each -> float32 [n v] of length 1. The centre square is seen, resized bilinearly."""
        found = []
        for start in range(0, len(frames), BATCH):
            views = [self.view(frame) for frame in frames[start : start + BATCH]]
            batch = torch.stack(views).to(self.encoders.device, self.encoders.dtype)
            found.append(F.normalize(self.encoders.model.encode_image(batch).float(), dim=-1).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """-> float32 [v] of length 1"""
        tokens = self.encoders.tokenize([prompt]).to(self.encoders.device)
        return F.normalize(self.encoders.model.encode_text(tokens).float(), dim=-1)[0].cpu()

    def view(self, frame: np.ndarray) -> Tensor:
        side, mean, std = self.sizes
        square = min(frame.shape[:2])
        return images.clip_view(Image.fromarray(frame), square=square, size=side, mean=mean, std=std)


def clip_from_weights(folder: str, device: torch.device) -> ClipJudge:
    """The CLIP of a native weights folder, in float32."""
    settings = load_config(None, (), weights=folder)
    return ClipJudge(checkpoint.load("clip", settings, device=device, dtype=torch.float32))


def clip_from_checkpoint(model: str, file: str, device: torch.device) -> ClipJudge:
    """An open_clip model by name, or by a JSON file of open_clip's, with the weights of a local file."""
    settings = load_config(None, [f"clip.model={model}", *JUDGE])
    encoders = checkpoint.build("clip", settings)
    state = read_state(file)
    checkpoint.fill(encoders, state, device=device, dtype=torch.float32, source=f"clip_checkpoint={file}")
    return ClipJudge(encoders.eval().requires_grad_(False))


def read_state(file: str) -> dict[str, Tensor]:
    """An open_clip checkpoint -> its tensors by name. Nothing in the file is executed."""
    check_file("clip_checkpoint", file)
    try:
        if file.endswith(".safetensors"):
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"clip_checkpoint={file} cannot be read as weights: {first_line(error)}; give a "
            ".safetensors file or one of torch.save with plain tensors (OpenAI's own .pt are programs: take "
            "open_clip's copy of them)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # open_clip's own trainings
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"clip_checkpoint={file} holds no state dict of tensors; give an open_clip checkpoint"
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


# ---------------------------------------------------------------------------------------------------
# Programs that the user names


def check(setting: str, spec: str) -> None:
    """ValueError for what can be wrong with a network's name before it is loaded."""
    place, colon, name = spec.rpartition(":")
    if not colon:
        check_file(setting, spec)
        if not zipfile.is_zipfile(spec):
            raise ValueError(
                f"{setting}={spec} is no TorchScript file; give one of torch.jit.save, or FILE.py:NAME or "
                "MODULE:NAME of a function that returns the network"
            )
    elif not name.isidentifier() or not place:
        raise ValueError(
            f"{setting}={spec}: write FILE.py:NAME, MODULE:NAME, or the path of a TorchScript file"
        )
    elif place.endswith(".py"):
        check_file(setting, place)
    elif not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"{setting}={spec}: {place} is no module's name; write FILE.py:NAME or MODULE:NAME")
    elif importlib.util.find_spec(place.split(".")[0]) is None:
        raise ValueError(
            f"{setting}={spec} needs the package {place.split('.')[0]}, which is not installed: "
            f"python -m pip install {place.split('.')[0]}"
        )


def check_file(setting: str, path: str) -> None:
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"{setting}={path} {what}; give the path of a file")


def load(setting: str, spec: str, device: torch.device) -> Network:
    """A network by its name, see the top of this file, in eval mode on `device`."""
    check(setting, spec)
    place, colon, name = spec.rpartition(":")
    if not colon:
        try:
            with warnings.catch_warnings():  # PyTorch has other plans for the format; published I3Ds have not
                warnings.simplefilter("ignore", FutureWarning)
                network = torch.jit.load(spec, map_location=device)
        except RuntimeError as error:
            raise ValueError(f"{setting}={spec} is no TorchScript file: {first_line(error)}") from error
        return network.eval()
    if place.endswith(".py"):
        found = importlib.util.spec_from_file_location(Path(place).stem, place)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    make = getattr(module, name, None)
    if not callable(make):
        raise ValueError(f"{setting}={spec}: {place} has no function {name}")
    network = make()
    if not callable(network):
        raise ValueError(f"{setting}={spec}: {name}() gave {type(network).__name__}, expected a network")
    return network.eval().to(device) if isinstance(network, torch.nn.Module) else network


class Lpips:
    """Zhang et al. 2018, "The unreasonable effectiveness of deep features": 0 is equal, lower is nearer.

    The network takes two batches of pictures, float32 [n 3 h w] in [-1, 1], and gives n distances.
    """

    def __init__(self, network: Network, device: torch.device):
        self.network, self.device = network, device

    @torch.no_grad()
    def __call__(self, one: np.ndarray, other: np.ndarray) -> float:
        """uint8 [n h w 3], uint8 [n h w 3] -> mean distance over the n pairs"""
        found = []
        for start in range(0, len(one), BATCH):
            pair = [unit(x[start : start + BATCH]).to(self.device) for x in (one, other)]
            out = torch.as_tensor(self.network(*pair)).reshape(-1).double().cpu()
            if len(out) != len(pair[0]):
                raise ValueError(
                    f"lpips_network gave {len(out)} numbers for {len(pair[0])} pairs; expected one each"
                )
            found.append(out)
        return float(torch.cat(found).mean())


class FvdFeatures:
    """The vector of a clip: float32 [1 3 f 224 224] in [-1, 1] -> [1 d] by the user's network.

    Scaled to cover 224 x 224, by box filter, and cut to the centre. StyleGAN-V's TorchScript I3D is told
    not to rescale or resize again, and to give features.
    """

    def __init__(self, network: Network, device: torch.device):
        self.network, self.device = network, device
        self.words = {}
        if isinstance(network, torch.jit.ScriptModule):
            known = {argument.name for argument in network.forward.schema.arguments}
            self.words = I3D_WORDS if I3D_WORDS.keys() <= known else {}

    @torch.no_grad()
    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """uint8 [f h w 3] -> float64 [d]"""
        square = [images.center_crop_wide(Image.fromarray(frame), FVD_SIDE, FVD_SIDE) for frame in clip]
        x = unit(np.stack([np.asarray(frame) for frame in square])).transpose(0, 1)[None].to(self.device)
        out = torch.as_tensor(self.network(x, **self.words))
        if out.shape[0] != 1:
            raise ValueError(f"fvd_network gave shape {tuple(out.shape)} for one clip; expected [1 d]")
        return out.reshape(-1).double().cpu().numpy()


def unit(pictures: np.ndarray) -> Tensor:
    """uint8 [n h w 3] -> float32 [n 3 h w] in [-1, 1]"""
    return torch.from_numpy(pictures.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
