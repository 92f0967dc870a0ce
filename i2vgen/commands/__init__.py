"""The commands of `i2vgen`: one module each. Its docstring is the --help text, its `main(argv)` runs it.

A new command is a module here (`refine_gain.py` for `refine-gain`) and a line in COMMANDS, perhaps in BARE.
"""

COMMANDS = {
    "generate": "make a video from a picture and a sentence",
    "app": "try the model in the browser",
    "examples": "copy example pictures, scripts and configurations to a new folder",
    "train": "train the autoencoder, CLIP, the video UNet or the second stage",
    "ablate": "run an ablation study and print its variants in a table",
    "evaluate": "score a model on clips that are never used in training",
    "score": "score your own videos, from any model",
    "vbench": "generate the samples for the benchmark VBench-I2V",
    "refine-gain": "measure the gain of a second stage over plain upscaling",
    "convert": "convert any known checkpoint to a native weights folder",
    "export": "export a native weights folder to another layout",
    "verify": "compare the weights of two checkpoints",
    "inspect": "describe a weights file or folder without executing anything in it",
    "summary": "list parameters, cost and shapes of every module, at any size",
    "trace": "record a run module by module, and find where two runs first differ",
    "bench": "compare the cost of a guidance step with diffusers",
    "parity": "compare with recorded outputs of the official code",
    "draw-example": "draw the example pictures",
}
# These mean something without any word; the others print their help.
BARE = ("generate", "app", "examples", "summary", "trace", "refine-gain", "draw-example")
