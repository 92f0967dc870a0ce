"""The demo without a browser: its runs, and what its command refuses. tests/browser.py drives the page."""

import json
import socket
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from i2vgen import pipeline
from i2vgen.app.runs import Clip, Runs, Step
from i2vgen.settings import shipped

STAR = str(shipped.STAR)


@pytest.fixture(scope="module")
def model():
    return pipeline.load(overrides=["device=cpu", "steps=4"])


@pytest.fixture
def runs(model, tmp_path):
    return Runs(model, tmp_path / "clips")


def test_a_run_shows_every_step_and_keeps_the_clip(runs):
    found = list(runs(STAR, ["a yellow star moves to the left"], threading.Event(), {"seed": 3, "steps": 5}))
    steps, (clip,) = found[:-1], found[-1:]
    assert [(s.number, s.steps, s.clip, s.clips) for s in steps] == [(n, 5, 1, 1) for n in range(1, 6)]
    assert steps[0].preview.shape == (32, 32, 3) and steps[0].preview.dtype == np.uint8
    # The preview of the last step is the middle of the finished clip.
    made = runs.model(STAR, "a yellow star moves to the left", seed=3, steps=5, output="frames")
    assert np.abs(steps[-1].preview.astype(int) - made[4]).max() <= 1  # decoded alone, so it rounds otherwise
    record = json.loads(clip.record.read_text())
    assert record["settings"]["sample"]["seed"] == [3] and record["settings"]["sample"]["steps"] == 5
    assert clip.video.stat().st_size > 500 and Image.open(clip.picture).n_frames == 8
    assert runs.clips == [clip] and clip.caption == "a yellow star moves to the left (seed 3)"


def test_several_sentences_make_several_clips_and_unknown_words_are_told(runs):
    found = [
        one for one in runs(STAR, ["it grows", "a dragon rests"], threading.Event()) if isinstance(one, Clip)
    ]
    assert len(found) == 2 and len({clip.video for clip in found}) == 2
    assert "know nothing of: dragon" in found[1].notes[0]
    assert runs.clips == found[::-1]


def test_a_stopped_run_ends_between_two_steps(runs):
    stop, seen = threading.Event(), []
    for one in runs(STAR, ["a yellow star grows"] * 3, stop, {"steps": 50}):
        seen.append(one)
        if len(seen) == 3:
            stop.set()
    assert all(isinstance(one, Step) for one in seen) and len(seen) < 20 and runs.clips == []
    assert list(runs(STAR, ["it grows"], threading.Event()))[-1] in runs.clips  # the next one runs


def test_two_runs_at_once_follow_each_other(runs):
    order, first = [], runs(STAR, ["it grows"], threading.Event())
    next(first)

    def second():
        for one in runs(STAR, ["it shrinks"], threading.Event()):
            order.append(one)

    other = threading.Thread(target=second)
    other.start()
    time.sleep(0.05)
    mine = list(first)
    other.join()
    assert [clip.caption.split()[1] for clip in runs.clips] == ["shrinks", "grows"]
    assert isinstance(mine[-1], Clip) and isinstance(order[-1], Clip)


def test_a_closed_page_stops_its_run(runs):
    stop = threading.Event()
    run = runs(STAR, ["it grows"], stop, {"steps": 50})
    next(run)
    run.close()
    assert stop.is_set()
    assert len(list(runs(STAR, ["it grows"], threading.Event()))) == 5  # 4 steps and the clip: nobody waits


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "sample.steps is 0"), ({"width": 33}, "width"), ({"frames": 10**6}, "frames")],
)
def test_settings_out_of_range_are_refused_as_everywhere(runs, settings, message):
    with pytest.raises(ValueError, match=message):
        list(runs(STAR, ["it grows"], threading.Event(), settings))
    assert runs.clips == []


def test_an_upload_that_is_no_picture_is_refused(runs, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png"):
        list(runs(str(tmp_path / "a.png"), ["it grows"], threading.Event()))


def test_the_command_says_what_is_missing(script_at, monkeypatch):
    run = script_at("app")
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert "pip install 'i2vgen[app]'" in run()[2]


def test_the_command_refuses_what_it_cannot_serve(script_at, monkeypatch):
    run = script_at("app")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: object())
    assert "prompt= has no effect here" in run("prompt=x")[2]
    assert "port is 70000; give 1 to 65535" in run("port=70000")[2]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used" in run(f"port={port}")[2]
