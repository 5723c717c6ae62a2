"""The callback that the PPO trainer adds by itself: the gradients of the critic."""

from transformers import TrainerCallback


class CriticGradientReset(TrainerCallback):
    """Clears the critic's gradients after each step: `Trainer` clears only those of the model it knows.

    Args:
        critic (`torch.nn.Module`): the task critic, as it is trained.
    """

    def __init__(self, critic):
        self.critic = critic

    def on_step_end(self, args, state, control, **kwargs):
        self.critic.zero_grad()
