"""The global generators of torch (CPU), Python and numpy looked at together: one comparison shows that none has moved.

`torch_generator` and `global_generators` know where each keeps its state, and copy it. A step looks four times, and
almost never finds anything; so here the bytes of all of them are compared at once, and the copies of the last time are
returned while they are the same.
"""

from __future__ import annotations

from torch import Tensor

from purestep.random import global_generators, torch_generator

States = tuple[Tensor, global_generators.State]
_bit_generator, _python = global_generators.bit_generator, global_generators.PYTHON


class _Watch:
    """What was seen the last time."""

    __slots__ = ("bits", "gauss", "heads", "seen", "states")

    def __init__(self) -> None:
        self.heads: tuple[memoryview, ...] = ()
        self.seen = b"nothing yet"  # no heads give this
        self.gauss: float | None = None
        self.bits: object = None
        self.states: States | None = None

    def look_again(self) -> States:
        """Read the states; remember where they lie, if that is known of all of them."""
        torchs, others = torch_generator.lying_at(), global_generators.lying_at()
        if torchs is None or others is None:
            self.seen = b"nothing yet"
            return torch_generator.state(), global_generators.read()
        # The bytes are those that lay there when the states were copied: another thread may have drawn since.
        (first, torch_seen, torch_state), (second, seen, state) = torchs, others
        self.heads, self.seen = (*first, *second), torch_seen + seen
        found = torch_state, state
        self.gauss, self.bits, self.states = state[1], state[2], found
        return found


_watch = _Watch()


def states() -> States:
    """Return the states of torch's generator, and of those of Python and numpy.

    As long as nothing is drawn it is the very same object, where it is known where the generators keep their state.

    Examples:
        >>> import random
        >>> random.seed(0)
        >>> before = states()
        >>> states() is before, random.random() > 0, states() is before
        (True, True, False)
    """
    watch = _watch
    if b"".join(watch.heads) == watch.seen and _python.gauss_next is watch.gauss and _bit_generator() is watch.bits:
        return watch.states  # type: ignore[return-value]  # set with `seen`
    return watch.look_again()


def moved(since: States) -> bool:
    """Tell whether a generator has another state than `states` returned.

    Examples:
        >>> before = states()
        >>> moved(before)
        False
    """
    now = states()
    return now is not since and (now[1] != since[1] or torch_generator.moved(since[0]))


def put_back(then: States) -> None:
    """Put all generators back to states that `states` returned; it costs next to nothing where they are in them."""
    if states() is not then:
        torch_generator.put_back(then[0])
        global_generators.write(then[1])
