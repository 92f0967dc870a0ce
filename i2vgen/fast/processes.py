"""The processes that torchrun starts for one command: who speaks, who takes what, how an error ends them all.

A process that nobody started beside others is a crew of one, for which nothing here makes a difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from i2vgen.fast import runtime
from i2vgen.fast.parallel import PeerLost
from i2vgen.settings.config import Config

LONG = datetime.timedelta(days=7)  # for which others may be waited for: torchrun ends those whose peer died
CREWS = itertools.count()  # of one run of torchrun; every process counts alike
A_MOMENT = 0.1  # seconds in which a thread gives back what it holds
SECONDS_TO_SPEAK = 1.0  # for the first process that fails, before the end of another makes torchrun end it


def own_device(config: Config, local: int, world: int) -> Config:
    """The settings of process number `local` on this machine, of `world` in all: each GPU computes for one.

    ValueError if there is none for it.
    """
    device = runtime.device(config.runtime)
    if world == 1 or device.type == "cpu":
        return config
    if device.type != "cuda" or device.index is not None:
        raise ValueError(
            f"runtime.device={device} is one device for {world} processes; write device=cuda, of which each "
            "takes its own, or device=cpu"
        )
    there = torch.cuda.device_count()
    if local >= there:
        raise ValueError(
            f"process {local + 1} on this machine has no device: PyTorch sees {there} here; use "
            f"--nproc-per-node {there}, or device=cpu"
        )
    torch.cuda.set_device(local)
    return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, device=f"cuda:{local}"))


def leave() -> None:
    """Leave the group of processes.

    Before 2.8 PyTorch waits for the group's threads with the interpreter's lock in hand, which one of them
    may still need to give back the tensors of the last exchange: each would wait for the other for ever.
    """
    if torch.__version__ < "2.8":
        time.sleep(A_MOMENT)
    dist.destroy_process_group()


@dataclass(frozen=True)
class Crew:
    """Process `rank` of `world`; `store` is what they all see, None for one process."""

    rank: int = 0
    world: int = 1
    store: dist.Store | None = None

    def place(self, config: Config) -> Config:
        """The settings with this process's own device, and its connections for `runtime.parallel`.

        ValueError if there is no device for it.
        """
        if self.world == 1:
            return config
        config = own_device(config, dist.get_node_local_rank(fallback_rank=0), self.world)
        if config.runtime.parallel != "none":
            on_cpu = runtime.device(config.runtime).type == "cpu"
            self.connect("gloo" if on_cpu else "cpu:gloo,cuda:nccl")
        return config

    def connect(self, backend: str) -> None:
        dist.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.world, timeout=LONG
        )

    def decided(self, decide: Callable[[], Any]) -> Any:
        """What the first process decides, on all of them; something that JSON can hold"""
        if self.store is None:
            return decide()
        if self.rank == 0:
            self.store.set("decided", json.dumps(decide()))
        self.store.wait(["decided"], LONG)
        return json.loads(self.store.get("decided"))

    def taken(self, count: int) -> Iterator[int]:
        """Of 0 to `count` - 1 those that this process is the first to take; each is taken once."""
        if self.store is None:
            yield from range(count)
            return
        while (number := self.store.add("taken", 1) - 1) < count:
            yield number

    def gathered(self, own: Any) -> list:
        """What every process has, by rank"""
        if self.store is None:
            return [own]
        if not dist.is_initialized():
            self.connect("gloo")
        found: list = [None] * self.world
        try:
            dist.all_gather_object(found, own)
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        return found

    def wait(self) -> None:
        """Until all processes are here: torchrun ends the others where one has ended with an error."""
        if self.store is not None:
            there = self.store.add("waiting", 1)
            while there < self.world:
                time.sleep(0.05)
                there = self.store.add("waiting", 0)

    @contextlib.contextmanager
    def quiet(self, *, on: bool = True) -> Iterator[None]:
        """Inside, only the first process prints and warns."""
        if not on or self.rank == 0:
            yield
            return
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield


ALONE = Crew()


@contextlib.contextmanager
def crew() -> Iterator[Crew]:
    """The processes that torchrun started this one with. Of the errors that end them the first is told."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE
        return
    store, rank, world = next(iter(rendezvous("env://")))
    store = dist.PrefixStore(f"i2vgen-{next(CREWS)}", store)
    try:
        yield Crew(rank, world, store) if world > 1 else ALONE
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        if store.add("errors", 1) > 1:
            time.sleep(SECONDS_TO_SPEAK)
            sys.exit(2)
        if isinstance(error, PeerLost):
            raise ValueError(
                "another process of this run has ended, perhaps killed for want of memory; the clips that "
                "are finished are kept"
            ) from error
        if rank == 0 or not isinstance(error, ValueError | OSError | FloatingPointError):
            raise
        sys.stderr.write("\n")  # the first process may be drawing its progress bar there
        raise ValueError(f"{error} (rank {rank} of {world})") from error
    finally:
        if dist.is_initialized():
            leave()
