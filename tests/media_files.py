"""Pictures and videos as cameras and phones write them, for the tests: colour profiles, display matrices."""

import struct
from fractions import Fraction

import av
import numpy as np

# XYZ of each primary under D50, in columns, from the standards' chromaticities.
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def icc_profile(space, connection, **tags):
    """An ICC version 2 profile of a colour space ("RGB ", "GRAY", "CMYK") from its tags' contents."""
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags = {"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78), "wtpt": white, **tags}
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        start = 132 + 12 * len(tags) + len(data)
        table += name.encode() + struct.pack(">II", start, len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I", 128 + len(table) + len(data)) + b"test" + struct.pack(">I", 0x02400000)
    head += b"mntr" + space.encode() + connection.encode() + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + table + data


def gamma_curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def rgb_profile(primaries, gamma):
    columns = np.rint(np.asarray(primaries).T * 65536).astype(int).tolist()
    xyz = {n: b"XYZ " + bytes(4) + struct.pack(">3i", *c) for n, c in zip("rgb", columns, strict=True)}
    tags = {f"{n}XYZ": xyz[n] for n in "rgb"} | {f"{n}TRC": gamma_curve(gamma) for n in "rgb"}
    return icc_profile("RGB ", "XYZ ", **tags)


def grey_profile(gamma):
    return icc_profile("GRAY", "XYZ ", kTRC=gamma_curve(gamma))


def cmyk_profile(corner_lightness):
    """Neutral inks: L* = corner_lightness[c, m, y, k in 0, 1], linear in between."""
    table = np.full((2, 2, 2, 2, 3), 128, np.uint8)
    table[..., 0] = np.rint(np.asarray(corner_lightness) * 2.55)
    ramp = bytes(range(256))
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + 4 * ramp + table.tobytes() + 3 * ramp
    return icc_profile("CMYK", "Lab ", A2B0=lut)


def srgb_of(primaries, gamma, values):
    """uint8 values of an RGB space [.. 3] -> levels in sRGB, by the standards' formulas."""
    linear = (np.asarray(values) / 255) ** gamma @ np.asarray(primaries).T @ np.linalg.inv(SRGB).T
    return srgb_levels(linear)


def srgb_levels(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def write_video(
    path,
    frames,
    *,
    times=None,
    rate=10,
    codec="libx264",
    aspect=None,
    options=None,
    metadata=None,
    pix_fmt=None,
    **color,
):
    """uint8 [f h w 3] -> a video file; `times` in seconds for a variable rate; `color`, e.g. color_trc=16."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
        stream.metadata.update(metadata or {})
        stream.bit_rate = 4_000_000
        if codec == "libx264":
            stream.options = {"crf": "1", **(options or {})}
        if aspect:
            stream.sample_aspect_ratio = aspect
        for name, value in color.items():
            setattr(stream.codec_context, name, value)
        stream.codec_context.time_base = clock = Fraction(1, 1000) if times else Fraction(1, rate)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts = round(times[i] * 1000) if times else i
            frame.time_base = clock
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def turn(path, a, b, c, d):
    """Set the display matrix of an .mp4 or .mov: a pixel at x, y is shown at a x + c y, b x + d y."""
    a, b, c, d = (round(value * 0x10000) for value in (a, b, c, d))
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of times, ids and layers come first
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(data)
    return path
