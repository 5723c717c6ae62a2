"""Length-guided decoding: a frozen length value model leans a policy's next token towards a length."""

from lenvm_rl.decoding.generation import generate_guided, mean_length_at
from lenvm_rl.decoding.guidance import LengthGuidance
from lenvm_rl.decoding.processor import LengthGuidedLogitsProcessor
from lenvm_rl.decoding.report import GuidanceReport

__all__ = ["GuidanceReport", "LengthGuidance", "LengthGuidedLogitsProcessor", "generate_guided", "mean_length_at"]
