"""Value pretraining: a length value model is fitted to rollouts (arXiv 2604.27039, sections 3.3 and 5)."""

from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments
from lenvm_rl.pretraining.batches import LengthValueCollator
from lenvm_rl.pretraining.metrics import length_value_metrics
from lenvm_rl.pretraining.trainer import LengthValueTrainer, pretrain

__all__ = [
    "LengthValueCollator",
    "LengthValueTrainer",
    "LengthValueTrainingArguments",
    "length_value_metrics",
    "pretrain",
]
