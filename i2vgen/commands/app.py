"""Try the model in the browser: a picture, a sentence, a clip.

    i2vgen app [port=7860] [host=127.0.0.1] [output=FOLDER] [weights=FOLDER] [adapter=FOLDER]
    [setting=value ...]

    i2vgen app
    i2vgen app weights=weights/xl memory=low port=8000

    port=       of the page, http://127.0.0.1:7860 by default
    host=       127.0.0.1 lets in this computer only; 0.0.0.0 everybody who reaches it: there is no password
    output=     folder that keeps every clip with its record (default: outputs/app)
    weights=    native weights folder (default: the shipped model); adapter= and adapter_scale= add adapters

Other settings are the page's defaults: steps=, guidance=, width=, ... It needs gradio:
pip install 'i2vgen[app]'. Nothing is sent anywhere else.
"""

from __future__ import annotations

import importlib.util
import socket

from i2vgen import cli, pipeline
from i2vgen.fast import runtime
from i2vgen.settings.config import Config
from i2vgen.settings.merge import load_config

NOT_HERE = ("image", "prompt", "items", "video", "refine_weights")


def main(argv: list[str]) -> int:
    file, words, _ = cli.split(argv)
    own, words = cli.take(words, numbers=("port",), texts=("host",))
    host, port = own.get("host", "127.0.0.1"), own.get("port", 7860)
    config = load_config(file, words, sampling=True)
    check(config, host, port)
    from i2vgen.app import page, runs

    runtime.apply(config.runtime)
    model = pipeline.load_parts(config, tell=lambda estimate: print(f"memory: {estimate}"))
    made = runs.Runs(model, config.output or "outputs/app")
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port} makes clips in {cli.shown(made.folder)}; Ctrl+C ends it")
    page.launch(made, host=host, port=port)
    return 0


def check(config: Config, host: str, port: int) -> None:
    """ValueError, before the model is loaded, for what cannot be served."""
    if given := [name for name in NOT_HERE if getattr(config, name)]:
        raise ValueError(f"{given[0]}= has no effect here: the page asks for it")
    if not 1 <= port <= 65535:
        raise ValueError(f"port is {port}; give 1 to 65535")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the demo needs gradio, which is not installed: python -m pip install 'i2vgen[app]'")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ValueError(f"port {port} of {host} cannot be used ({error}); choose another port=") from error
