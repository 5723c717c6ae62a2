"""Trainers on TRL: GRPO and PPO with a frozen length value model."""

from lenvm_rl.modeling.critic import TaskCritic, TaskCriticConfig
from lenvm_rl.trainers.config import LenVMGRPOConfig, LenVMPPOConfig
from lenvm_rl.trainers.grpo import LenVMGRPOTrainer
from lenvm_rl.trainers.ppo import LenVMPPOTrainer

__all__ = ["LenVMGRPOConfig", "LenVMGRPOTrainer", "LenVMPPOConfig", "LenVMPPOTrainer", "TaskCritic", "TaskCriticConfig"]
