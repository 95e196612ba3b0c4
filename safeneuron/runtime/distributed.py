"""Many processes as one: which of them this is, how they share work and exchange results, and how they end together.

``torchrun`` and ``accelerate launch`` start processes ("ranks"), number them in the environment, and keep a store for
them: a server of keys and values. What the ranks tell one another goes through it, as JSON, because a rank that waits
there, for however long, can be told that another one has failed; inside a collective operation of torch it would hang.
In a single process everything here is trivial, and torch is not imported.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from safeneuron.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What the environment of a launched process holds; with less, a process is the only one."""
MEETING = timedelta(minutes=10)
"""How long ranks wait for one another at the start."""
COLLECTIVE = timedelta(hours=2)
"""How long a collective operation may take: longer than anything that one rank does alone while others are in one."""
LOOKS = (0.001, 0.2)
"""How many seconds a waiting rank lets pass between two looks, at first and at most."""
GOODBYE = 5.0
"""How many seconds a rank that ends waits until the others have heard of it."""
PIECE = 2**22
"""The store takes values of at most 8 MB."""

_alone: ContextVar[bool] = ContextVar("alone", default=False)


class _Exchange:
    """What this rank and the others tell one another through the launcher's store: rounds of values, and goodbyes.

    Attributes:
        store: Of keys and values; the same for all ranks.
        rounds: Numbers the exchanges, which come in the same order on every rank.
        sent: The keys that this rank has written and not yet deleted.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rounds = count()
        self.sent: list[str] = []

    def send(self, key: str, value: Any) -> None:
        """Write a value, in pieces that the store takes; its own key comes last, once all of it is there."""
        text = json.dumps(value)
        pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
        for number, piece in enumerate(pieces):
            self.store.set(f"{key}/{number}", piece)
        self.store.set(key, str(len(pieces)))
        self.sent.append(key)

    def receive(self, key: str) -> Any:
        """What a rank has written under this key; ends the program if a rank has failed meanwhile."""
        # The store could be waited on too, but writes a warning for every time that this is in vain.
        pause, longest = LOOKS
        while not self.store.check([key]):
            if self.store.check(["failed"]):
                raise SystemExit(first_to_fail(1))
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return json.loads(b"".join(self.store.get(f"{key}/{number}") for number in range(int(self.store.get(key)))))

    def forget_all_but_last(self) -> None:
        """Delete what this rank has written in earlier rounds, which all ranks have read."""
        while len(self.sent) > 1:
            key = self.sent.pop(0)
            for number in range(int(self.store.get(key))):
                self.store.delete_key(f"{key}/{number}")
            self.store.delete_key(key)

    def say_goodbye(self, wait: bool) -> None:
        """Let the others know that this rank is ending; with ``wait``, until all have said the same or time is up."""
        self.store.set(f"goodbye/{os.environ['RANK']}", "")
        deadline, everyone = time.monotonic() + GOODBYE, [f"goodbye/{other}" for other in range(_launched())]
        while wait and time.monotonic() < deadline and not self.store.check(everyone):
            time.sleep(LOOKS[0])


def world() -> int:
    """How many ranks there are; 1 in a process that was not launched as one of many, and within ``alone``."""
    return 1 if _alone.get() else _launched()


def rank() -> int:
    """Which of them this is, counted from 0."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def local_rank() -> int:
    """Which of the ranks on this machine it is, and so which GPU is its own."""
    return int(os.environ["LOCAL_RANK"]) if world() > 1 else 0


def local_world() -> int:
    """How many ranks share this machine; all of them, if the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) if world() > 1 else 1


def is_main() -> bool:
    """Whether this is the rank that writes, prints and decides for all, also within ``alone``."""
    return _launched() == 1 or os.environ["RANK"] == "0"


@contextmanager
def alone() -> Iterator[None]:
    """Within the block a rank works as if it were the only one: nothing is shared out, nobody is waited for."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def gather(value: Any) -> list[Any]:
    """What each rank gives (anything that JSON can write), in the order of the ranks, on every rank."""
    if world() == 1:
        return [value]
    exchange = _exchange()
    number = next(exchange.rounds)
    exchange.send(f"{number}/{rank()}", value)
    values = [exchange.receive(f"{number}/{other}") for other in range(world())]
    # Each rank has written in this round, so each has read the rounds before it, which can now be forgotten.
    exchange.forget_all_but_last()
    return values


def barrier() -> None:
    """Wait until every rank has come here."""
    gather(None)


def agree(problem: str) -> None:
    """Raise ``InputError`` on every rank if any of them has a problem: that of the first one."""
    problems = [text for text in gather(problem) if text]
    if problems:
        raise InputError(problems[0])


def from_main(work: Callable[[], _Result]) -> _Result:
    """What ``work`` gives on rank 0, which does it alone while the others wait; JSON must be able to write it.

    An ``InputError`` there is raised on every rank.
    """
    if world() == 1:
        return work()
    exchange = _exchange()
    key = f"{next(exchange.rounds)}/0"
    if is_main():
        try:
            with alone():
                result = work()
        except InputError as error:
            exchange.send(key, [None, str(error)])
            raise
        exchange.send(key, [result, ""])
        return result
    received: tuple[_Result, str] = exchange.receive(key)
    result, problem = received
    if problem:
        raise InputError(problem)
    return result


def deal(items: Sequence[_Item], work: Callable[[_Item], _Result]) -> Iterator[_Result]:
    """``work(item)`` for each item, in order; the ranks do one item each in turn, and all of them get every result."""
    for start in range(0, len(items), world()):
        mine = items[start : start + world()][rank() : rank() + 1]
        for results in gather([work(item) for item in mine]):
            yield from results


def each_tensor(own: Tensor) -> Iterator[Tensor]:
    """The tensor of each rank, in the order of the ranks, one at a time; all of one shape and on the CPU."""
    if world() == 1:
        yield own
        return
    import torch.distributed as dist

    for source in range(world()):
        tensor = own.clone() if source == rank() else own.new_empty(own.shape)
        # A rank that has failed is noticed here, where one can wait for it, and not in the collective operation.
        barrier()
        dist.broadcast(tensor, source, group=_gloo())
        yield tensor


def start_group() -> None:
    """Make torch's process group, if there are several ranks and nobody has made it: nccl on GPUs, gloo elsewhere."""
    import torch
    import torch.distributed as dist

    if world() > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE)


def first_to_fail(code: int) -> int | None:
    """``None`` on the rank that fails first, which then says why; on others the exit code of that one, to end with.

    Ranks that wait for others are ended by this, in silence and with that exit code.
    """
    if _launched() == 1:
        return None
    for number in (signal.SIGINT, signal.SIGTERM):  # The launcher may send them again, and this rank is ending.
        signal.signal(number, signal.SIG_IGN)
    own = json.dumps([os.environ["RANK"], code])
    try:
        exchange = _exchange()
        first = exchange.store.compare_set("failed", "", own).decode()
        exchange.say_goodbye(wait=first == own)
    except (RuntimeError, InputError):
        return None  # There is no store, or none any more, so nobody can be told.
    return None if first == own else int(json.loads(first)[1])


def leave() -> None:
    """The end of a program that went well: wait for all ranks, so that none ends while another still needs it."""
    if world() == 1:
        return
    import torch.distributed as dist

    barrier()
    _exchange().say_goodbye(wait=is_main())
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def whole_weights() -> Iterator[None]:
    """Within the block every rank reads the weights of a model that it loads.

    With FSDP and accelerate's ``cpu_ram_efficient_loading``, transformers gives all but the first zeros instead, to be
    overwritten when the model is sharded; here every rank also computes with models that are not.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    setting = os.environ.get(name)
    try:
        if setting is not None:
            os.environ[name] = "false"
        yield
    finally:
        if setting is not None:
            os.environ[name] = setting


def _launched() -> int:
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHED) else 1


def _exchange() -> _Exchange:
    """That of this process, which waits for all ranks to come to it first; ``InputError`` if they did not."""
    meeting = _meeting()
    if isinstance(meeting, str):
        raise InputError(
            f"this is one of {_launched()} processes (WORLD_SIZE), but in {MEETING.seconds // 60} minutes they have "
            f"not met at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({meeting}); start all of them with "
            "torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    return meeting


# A process is one rank for as long as it lives, and ranks meet once: so this and the group are made once a process.
@cache
def _meeting() -> _Exchange | str:
    """The exchange through the launcher's store, or one that rank 0 keeps where there is none; else what went wrong."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=MEETING))
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return _Exchange(PrefixStore(f"safeneuron/{attempt}", store))


@cache
def _gloo() -> ProcessGroup:
    """A group for tensors on the CPU, whatever backend the ranks have for the others."""
    import torch.distributed as dist

    start_group()
    group: ProcessGroup = dist.new_group(backend="gloo", timeout=COLLECTIVE)
    return group
