"""`train.shard=full`: the UNet's weights, gradients, moments and average split over processes (FSDP2).

Every process holds an n-th of each tensor, and the rest of a block only while that block computes. The UNet
is built on `meta` and each process reads or draws its own part, one tensor at a time: none ever holds the
whole model. Checkpoints are PyTorch's distributed ones (`torch.distributed.checkpoint`), which any number of
processes can resume from; one process writes `weights/`, one gathered tensor at a time.

Functions without a word about sharding take plain tensors too.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from i2vgen.fast.checkpointing import set_checkpointing
from i2vgen.fast.compiled import compile_training
from i2vgen.files import checkpoint, whole
from i2vgen.files.safefile import Entry, in_order
from i2vgen.model.unet import UNet
from i2vgen.settings.config import RANDOM, Config
from i2vgen.training.settings import Train, buckets

# The streams of CPUs, which do nothing, learned in 2.7 what fully_shard asks of streams.
CPUS = getattr(torch.cpu.Stream, "record_event", None) is not None
METADATA = ".metadata"  # the file that makes a folder one of PyTorch's distributed checkpoints
TIMEOUT = timedelta(minutes=30)  # for a process that waits for the others
# What gloo says once the process at the other end is gone; NCCL raises errors of its own type.
PEER_GONE = ("closed by peer", "reset by peer", "broken pipe", "gloo/transport", "no error: eof")


# ---------------------------------------------------------------------------------------------------
# Processes


def check(train: Train, ranks: int) -> None:
    """ValueError for a number of processes that the settings cannot use."""
    if train.shard == "none":
        return
    if ranks == 1:
        raise ValueError(
            "train.shard=full splits the UNet over processes, but there is one; start several with torchrun "
            "--nproc-per-node N, or leave it out"
        )
    if ranks % train.replicas or ranks == train.replicas:
        fitting = [n for n in range(1, ranks // 2 + 1) if ranks % n == 0]
        raise ValueError(
            f"train.replicas = {train.replicas} does not divide {ranks} processes into groups of two or "
            f"more; give one of {', '.join(map(str, fitting))}, or start another number of processes"
        )


def join(device: torch.device) -> None:
    """Enter the group of all processes. Checkpoints are agreed upon by CPUs, whatever the device."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def make_mesh(train: Train, device: torch.device) -> DeviceMesh:
    """All processes as [shards], or as [replicas shards]: neighbours hold the shards of one copy."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    check(train, ranks)
    if device.type == "cpu" and not CPUS:
        raise ValueError(
            f"train.shard=full on CPUs needs PyTorch 2.7 or newer, here is {torch.__version__}; use GPUs, or "
            "leave it out"
        )
    if train.replicas == 1:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shards",))
    shape = (train.replicas, ranks // train.replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "shards"))


def agree(what: str, value: object) -> None:
    """ValueError if the processes see different values: their machines do not share a folder."""
    seen: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, value)
    if any(one != seen[0] for one in seen):
        raise ValueError(
            f"the processes see different {what} ({', '.join(sorted({str(one) for one in seen}))}); all "
            "machines must share the folder of output="
        )


def peer_gone(error: RuntimeError) -> bool:
    """Whether an error means that another process ended."""
    return isinstance(error, dist.DistError) or any(words in str(error).lower() for words in PEER_GONE)


# ---------------------------------------------------------------------------------------------------
# The network


def make_unet(config: Config, train: Train, device: torch.device, dtype: torch.dtype) -> UNet:
    """The UNet of `weights=`, or the new one of `train.seed`, in float32 shards; it computes in `dtype`."""
    if dtype == torch.float16:
        raise ValueError(
            "train.shard=full computes in bf16 or float32, but train.precision is fp16 here; give one of them"
        )
    if config.weights == RANDOM:
        raise ValueError("weights=random cannot be trained on; leave weights out to start from new weights")
    mesh = make_mesh(train, device)
    recorder = Recorder()
    with recorder, torch.device("meta"):
        unet = checkpoint.construct("unet", config)
    new = "unet" in checkpoint.missing_parts(config.weights)
    state = recorder.replay(unet, train.seed) if new else checkpoint.read_part(config.weights, "unet")
    set_checkpointing(unet, train.checkpointing)
    if train.compile:
        compile_training(unet, len(buckets(config, train)), device)
    shard(unet, mesh, dtype)
    specs = dict(unet.state_dict())
    checkpoint.fill(
        unet,
        state,
        changed=checkpoint.NO_CHANGE if new else checkpoint.ablation_of_folder(config),
        place=lambda name, tensor: shard_of(tensor.to(device, torch.float32), specs[name]),
        source="the new UNet" if new else f"unet of {config.weights}",
        initial=lambda names: checkpoint.initial("unet", config, names),
    )
    return unet.requires_grad_(True)


def shard(unet: UNet, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Split every block, and what lies between the blocks, over the mesh; each is gathered in `dtype`."""
    half = dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if half else None, reduce_dtype=torch.float32 if half else None
    )
    for module in (*unet.blocks(), unet):
        # The outermost module too gives its weights back: between two forwards they may change.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    register_fsdp_forward_method(unet, "prepare")


class Recorder(TorchDispatchMode):
    """Notes the initialisation of a network that is built on `meta`, to carry it out tensor by tensor."""

    def __init__(self):
        super().__init__()
        self.steps: list[tuple[Tensor, Callable, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            self.steps.append((args[0], func, args[1:], kwargs or {}))
        return func(*args, **(kwargs or {}))

    def replay(self, network: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), as building the network on the CPU after `torch.manual_seed(seed)` gives them."""
        names = {t.untyped_storage()._cdata: name for name, t in network.state_dict().items()}
        steps = [(names.get(t.untyped_storage()._cdata), t.shape, *rest) for t, *rest in self.steps]
        left = Counter(name for name, *_ in steps)
        return _replay(steps, left, seed)


def _replay(steps: list[tuple], left: Counter, seed: int) -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(seed)
    started: dict[str, Tensor] = {}
    for name, shape, func, args, kwargs in steps:
        tensor = started.setdefault(name, torch.empty(shape)) if name else torch.empty(shape)
        func(tensor, *args, **kwargs)
        left[name] -= 1
        if name and not left[name]:
            yield name, started.pop(name)


# ---------------------------------------------------------------------------------------------------
# Tensors. Arithmetic on many of them is on local parts, because a DTensor takes long to find its way.


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, sharded: Tensor) -> Tensor:
    """This process's part -> a tensor sharded as another one, or one number for each row of it."""
    if not isinstance(sharded, DTensor) or isinstance(part, DTensor) or not part.ndim:
        return part
    shape, stride = sharded.shape, sharded.stride()
    if part.ndim < sharded.ndim:
        shape, stride = shape[:1], (1,)
    mesh, placements = sharded.device_mesh, sharded.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def shard_of(tensor: Tensor, sharded: Tensor) -> Tensor:
    """A whole tensor -> the same, sharded as another one of its shape is. Nothing is sent."""
    if not isinstance(sharded, DTensor):
        return tensor
    return like(_rows(tensor, sharded).clone(memory_format=torch.contiguous_format), sharded)


def _rows(tensor: Tensor, sharded: DTensor) -> Tensor:
    """This process's rows of a whole tensor."""
    axis = next(i for i, placement in enumerate(sharded.placements) if placement.is_shard())
    pieces = tensor.chunk(sharded.device_mesh.size(axis))
    place = sharded.device_mesh.get_local_rank(axis)
    return pieces[place] if place < len(pieces) else tensor[:0]


@torch.no_grad()
def copy_into(target: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    local(target).copy_(_rows(tensor, target) if isinstance(target, DTensor) else tensor)


def handle(parameter: nn.Parameter) -> nn.Parameter:
    """What an optimiser gets of a parameter: itself, or this process's part of it."""
    return nn.Parameter(local(parameter.detach())) if isinstance(parameter, DTensor) else parameter


def clip(model: nn.Module, handles: Mapping[str, nn.Parameter], most: float) -> Tensor:
    """Scale gradients down to a norm of `most` -> their norm before. The handles get their gradients here."""
    mesh = None
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            handles[name].grad = None if parameter.grad is None else local(parameter.grad)
    if mesh is None:
        return nn.utils.clip_grad_norm_(handles.values(), most)
    squares = nn.utils.get_total_norm([p.grad for p in handles.values() if p.grad is not None]).square()
    dist.all_reduce(squares, group=mesh.get_group("shards"))
    norm = squares.sqrt()
    nn.utils.clip_grads_with_norm_(handles.values(), most, norm)
    return norm


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; all processes must call it."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def entries(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Tensors to be written, each gathered in its turn; all processes must read them, in this order."""
    return in_order(
        [Entry(name, tuple(t.shape), t.dtype, lambda t=t: gathered(t)) for name, t in tensors.items()]
    )


# ---------------------------------------------------------------------------------------------------
# Checkpoints


class Saver:
    """Writes checkpoints in the background, one at a time; each appears whole, once the next step asks.

    The folder must be one that all machines share.
    """

    def __init__(self, rank: int):
        self.rank, self.group = rank, dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.writing: contextlib.ExitStack | None = None
        self.done: Callable[[], None] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            self.finish()
        elif self.writing is not None:
            self.writing.__exit__(kind, *rest)  # what is unfinished goes

    def save(
        self,
        place: Path,
        tensors: Mapping[str, Tensor],
        finish: Callable[[Path], None],
        after: Callable[[], None],
    ) -> None:
        """Begin to write. One process calls `finish` with the folder before, and `after` once it is there."""
        self.finish()
        told = [None]
        self.writing = contextlib.ExitStack()
        if self.rank == 0:
            told = [self.writing.enter_context(whole.replacing_folder(place, sync=True))]
        dist.broadcast_object_list(told, src=0, group=self.group)
        # Training goes on in these tensors: those of a GPU are copied by PyTorch, those of a CPU not always.
        on_cpu = {name: local(t).device.type == "cpu" for name, t in tensors.items()}
        kept = {n: like(local(t).detach().clone(), t) if on_cpu[n] else t for n, t in tensors.items()}
        writer = (Writer if all(on_cpu.values()) else FileSystemWriter)(told[0])
        with _quiet():
            future = dcp.async_save(kept, storage_writer=writer, process_group=self.group)

        def done() -> None:
            future.result()
            if self.rank == 0:
                finish(told[0])
                self.writing.close()
                after()

        self.done, self.future = done, future

    def look(self) -> None:
        """Let a checkpoint appear that has been written meanwhile."""
        if self.done is not None and self.future.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is there."""
        done, self.done = self.done, None
        if done is not None:
            done()
            self.writing = None


class Writer(FileSystemWriter):
    """PyTorch's, for tensors that are copies already: its own copy of a sharded one takes a millisecond."""

    def stage(self, state_dict):
        return state_dict


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a distributed one."""
    return (path / METADATA).is_file()


def files(path: Path) -> list[Path]:
    return [path / METADATA, *path.glob("*.distcp")]


class Reader(FileSystemReader):
    """PyTorch's, which reads a pickle: here one that can hold nothing but what describes tensors."""

    def read_metadata(self, rank: int | None = None) -> Metadata:  # all ranks read the same
        file = Path(self.path) / METADATA
        try:
            metadata = Descriptions(io.BytesIO(file.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); remove {file.parent}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


# Module -> names that the metadata of a checkpoint of tensors holds.
DESCRIBING = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "StorageMeta", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


class Descriptions(pickle.Unpickler):
    """Reads the metadata of a distributed checkpoint; ValueError for anything else, which could run code."""

    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) == ("torch", "Size") or name in DESCRIBING.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"the metadata of a checkpoint names {module}.{name}, which describes no tensor")


def stored_names(path: Path) -> set[str]:
    return set(Reader(path).read_metadata().state_dict_metadata)


def load(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors, sharded or not, from a distributed checkpoint of any number of processes, in place."""
    sharded = any(isinstance(t, DTensor) for t in tensors.values())
    with _quiet():
        dcp.load(
            {n: t.detach() for n, t in tensors.items()},
            storage_reader=Reader(path),
            no_dist=not sharded,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's notes on its own ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
