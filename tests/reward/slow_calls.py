"""Functions that a process of its own is asked to call, in `test_timed_calls`."""

import os
import time


def echo(value):
    return value


def hold(seconds):
    time.sleep(seconds)
    return seconds


def hold_the_interpreter():
    # One step of the interpreter: no signal is looked at before it ends.
    return len(str(9**9**9))


def take(size):
    return len(bytearray(size))


def fail(value):
    raise KeyError(value)


def recurse(depth=0):
    return recurse(depth + 1)


def leave():
    os._exit(3)


def whisper():
    print("not a reply")
    return os.getpid()
