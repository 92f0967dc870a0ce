"""Feed mutated files to everything that reads what people give: a job for minutes, not a test.

    python tests/fuzz.py [COUNT] [--kinds picture,video,...] [--seed N] [--keep FOLDER]

    COUNT     mutated files in all (default 100000), shared out over the kinds
    --kinds   only these: picture, video, checkpoint, settings, yaml, jsonl, csv
    --seed    the first batch's number; the same numbers give the same files
    --keep    a folder for the files that failed (default outputs/fuzz)

Batches of files are read by processes of their own, with a limit on their memory. A file may be read, or
refused with a ValueError or OSError, which scripts tell in one line; anything else is a fault: another
exception, a signal, more than 10 seconds, more than 1 GB. The exit status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import media_files
import numpy as np
import safetensors.torch
import torch
from PIL import Image, PngImagePlugin

from i2vgen import jobs
from i2vgen.adapt import lora
from i2vgen.files import checkpoint, images, video
from i2vgen.scoring import clips
from i2vgen.settings import config
from i2vgen.settings.merge import from_dict, load_config, read_stored_settings
from i2vgen.training import data
from i2vgen.training.settings import load_settings
from weights_conversion import readers

ROOT = Path(__file__).parents[1]
SECONDS, BYTES = 10, 2**30  # what one file may take
ADDRESS_SPACE = 3 * 2**30  # more than a batch's process begins with: what asks for more gets a MemoryError
BATCH = 100  # files read by one process
REFUSALS = (ValueError, OSError)


class Kind(NamedTuple):
    share: int  # of 100 files
    seeds: Callable[[], dict[str, bytes]]  # file name -> a good file
    mutate: Callable[[random.Random, str, bytes], bytes]
    read: Callable[[Path, random.Random], object]


# ---------------------------------------------------------------------------------------------------
# Mutations


NUMBERS = (0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def bytes_changed(r: random.Random, held: bytes, *, head: bool = False) -> bytes:
    """A few bytes flipped, set, removed, inserted or copied; `head`: mostly where headers are."""
    found = bytearray(held)
    for _ in range(r.choice((1, 1, 2, 4, 16, 64))):
        if len(found) < 2:
            break
        reach = min(len(found), r.choice((64, 256, len(found)))) if head else len(found)
        at, length = r.randrange(reach), r.choice((1, 2, 4, 8))
        match r.randrange(7):
            case 0:
                found[at] ^= 1 << r.randrange(8)
            case 1:
                found[at] = r.randrange(256)
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = r.randbytes(length)
            case 4:
                number = r.choice(NUMBERS).to_bytes(8, r.choice(("little", "big")))
                found[at : at + length] = number[:length] if number[0] else number[-length:]
            case 5:
                start = r.randrange(len(found))
                found[at : at + length] = found[start : start + 4 * length]
            case 6 if r.random() < 0.3:
                del found[r.randrange(len(found)) :]
    return bytes(found)


def media_changed(r: random.Random, name: str, held: bytes) -> bytes:
    return bytes_changed(r, held, head=True)


# What stands for values, names and separators in texts.
ODD = (
    "", "null", "~", "true", "-1", "0", "1.5", ".nan", ".inf", "1e400", "9" * 5000, str(2**62), str(2**40),
    "0x10", "12:30:45", "2024-13-45", "!!python/object/apply:os.system [echo]", "!!binary x", "!!set {a, b}",
    "!!int ''", "!!timestamp x", "[]", "[[]]", "[1, [2]]", "{}", "{1: 2}", "{a: {a: 1}}", '"', "'", "[", "{",
    "]", "&a", "*a", "&a [*a]", "<<: *a", "<<: 3", "${oc.env:HOME}", "${sample.steps}", "${", "???", "\0",
    "\x1b[31m", "\ud7ff", "\u2028", "\x85", "\ufeff", "é", "a" * 10_000, "[" * 3000, "{a: " * 500,
    "- " * 500, "? ", ": ", ",", ";", "\t", "\r", "\n", '""', "\\ud800", "\\u0000", "NaN", "../", "/", ".",
    "=", "#", "|", ">", "%", "@", "`",
)  # fmt: skip


def text_changed(r: random.Random, name: str, held: bytes) -> bytes:
    """Words and lines of a text replaced by odd ones, moved or doubled; some bytes too."""
    text = held.decode()
    for _ in range(r.choice((1, 1, 2, 3, 8))):
        words = text.split(" ")
        at = r.randrange(len(words))
        match r.randrange(6):
            case 0 | 1:
                words[at] = r.choice(ODD)
            case 2:
                words.insert(at, r.choice(ODD))
            case 3:
                words[at] = words[at] + r.choice(ODD)
            case 4:
                del words[at]
        text = " ".join(words)
        lines = text.split("\n")
        at = r.randrange(len(lines))
        match r.randrange(8):
            case 0:
                lines.insert(at, r.choice(lines))
            case 1:
                lines[at] = " " * r.randrange(6) + lines[at].strip()
            case 2:
                del lines[at]
        text = "\n".join(lines)
    encoding = r.choice(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "latin-1", "utf-32"))
    found = text.encode(encoding, "replace")
    return bytes_changed(r, found) if found and r.random() < 0.2 else found


PICKLED = (
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n", b"ctorch\nfloat32\n", b"cargparse\nNamespace\n", b"cbuiltins\nset\n",
    b"cbuiltins\ngetattr\n", b"cos\nsystem\n", b"h\x00R", b"h\x01\x85R", b"h\x02\x86", b"h\x00s", b"h\x00a",
    b"h\x00u", b")" + b"\x85" * 64, b"q\x00h\x00\x86" * 12,
)  # fmt: skip
OPCODES = (
    b"(012FNIJKLMPQRSTUVXabcdegijhlopqrstu]})\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8f\x90\x91\x93."
)


def pickle_changed(r: random.Random, held: bytes) -> bytes:
    found = bytearray(held)
    for _ in range(r.choice((1, 2, 3, 6))):
        at = r.randrange(2, max(3, len(found)))
        if r.random() < 0.3:
            found = bytearray(bytes_changed(r, bytes(found)))
        else:
            found[at:at] = r.choice((bytes([r.choice(OPCODES)]), r.choice(PICKLED)))
    return bytes(found)


def zip_changed(r: random.Random, held: bytes) -> bytes:
    """The pickle inside of a zip archive, under a right checksum, or an entry left out or doubled."""
    out = io.BytesIO()
    warnings.simplefilter("ignore")  # of names that come twice
    with zipfile.ZipFile(io.BytesIO(held)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = pickle_changed(r, content)
            for _ in range(r.choice((1,) * 30 + (0, 2))):
                new.writestr(entry.filename, content)
    return out.getvalue()


VALUES = (
    0, 1, -1, 4, 16, 2**31, 2**63, 2**64, 1e400, -0.0, None, True, "4", [], [1], {}, "F32", "F8_E4M3", "XX",
    "\x1b[31m",
)  # fmt: skip


def header_changed(r: random.Random, held: bytes) -> bytes:
    """The JSON of a safetensors file."""
    size = int.from_bytes(held[:8], "little")
    header, rest = json.loads(held[8 : 8 + size]), held[8 + size :]
    for _ in range(r.choice((1, 1, 2, 3))):
        name = r.choice(list(header))
        entry = header[name]
        match r.randrange(4):
            case 0:
                header[r.choice(("", "../../x", "\0", "__metadata__", "z" * 300, "\ud800"))] = entry
            case 1 if isinstance(entry, dict) and entry:
                entry[r.choice(list(entry))] = r.choice(VALUES)
            case 2 if isinstance(entry, dict):
                entry["shape"] = [r.choice(VALUES) for _ in range(r.randrange(4))]
            case 3 if isinstance(entry, dict):
                entry["data_offsets"] = [r.choice((0, 24, 48, 96, r.randrange(400))) for _ in range(2)]
    text = json.dumps(header).encode()
    return (len(text) + r.choice((0,) * 6 + (1, -1, 8))).to_bytes(8, "little") + text + rest


def checkpoint_changed(r: random.Random, name: str, held: bytes) -> bytes:
    if r.random() < 0.4:
        return bytes_changed(r, held, head=r.random() < 0.5)
    if name.endswith(".safetensors"):
        return header_changed(r, held)
    return pickle_changed(r, held) if "legacy" in name else zip_changed(r, held)


# ---------------------------------------------------------------------------------------------------
# Good files, and how each kind is read


def pictures() -> dict[str, bytes]:
    colours = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[images.EXIF_ORIENTATION] = 6
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"gAMA", (45455).to_bytes(4, "big"))
    for number, name in enumerate(("gamma", "chromaticity", "icc_profile", "srgb", "fps")):
        chunks.add_text(name, str(number))
    found = {}
    for name, picture, form, how in (
        ("a.png", colours, "PNG", {}),
        ("text.png", colours, "PNG", {"pnginfo": chunks, "exif": turned}),
        ("icc.png", colours, "PNG", {"icc_profile": media_files.rgb_profile(media_files.ADOBE_RGB, 2.2)}),
        ("alpha.png", colours.convert("RGBA"), "PNG", {}),
        ("palette.png", colours.convert("P"), "PNG", {"transparency": 3}),
        ("deep.png", colours.convert("I;16"), "PNG", {}),
        ("a.jpg", colours, "JPEG", {"exif": turned}),
        (
            "cmyk.jpg",
            colours.convert("CMYK"),
            "JPEG",
            {"icc_profile": media_files.cmyk_profile(np.ones([2] * 4))},
        ),
        ("a.webp", colours, "WEBP", {"exif": turned.tobytes()}),
        ("a.avif", colours, "AVIF", {}),
        ("a.gif", colours, "GIF", {}),
        ("a.bmp", colours, "BMP", {}),
        ("lzw.tif", colours, "TIFF", {"compression": "tiff_lzw"}),
        ("float.tif", colours.convert("F"), "TIFF", {}),
        ("a.ico", colours, "ICO", {}),
        ("a.ppm", colours, "PPM", {}),
        ("a.tga", colours, "TGA", {}),
        ("a.jp2", colours, "JPEG2000", {}),
        ("a.pcx", colours, "PCX", {}),
        ("a.dds", colours, "DDS", {}),
    ):
        file = io.BytesIO()
        with contextlib.suppress(KeyError, OSError):  # a Pillow without this format
            picture.save(file, form, **how)
            found[name] = file.getvalue()
    return found


def read_picture(path: Path, r: random.Random) -> object:
    return images.open_picture(path, exif=r.choice(("apply", "ignore")), alpha=r.choice(("white", "drop")))


def videos() -> dict[str, bytes]:
    frames = np.random.RandomState(0).randint(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.mp4", "a.gif", "a.webp"):
            found[name] = video.save(frames, Path(folder, name), fps=8).read_bytes()
        for name, form, codec in (
            ("a.mkv", "matroska", "mpeg4"),
            ("a.avi", "avi", "mpeg4"),
            ("a.mov", "mov", "mpeg4"),
            ("a.webm", "webm", "libvpx-vp9"),
        ):
            with contextlib.suppress(av.FFmpegError, ValueError):  # a PyAV without this codec
                found[name] = encoded(frames, Path(folder, name), form, codec)
        turned = media_files.turn(
            media_files.write_video(Path(folder, "turned.mov"), frames, aspect=2), 0, -1, -1, 0
        )
        found["turned.mov"] = turned.read_bytes()
    return found


def encoded(frames: np.ndarray, path: Path, form: str, codec: str) -> bytes:
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def read_video(path: Path, r: random.Random) -> object:
    return clips.frames(clips.Clip("clip", path), r.choice((0, 0, 2)))


def checkpoints() -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(5, generator=generator).half(),
        "c": torch.arange(6),
        "d": torch.randn(4, 4, generator=generator).t(),
        "e": torch.randn(2, 3, generator=generator).bfloat16(),
    }
    wrapped = {"state_dict": tensors, "step": 5, "settings": {"x": 1}, "list": [1, 2, "s"]}
    found = {}
    for name, content, zipped in (
        ("a.pth", tensors, True),
        ("wrapped.pth", wrapped, True),
        ("legacy.pth", tensors, False),
        ("legacy_wrapped.pth", wrapped, False),
    ):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        found[name] = file.getvalue()
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    found["a.safetensors"] = safetensors.torch.save(plain, {"format": "pt"})
    return found


def read_checkpoint(path: Path, r: random.Random) -> object:
    return [tensor.clone() for tensor in readers.open_file(path).tensors.values() if tensor.numel() < 2**24]


def settings_files() -> dict[str, bytes]:
    stored = {"format": config.FORMAT, "settings": load_config(ROOT / "configs" / "tiny.yaml").to_dict()}
    index = {"weight_map": {"a": "unet-00001-of-00002.safetensors", "b": "unet-00002-of-00002.safetensors"}}
    adapter = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "target_modules": ["to_q"], "bias": "none"}
    files = {
        "settings": stored,
        "unet.safetensors.index": index,
        "adapter_config": adapter,
        "origin": {"a": [1]},
    }
    return {f"{name}.json": json.dumps(held, indent=1).encode() for name, held in files.items()}


def read_settings(path: Path, r: random.Random) -> object:
    match path.name:
        case "settings.json":
            return from_dict(read_stored_settings(path.parent))
        case "adapter_config.json":
            matrices = {f"base_model.model.a.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
            safetensors.torch.save_file(matrices, path.with_name(lora.WEIGHTS_FILE))
            return lora.read(path.parent)
        case "origin.json":
            return checkpoint.read_origin(path.parent)
    return checkpoint.part_files(path.parent, "unet")


def yaml_files() -> dict[str, bytes]:
    places = ("tiny.yaml", "cascade_small.yaml", "variants/sr600_official.yaml", "train/tiny_vae.yaml")
    return {Path(place).name: (ROOT / "configs" / place).read_bytes() for place in places}


def read_yaml(path: Path, r: random.Random) -> object:
    return load_settings(path) if path.name == "tiny_vae.yaml" else load_config(path)


def jsonl_files() -> dict[str, bytes]:
    rows = [
        {"image": "a.png", "prompt": "a star, moving left", "seed": [1, 2], "output": "a.mp4"},
        {"image": "b.png", "prompt": "é \u2028 x", "refine_prompt": "sharp"},
    ]
    named = [
        {"file": "a.mp4", "caption": "a star", "prompt": "x", "image": "a.png", "name": "n"},
        {"file": "b.gif", "caption": ""},
    ]
    return {
        name: "".join(json.dumps(row, ensure_ascii=r) + "\n" for row in held).encode()
        for name, held, r in (
            ("items.jsonl", rows, False),
            ("list.jsonl", named, True),
            ("captions.jsonl", named, True),
        )
    }


def csv_files() -> dict[str, bytes]:
    text = 'file,caption,image,prompt\na.mp4,"a ""red"" star, moving\nleft",a.png,"x, y"\nb.gif,blue,,\n'
    return {"list.csv": text.encode(), "captions.csv": text.replace("\n", "\r\n").encode()}


def read_list(path: Path, r: random.Random) -> object:
    if path.stem == "captions":
        return data.read_captions(path.parent)
    return list(jobs.read_items(str(path))) if path.stem == "items" else clips.find("videos", str(path))


KINDS = {
    "picture": Kind(22, pictures, media_changed, read_picture),
    "video": Kind(14, videos, media_changed, read_video),
    "checkpoint": Kind(28, checkpoints, checkpoint_changed, read_checkpoint),
    "settings": Kind(6, settings_files, text_changed, read_settings),
    "yaml": Kind(10, yaml_files, text_changed, read_yaml),
    "jsonl": Kind(10, jsonl_files, text_changed, read_list),
    "csv": Kind(10, csv_files, text_changed, read_list),
}


# ---------------------------------------------------------------------------------------------------
# Running


class TooLong(BaseException):
    """Raised by the alarm; no reader may catch it."""


def one(kind: Kind, path: Path, r: random.Random) -> str:
    """Read one file -> `read`, `refused`, or the fault."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        kind.read(path, r)
        outcome = "read"
    except REFUSALS:
        outcome = "refused"
    except TooLong:
        outcome = f"over {SECONDS} s"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {str(error)[:80]!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return f"{grown / 2**30:.1f} GB" if grown > BYTES and outcome in ("read", "refused") else outcome


def batch(kind: Kind, seed: int, count: int, folder: Path, keep: Path, log: Path) -> None:
    """Read `count` mutated files, and write a line per file; a faulty one is kept."""
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TooLong()))
    taken = Path("/proc/self/statm")  # in pages; a fork of a process that has run long begins with more
    begun = int(taken.read_text().split()[0]) * resource.getpagesize() if taken.exists() else 3 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (begun + ADDRESS_SPACE, begun + ADDRESS_SPACE))
    warnings.simplefilter("ignore")
    logging.disable()
    r, good = random.Random(seed), kind.seeds()
    for name, held in good.items():  # else nothing would be learned from what is refused
        (folder / name).write_bytes(held)
        kind.read(folder / name, r)
    with log.open("w", encoding="utf-8") as lines:
        for number in range(count):
            name = r.choice(sorted(good))
            path = folder / name
            path.write_bytes(kind.mutate(r, name, good[name]))
            outcome = one(kind, path, r)
            if outcome not in ("read", "refused"):
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, keep / f"{seed}_{number}_{name}")
            for file in folder.iterdir():
                if file != log:
                    file.unlink()
            lines.write(json.dumps(outcome) + "\n")
            lines.flush()


def forked(name: str, seed: int, count: int, folder: Path, keep: Path) -> int:
    """Start a batch in a process of its own -> its id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)  # what FFmpeg says of broken files
        batch(KINDS[name], seed, count, folder, keep, folder / "log")
        status = 0
    finally:
        os._exit(status)


def outcomes(folder: Path, count: int, status: int) -> list[str]:
    """What a batch's files came to; after a signal, the first without a line is the one that raised it."""
    log = folder / "log"
    found = (
        [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    )
    if len(found) < count:
        found.append(f"the process ended with {os.waitstatus_to_exitcode(status)}")
    return found


def run(count: int, names: list[str], seed: int, keep: Path) -> Iterator[tuple[str, list[str]]]:
    """Batches of every kind, one per core at a time -> (kind, outcomes) as they end."""
    total = sum(KINDS[name].share for name in names)
    waiting = []
    for name in names:
        wanted = -(-count * KINDS[name].share // total)
        waiting += [(name, min(BATCH, wanted - done)) for done in range(0, wanted, BATCH)]
    running: dict[int, tuple[str, int, Path, float]] = {}
    with tempfile.TemporaryDirectory() as work:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                name, size = waiting.pop()
                folder = Path(work, str(seed))
                folder.mkdir()
                pid = forked(name, seed, size, folder, keep)
                running[pid] = name, size, folder, time.monotonic()
                seed += 1
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                name, size, folder, _ = running.pop(pid)
                yield name, outcomes(folder, size, status)
                if stuck := [path for path in folder.iterdir() if path.name != "log"]:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(stuck[0], keep / f"{folder.name}_ended_{stuck[0].name}")
                shutil.rmtree(folder)
                continue
            for pid, (_, _, folder, start) in running.items():
                log = folder / "log"
                beat = (
                    max(start, time.monotonic() - (time.time() - log.stat().st_mtime))
                    if log.exists()
                    else start
                )
                if time.monotonic() - beat > 6 * SECONDS:  # stuck in C, where no alarm arrives
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", nargs="?", type=int, default=100_000)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("outputs/fuzz"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    names, start = given.kinds.split(","), time.monotonic()
    found = {name: collections.Counter() for name in names}
    for name, came in run(given.count, names, given.seed, given.keep):
        found[name].update(came)
    print("| kind | files | read | refused | faults |\n|---|---:|---:|---:|---:|")
    faults = 0
    for name, counts in found.items():
        read, refused, total = counts["read"], counts["refused"], counts.total()
        faults += total - read - refused
        print(f"| {name} | {total:,} | {read:,} | {refused:,} | {total - read - refused} |")
    total = sum(counts.total() for counts in found.values())
    print(f"\n{total:,} mutated files in {time.monotonic() - start:.0f} s: {faults} faults")
    for name, counts in found.items():
        for outcome, times in counts.most_common():
            if outcome not in ("read", "refused"):
                print(f"{name}: {times} times {outcome}; files in {given.keep}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
