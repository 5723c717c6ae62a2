"""The callback that keeps the state of reward functions in checkpoints, for trainers of TRL: ours add it themselves."""

from lenvm_rl.trainers.rewards import FILE_NAME as FILE_NAME
from lenvm_rl.trainers.rewards import RewardStates as RewardStates
