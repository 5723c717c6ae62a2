"""The built-in task: a chain of operations whose written steps are worth their tokens only where they are needed."""

from lenvm_rl.sandbox.policy import PolicySettings, fit_policy
from lenvm_rl.sandbox.styles import STYLES, clean_length, draw_completion, read_completion
from lenvm_rl.sandbox.task import (
    DIFFICULTIES,
    Problem,
    distinct_problems,
    is_correct,
    sandbox_tokenizer,
    stream_problems,
)

__all__ = [
    "DIFFICULTIES",
    "STYLES",
    "PolicySettings",
    "Problem",
    "clean_length",
    "distinct_problems",
    "draw_completion",
    "fit_policy",
    "is_correct",
    "read_completion",
    "sandbox_tokenizer",
    "stream_problems",
]
