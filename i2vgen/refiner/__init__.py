"""The second stage, which noises a finished clip and denoises it again at a larger size."""
