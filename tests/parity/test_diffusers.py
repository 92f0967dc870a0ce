"""Comparison with diffusers and transformers, on the same random weights, mapped by the conversion tables.

Everything is float64 and every parameter is random, so that a difference in the formulas cannot hide
behind rounding or a zero-initialised output. Where the two sides take float32 steps of their own (sinusoids,
frame positions, noise tables) the bound has room for exactly that.
"""

import dataclasses

import pytest
import torch

from i2vgen.diffusion.sampler import ddim
from i2vgen.diffusion.schedule import Schedule, make_betas
from i2vgen.fast import savings
from i2vgen.files import checkpoint
from i2vgen.model.clip import ClipEncoders
from i2vgen.model.conditioning import Conditions
from i2vgen.model.unet import UNet
from i2vgen.model.vae import AutoencoderKL
from i2vgen.parity.diffusion import stand_in
from i2vgen.settings import config
from weights_conversion import rules, unet_diffusers
from weights_conversion import vae as vae_tables

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

# diffusers' class hard-codes 8 heads in the first temporal transformer, one global token per latent channel,
# and the same width for context and CLIP vector.
TINY = config.UNet(
    base_width=32,
    width_multipliers=(1, 2, 4, 4),
    head_width=8,
    first_temporal_heads=8,
    context_width=16,
    image_vector_width=16,
)
THEIR_USE = config.Use(concat_gain=1.0, sinusoid="exp", frame_planes="network")


def distance(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def fill(model, state):
    checkpoint.fill(model, state, dtype=torch.float64)
    return model.eval().requires_grad_(False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------- UNet


def our_unet(unet, use):
    with torch.device("meta"):
        model = UNet(unet, use)
    return fill(model, checkpoint.random_state(model, seed=1))


def their_unet(unet, state, *, concat_gain=1.0):
    """diffusers' class with our weights; it has no gain, so the first convolution absorbs it."""
    side = "CrossAttn{}Block3D", "{}Block3D"
    with torch.device("meta"):
        model = diffusers.I2VGenXLUNet(
            block_out_channels=unet.widths,
            layers_per_block=unet.blocks_per_level,
            down_block_types=tuple(side[not on].format("Down") for on in unet.attention_levels),
            up_block_types=tuple(side[not on].format("Up") for on in reversed(unet.attention_levels)),
            norm_num_groups=unet.norm_groups,
            cross_attention_dim=unet.context_width,
            attention_head_dim=unet.head_width,
        )
    theirs = rules.to_theirs(unet_diffusers.rows(unet), state)
    theirs["conv_in.weight"] = theirs["conv_in.weight"].clone()
    theirs["conv_in.weight"][:, unet.in_channels :] *= concat_gain
    model.load_state_dict(theirs, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def unet_inputs(batch, frames):
    x, latent = normal(batch, 4, frames, 8, 16, seed=1), normal(batch, 4, 8, 16, seed=2)
    text, vector = normal(batch, 7, 16, seed=3), normal(batch, 16, seed=4)
    t, fps = torch.tensor([981, 3][:batch]), torch.tensor([16, 7][:batch])
    return x, t, Conditions(text, vector, latent, fps)


def run_ours(model, x, t, conditions):
    return model(x, t, model.prepare(conditions, x.shape[2]))


def run_theirs(model, x, t, conditions):
    frames = x.shape[2]
    planes = [conditions.image_latent]  # in the layout of its pipeline
    planes += [torch.full_like(planes[0], (k + 1) / (frames - 1)) for k in range(frames - 1)]
    with torch.no_grad():
        return model(
            x,
            timestep=t,
            fps=conditions.fps,
            image_latents=torch.stack(planes, dim=2),
            image_embeddings=conditions.image_vector,
            encoder_hidden_states=conditions.text,
            return_dict=False,
        )[0]


@pytest.fixture(scope="module")
def state():
    return our_unet(TINY, config.Use()).state_dict()


def with_use(state, use):
    with torch.device("meta"):
        model = UNet(TINY, use)
    return fill(model, state)


@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (1, 2), (1, 4), (2, 5)])
def test_unet(batch, frames, state):
    inputs = unet_inputs(batch, frames)
    once, doubled = their_unet(TINY, state), their_unet(TINY, state, concat_gain=2.0)
    expected, expected_doubled = run_theirs(once, *inputs), run_theirs(doubled, *inputs)
    assert expected.std() > 0.1

    same_floats = run_ours(with_use(state, THEIR_USE), *inputs)
    assert distance(same_floats, expected) <= 1e-9
    gain_one = run_ours(with_use(state, config.Use(concat_gain=1.0)), *inputs)
    assert distance(gain_one, expected) <= 1e-6
    official = run_ours(with_use(state, config.Use()), *inputs)
    assert distance(official, expected_doubled) <= 1e-6

    assert distance(official, expected) > 0.1  # adding the branch twice matters


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_theirs(dtype, state):
    """Errors relative to float64 with the same weights; ours uses every optimisation available on a CPU.

    Over several inputs: one alone says which side had luck, the ratio then goes from 0.87 to 1.14.
    """
    use = config.Use(concat_gain=1.0)
    exact, ours, theirs = with_use(state, use), with_use(state, use).to(dtype), their_unet(TINY, state)
    savings.apply(ours, config.Runtime())
    for parameter in theirs.parameters():
        parameter.data = parameter.data.to(dtype)
    squares = torch.zeros(2)
    for i, t in enumerate((981, 3, 500, 250, 750)):
        x, latent = normal(1, 4, 2, 8, 8, seed=10 * i), normal(1, 4, 8, 8, seed=10 * i + 1)
        text, vector = normal(1, 7, 16, seed=10 * i + 2), normal(1, 16, seed=10 * i + 3)
        t, fps = torch.tensor([t]), torch.tensor([16])
        wanted = run_ours(exact, x, t, Conditions(text, vector, latent, fps))
        half = Conditions(text.to(dtype), vector.to(dtype), latent.to(dtype), fps)
        outs = run_ours(ours, x, t, half), run_theirs(theirs, x.to(dtype), t, half)
        squares += torch.tensor([distance(out.double(), wanted) for out in outs]).square()
    error, bound = squares.sqrt().tolist()
    assert 1e-4 < error <= 1.1 * bound


def test_unet_of_another_shape():
    unet = dataclasses.replace(
        TINY,
        width_multipliers=(1, 2),
        attention_levels=(False, True),
        blocks_per_level=1,
        head_width=16,
        norm_groups=16,
    )
    ours = our_unet(unet, THEIR_USE)
    inputs = unet_inputs(2, 3)
    expected = run_theirs(their_unet(unet, ours.state_dict()), *inputs)
    assert distance(run_ours(ours, *inputs), expected) <= 1e-9


@pytest.mark.parametrize("kept", ["sinusoid", "frame_planes"])
def test_both_conventions_are_needed_for_equal_bits(kept, state):
    """Each official convention shows clearly above float64 rounding but below float32 rounding."""
    use = dataclasses.replace(THEIR_USE, **{kept: getattr(config.Use(), kept)})
    inputs = unet_inputs(1, 4)
    expected = run_theirs(their_unet(TINY, state), *inputs)
    assert 1e-9 < distance(run_ours(with_use(state, use), *inputs), expected) <= 1e-6


@pytest.mark.parametrize("pair", [("norm1", "norm3"), ("attention1.to_q", "attention1.to_k")], ids=str)
def test_unet_rows_that_confuse_two_parts_are_caught(pair, state, monkeypatch):
    a, b = ((f"temporal_in.{part}.weight",) for part in pair)
    right, other = unet_diffusers.rows, {a: b, b: a}
    monkeypatch.setattr(
        unet_diffusers,
        "rows",
        lambda unet: [dataclasses.replace(row, ours=other.get(row.ours, row.ours)) for row in right(unet)],
    )
    inputs = unet_inputs(1, 3)
    ours = run_ours(with_use(state, THEIR_USE), *inputs)
    assert distance(ours, run_theirs(their_unet(TINY, state), *inputs)) > 1e-6


# ------------------------------------------------------------------------------------------------ VAE


@pytest.fixture(scope="module")
def autoencoders():
    vae = config.VAE(base_width=32, width_multipliers=(1, 2, 2), blocks_per_level=1, norm_groups=8)
    widths = [vae.base_width * m for m in vae.width_multipliers]
    with torch.device("meta"):
        ours = AutoencoderKL(vae)
        theirs = diffusers.AutoencoderKL(
            block_out_channels=widths,
            layers_per_block=vae.blocks_per_level,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            latent_channels=vae.embed_dim,
            norm_num_groups=vae.norm_groups,
        )
    fill(ours, checkpoint.random_state(ours, seed=2))
    state = rules.to_theirs(vae_tables.diffusers_rows(vae), ours.state_dict())
    theirs.load_state_dict(state, strict=True, assign=True)
    return ours, theirs.eval().requires_grad_(False)


def test_vae(autoencoders):
    ours, theirs = autoencoders
    pixels = normal(2, 3, 24, 36).tanh()
    posterior = theirs.encode(pixels).latent_dist
    assert distance(ours.moments(pixels), posterior.parameters) <= 1e-10
    noise = normal(2, 4, 6, 9)
    latent = ours.encode(pixels, noise)
    assert distance(latent, ours.scale * (posterior.mean + posterior.std * noise)) <= 1e-10
    assert distance(ours.decode(latent), theirs.decode(latent / ours.scale).sample) <= 1e-10


def test_vae_with_reversed_level_numbers_is_caught(autoencoders):
    ours, theirs = autoencoders
    up = list(theirs.decoder.up_blocks)
    theirs.decoder.up_blocks = torch.nn.ModuleList([up[1], up[0], up[2]])  # two levels of equal width
    z = normal(1, 4, 6, 9)
    try:
        assert distance(ours.decode(ours.scale * z), theirs.decode(z).sample) > 1e-3
    finally:
        theirs.decoder.up_blocks = torch.nn.ModuleList(up)


# ------------------------------------------------------------------------------------------ scheduler


def v_network(x, t):
    return stand_in(x, t, None, None, None, None)


def run_scheduler(steps, noise, **changed):
    settings = {
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    scheduler = diffusers.DDIMScheduler(**settings | changed)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(v_network(x, t.expand(len(x))), t, x).prev_sample
    return x


def run_sampler(steps, noise, **changed):
    schedule = Schedule(make_betas(kind="cosine", num_timesteps=1000, zero_terminal_snr=True))
    settings = {"spacing": "leading", "final_alpha": "one"} | changed
    return ddim(v_network, noise, schedule, steps=steps, **settings)


@pytest.mark.parametrize("steps", [10, 50, 30])
def test_ddim(steps):
    noise = normal(2, 4, 3, 4, 6)
    assert distance(run_sampler(steps, noise), run_scheduler(steps, noise)) <= 1e-5


def test_ddim_that_ends_at_the_first_level():
    noise = normal(1, 4, 3, 4, 6)
    landed = run_sampler(10, noise, final_alpha="first")
    assert distance(landed, run_scheduler(10, noise, set_alpha_to_one=False)) <= 1e-5
    assert distance(landed, run_scheduler(10, noise)) > 1e-4


def test_ddim_on_the_official_grid_differs_where_1000_does_not_divide():
    noise = normal(1, 4, 3, 4, 6)
    assert distance(run_sampler(50, noise, spacing="official"), run_scheduler(50, noise)) <= 1e-5
    assert distance(run_sampler(30, noise, spacing="official"), run_scheduler(30, noise)) > 1e-3


# ----------------------------------------------------------------------------------------------- CLIP

CARD = config.Clip(
    embed_dim=12,
    vision={"image_size": 28, "patch_size": 14, "layers": 2, "width": 32, "head_width": 8},
    text={"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3},
)
BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
}
VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}


def hugging_face(state, names):
    """One open_clip tower -> transformers' names without the tower's prefix; q, k and v unfused."""
    made = {}
    for name, tensor in state.items():
        if name.startswith("transformer.resblocks."):
            layer, inside = name.removeprefix("transformer.resblocks.").split(".", 1)
            place = f"encoder.layers.{layer}"
            if inside.startswith("attn.in_proj_"):
                kind = inside.removeprefix("attn.in_proj_")
                for x, part in zip("qkv", tensor.chunk(3), strict=True):
                    made[f"{place}.self_attn.{x}_proj.{kind}"] = part
                continue
            inside, kind = inside.rsplit(".", 1)
            made[f"{place}.{BLOCK[inside]}.{kind}"] = tensor
        elif name in names:
            made[names[name]] = tensor
        elif name.rsplit(".", 1)[0] in names:
            module, kind = name.rsplit(".", 1)
            made[f"{names[module]}.{kind}"] = tensor
    return made


def load(model, state, prefix):
    if any(
        name.startswith(prefix) for name in model.state_dict()
    ):  # transformers 5.6 dropped the text model's
        bare = ("visual_projection.weight",)
        state = {name if name in bare else prefix + name: tensor for name, tensor in state.items()}
    model.double().load_state_dict(state, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def clip():
    with torch.device("meta"):
        model = ClipEncoders(CARD)
    return fill(model, checkpoint.random_state(model, seed=3))


def test_clip_text(clip):
    text = CARD.text
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["width"],
            intermediate_size=4 * text["width"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            max_position_embeddings=text["context_length"],
            hidden_act="gelu",
        )
    )
    load(model, hugging_face(clip.model.state_dict(), TEXT), "text_model.")
    tokens = clip.tokenize(["a cat in the rain", "", "two dogs, running over a field of snow"])
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
        final = getattr(model, "text_model", model).final_layer_norm
        penultimate, last = final(states[-2]), final(states[-1])
    got = clip.text(tokens)
    assert distance(got, penultimate) <= 1e-10
    assert distance(got, last) > 1e-2


def test_clip_image(clip):
    vision = CARD.vision
    model = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=4 * vision["width"],
            projection_dim=CARD.embed_dim,
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["width"] // vision["head_width"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_act="gelu",
        )
    )
    tower = clip.model.visual.state_dict()
    state = hugging_face(tower, VISION) | {"visual_projection.weight": tower["proj"].T}
    load(model, state, "vision_model.")
    pixels = normal(2, 3, 28, 28)
    with torch.no_grad():
        expected = model(pixel_values=pixels).image_embeds
    got = clip.image(pixels)
    assert distance(got, expected) <= 1e-10
    assert distance(torch.nn.functional.normalize(got, dim=-1), expected) > 1e-2
