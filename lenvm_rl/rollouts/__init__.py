"""Rollouts: their record and file, the job that samples them, and one module for each place they come from."""

from lenvm_rl.rollouts.job import SamplingSettings, sample_rollouts, sample_to_file
from lenvm_rl.rollouts.local import TransformersJob
from lenvm_rl.rollouts.record import RolloutMetadata, read_rollouts, split_by_prompt, write_rollouts
from lenvm_rl.rollouts.server import ServerJob
from lenvm_rl.rollouts.text import import_completions
from lenvm_rl.rollouts.vllm import VLLMJob

__all__ = [
    "RolloutMetadata",
    "SamplingSettings",
    "ServerJob",
    "TransformersJob",
    "VLLMJob",
    "import_completions",
    "read_rollouts",
    "sample_rollouts",
    "sample_to_file",
    "split_by_prompt",
    "write_rollouts",
]
