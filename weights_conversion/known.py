"""Published checkpoint files and their licence terms, for the converter's report. Nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    name: str
    note: str


# SHA-256 from public file listings.
KNOWN_FILES = {
    "d3921efea21a4aac109a03ea8ca1f4f6a756ba82d30bfeb82b83f94a7aff8f73": Known(
        "i2vgen_xl_00854500.pth", "the released I2VGen-XL UNet, step 854,500"
    ),
    "9a78ef8e8c73fd0df621682e7a8e8eb36c6916cb3c16b291a082ecd52ab79cc4": Known(
        "open_clip_pytorch_model.bin", "open_clip ViT-H-14, laion2b_s32b_b79k"
    ),
    "88ecb782561455673c4b78d05093494b9c539fc6bfc08f3a9a4a0dd7b0b10f36": Known(
        "v2-1_512-ema-pruned.ckpt", "Stable Diffusion 2.1 base; its autoencoder is used"
    ),
    "df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2": Known(
        "v2-1_512-ema-pruned.safetensors", "Stable Diffusion 2.1 base; its autoencoder is used"
    ),
}

# Settings of the earlier networks of the lineage that cannot be read from their tensors.
V1_SETTINGS = {
    "schedule": {"kind": "linear_sd", "init_beta": 0.00085, "last_beta": 0.012, "zero_terminal_snr": False},
    "sample": {"width": 448, "height": 256, "frames": 32, "fps": 8, "guidance": 3.0, "noise_offset": 0.1},
}
REFINER_SETTINGS = {
    "schedule": {"kind": "logsnr_cosine"},
    "sample": {"width": 1280, "height": 720, "frames": 32},
}
# SR600 has the same tensor names as MS-Vid2Vid-XL; the user selects it with use.skip_filter=sr600.
SR600_SETTINGS = REFINER_SETTINGS | {
    "refine": {"noise_level": 700, "start": "inversion", "guidance": 9.0, "rescale": 0.3},
    "refine_suffix": (
        ", cinematic, High Contrast, highly detailed, Unreal Engine 5, no blur, full length ultra-wide angle "
        "shot a cinematic scene, taken using a Canon EOS R camera, hyper detailed photo - realistic maximum "
        "detail, 32k, Color Grading, portrait Photography, ultra HD, extreme meticulous detailing, skin pore "
        "detailing, hyper sharpness, perfect without deformations, 4k render"
    ),
}

# A summary of public statements, not legal advice.
LICENCE_NOTES = {
    "released": (
        "I2VGen-XL weights: tagged MIT on the hub, but the authors' disclaimer says research and "
        "non-commercial use only; treat them as non-commercial"
    ),
    "v1": (
        "MS-Image2Video weights: CC BY-NC-ND 4.0; convert for yourself only, never redistribute converted "
        "files"
    ),
    "refiner": (
        "refiner weights: MS-Vid2Vid-XL is CC BY-NC-ND 4.0, for SR600 no licence was found and its authors "
        "speak of research use only; convert for yourself only, never redistribute converted files"
    ),
    "sd": "Stable Diffusion 2.1: CreativeML Open RAIL++-M; its use restrictions travel with the weights",
    "vae": "Stable Diffusion 2.1 autoencoder: CreativeML Open RAIL++-M; its use restrictions travel with it",
    "clip": "CLIP ViT-H-14 LAION-2B weights: tagged MIT",
}
CONVERTED_NOTE = "A converted file is subject to the terms of the file it was made from."
