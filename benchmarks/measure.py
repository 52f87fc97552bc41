"""How a call is timed and weighed.

Clocks: "wall" on a CPU; "events", device events around each call as it comes from Python; "graph", device events around
the replay of a CUDA graph, without Python's share. The calls of a group are interleaved, a round at a time, in an order
that rotates, so that drift meets all of them alike; their inputs rotate through more memory than the L2 holds.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[], object]

MIN_ROUNDS = 3
"""Fewer rounds than this are no measurement: a group that the budget stops before is left out."""
MAX_ROUNDS = 100
CPU_CACHE_BYTES = 32 << 20
MAX_ROTATED = 64


class Budget:
    """Seconds left of a run, from `since` (time.time()) or from now."""

    def __init__(self, seconds: float, since: float | None = None):
        self.end = (time.time() if since is None else since) + seconds

    def left(self) -> float:
        return self.end - time.time()


class Outcome(NamedTuple):
    """How an attempt ended. status: "ok", "out of memory", "left out" or "failed"."""

    status: str
    message: str = ""


class LeftOut(Exception):
    """Raised by what cannot be measured here, for the reason it gives; no failure."""


class CallFailed(Exception):
    """One of several interleaved calls raised."""

    def __init__(self, name: str, error: Exception):
        super().__init__(f"{name}: {error}")
        self.name, self.outcome = name, outcome_of(error)


def outcome_of(error: Exception) -> Outcome:
    if isinstance(error, (LeftOut, ModuleNotFoundError)):
        return Outcome("left out", str(error))
    line = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return Outcome("out of memory", line)
    return Outcome("failed", f"{type(error).__name__}: {line}")


def attempt(action: Callable[[], object]) -> tuple[object, Outcome]:
    """The action's result and how it ended: one provider's trouble does not end a run."""
    try:
        return action(), Outcome("ok")
    except Exception as error:
        outcome = outcome_of(error)
    release_memory()
    return None, outcome


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # after a kernel's fault every call raises
            torch.cuda.empty_cache()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise LeftOut in the main thread once the time is up: compilation is Python, and can be stopped by a signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    late = LeftOut(f"not ready within {seconds:.0f} s")
    stopped = []

    def stop(*_) -> None:
        stopped.append(True)
        raise late

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    except Exception:  # torch.compile wraps whatever it meets
        if stopped:
            raise late from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# inputs


def cache_bytes(device: torch.device) -> int:
    """The size of the cache that inputs must be rotated through."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE_BYTES


def rotation(device: torch.device, bytes_a_set: int) -> int:
    """How many sets of inputs outgrow the cache twice; 2 at least."""
    return min(max(-(-2 * cache_bytes(device) // max(bytes_a_set, 1)), 2), MAX_ROTATED)


def rotated(make: Callable[[], Tensor], count: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A source that hands out `count` tensors of its making in turn, and the tensors."""
    made = [make() for _ in range(count)]
    cycle = itertools.cycle(made)
    return lambda: next(cycle), made


# time


def captured(call: Call, repeats: int = 1) -> Call:
    """The replay of a CUDA graph of `repeats` calls. Launches that compile must happen before, outside the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay


def one_round(calls: dict[str, Call], device: torch.device, end: float = float("inf")) -> dict[str, float]:
    """Seconds of one call of each, of none after the time `end`. On a GPU nothing waits between them.

    CallFailed where one of them raises.
    """
    if device.type != "cuda":
        seconds = {}
        for name, call in calls.items():
            if time.time() > end:
                break
            start = time.perf_counter()
            _named(name, call)
            seconds[name] = time.perf_counter() - start
        return seconds
    events = {}
    for name, call in calls.items():
        if time.time() > end:
            break
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        _named(name, call)
        after.record()
        events[name] = (before, after)
    torch.cuda.synchronize(device)
    return {name: before.elapsed_time(after) / 1e3 for name, (before, after) in events.items()}


def _named(name: str, call: Call) -> None:
    try:
        call()
    except Exception as error:
        raise CallFailed(name, error) from error


def interleaved(
    calls: dict[str, Call],
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    warmup_s: float | None,
    budget: Budget,
    least_s: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of each call, round by round, after a warm-up of at least one round and `warmup_s`; None: no warm-up.

    Ends after `rounds` (of short calls after as many, to MAX_ROUNDS, as `least_s` hold), or once `seconds` are gone and
    MIN_ROUNDS are done. LeftOut where the budget ends before that.
    """
    names, start = list(calls), time.time()
    while warmup_s is not None and budget.left() > 0:
        one_round(calls, device, budget.end)
        if time.time() - start >= warmup_s:
            break
    found: dict[str, list[float]] = {name: [] for name in names}
    begun = time.time()
    for round_ in range(max(rounds, MAX_ROUNDS if least_s else 0)):
        if round_ >= rounds and time.time() - begun > least_s:
            break
        if round_ >= MIN_ROUNDS and time.time() - start > seconds:
            break
        first = round_ % len(names)
        round_seconds = one_round({n: calls[n] for n in names[first:] + names[:first]}, device, budget.end)
        if len(round_seconds) < len(names):
            if round_ < min(MIN_ROUNDS, rounds):
                raise LeftOut(f"the time budget was gone after {round_} rounds")
            break
        for name, elapsed in round_seconds.items():
            found[name].append(elapsed)
    return found


def quantiles(seconds: Iterable[float]) -> dict[str, float | int]:
    """median_s, q20_s, q80_s and the number of rounds."""
    ordered = sorted(seconds)

    def at(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {"median_s": at(0.5), "q20_s": at(0.2), "q80_s": at(0.8), "rounds": len(ordered)}


# memory and launches


def peak_bytes(call: Call, device: torch.device) -> int:
    """Bytes alive at the worst moment of a call, beyond what was alive before: the allocator's own count."""
    if device.type == "cuda":
        call()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    alive = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(alive, default=0)


def launches(call: Call) -> int:
    """How many of our own kernels a call launches; the library's are not among them."""
    if importlib.util.find_spec("triton") is None:
        return 0
    from mos_kernels.backends.triton import launch

    run, count = launch.launch, itertools.count()

    def counted(kernel, grid, *arguments, **constants) -> None:
        if 0 not in grid:
            next(count)
        run(kernel, grid, *arguments, **constants)

    launch.launch = counted
    try:
        call()
    finally:
        launch.launch = run
    return next(count)


def device_launches(call: Call) -> int:
    """How many kernels, ours and the library's, and copies a call starts on a GPU, as torch's profiler records them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(1 for event in profiler.events() if event.device_type == DeviceType.CUDA)


class _Operations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches, but for those that only look at memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        returns = function._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not is_view
        return function(*arguments, **(options or {}))


def operations(call: Call) -> int:
    """How many operations of PyTorch's a call makes, views left out: what launches would be, where there are none."""
    with _Operations() as counted:
        call()
    return counted.count


def host_seconds(call: Call, device: torch.device, rounds: int = 7) -> float:
    """How long Python takes to start a call's kernels: from the call to its return, with an idle GPU; the median."""
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    synchronize(device)
    return quantiles(seconds)["median_s"]


def saved_bytes(forward: Callable[[], Tensor], owned: Iterable[Tensor]) -> int:
    """Bytes that a forward saves for backward in storages other than those of `owned`, each storage once."""
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    for tensor in owned:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    del y
    return sum(size for size, _ in found.values())
