"""Kind `vgen_unet`: activations, output and gradients of the official UNet, compared with ours.

Axes: b batch, f frames, n frames of all clips, c channels, h w rows and columns, p = h w positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor, nn

from i2vgen.model.conditioning import Conditions, frame_planes
from i2vgen.model.layers import sinusoid
from i2vgen.model.unet import UNet
from i2vgen.parity.report import Golden, Row, Settings, check, compare
from i2vgen.parity.weights import fingerprint, grid_weight
from weights_conversion import rules, unet_vgen

# Bounds of the goldens' README; those for half precision are only a sanity check.
OUTPUT_L2 = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1.5e-2, torch.bfloat16: 8e-2}
OUTPUT_ABS = {torch.float64: 1e-6, torch.float32: 5e-5, torch.float16: 5e-2, torch.bfloat16: 3e-1}
# Activations are stored from the float32 run, whose rounding also limits comparisons in float64.
ACTIVATION_L2 = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 2e-1}
FLOAT64 = 1e-12  # for the output that the reference computed in float64
GRADIENT = {torch.float64: 1e-6, torch.float32: 1e-4}


def run(golden: Golden, settings: Settings) -> Iterator[Row]:
    """Compare every stored activation that our network has, then output and gradients."""
    model, mapping, state_row = build(golden, settings)
    yield state_row
    inputs = {name: settings.cast(golden[f"inputs/{name}"]) for name in _names(golden, "inputs/")}
    for name in ("t", "fps"):  # half precision would round a timestep
        inputs[name] = golden[f"inputs/{name}"].to(settings.device)
    x, t, frames = inputs["x"], inputs["t"], inputs["x"].shape[2]
    conditions = _conditions(inputs)

    seen: dict[str, Tensor] = {}
    handles = [m.register_forward_hook(keep(seen, name)) for name, m in model.named_modules()]
    with torch.no_grad():
        prepared = model.prepare(conditions, frames)
        out = model(x, t, prepared)
    for handle in handles:
        handle.remove()

    expected = {name: golden[f"acts/{name}"] for name in _names(golden, "acts/")}
    found = _activations(model, seen, conditions, prepared, frames, t)
    bound = ACTIVATION_L2[settings.dtype]
    for name in sorted(expected.keys() & found.keys()):
        yield compare(f"acts/{name}", found[name], expected[name], relative_l2=bound)
    yield from _entries(model, seen, expected, bound)
    yield from _details(mapping, seen, expected, bound, x.shape)

    l2, worst = OUTPUT_L2[settings.dtype], OUTPUT_ABS[settings.dtype]
    if settings.dtype != torch.float64:
        yield compare("out", out, golden["outputs/out"], relative_l2=l2, max_abs=worst)
    if "outputs/out_fp64" in golden:
        if settings.dtype == torch.float64:
            l2 = worst = FLOAT64
        yield compare("out_fp64", out, golden["outputs/out_fp64"], relative_l2=l2, max_abs=worst)
    if "grads/probe" in golden and settings.dtype in GRADIENT:
        yield from _gradients(golden, settings, model, mapping, inputs)


def build(golden: Golden, settings: Settings) -> tuple[UNet, list[rules.Row], Row]:
    """-> our network with the golden's weights, the mapping used, and the row that checks the weights."""
    unet, use = unet_vgen.settings(golden.meta["config"])
    with torch.device("meta"):
        model = UNet(unet, use)
    mapping = unet_vgen.rows(unet, use)
    shapes = rules.to_theirs(mapping, model.state_dict())
    exponents, seed = golden.meta["weight_exponents"], golden.meta["weight_seed"]
    missing, unexpected = rules.audit(mapping, exponents)
    if missing or unexpected:
        named = ", ".join([*missing, *unexpected][:5])
        raise ValueError(f"{golden.path}: its parameters do not map one to one to ours, e.g. {named}")
    theirs = {k: grid_weight(k, tuple(v.shape), seed, exponents[k]) for k, v in shapes.items()}
    same = fingerprint(theirs) == golden.meta["state_dict_sha256"]
    state = rules.to_ours(mapping, theirs)
    model.load_state_dict({k: settings.cast(v) for k, v in state.items()}, assign=True)
    return model.eval(), mapping, check("weights", same, "SHA-256 of the golden")


def _conditions(inputs: dict[str, Tensor]) -> Conditions:
    x, latent, vector = inputs["x"], inputs["local_image"], inputs.get("image")
    text = inputs.get("y")
    if text is None:  # then the official class repeats the first token of `zero_y`
        text = inputs["zero_y"][:, :1].expand(x.shape[0], -1, -1)
    return Conditions(
        text=text,
        image_vector=None if vector is None else vector.flatten(1),
        image_latent=latent[:, :, 0] if latent.ndim == 5 else latent,  # only frame 0 is read
        fps=inputs["fps"],
    )


def _activations(
    model: UNet, seen: dict[str, Tensor], conditions: Conditions, prepared, frames: int, t: Tensor
) -> dict[str, Tensor]:
    """Our values, under the golden's names, of everything before the first block."""
    found = {}
    found["sin_t"] = sinusoid(t, model.base_width)
    found["sin_fps"] = sinusoid(conditions.fps, model.base_width)
    found["time_embed"], found["fps_embed"] = seen["time"], seen["stem.fps"]
    found["emb"] = seen["time"] + prepared.fps_embedding
    dtype = prepared.context.dtype
    planes = frame_planes(conditions.image_latent.to(dtype), frames)
    found["frame_planes"] = rearrange(planes, "b f h w c -> (b f) c h w")
    convolved = rearrange(seen["stem.concat.conv3"], "n h w c -> n c h w")
    found["local_image_concat"] = convolved
    encoded = seen["stem.concat.frames"]
    found["local_temporal_encoder"] = rearrange(encoded, "b f h w c -> (b h w) f c")
    found["concat"] = rearrange(prepared.concat, "b f h w c -> (b f) c h w")
    found["local_tokens"] = seen["stem.local_tokens"]
    if "stem.global_tokens" in seen:
        found["global_tokens"] = seen["stem.global_tokens"]
    found["context"] = prepared.context
    return found


def _entries(
    model: UNet, seen: dict[str, Tensor], expected: dict[str, Tensor], bound: float
) -> Iterator[Row]:
    """Compare the official entries `input_blocks.N`, `middle_block.N`, `output_blocks.N` in order."""

    def row(entry: str, module: str) -> Iterator[Row]:
        if f"{entry}" in expected:
            got = rearrange(seen[module], "b f h w c -> (b f) c h w")
            yield compare(f"acts/{entry}", got, expected[entry], relative_l2=bound)

    if "input_blocks.0" in expected:
        first = seen["temporal_in"] if model.temporal_in is not None else seen["conv_in"]
        shape = seen["down.0.blocks.0"].shape[:2]
        first = first if first.ndim == 5 else first.unflatten(0, shape)
        got = rearrange(first, "b f h w c -> (b f) c h w")
        yield compare("acts/input_blocks.0", got, expected["input_blocks.0"], relative_l2=bound)
    index = 1
    for level, stage in enumerate(model.down):
        for i in range(len(stage.blocks)):
            yield from row(f"input_blocks.{index}", f"down.{level}.blocks.{i}")
            index += 1
        if stage.resample is not None:
            yield from row(f"input_blocks.{index}", f"down.{level}.resample")
            index += 1
    temporal = model.mid1.temporal is not None
    middle = ["mid1.temporal_conv", "mid1.spatial", *(["mid1.temporal"] if temporal else []), "mid2"]
    for i, module in enumerate(middle):
        yield from row(f"middle_block.{i}", module)
    index = 0
    for level in reversed(range(len(model.up))):
        stage = model.up[level]
        for i in range(len(stage.blocks)):
            last = i == len(stage.blocks) - 1 and stage.resample is not None
            yield from row(
                f"output_blocks.{index}", f"up.{level}.resample" if last else f"up.{level}.blocks.{i}"
            )
            index += 1


def _details(
    mapping: list[rules.Row],
    seen: dict[str, Tensor],
    expected: dict[str, Tensor],
    bound: float,
    shape: torch.Size,
) -> Iterator[Row]:
    """Compare `detail/<official module path>`: convolutions, linears and norms in the conversion table."""
    ours = {row.theirs.removesuffix(".weight"): row.ours[0].removesuffix(".weight") for row in mapping}
    for name in sorted(expected):
        module = ours.get(name.removeprefix("detail/")) if name.startswith("detail/") else None
        if module is None or module not in seen:
            continue
        got = _as_layout(seen[module], expected[name].shape, shape[0], shape[2])
        if got is not None:
            yield compare(f"acts/{name}", got, expected[name], relative_l2=bound)


def _as_layout(got: Tensor, shape: torch.Size, b: int, f: int) -> Tensor | None:
    """Our channels-last tensor in the official module's layout; None if the layout is ambiguous."""
    if got.ndim == 4 and got.shape[:2] == (b, f):  # temporal: [b f p c]
        if len(shape) == 5:
            return rearrange(got, "b f (h w) c -> b c f h w", h=shape[3])
        if len(shape) == 3 and shape[1] == f:
            return rearrange(got, "b f p c -> (b p) f c")
        return rearrange(got, "b f p c -> (b p) c f") if len(shape) == 3 else None
    if got.ndim == 4 and len(shape) == 4:
        return rearrange(got, "n h w c -> n c h w")
    if got.ndim == 5 and len(shape) == 5:
        return rearrange(got, "b f h w c -> b c f h w")
    if got.ndim == 3 and len(shape) == 3 and got.numel() == shape.numel():  # both fold the frames
        return got.reshape(shape)
    return got if got.shape == shape else None


def _gradients(
    golden: Golden, settings: Settings, model: nn.Module, mapping: list[rules.Row], inputs: dict[str, Tensor]
) -> Iterator[Row]:
    """Gradients of sum(out * probe): for x, and their L2 norm for every parameter of the official model."""
    x = inputs["x"].clone().requires_grad_()
    model.requires_grad_(True)
    prepared = model.prepare(_conditions(inputs), x.shape[2])
    (model(x, inputs["t"], prepared) * settings.cast(golden["grads/probe"])).sum().backward()
    bound = GRADIENT[settings.dtype]
    yield compare("grads/x", x.grad, golden["grads/x"], relative_l2=max(bound, 1e-6))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    # A parameter without influence, such as q and k for a single frame, may have no gradient; it counts as 0.
    zeros = {name: torch.zeros_like(p) if gradients[name] is None else gradients[name]
             for name, p in model.named_parameters()}  # fmt: skip
    theirs = rules.to_theirs(mapping, zeros)
    norms = torch.stack([theirs[key].double().norm() for key in golden.meta["grad_keys"]])
    expected = golden["grads/param_l2"]
    # The gradient of a parameter without influence, such as a bias before a norm of single channels, is
    # rounding error.
    dead = expected < 1e-9 * expected.max()
    relative = torch.where(dead, 0.0, (norms.cpu() - expected).abs() / expected)
    worst = golden.meta["grad_keys"][int(relative.argmax())]
    yield compare(f"grads/param_l2, worst {worst}", relative, torch.zeros_like(relative), max_abs=bound)
    rounding = norms.cpu()[dead] / expected.max()
    yield compare("grads/param_l2, dead parameters", rounding, torch.zeros_like(rounding), max_abs=1e-6)


def keep(seen: dict[str, Tensor], name: str):
    def hook(module: nn.Module, inputs, output) -> None:
        if isinstance(output, Tensor):
            seen[name] = output

    return hook


def _names(golden: Golden, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in golden if name.startswith(prefix)]
