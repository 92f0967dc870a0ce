"""A clip between two pictures: the first conditions the model as usual, the last is inserted in every step.

    python examples/first_and_last.py first.png last.png "a yellow star moves to the right" between.gif

Needs no training. In every step, the network's estimate of the last latent frame is replaced by the latent of
the given picture, so that the other frames lead up to it. The last few frames are also pulled towards it.
"""

import argparse

import torch

import i2vgen
from i2vgen import pipeline


def meeting(last, reach):
    """-> a sampler for `generate`; `last` [c h w] is the target latent, `reach` the frames affected."""

    def sampler(predict, x, schedule, *, steps, noise, on_step):
        f = x.shape[2]
        pull = torch.clamp((torch.arange(f) - (f - 1 - reach)) / reach, 0, 1).to(x)[None, None, :, None, None]
        pull = torch.where(pull < 1, 0.25 * pull, pull)  # neighbours are pulled, the last frame is fixed

        def predict_meeting(x, t):
            v = predict(x, t)
            a, s = (level.to(x) for level in signal_and_noise(schedule, t))
            x0, eps = a * x - s * v, s * x + a * v
            x0 = torch.lerp(x0, last[None, :, None].to(x), pull)
            # The rest of x is noise; at the noisiest step x is nothing else, so eps stays.
            eps = torch.where(s > 0.999, eps, (x - a * x0) / s.clamp(min=1e-3))
            return a * eps - s * x0

        return pipeline.ddim(predict_meeting, x, schedule, steps=steps, on_step=on_step)

    return sampler


def signal_and_noise(schedule, t):
    abar = schedule.abar[t.cpu()].view(-1, 1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def between(model, first, last, prompt, *, seed=0, reach=3):
    config = model.config
    if config.schedule.prediction != "v":
        raise ValueError(f"schedule.prediction is {config.schedule.prediction}; this example needs v")
    views = pipeline.prepare_views(pipeline.open_picture(last, config), config)
    latent = model.vae.encode(views.pixels[None].to(model.device), None, chunk=1)[0]
    return model.generate([first], [prompt], [seed], sampler=meeting(latent, reach))[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("first", "last", "prompt", "output"):
        parser.add_argument(name)
    parser.add_argument("settings", nargs="*", help="any settings, for example steps=50")
    given = parser.parse_args()
    model = i2vgen.load(overrides=["weights=lab", *given.settings])
    print(between(model, given.first, given.last, given.prompt).save(given.output))


if __name__ == "__main__":
    main()
