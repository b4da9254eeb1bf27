"""Programs and the time that they take, in turns: what the benchmark's tables share."""

from collections.abc import Callable
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from dpp_jax.training import devices


@dataclasses.dataclass
class Contender:
    """One way to do some work, ready to be called; None is what cannot be measured."""

    title: str
    call: Callable[[], Any]
    compile_seconds: float | None = None
    memory_bytes: int | None = None
    amount: float = 1.0  # of work that a call does
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.amount / self.median

    def times_as_fast_as(self, other: 'Contender') -> float:
        """Median over the turns: what slows a machine down slows down both of a turn."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median((self.amount / mine) / (other.amount / theirs) for mine, theirs in pairs)


def compiled(title: str, function: Callable, *arguments) -> Contender:
    """Compile `function`, a jitted or mapped one that donates nothing."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Contender(title, lambda: program(*arguments), seconds, needed)


def donating(title: str, step: Callable, state, *arguments) -> Contender:
    """Compile a step that takes over its state's memory; every call goes on from the last."""
    start = time.perf_counter()
    program = step.lower(state, *arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    if jax.default_backend() == 'cpu':  # where all devices have the same memory
        needed *= devices.count()
    current = jax.tree.map(jnp.array, state)

    def call():
        nonlocal current
        current, metrics = program(current, *arguments)
        return current, metrics

    return Contender(title, call, seconds, needed)


def measure(found: list[Contender], repeats: int, turn_seconds: float = 0.0) -> None:
    """Every contender once to warm up, then all in turns; seconds are those of a call.

    In its turn a contender is called until `turn_seconds` have passed: a single call of a second or less
    shows what the one before it left in the caches, and what else the machine did just then.
    """
    for turn in range(repeats + 1):
        for contender in found:
            calls, start, passed = 0, time.perf_counter(), 0.0
            while not calls or (turn and passed < turn_seconds):
                jax.block_until_ready(contender.call())
                calls, passed = calls + 1, time.perf_counter() - start
            if turn:
                contender.seconds.append(passed / calls)
