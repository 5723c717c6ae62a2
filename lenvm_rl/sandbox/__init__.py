"""The built-in task: a chain of operations that a policy solves at too great length."""

from lenvm_rl.sandbox.policy import PolicySettings, fit_policy
from lenvm_rl.sandbox.styles import STYLES, Overthinking, Reading, clean_length, draw_completion, read_completion
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
    "Overthinking",
    "PolicySettings",
    "Problem",
    "Reading",
    "clean_length",
    "distinct_problems",
    "draw_completion",
    "fit_policy",
    "is_correct",
    "read_completion",
    "sandbox_tokenizer",
    "stream_problems",
]
