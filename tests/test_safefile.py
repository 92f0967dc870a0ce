"""safefile.py: files that safetensors' own loader reads bit for bit, written whole or not at all."""

import json
import struct
import subprocess
import sys
import weakref
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file, save_file

from i2vgen.files import checkpoint
from i2vgen.files.safefile import DTYPES, Entry, write_safetensors


def entries_of(tensors):
    return [Entry(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()]


def random_of(dtype, *shape):
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.bool)
    return raw.view(dtype).reshape(shape)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bits(a[n]).equal(bits(b[n])) for n in a
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_and_shape(tmp_path, dtype):
    tensors = {
        "scalar": random_of(dtype),
        "empty": random_of(dtype, 0, 3),
        "odd": random_of(dtype, 3, 5),
        "one": random_of(dtype, 1),
    }
    write_safetensors(tmp_path / "f", entries_of(tensors))
    assert same_bits(load_file(tmp_path / "f"), tensors)


def test_mixed_dtypes_are_the_bytes_that_safetensors_itself_writes(tmp_path):
    tensors = {f"{name}.é": random_of(dtype, 3) for name, dtype in DTYPES.items()}
    write_safetensors(tmp_path / "ours", entries_of(tensors), metadata={"note": "é\n"})
    assert same_bits(load_file(tmp_path / "ours"), tensors)
    common = {n: t for n, t in tensors.items() if t.dtype.itemsize in (2, 4) and not t.is_complex()}
    one_each = {str(t.dtype.itemsize): t for t in common.values()}  # equal widths: their order is their own
    write_safetensors(tmp_path / "ours", entries_of(one_each), metadata={"note": "é\n"})
    save_file(one_each, tmp_path / "theirs", metadata={"note": "é\n"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_data_is_aligned_and_follows_the_header(tmp_path):
    tensors = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.ones(2), "c": torch.ones(1).double()}
    write_safetensors(tmp_path / "f", entries_of(tensors))
    raw = (tmp_path / "f").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    offsets = [told["data_offsets"] for told in header.values()]
    assert list(header) == ["c", "b", "a"] and offsets == [[0, 8], [8, 16], [16, 19]]
    assert len(raw) == 8 + length + 19


def test_the_order_of_the_entries_does_not_matter(tmp_path):
    tensors = {name: torch.randn(4) for name in "abcd"}
    write_safetensors(tmp_path / "one", entries_of(tensors))
    write_safetensors(tmp_path / "two", entries_of(tensors)[::-1])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_strides_gradients_and_pending_operations(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "transposed": base.T,
        "cut": base[1:3, ::2],
        "expanded": base[:1].expand(5, 6),
        "parameter": torch.nn.Parameter(base),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "shared": base,
    }
    write_safetensors(tmp_path / "f", entries_of(tensors))
    assert same_bits(load_file(tmp_path / "f"), {n: t.detach().resolve_conj() for n, t in tensors.items()})


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_casting_on_the_way(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("i2vgen.files.safefile.CHUNK", 7)
    tensor = torch.randn(5, 9)
    write_safetensors(tmp_path / "f", [Entry("w", (5, 9), dtype, lambda: tensor)])
    assert same_bits(load_file(tmp_path / "f"), {"w": tensor.to(dtype)})


def test_each_tensor_is_read_once_and_in_turn(tmp_path):
    log = []

    def entry(name):
        return Entry(name, (2,), torch.float32, lambda: log.append(name) or torch.ones(2))

    total = []
    write_safetensors(tmp_path / "f", [entry(n) for n in "cab"], on_bytes=total.append)
    assert log == ["a", "b", "c"]
    assert sum(total) == (tmp_path / "f").stat().st_size


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Entry("w", (3,), torch.float32, lambda: torch.ones(2)), r"w has shape \(2,\); \(3,\) was announced"),
        (Entry("w", (2,), torch.float32, lambda: torch.ones(2, device="meta")), "has no numbers"),
        (Entry("w", (2,), torch.float32, lambda: torch.ones(2).to_sparse()), "not dense"),
        (Entry("w", (2,), torch.int64, lambda: torch.ones(2)), "would lose what it means"),
        (Entry("w", (2,), torch.complex128, lambda: torch.ones(2)), "cannot hold"),
        (Entry("__metadata__", (2,), torch.float32, lambda: torch.ones(2)), "keeps its notes there"),
    ],
    ids=["shape", "meta", "sparse", "kind", "dtype", "reserved"],
)
def test_what_cannot_be_written_leaves_no_trace(tmp_path, entry, words):
    (tmp_path / "f").write_bytes(b"old")
    first = Entry("a", (2,), torch.float32, lambda: torch.ones(2))
    with pytest.raises(ValueError, match=words):
        write_safetensors(tmp_path / "f", [first, entry])
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_bytes() == b"old"


def test_names_are_unique_and_notes_are_text(tmp_path):
    entry = Entry("w", (2,), torch.float32, lambda: torch.ones(2))
    with pytest.raises(ValueError, match="two tensors are called w"):
        write_safetensors(tmp_path / "f", [entry, entry])
    with pytest.raises(ValueError, match="metadata holds text only; 'step'"):
        write_safetensors(tmp_path / "f", [entry], metadata={"step": 3})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"]
)
def test_a_write_that_fails_keeps_the_old_file(tmp_path, error):
    def failing():
        raise error

    path = tmp_path / "f"
    write_safetensors(path, entries_of({"w": torch.ones(3)}))
    old = path.read_bytes()
    bad = Entry("z", (1,), torch.float32, failing)
    with pytest.raises(type(error)):
        write_safetensors(path, [*entries_of({"w": torch.zeros(3)}), bad])
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["f"]


KILLED = """
import os, signal, sys, torch
from i2vgen.files.safefile import (Entry, write_safetensors)
def die():
    os.kill(os.getpid(), signal.SIGKILL)
good = Entry("a", (4,), torch.float32, lambda: torch.zeros(4))
write_safetensors(sys.argv[1], [good, Entry("b", (4,), torch.float32, die)])
"""


def test_a_kill_in_the_middle_keeps_the_old_file(tmp_path, root):
    path = tmp_path / "f"
    write_safetensors(path, entries_of({"w": torch.ones(3)}))
    old = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=root)
    assert done.returncode == -9 and path.read_bytes() == old
    assert all(p.name.startswith(".") for p in tmp_path.iterdir() if p != path)


class Lazy(Mapping):
    """Tensors made at each access; knows how many of them are alive."""

    def __init__(self, names):
        self.names, self.alive, self.most = names, weakref.WeakSet(), 0

    def __getitem__(self, name):
        tensor = torch.full((3,), float(self.names.index(name)))
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return tensor

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


@pytest.mark.parametrize("shard_bytes", [None, 24])
def test_a_folder_is_saved_from_tensors_that_are_read_in_turn(tmp_path, tiny, shard_bytes):
    lazy = Lazy(list("abcdef"))
    folder = checkpoint.save(tmp_path / "w", {"vae": lazy}, tiny, shard_bytes=shard_bytes)
    assert lazy.most <= 2  # the next one is made before the last one's name is free
    assert same_bits(dict(checkpoint.read_part(folder, "vae")), dict(lazy.items()))


def test_a_folder_is_saved_from_entries_that_are_read_once(tmp_path, tiny):
    reads = []
    entries = {n: Entry(n, (2,), torch.bfloat16, lambda n=n: reads.append(n) or torch.ones(2)) for n in "ab"}
    folder = checkpoint.save(tmp_path / "w", {"vae": entries}, tiny)
    assert reads == ["a", "b"]
    assert all(t.equal(torch.ones(2).bfloat16()) for _, t in checkpoint.read_part(folder, "vae"))
