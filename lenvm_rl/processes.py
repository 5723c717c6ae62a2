"""What the processes of a run tell each other about things that are no tensors."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


def number_of_processes() -> int:
    """How many processes work on the batches of this run."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def process_index() -> int:
    """Which of them this is; rows of a batch are in their order."""
    return torch.distributed.get_rank() if number_of_processes() > 1 else 0


def exchanged(value: T) -> list[T]:
    """The value of each process, in their order; every process has to call this, with something that can be pickled."""
    if number_of_processes() == 1:
        return [value]
    everyone: list = [None] * number_of_processes()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


@contextlib.contextmanager
def fails_together(what: str) -> Iterator[None]:
    """A context in which an error on one process ends the others too, which would wait for that one in vain.

    Every process has to enter it, and to leave it before they exchange anything else.

    Args:
        what (`str`): what is done inside, for the error.

    Raises:
        RuntimeError: it failed on another process. Where it failed, its own error passes.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    told = exchanged(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    failed = [f"process {index} ({problem})" for index, problem in enumerate(told) if problem is not None]
    if failed:
        raise RuntimeError(f"{what} failed on {', '.join(failed)}: see what that process says.")
