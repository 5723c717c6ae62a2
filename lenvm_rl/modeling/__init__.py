"""The length value model: any decoder of transformers with a head that says how much of a completion is to come."""

from lenvm_rl.modeling.length_value_model import LengthValueConfig, LengthValueModel
from lenvm_rl.modeling.released import load_released_checkpoint

__all__ = ["LengthValueConfig", "LengthValueModel", "load_released_checkpoint"]
