"""Processes for the tests of training on several cards, on a CPU with gloo.

They are forked from one that has imported everything, since importing is most of what a launch takes.
"""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.checkpoint",
        "i2vgen.commands.train",
        "i2vgen.training.shards",
        "open_clip",
        "processes",
    ]
)


def launch(ranks, work, *arguments, dies=None):
    """Run work(rank, *arguments) in so many processes -> what each returned, or the text of its error.

    `dies` is the rank that is expected to be killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
    started = [
        CONTEXT.Process(target=_begin, args=(rank, ranks, port, pipes[rank][1], work, arguments), daemon=True)
        for rank in range(ranks)
    ]
    from conftest import CORE_ONLY  # not by the processes started here, which import this module

    sys.path.insert(0, str(CORE_ONLY))  # newer versions of Python hand it on instead of PYTHONPATH
    try:
        for process in started:
            process.start()
    finally:
        del sys.path[0]
    found = []
    try:
        for rank, (reader, writer) in enumerate(pipes):
            writer.close()
            if rank == dies:
                found.append(None)
                continue
            assert reader.poll(500), f"rank {rank} says nothing"
            found.append(reader.recv())
            assert not isinstance(found[-1], str), found[-1]
    finally:
        for process in started:
            process.join(10)
            process.kill()
    return found


def _begin(rank, ranks, port, pipe, work, arguments):
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    try:
        pipe.send(work(rank, *arguments))
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


def train(rank, words, killed_at=None):
    """`i2vgen train` as one of several processes -> its exit status, what it printed and said."""
    from i2vgen import cli
    from i2vgen.commands import train as command
    from i2vgen.training import loop

    if killed_at is not None:
        update = loop.update

        def deadly(part, step, state, *rest, **named):
            if rank == killed_at[0] and state.step == killed_at[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(part, step, state, *rest, **named)

        loop.update = deadly
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = cli.run(lambda: command.main(words))
    return status, out.getvalue()


def fit(rank, ranks, config, train, folder, *, double):
    """Train in a group that is joined already -> the log's lines, and how many numbers this process holds."""
    import torch

    from i2vgen.training import data, diffusion, loop

    device = torch.device("cpu")
    source = data.open_source(config, train)
    part = diffusion.make(config, train, source, device)
    held = {}
    if double:
        part.model.double()

    start = loop.start

    def seen(*arguments):
        held["state"] = start(*arguments)
        return held["state"]

    loop.start = seen
    try:
        resume = bool(loop.checkpoints(Path(folder)))
        where = {"device": device, "rank": rank, "ranks": ranks, "resume": resume}
        loop.fit(part, config, train, source, folder, **where)
    finally:
        loop.start = start
    state = held["state"]
    moments = [t for one in state.optimiser.state.values() for key, t in one.items() if key != "step"]
    kinds = {"weights": state.parameters.values(), "moments": moments, "average": state.ema.values()}
    counts = {kind: sum(t.numel() for t in tensors) for kind, tensors in kinds.items()}
    log = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines() if rank == 0 else []
    return [json.loads(line) for line in log], counts


def work(rank, ranks, jobs, backend=None):
    """Several trainings after one another in one launch; each is (name, config, train, folder, double).

    `backend` is what torch.compile uses; how many graphs it compiled is then told too.
    """
    import torch

    from i2vgen.fast.processes import leave
    from i2vgen.training import shards

    if backend:
        right = torch.compile
        torch.compile = lambda function, **how: right(function, backend=backend, **how)
    shards.join(torch.device("cpu"))
    found = {}
    for name, config, train, folder, double in jobs:
        found[name] = fit(rank, ranks, config, train, folder, double=double)
    leave()
    if backend:
        found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found
