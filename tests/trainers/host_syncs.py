"""Counts where lenvm_rl makes the host wait for a device, as far as that can be seen on a CPU."""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lenvm_rl

OURS = str(Path(lenvm_rl.__file__).parent)
# Whose code asks for a number of the device: of the frames that lead to it, the innermost of these.
ASKERS = tuple(f"{folder}/" for folder in (OURS, "site-packages/trl", "site-packages/transformers"))
# Works on what reward functions return, which is on the host.
ON_HOST = "/reward_functions.py"
# Operations that give the host a number of the device, or a shape that depends on one; with masks, also indexing.
OPERATIONS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
BY_MASK = ("index", "index_put_")
METHODS = ("tolist", "cpu", "numpy")
# From lists of the host onto a device that is named: the copy waits for what the device has to do.
MAKERS = ("tensor", "as_tensor")


def asker():
    """`file:line` of the innermost frame of [`ASKERS`], if that is one of lenvm_rl."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(folder in path for folder in ASKERS):
            name = path.removeprefix(OURS)
            return f"{name}:{frame.f_lineno}" if name not in (path, ON_HOST) else None
        frame = frame.f_back
    return None


class _Dispatched(TorchDispatchMode):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in OPERATIONS or (name in BY_MASK and any(_is_mask(index) for index in arguments[1])):
            self.count(name)
        return function(*arguments, **(keywords or {}))


def _is_mask(index):
    return index is not None and index.dtype in (torch.bool, torch.uint8)


@contextmanager
def counted_syncs():
    """Gives a `Counter` of what lenvm_rl asks for inside, `"file:line what"`."""
    found, counted = Counter(), []

    def count(what):
        where = None if counted else asker()
        if where is not None:
            found[f"{where} {what}"] += 1

    def counting(name, function, counts=lambda *arguments, **keywords: True):
        def called(*arguments, **keywords):
            if counts(*arguments, **keywords):
                count(name)
            # What it is made of is no wait of its own.
            counted.append(name)
            try:
                return function(*arguments, **keywords)
            finally:
                counted.pop()

        return called

    def from_host(data, *arguments, device=None, **keywords):
        return device is not None and not isinstance(data, torch.Tensor)

    with ExitStack() as patches:
        for name in METHODS:
            method = counting(name, getattr(torch.Tensor, name))
            patches.enter_context(mock.patch.object(torch.Tensor, name, method))
        for name in MAKERS:
            maker = counting(name, getattr(torch, name), from_host)
            patches.enter_context(mock.patch.object(torch, name, maker))
        patches.enter_context(_Dispatched(count))
        yield found
