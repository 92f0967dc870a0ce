"""Native weights: a folder of safetensors, the settings they were made with, and where they came from.

    settings.json                     {"format": 1, "settings": every setting, see config.py}
    origin.json                       source files, hashes, licence notes; free-form
    unet.safetensors                  one file per part (unet, vae, clip), or shards
    unet-00001-of-00003.safetensors   with unet.safetensors.index.json (`weight_map`: tensor -> file)

Models are built on `meta` and filled strictly: every tensor must be there and none may be left over, except
for the difference between the ablated and the released network (`ablation`). Nothing in a weights folder is
ever executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from i2vgen.files import plugins, whole
from i2vgen.files.eight_bits import Widened
from i2vgen.files.safefile import Entry, write_safetensors
from i2vgen.model.attention import for_any_heads
from i2vgen.model.clip import ClipEncoders
from i2vgen.model.unet import UNet
from i2vgen.model.vae import AutoencoderKL
from i2vgen.settings import config as settings
from i2vgen.settings.config import SETTINGS_FILE, Config, Use
from i2vgen.settings.merge import from_dict, read_stored_settings
from i2vgen.settings.wording import counted

ORIGIN_FILE = "origin.json"
CARD_FILE = "README.md"  # a model card, by hand: never read, and kept when the weights are replaced
# Files of a weights folder, and what systems put into any folder.
OF_FOLDER = re.compile(r"(settings|origin)\.json|README\.md|.*\.safetensors(\.index\.json)?|\..*")
PARTS = ("unet", "vae", "clip")  # clip: both towers of one open_clip model, in open_clip's names


class Ablation(NamedTuple):
    """How the tensors of an ablated UNet differ from the released one's: names, and slices of axis 1."""

    dropped: frozenset[str] = frozenset()  # the released network has them, the ablated one does not
    added: frozenset[str] = frozenset()  # the other way round: they start as built
    slices: tuple[tuple[str, int], ...] = ()  # tensor name, and how many of its input channels remain


NO_CHANGE = Ablation()


def ablation(unet: settings.UNet, use: Use) -> Ablation:
    """Found by building both networks on `meta`. ValueError for a switch that changes a tensor otherwise."""
    if use == Use():
        return NO_CHANGE
    with on_meta():
        released, ablated = (
            {name: t.shape for name, t in UNet(unet, u).state_dict().items()} for u in (Use(), use)
        )
    slices = []
    for name in sorted(released.keys() & ablated.keys()):
        have, want = released[name], ablated[name]
        if have != want:
            if (have[:1], have[2:]) != (want[:1], want[2:]) or have[1] < want[1]:
                raise ValueError(
                    f"the switches change {name} from {tuple(have)} to {tuple(want)}; a switch may drop or "
                    "add tensors, or keep a tensor's first input channels: give the changed layer a new name"
                )
            slices.append((name, want[1]))
    dropped, added = released.keys() - ablated.keys(), ablated.keys() - released.keys()
    return Ablation(frozenset(dropped), frozenset(added), tuple(slices))


def ablation_of_folder(config: Config) -> Ablation:
    """`ablation` of `config`, for weights that may hold tensors which their own switches added."""
    changed, stored = ablation(config.unet, config.use), from_dict(read_stored_settings(config.weights)).use
    if stored == config.use:
        return changed
    return changed._replace(dropped=changed.dropped | (ablation(config.unet, stored).added - changed.added))


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Modules that are built here have shapes, and neither memory nor numbers."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills a new tensor: on `meta` nothing can, and trying takes half of the time."""

    FILLING = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.zero_, Tensor.fill_)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.FILLING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:  # plugins may make others
                return tensor
        return function(*args, **(kwargs or {}))


def build(part: str, config: Config) -> nn.Module:
    """One part without memory or numbers, on the `meta` device."""
    with on_meta():
        return construct(part, config)


def build_all(config: Config) -> dict[str, nn.Module]:
    """All parts of one model, likewise; plugins see them once."""
    with on_meta():
        parts = {part: as_drawn(part, config) for part in PARTS}
    plugins.change(parts, config, shapes)
    return parts


def construct(part: str, config: Config) -> nn.Module:
    """One part as a training from scratch starts: PyTorch's initialisation, branches zero at their ends.

    Then plugins change it. They see the other parts too, on `meta`.
    """
    made = as_drawn(part, config)
    if not config.plugins:
        return made
    with on_meta():
        parts = {name: made if name == part else as_drawn(name, config) for name in PARTS}
    plugins.change(parts, config, shapes)
    return parts[part]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all tensors that a weights file holds of a part"""
    return {name: tuple(t.shape) for name, t in inner(model).state_dict().items()}


def as_drawn(part: str, config: Config) -> nn.Module:
    """One part without plugins"""
    if part == "unet":
        return UNet(config.unet, config.use, backend=config.runtime.attention)
    if part == "vae":
        return AutoencoderKL(config.vae, backend=for_any_heads(config.runtime.attention))
    if part == "clip":
        return ClipEncoders(config.clip)
    raise ValueError(f"there is no part {part!r}; a model has {', '.join(PARTS)}")


def load(part: str, config: Config, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """One part with the weights of `config.weights`, or random ones, in eval mode and without gradients."""
    model = build(part, config)
    if config.weights == settings.RANDOM:
        state = random_state(model, seed=0)
        changed, lacking = NO_CHANGE, ""
    else:
        state = read_part(config.weights, part)
        changed = ablation_of_folder(config) if part == "unet" else NO_CHANGE
        lacking = plugins.missing(read_origin(config.weights), config)
    if config.plugins:
        with on_meta():
            dropped, added = plugins.difference(shapes(as_drawn(part, config)), shapes(model))
        changed = changed._replace(dropped=changed.dropped | dropped, added=changed.added | added)
    try:
        fill(
            model,
            state,
            changed=changed,
            device=device,
            dtype=dtype,
            source=f"{part} of {config.weights}",
            initial=lambda names: initial(part, config, names),
        )
    except ValueError as error:
        if lacking:
            raise ValueError(f"{error}; {lacking}") from error
        raise
    if lacking and part == "unet":
        warnings.warn(f"the weights in {config.weights}: {lacking}", stacklevel=2)
    return model.eval().requires_grad_(False)


def fill(
    model: nn.Module,
    state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    changed: Ablation = NO_CHANGE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    source: str = "the state dict",
    initial: Callable[[list[str]], Mapping[str, Tensor]] | None = None,
    place: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Put a state dict into a model built on `meta`: strictly, tensor by tensor, cast on the way.

    ValueError lists what is missing, left over or of another shape. Dropped tensors are left out; for added
    ones that the state lacks, `initial` is called, with a warning. `place` makes of each tensor what the
    model will hold; by default it is moved to `device` in `dtype`.
    """

    def moved(name: str, tensor: Tensor) -> Tensor:
        cast = dtype if tensor.is_floating_point() else None
        return tensor.to(device=device, dtype=cast or tensor.dtype).contiguous()

    place = place or moved
    wanted = shapes(model)
    filled: dict[str, Tensor] = {}
    problems, slices = [], dict(changed.slices)
    for name, tensor in state.items() if isinstance(state, Mapping) else state:
        if name in changed.dropped and wanted.get(name) != tuple(tensor.shape):
            continue  # one of another shape that a plugin gives a tensor is new, not missing
        if name in slices:
            tensor = tensor[:, : slices[name]]
        if name not in wanted:
            problems.append(f"unexpected {name}")
        elif tuple(tensor.shape) != wanted[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the model's is {wanted[name]}")
        else:
            filled[name] = place(name, tensor)
    new = [name for name in wanted if name not in filled and name in changed.added]
    if new and initial is not None:
        warnings.warn(
            f"{source} lacks {counted(len(new), 'tensor')} that the settings add ({new[0]}"
            f"{', ...' * (len(new) > 1)}): what is new starts untrained",
            stacklevel=3,
        )
        filled |= {name: place(name, t) for name, t in initial(new).items()}
    problems += [f"missing {name}" for name in wanted if name not in filled and not _named(problems, name)]
    if problems:
        shown = "; ".join(problems[:6]) + ("; ..." if len(problems) > 6 else "")
        raise ValueError(f"{source} does not fit the settings in {counted(len(problems), 'tensor')}: {shown}")
    inner(model).load_state_dict(filled, strict=True, assign=True)
    if isinstance(model, ClipEncoders):
        model.reset_buffers()


def initial(part: str, config: Config, names: Iterable[str]) -> dict[str, Tensor]:
    """PyTorch's own initialisation, seeded, of these tensors; all of the part is built for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = inner(construct(part, config)).state_dict()
    return {name: state[name] for name in names}


def inner(model: nn.Module) -> nn.Module:
    """The module whose state dict a weights file holds: for CLIP open_clip's own."""
    return model.model if isinstance(model, ClipEncoders) else model


def random_state(
    model: nn.Module, *, seed: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Seeded weights from each tensor's name and shape; none is zero, activations stay finite.

    A GPU draws billions of them in a second; every kind of device draws numbers of its own.
    """
    for name, like in inner(model).state_dict().items():
        shape = tuple(like.shape)
        if not shape:
            yield name, torch.tensor(math.log(1 / 0.07), device=device)  # CLIP's logit_scale
            continue
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) + seed)
        value = torch.randn(shape, generator=generator, device=device)
        if len(shape) >= 2:
            value = value / math.sqrt(math.prod(shape[1:]))
        else:
            value = 1 + 0.1 * value if name.endswith("weight") else 0.05 * value
        yield name, value


def missing_parts(folder: str | Path) -> list[str]:
    """Parts that a native folder lacks for generation."""
    return [part for part in PARTS if not part_files(Path(folder), part)]


def read_part(folder: str | Path, part: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a part, one at a time. ValueError if the part is missing or damaged."""
    files = part_files(Path(folder), part)
    if not files:
        raise ValueError(
            f"weights folder {folder} lacks the {part}; it needs {part}.safetensors or its shards"
        )
    return _tensors(files)


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    with contextlib.ExitStack() as opened:
        yield from Widened(_Stored(files, opened)).items()


class _Stored(Mapping[str, Tensor]):
    """The tensors of a part's files, read on access."""

    def __init__(self, files: list[Path], opened: contextlib.ExitStack):
        self.home = {}
        for path in files:
            with _readable(path):
                file = opened.enter_context(safe_open(path, "pt"))
                self.home |= dict.fromkeys(file.keys(), (path, file))

    def __getitem__(self, name: str) -> Tensor:
        path, file = self.home[name]
        with _readable(path):
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.home)

    def __len__(self) -> int:
        return len(self.home)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); convert the weights again") from error


def stored(folder: str | Path, part: str) -> Mapping[str, Tensor]:
    """The same, each read whenever it is asked for, for `save` elsewhere."""
    return Widened(_Stored(part_files(Path(folder), part), contextlib.ExitStack()))


def read_origin(folder: str | Path) -> dict:
    """Where a native folder's weights come from, as far as it says; ValueError if the file is damaged."""
    path = Path(folder) / ORIGIN_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); convert the weights again") from error


def part_files(folder: Path, part: str) -> list[Path]:
    """The file or shards of a part; empty if it is not there. ValueError for a damaged index."""
    index = folder / f"{part}.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            bad = [name for name in names if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); convert the weights again") from error
        if bad:
            raise ValueError(f"{index} names files outside its folder: {bad[0]}")
        return [folder / name for name in names]
    single = folder / f"{part}.safetensors"
    return [single] if single.is_file() else []


def save(
    folder: str | Path,
    parts: Mapping[str, nn.Module | Mapping[str, Tensor | Entry]],
    config: Config,
    *,
    origin: Mapping | None = None,
    shard_bytes: int | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a native folder, whole or not at all; an old one at the same place is replaced at the very end.

    `parts` maps names of PARTS to models or state dicts. Of a model, the weights that it computes with are
    written: with its adapters merged, and widened where they are stored in eight bits. Tensors are taken out
    of a state dict one at a time, once for their shape and once to be written, so that one that reads lazily
    never lies in memory whole; an `Entry` in a tensor's place (its name is the key) is read only once.
    ValueError if the place holds anything but weights. `on_bytes` is called with the bytes written and the
    bytes in all.
    """
    folder = check_place(folder)
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"there is no part {sorted(unknown)[0]!r}; a model has {', '.join(PARTS)}")
    with whole.replacing_folder(folder, sync=True) as temporary:
        states = {p: computed_state(inner(m)) if isinstance(m, nn.Module) else m for p, m in parts.items()}
        entries = {part: _entries(state) for part, state in states.items()}
        tick = counter(sum(e.nbytes for listed in entries.values() for e in listed), on_bytes)
        for part, listed in entries.items():
            _write_part(temporary, part, listed, config, shard_bytes, tick)
        stored = dataclasses.replace(config, weights="", image=(), prompt=(), output="", items="").to_dict()
        # The job and the machine do not belong to the weights; their usual texts do.
        for name in (*settings.LITERALS, "runtime"):
            if name not in settings.KEPT_TEXTS:
                stored.pop(name, None)
        whole.write_json(temporary / ORIGIN_FILE, dict(origin or {}))
        whole.write_json(temporary / SETTINGS_FILE, {"format": settings.FORMAT, "settings": stored})
        if (folder / CARD_FILE).is_file():
            shutil.copyfile(folder / CARD_FILE, temporary / CARD_FILE)
    return folder


def computed_state(model: nn.Module) -> dict[str, Tensor | Entry]:
    """The state dict, with what each parametrized weight computes in place of what it is computed from."""
    state: dict[str, Tensor | Entry] = model.state_dict()
    for path, module in model.named_modules():
        for weight in module.parametrizations if parametrize.is_parametrized(module) else ():
            name, held = f"{path}.{weight}", getattr(module, weight)
            state = {n: t for n, t in state.items() if not n.startswith(f"{path}.parametrizations.{weight}.")}
            state[name] = Entry(name, tuple(held.shape), held.dtype, partial(getattr, module, weight))
    return state


def check_place(folder: str | Path) -> Path:
    """ValueError unless a weights folder can be written here: nothing there yet, or an older one.

    The older one is replaced, so it must hold nothing else, except a model card, which stays.
    """
    folder = Path(folder)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if folder.is_file() or (there and not _is_native(folder)):
        raise ValueError(f"{folder} exists and is no weights folder; choose another place")
    if others := [name for name in there if not OF_FOLDER.fullmatch(name)]:
        raise ValueError(
            f"{folder} is a weights folder that also holds {others[0]}, which would be lost; choose another "
            "place"
        )
    if file := next((parent for parent in folder.absolute().parents if parent.is_file()), None):
        raise ValueError(f"{folder} cannot be made: {file} is a file, not a folder")
    return folder


def _is_native(folder: Path) -> bool:
    try:
        held = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(held, dict) and "format" in held


def _write_part(
    folder: Path,
    part: str,
    entries: list[Entry],
    config: Config,
    shard_bytes: int | None,
    tick: Callable[[int], None],
) -> None:
    metadata = {"format": "pt", "part": part, "i2vgen": json.dumps(config.to_dict()[part], sort_keys=True)}
    pieces = shards(entries, shard_bytes)
    if len(pieces) == 1:
        write_safetensors(folder / f"{part}.safetensors", pieces[0], metadata=metadata, on_bytes=tick)
        return
    weight_map = {}
    for i, piece in enumerate(pieces, start=1):
        name = f"{part}-{i:05}-of-{len(pieces):05}.safetensors"
        write_safetensors(folder / name, piece, metadata=metadata, on_bytes=tick)
        weight_map.update((entry.name, name) for entry in piece)
    total = sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    whole.write_json(folder / f"{part}.safetensors.index.json", index)


def _entries(state: Mapping[str, Tensor | Entry]) -> list[Entry]:
    """A tensor is read for its shape now and again in its turn to be written; an Entry only then."""
    return [
        held
        if isinstance(held, Entry)
        else Entry(name, tuple(held.shape), held.dtype, lambda name=name: state[name])
        for name, held in state.items()
    ]


def shards(entries: Sequence[Entry], shard_bytes: int | None) -> list[list[Entry]]:
    """Entries in their order, cut so that no piece but one of a single tensor exceeds `shard_bytes`."""
    pieces: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shard_bytes is not None and pieces[-1] and size + entry.nbytes > shard_bytes:
            pieces.append([])
            size = 0
        pieces[-1].append(entry)
        size += entry.nbytes
    return pieces


def counter(total: int, on_bytes: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """-> a function of the size of each piece that calls `on_bytes` with (bytes done, bytes in all)."""
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if on_bytes is not None:
            on_bytes(min(done, total), total)

    return tick


def _named(problems: list[str], name: str) -> bool:
    return any(problem.startswith(f"{name} has shape") for problem in problems)
