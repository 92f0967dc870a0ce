"""Run an ablation study and print its variants side by side in a table.

    i2vgen ablate configs/ablations/STUDY.yaml [budget=smoke|quick|full] output=FOLDER

    i2vgen ablate configs/ablations/hierarchical_encoders.yaml budget=smoke output=outputs/smoke
    i2vgen ablate configs/ablations/concat_gain.yaml output=outputs/concat_gain
    i2vgen ablate configs/ablations/temporal.yaml measures=cost,untrained output=outputs/temporal

    budget=    smoke (a quick check), quick (default; an hour on two cores at most) or full (reliable)
    output=    folder for table.md, results.csv, plots, index.html, and settings, log, scores, clips per run
    workers=   parallel runs; default: one per GPU, without a GPU one per core
    measures=  run only these of the study's measures; cost,untrained takes minutes
    stale=     results made before the package's code changed: keep, or again (measure them anew)

An interrupted study continues where it stopped; finished runs are not repeated. The plots need matplotlib
(pip install 'i2vgen[lab]'). docs/laboratory.md explains how to write a study, also on your clips.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import multiprocessing
import queue
import shutil
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from i2vgen import cli
from i2vgen.files import lock, whole
from i2vgen.lab import measure, own_clips, report
from i2vgen.lab import study as studies
from i2vgen.settings.wording import counted
from i2vgen.training import data

COSTS = "cost.json"
PATIENCE = 0.1  # seconds between two looks at the workers


def main(argv: list[str]) -> int:
    file, words, _ = cli.split(argv)
    hint = "; settings of variants are the study's"
    given = cli.take_all(
        words, numbers=("workers",), texts=("budget", "output", "measures", "stale"), hint=hint
    )
    if file is None or "output" not in given:
        raise ValueError("give a study and a folder: i2vgen ablate configs/ablations/NAME.yaml output=FOLDER")
    name = cli.choose("budget", given.get("budget", "quick"), studies.BUDGETS)
    study, budget = chosen(studies.read(file), given.get("measures")), studies.BUDGETS[name]
    if not study.only_counted and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "the plots need matplotlib, which is not installed: python -m pip install 'i2vgen[lab]'; "
            "measures=cost needs none"
        )
    for config in studies.with_plugins(study):
        cli.tell_plugins(config)
    stale = cli.choose("stale", given.get("stale", "refuse"), ("refuse", "keep", "again"))
    folder = whole.check_folder("output=", given["output"])
    with lock.locked(folder):
        todo = studies.runs(study, budget, folder)
        note = settle_stale(todo, stale)
        left = [run for run in todo if not measure.finished(study, run, budget)]
        begun = len(left) < len(todo) or (folder / COSTS).exists()
        if left and study.evaluate:
            own_clips.check(study.evaluate["videos"], measure.cost_config(study, study.base, budget))
        whole.check_results("output=", folder, report.FILES, ours=begun)
        print(
            f"{study.question}\n{counted(len(study.variants), 'variant')}, {counted(len(todo), 'run')}, "
            f"{len(todo) - len(left)} of them done"
        )

        costs = None
        if "cost" in study.measures:
            costs = measure.cost(study, budget)
            whole.write_json(folder / COSTS, costs, indent=1)
        perform(study, left, budget, places(given, len(left)))
        page = report.write(study, todo, costs, folder, name, note)
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"page in {cli.shown(page)}")
    return 0


def settle_stale(runs: list[studies.Run], wish: str) -> str:
    """Refuse, keep or remove the results that other code made -> a note on those that are kept."""
    stale = {run: files for run in runs if (files := measure.changed_code(run))}
    if not stale:
        return ""
    names = ", ".join(str(run.folder) for run in stale)
    files = list(dict.fromkeys(itertools.chain.from_iterable(stale.values())))
    changed = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    said = f"{len(stale)} of {len(runs)} results are stale, made before a change of {changed}: {names}"
    if wish == "refuse":
        raise ValueError(
            f"{said}; measure them anew with stale=again, take them as they are with stale=keep, or choose "
            "another output="
        )
    if wish == "again":
        for run in stale:
            shutil.rmtree(run.folder)
        return ""
    warnings.warn(said, stacklevel=1)
    return f"{said}."


def chosen(study: studies.Study, names: str | None) -> studies.Study:
    """The study, restricted to these measures."""
    if names is None:
        return study
    measures = tuple(names.split(","))
    if wrong := [m for m in measures if m not in study.measures]:
        raise ValueError(
            f"measures={names}: this study does not measure {wrong[0]!r}; it measures "
            f"{', '.join(study.measures)}"
        )
    return dataclasses.replace(study, measures=measures)


def places(given: dict, runs: int) -> list[str]:
    """One device per worker."""
    found = measure.devices()
    if "workers" in given:
        found = [found[i % len(found)] for i in range(cli.at_least_one("workers", given["workers"]))]
    return found[: max(1, runs)]


def begin() -> None:
    """In a worker."""
    data.end_with_parent()
    cli.show_warnings_as_notes()


def perform(study, runs, budget, devices: list[str]) -> None:
    """Workers take runs from a queue; the first failure ends the study."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for run in runs:
        waiting.put(run)
    failed: list[BaseException] = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(len(devices), mp_context=context, initializer=begin) as pool,
        tqdm(total=len(runs), unit="run") as bar,
    ):

        def serve(device: str) -> None:
            while not failed:
                try:
                    run = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done = pool.submit(measure.work, study, run, budget, device)
                except RuntimeError as error:  # the pool has lost a worker
                    failed.append(error)
                    return
                # A pool that loses its workers in the moment it is given a run forgets the run.
                while not done.done():
                    if failed:
                        return
                    wait([done], timeout=PATIENCE)
                if error := done.exception():
                    failed.append(error)
                    return
                bar.set_description(cli.shown(f"{run.variant}, {run.measure}"), refresh=False)
                bar.update()

        threads = [threading.Thread(target=serve, args=(device,)) for device in devices]
        try:
            for thread in threads:
                thread.start()
            ended(threads)
        except BaseException as error:
            # On an interruption the workers end at once, instead of finishing their runs first. One that is
            # being started is known only when its thread has done so.
            failed.append(error)
            ended(threads)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    if failed and isinstance(failed[0], BrokenProcessPool):
        raise ValueError(
            "a worker was killed, perhaps for want of memory; call again with fewer workers=, the finished "
            "runs are kept"
        ) from failed[0]
    if failed:
        raise failed[0]


def ended(threads: list[threading.Thread]) -> None:
    """Wait for them, and look now and then: Ctrl-C may reach another thread, and is raised in this one."""
    while any(thread.is_alive() for thread in threads):
        time.sleep(PATIENCE)
