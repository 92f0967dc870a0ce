"""The function that runs our implementation, for each kind of golden file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from i2vgen.parity import (
    diffusers_pipeline,
    diffusion,
    encoders,
    pictures,
    refiner,
    refiner_flow,
    unet,
    whole,
)
from i2vgen.parity.report import Golden, Row, Settings

KINDS: dict[str, Callable[[Golden, Settings], Iterator[Row]]] = {
    "vgen_unet": unet.run,
    "pipeline_schedules": diffusion.schedules,
    "pipeline_ddim": diffusion.ddim,
    "pipeline_forward_loss": diffusion.forward_loss,
    "pipeline_vae": encoders.vae,
    "pipeline_clip": encoders.clip,
    "pipeline_preprocess": pictures.preprocess,
    "pipeline_preprocess_full": pictures.preprocess_full,
    "pipeline_video_out": pictures.video_out,
    "pipeline_e2e": whole.e2e,
    "pipeline_rng": whole.rng,
    "diffusers_pipeline": diffusers_pipeline.run,
    "refiner_unet": refiner.refiner_unet,
    "i2v_v1": refiner.i2v_v1,
    "refiner_schedule": refiner_flow.schedule,
    "refiner_sampling": refiner_flow.sampling,
    "refiner_e2e": refiner_flow.e2e,
    "refiner_prepost": refiner_flow.prepost,
}


def run(path: str | Path, settings: Settings) -> list[Row]:
    """All comparisons for a golden file. ValueError for an unknown kind or a damaged file."""
    golden = Golden(path)
    if golden.kind not in KINDS:
        raise ValueError(f"{path} is of the unknown kind {golden.kind!r}; known are {', '.join(KINDS)}")
    try:
        return list(KINDS[golden.kind](golden, settings))
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}, which files of kind {golden.kind} must hold") from error
