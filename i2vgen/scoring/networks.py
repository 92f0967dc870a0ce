"""Networks that some scores need and the user must provide: CLIP, LPIPS, and the features for FVD.

None is part of the package, and none is downloaded. A CLIP is read as weights only; no code in the file is
executed. LPIPS and FVD networks are code, so they are loaded only if the user names them; load only code you
trust:

    FILE.py:NAME     a function or class in a file, which returns the network when called without arguments
    MODULE:NAME      the same from an installed package, for example lpips:LPIPS
    FILE             a TorchScript file (torch.jit.save): no Python, but a program of torch operations, which
                     can read and write files

Axes: n pictures, f frames, h w pixel rows and columns, d width of a feature vector.
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
from i2vgen.settings.merge import load_config
from i2vgen.settings.wording import counted, first_line

Network = Callable[..., Tensor]
FVD_SIDE = 224  # input size of the published I3D networks
BATCH = 16  # frames per forward pass
# A CLIP used for scoring need not meet the requirements of the video UNet (token widths, penultimate layer).
JUDGE = ("use.text=false", "use.global_tokens=false", "clip.text_layer=last")
# Arguments of StyleGAN-V's TorchScript I3D, which most published FVD values use.
I3D_ARGUMENTS = {"rescale": False, "resize": False, "return_features": True}


class Sizes(NamedTuple):
    """Size and normalisation of CLIP's input pictures."""

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# ---------------------------------------------------------------------------------------------------
# CLIP


class ClipJudge:
    """Embeds pictures and texts as unit vectors with an open_clip model."""

    def __init__(self, encoders: ClipEncoders):
        settings = encoders.settings
        self.encoders = encoders
        self.sizes = Sizes(settings.image_size, settings.image_mean, settings.image_std)

    @torch.no_grad()
    def pictures(self, frames: Sequence[np.ndarray]) -> Tensor:
        """uint8 [h w 3] each -> unit vectors, float32 [n d], of the centre squares, resized bilinearly."""
        found = []
        for start in range(0, len(frames), BATCH):
            views = [self.view(frame) for frame in frames[start : start + BATCH]]
            batch = torch.stack(views).to(self.encoders.device, self.encoders.dtype)
            found.append(F.normalize(self.encoders.model.encode_image(batch).float(), dim=-1).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """-> unit vector, float32 [d]."""
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
    """An open_clip model, by its name or JSON configuration file, with weights from a local file."""
    settings = load_config(None, [f"clip.model={model}", *JUDGE])
    encoders = checkpoint.build("clip", settings)
    state = read_state(file)
    checkpoint.fill(encoders, state, device=device, dtype=torch.float32, source=f"clip_checkpoint={file}")
    return ClipJudge(encoders.eval().requires_grad_(False))


def read_state(file: str) -> dict[str, Tensor]:
    """Read an open_clip checkpoint -> tensors by name. No code in the file is executed."""
    check_file("clip_checkpoint", file)
    try:
        if file.endswith(".safetensors"):
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"clip_checkpoint={file} cannot be read as weights: {first_line(error)}; give a "
            ".safetensors file or a torch.save file of plain tensors (OpenAI's original .pt files contain "
            "code; use open_clip's version of them)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # saved by open_clip
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"clip_checkpoint={file} is not a state dict of tensors; give an open_clip checkpoint"
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


# ---------------------------------------------------------------------------------------------------
# Networks named by the user


def check(setting: str, spec: str) -> None:
    """ValueError if a network's name is malformed or its file or package is missing; loads nothing."""
    place, colon, name = spec.rpartition(":")
    if not colon:
        check_file(setting, spec)
        if not zipfile.is_zipfile(spec):
            raise ValueError(
                f"{setting}={spec} is not a TorchScript file; give one written by torch.jit.save, or "
                "FILE.py:NAME or MODULE:NAME of a function that returns the network"
            )
    elif not name.isidentifier() or not place:
        raise ValueError(
            f"{setting}={spec}: write FILE.py:NAME, MODULE:NAME, or the path of a TorchScript file"
        )
    elif place.endswith(".py"):
        check_file(setting, place)
    elif not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"{setting}={spec}: {place} is not a module name; write FILE.py:NAME or MODULE:NAME")
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
    """Load a network by its name (see the top of this file), in eval mode on `device`."""
    check(setting, spec)
    place, colon, name = spec.rpartition(":")
    if not colon:
        try:
            with warnings.catch_warnings():  # PyTorch deprecates TorchScript, but published I3Ds use it
                warnings.simplefilter("ignore", FutureWarning)
                network = torch.jit.load(spec, map_location=device)
        except RuntimeError as error:
            raise ValueError(f"{setting}={spec} is not a TorchScript file: {first_line(error)}") from error
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
        raise ValueError(f"{setting}={spec}: {name}() returned {type(network).__name__}, expected a network")
    return network.eval().to(device) if isinstance(network, torch.nn.Module) else network


class Lpips:
    """Zhang et al. 2018, "The unreasonable effectiveness of deep features": 0 for equal pictures, lower is
    better.

    The network maps two batches of pictures, float32 [n 3 h w] in [-1, 1], to n distances.
    """

    def __init__(self, network: Network, device: torch.device):
        self.network, self.device = network, device

    @torch.no_grad()
    def __call__(self, one: np.ndarray, other: np.ndarray) -> float:
        """uint8 [n h w 3], uint8 [n h w 3] -> mean distance over the n pairs."""
        found = []
        for start in range(0, len(one), BATCH):
            pair = [unit(x[start : start + BATCH]).to(self.device) for x in (one, other)]
            out = torch.as_tensor(self.network(*pair)).reshape(-1).double().cpu()
            if len(out) != len(pair[0]):
                raise ValueError(
                    f"lpips_network returned {counted(len(out), 'number')} for "
                    f"{counted(len(pair[0]), 'pair')}; expected one each"
                )
            found.append(out)
        return float(torch.cat(found).mean())


class FvdFeatures:
    """The feature vector of a clip: the user's network maps float32 [1 3 f 224 224] in [-1, 1] to [1 d].

    Frames are scaled with a box filter to cover 224 x 224 and centre-cropped. StyleGAN-V's TorchScript I3D is
    called so that it does not rescale or resize again and returns features.
    """

    def __init__(self, network: Network, device: torch.device):
        self.network, self.device = network, device
        self.arguments = {}
        if isinstance(network, torch.jit.ScriptModule):
            known = {argument.name for argument in network.forward.schema.arguments}
            self.arguments = I3D_ARGUMENTS if I3D_ARGUMENTS.keys() <= known else {}

    @torch.no_grad()
    def __call__(self, clip: np.ndarray) -> np.ndarray:
        """uint8 [f h w 3] -> float64 [d]."""
        square = [images.center_crop_wide(Image.fromarray(frame), FVD_SIDE, FVD_SIDE) for frame in clip]
        x = unit(np.stack([np.asarray(frame) for frame in square])).transpose(0, 1)[None].to(self.device)
        out = torch.as_tensor(self.network(x, **self.arguments))
        if out.shape[0] != 1:
            raise ValueError(f"fvd_network returned shape {tuple(out.shape)} for one clip; expected [1 d]")
        return out.reshape(-1).double().cpu().numpy()


def unit(pictures: np.ndarray) -> Tensor:
    """uint8 [n h w 3] -> float32 [n 3 h w] in [-1, 1]."""
    return torch.from_numpy(pictures.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
