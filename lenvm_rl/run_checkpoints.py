"""Which checkpoints of a run were written to their end: a run may have died while it wrote the last one."""

import json
import logging
import os
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end, which is its trainer state."""
    path = Path(checkpoint, TRAINER_STATE_NAME)
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints in a run's folder, which need not be there: those of the most steps first."""
    found = ((re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in Path(folder).glob("*"))
    steps = [(int(match[1]), path) for match, path in found if match]
    return [path for _, path in sorted(steps, reverse=True)]


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The checkpoint of the most steps in a run's folder that was written to its end, or `None`.

    Args:
        folder (`str` or path): `output_dir` of the run; it need not be there.
    """
    for checkpoint in checkpoints_in(folder):
        if is_complete(checkpoint):
            return str(checkpoint)
        logger.warning("'%s' is passed over: the run died while it was written", checkpoint)
    return None
