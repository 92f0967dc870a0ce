"""The demo's page, in Gradio. It asks no address but its own: no analytics, and the browser's own fonts."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from i2vgen.app.runs import Clip, Runs
from i2vgen.settings import shipped

FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
LARGEST_UPLOAD = "20mb"
MAX_SEED = 2**31 - 1
TITLE = "I2VGen-XL: a picture and a sentence become a clip"
FOUR = ("moves to the left", "moves to the right", "grows", "shrinks")


def page(runs: Runs) -> gr.Blocks:
    """The whole page; `launch` serves it."""
    sample = runs.model.config.sample
    # a model of few words does not know "it"
    subject = shipped.SUBJECT if runs.model.config.clip.words else "it"
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {TITLE}\n\n{describe(runs)}")
        stop = gr.State(threading.Event)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], height=280)
                # The uploaded file goes on as it is, to be opened and checked by the same code as everywhere.
                picture.preprocess = lambda uploaded: None if uploaded is None else uploaded.path
                with gr.Tab("One sentence"):
                    prompt = gr.Textbox(
                        label="Sentence", placeholder="the turtle drifts to the left", lines=2
                    )
                    make = gr.Button("Make a clip", variant="primary")
                with gr.Tab("Same picture, four sentences"):
                    four = [
                        gr.Textbox(label=f"Sentence {i + 1}", value=f"{subject} {text}")
                        for i, text in enumerate(FOUR)
                    ]
                    make_four = gr.Button("Make four clips", variant="primary")
                halt = gr.Button("Stop", variant="stop")
                gr.Examples(examples(), [picture, prompt], label="Examples")
                with gr.Accordion("Settings", open=False):
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                        fresh = gr.Checkbox(False, label="A new seed each time")
                    steps = gr.Number(sample.steps, label="Steps", precision=0)
                    guidance = gr.Number(sample.guidance, label="Guidance")
                    with gr.Row():
                        width = gr.Number(sample.width, label="Width, pixels", precision=0)
                        height = gr.Number(sample.height, label="Height, pixels", precision=0)
                        frames = gr.Number(sample.frames, label="Frames", precision=0)
            with gr.Column():
                state = gr.Markdown("Ready.")
                preview = gr.Image(
                    label="On the way: the middle frame", interactive=False, height=200, visible=False
                )
                video = gr.Video(label="Clip", autoplay=True, loop=True, interactive=False)
                files = gr.Files(label="Clip and its record", interactive=False)
        gallery = gr.Gallery(
            label="Earlier clips; click one for its settings",
            columns=6,
            height=240,
            object_fit="contain",
            allow_preview=False,
        )
        record = gr.JSON(label="Settings of the chosen clip", visible=False)

        settings = [seed, fresh, steps, guidance, width, height, frames]
        shown = [state, preview, video, files, gallery, seed]
        runner, private = Runner(runs), {"api_visibility": "private"}  # a page, not a service for programs
        one_at_a_time = {**private, "concurrency_id": "model", "concurrency_limit": 1}
        for begin, prompts in ((make.click, [prompt]), (prompt.submit, [prompt]), (make_four.click, four)):
            begin(runner.run, [stop, picture, *settings, *prompts], shown, **one_at_a_time)
        halt.click(lambda event: event.set(), [stop], None, queue=False, **private)
        gallery.select(runner.chosen, None, [record, video, files], **private)
    return blocks


def describe(runs: Runs) -> str:
    config = runs.model.config
    sample = config.sample
    return (
        f"Weights: `{Path(config.weights).name}`. Clips of {sample.frames} frames of {sample.width} x "
        f"{sample.height} pixels. Everything stays on this computer; clips are kept in `{runs.folder}`."
    )


def examples() -> list[list[str]]:
    """Shipped pictures with a sentence each."""
    return [
        [str(shipped.PICTURE), shipped.PROMPT],
        [str(shipped.PICTURE.with_name("turtle.png")), "the turtle drifts to the left"],
    ]


class Runner:
    """What the page's buttons call."""

    def __init__(self, runs: Runs):
        self.runs = runs

    def run(
        self, stop, picture, seed, fresh, steps, guidance, width, height, frames, *prompts
    ) -> Iterator[tuple]:
        stop.clear()
        seed = random.randrange(MAX_SEED) if fresh else seed
        same, clips, notes = gr.skip(), [], []
        settings = {"seed": seed, "steps": steps, "guidance": guidance}
        settings |= {"width": width, "height": height, "frames": frames}
        if picture is None:
            raise gr.Error("Give a picture first: upload one, paste one, or choose an example.")
        if empty := [name for name, value in settings.items() if value is None]:
            raise gr.Error(f"{empty[0]} is empty; give a number.")
        hidden = gr.Image(None, visible=False)
        yield "Waiting for the model ...", hidden, None, None, same, seed
        try:
            for item in self.runs(picture, [prompt or "" for prompt in prompts], stop, settings):
                if isinstance(item, Clip):
                    clips.append(item)
                    notes += [note for note in item.notes if note not in notes]
                    yield (
                        f"{len(clips)} of {len(prompts)} done",
                        same,
                        str(item.video),
                        files(clips),
                        self.all(),
                        seed,
                    )
                else:
                    label = f"Clip {item.clip} of {item.clips}, step {item.number} of {item.steps}"
                    shown = same if item.preview is None else gr.Image(item.preview, visible=True)
                    yield label, shown, same, same, same, same
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from error
        said = (
            f"{len(clips)} of {len(prompts)} made, seed {seed}." if len(clips) == len(prompts) else "Stopped."
        )
        said += "".join(f"\n\nNote: {note}" for note in notes)
        yield said, hidden, same, same, self.all(), same

    def all(self) -> list[tuple[str, str]]:
        return [(str(clip.picture), clip.caption) for clip in self.runs.clips]

    def chosen(self, event: gr.SelectData) -> tuple:
        clip = self.runs.clips[event.index]
        told = json.loads(clip.record.read_text(encoding="utf-8"))
        return gr.JSON(told, visible=True), str(clip.video), files([clip])


def files(clips: list[Clip]) -> list[str]:
    return [str(path) for clip in clips for path in (clip.video, clip.record)]


def launch(runs: Runs, *, host: str, port: int) -> None:
    """Serve the page until the process ends. OSError if the port is in use."""
    page(runs).queue(max_size=16).launch(
        server_name=host,
        server_port=port,
        max_file_size=LARGEST_UPLOAD,
        allowed_paths=[str(runs.folder)],
        theme=gr.themes.Default(**FONTS),
        show_error=True,
        quiet=True,
        footer_links=[],
    )
