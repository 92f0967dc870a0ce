"""The demo in a real browser: upload, run, stop, four sentences, an error, the gallery, a download.

    python tests/browser.py [PICTURE.png]        needs gradio, playwright and Chromium; .ci/full runs it

It starts `i2vgen app`, drives the page in headless Chromium and fails if the page asks for any address but
its own. PICTURE.png is where a screenshot goes.
"""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROCKET = Path(__file__).parents[1] / "i2vgen" / "assets" / "rocket.png"
PATIENCE = 180_000  # milliseconds; a busy machine is slow


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        words = ["app", f"port={port}", "output=clips"]
        server = subprocess.Popen([sys.executable, "-m", "i2vgen", *words], cwd=folder)
        try:
            wait_for(f"http://127.0.0.1:{port}/", server)
            drive(f"http://127.0.0.1:{port}/", Path(folder))
        finally:
            server.terminate()
            server.wait()
    print("the page works")


def wait_for(address: str, server: subprocess.Popen) -> None:
    for _ in range(PATIENCE // 1000):
        assert server.poll() is None, "the server has ended"
        try:
            return urlopen(address).close()
        except OSError:
            time.sleep(1)
    raise TimeoutError(address)


def drive(address: str, folder: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(PATIENCE)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address, wait_until="domcontentloaded")
        make = page.get_by_role("button", name="Make a clip")

        make.click()
        page.get_by_text("Give a picture first").wait_for()

        upload(page, ROCKET)
        page.get_by_label("Sentence", exact=True).fill("the rocket moves up")
        make.click()
        page.get_by_text("1 of 1 made, seed 0.").wait_for()
        with page.expect_download() as download:
            page.locator("a[download$='.mp4.json']").first.click()
        record = json.loads(Path(download.value.path()).read_text())
        assert record["settings"]["prompt"] == ["the rocket moves up"]
        page.get_by_role("button", name="Settings").click()
        steps = page.get_by_label("Steps")
        steps.fill("0")
        make.click()
        page.get_by_text("sample.steps is 0").first.wait_for()

        steps.fill("400")
        make.click()
        page.get_by_text("Clip 1 of 1, step").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        assert len(list((folder / "clips").glob("*.mp4"))) == 1

        steps.fill("8")
        page.get_by_role("tab", name="Same picture, four sentences").click()
        page.get_by_role("button", name="Make four clips").click()
        page.get_by_text("4 of 4 made").wait_for()
        assert len(list((folder / "clips").glob("*.mp4"))) == 5

        page.locator(".gallery-item, .thumbnail-item").last.click()
        page.get_by_text("Settings of the chosen clip").wait_for()
        if len(sys.argv) > 1:
            page.get_by_role("tab", name="One sentence").click()
            page.get_by_role("button", name="Settings").first.click()
            screenshot(page, sys.argv[1])

        broken = folder / "broken.png"
        broken.write_text("no picture")
        page.reload(wait_until="domcontentloaded")
        upload(page, broken)
        page.get_by_label("Sentence", exact=True).fill("it grows")
        make.click()
        page.get_by_text("is not a picture that Pillow can read").first.wait_for()
        assert len(list((folder / "clips").glob("*.mp4"))) == 5

        foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert not foreign, foreign
        browser.close()


def screenshot(page: Page, path: str) -> None:
    """The page down to the earlier clips, as the README shows it: small, in few colours."""
    page.wait_for_timeout(2000)
    gallery = (
        page.get_by_text("Earlier clips")
        .locator("xpath=ancestor::div[contains(@class, 'block')][1]")
        .bounding_box()
    )
    page.screenshot(
        path=path,
        full_page=True,
        clip={"x": 100, "y": 0, "width": 1000, "height": gallery["y"] + gallery["height"] + 10},
    )
    picture = Image.open(path).convert("RGB")
    picture = picture.resize((720, round(picture.height * 0.72)), Image.Resampling.LANCZOS)
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def upload(page: Page, file: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(file)
    page.wait_for_timeout(2000)


if __name__ == "__main__":
    main()
