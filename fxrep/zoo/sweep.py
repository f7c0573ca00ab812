"""Many networks, each in a process of its own with a limit on time and memory; what is done is not done again."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch import nn

from fxrep.zoo.row import Row

Load = Callable[[str], nn.Module]
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PRELOADED = ("fxrep.zoo.examine", "timm", "torchvision")
GIBI = 1 << 30


@dataclass(frozen=True)
class Limits:
    """Of one network: seconds, GiB of data, threads."""

    seconds: float = 300.0
    memory: float = 8.0
    threads: int = 1


@dataclass
class _Job:
    name: str
    process: BaseProcess
    results: Connection
    deadline: float


def sweep(
    names: Sequence[str], load: Load, out: Path, *, jobs: int = 1, limits: Limits = Limits(), redo: bool = False
) -> Iterator[Row]:
    """Examines every network that `out` has no row of, and appends its row; gives the rows as they come.

    Args:
        names: what `load` builds a network from. A name is also the key of its row.
        load: importable by name, since it is called in another process.
        out: a file with one JSON object a line; made if it is not there.
        jobs: how many networks at once.
        limits: of each network; one that breaks a limit, or crashes, is a row that says so.
        redo: examine the networks anew that have a row already, and replace it.
    """
    if redo:
        _forget(set(names), out)
    done = {row.name for row in read_rows(out)}
    todo = [name for name in dict.fromkeys(names) if name not in done]
    for row in _run(todo, load, jobs, limits):
        with out.open("a", encoding="utf-8") as file:
            file.write(f"{row.to_json()}\n")
        yield row


def read_rows(out: Path) -> list[Row]:
    """The rows of a file; a line that was cut off by an interrupt is not one."""
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    return [Row.from_json(line) for line in lines if line.endswith("}")]


def _forget(names: set[str], out: Path) -> None:
    write_rows([row for row in read_rows(out) if row.name not in names], out)


def write_rows(rows: Sequence[Row], out: Path) -> None:
    out.write_text("".join(f"{row.to_json()}\n" for row in rows), encoding="utf-8")


def _run(names: Sequence[str], load: Load, jobs: int, limits: Limits) -> Iterator[Row]:
    context: Any = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        context.set_forkserver_preload(list(PRELOADED))
    waiting = list(reversed(names))
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.pop(), load, limits))
            nearest = max(min(job.deadline for job in running) - time.monotonic(), 0)
            wait([job.results for job in running], nearest)
            for job in [job for job in running if job.results.poll() or time.monotonic() >= job.deadline]:
                running.remove(job)
                yield _finished(job, limits)
    finally:
        for job in running:
            _stop(job)


def _start(context: Any, name: str, load: Load, limits: Limits) -> _Job:
    results, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, load, limits, send), daemon=True)
    process.start()
    send.close()  # so that a child that dies is seen as the end of the pipe
    return _Job(name, process, results, time.monotonic() + limits.seconds)


def _finished(job: _Job, limits: Limits) -> Row:
    if not job.results.poll():
        _stop(job)
        return Row(job.name, failed=f"took more than {limits.seconds:g} s")
    try:
        return job.results.recv()
    except EOFError:
        job.process.join()
        return Row(job.name, failed=f"crashed with exit code {job.process.exitcode}")
    finally:
        _stop(job)


def _stop(job: _Job) -> None:
    job.process.kill()
    job.process.join()
    job.results.close()


def _child(name: str, load: Load, limits: Limits, send: Connection) -> None:
    """Examines one network; every end but a kill is a row. It does not outlive the sweep."""
    threading.Thread(target=_end_with_sweep, daemon=True).start()
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # whatever a library prints is not of the table
        os.dup2(quiet, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    _limit_memory(limits.memory)
    send.send(_row(name, load, limits))


def _end_with_sweep() -> None:
    """A sweep that is killed cannot stop what it has started."""
    sweep = multiprocessing.parent_process()
    if sweep is not None:
        sweep.join()
        os._exit(1)


def _row(name: str, load: Load, limits: Limits) -> Row:
    import torch

    from fxrep.zoo.examine import examine

    torch.set_num_threads(limits.threads)
    try:
        return examine(name, load)
    except MemoryError:
        return Row(name, failed=f"needs more than {limits.memory:g} GiB")
    except Exception as error:  # a network may raise anything
        text = " ".join(str(error).split())
        if "can't allocate memory" in text:  # a RuntimeError of torch, or what was made of it
            return Row(name, failed=f"needs more than {limits.memory:g} GiB")
        return Row(name, failed=f"{type(error).__name__}: {text[:160]}")


def _limit_memory(gibibytes: float) -> None:
    if sys.platform == "win32":
        return  # which has no such limit; the one on time holds
    import resource

    size = int(gibibytes * GIBI)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
