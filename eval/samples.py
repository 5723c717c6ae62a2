"""Sampled arms of a comparison, kept in files so that none is sampled twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lenvm_rl.files import atomic_file
from lenvm_rl.prediction import weights_fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Sampled completions of an arm, before they are graded.

    Args:
        completions (list of lists of `int`): ids, end-of-sequence kept.
        finished (list of `bool`): whether each ended.
        kl (list of `float`, *optional*): divergence of each from the same policy at strength 0.
    """

    completions: list[list[int]]
    finished: list[bool]
    kl: list[float] | None


class SampleStore:
    """Sampled arms in a folder, a file each, so that an interrupted comparison goes on where it was.

    A file's name is a hash of all that its samples depend on, weights included: another comparison in the same folder
    uses what it shares with this one, and nothing else.

    Args:
        folder (`str` or path): made when the first arm is kept.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._fingerprints: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def get(self, name: str, models: Sequence[nn.Module], depends: Any, sample: Callable[[], Samples]) -> Samples:
        """The samples of an arm, read or else made by `sample` and kept.

        Args:
            name (`str`): of the arm, for the log.
            models (sequence of `nn.Module`): what samples.
            depends (any): what else the samples depend on, as JSON can hold it.
            sample (callable): samples the arm.
        """
        identity = json.dumps([[self._fingerprint(model) for model in models], depends])
        path = self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        if path.is_file():
            logger.info("%s: sampled before, %s", name, path)
            return Samples(**json.loads(path.read_text(encoding="ascii")))
        samples = sample()
        with atomic_file(path) as file:
            file.write(json.dumps(asdict(samples)).encode("ascii"))
        return samples

    def _fingerprint(self, model: nn.Module) -> str:
        if model not in self._fingerprints:
            self._fingerprints[model] = weights_fingerprint(model)
        return self._fingerprints[model]
