"""Rollouts: their record and file, the job that samples them, and one module for each place they come from."""

from lenvm_rl.rollouts.job import SamplingSettings
from lenvm_rl.rollouts.local import sample_rollouts, sample_to_file
from lenvm_rl.rollouts.record import RolloutMetadata, read_rollouts, split_by_prompt, write_rollouts
from lenvm_rl.rollouts.server import sample_from_server
from lenvm_rl.rollouts.text import read_sharegpt, read_traces
from lenvm_rl.rollouts.vllm import sample_with_vllm

__all__ = [
    "RolloutMetadata",
    "SamplingSettings",
    "read_rollouts",
    "read_sharegpt",
    "read_traces",
    "sample_from_server",
    "sample_rollouts",
    "sample_to_file",
    "sample_with_vllm",
    "split_by_prompt",
    "write_rollouts",
]
