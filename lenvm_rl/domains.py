"""Metrics of an evaluation by domain: which prompt is of which, and how they are named."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor

logger = logging.getLogger(__name__)

# Before the name of a metric that is of one domain only.
DOMAIN_PREFIX = "domain/"


def domains_of_prompts(rollouts: Dataset, column: str) -> dict[int, str]:
    """The domain of each prompt, by its group.

    Raises:
        ValueError: if there is no such column, or completions of one prompt are of different domains.
    """
    if column not in rollouts.column_names:
        raise ValueError(f"domain_column={column!r} is no column of the rollouts: they have {rollouts.column_names}.")
    domains: dict[int, str] = {}
    for group, domain in zip(rollouts["group"][:], rollouts[column][:], strict=True):
        if domains.setdefault(group, str(domain)) != str(domain):
            raise ValueError(f"the completions of group {group} are of different domains: a prompt has one.")
    return domains


def metrics_for_card(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """The metrics of an evaluation as the model's config keeps them: of all held-out prompts, and of each domain."""
    kept: dict[str, dict[str, float]] = {"held-out prompts": {}}
    for name, value in metrics.items():
        if not (isinstance(value, float) and math.isfinite(value)):
            continue
        prefix = f"eval_{DOMAIN_PREFIX}"
        if name.startswith(prefix):
            domain, _, name = name.removeprefix(prefix).rpartition("/")
            kept.setdefault(domain, {})[name] = value
        else:
            kept["held-out prompts"][name.removeprefix("eval_")] = value
    return kept


def domain_metrics(
    metrics_of: Callable[[Tensor, Tensor], dict[str, float]],
    statistics: Tensor,
    labels: Tensor,
    domain_of: dict[int, str],
) -> dict[str, float]:
    """The metrics of each domain, named `domain/<domain>/<metric>`.

    Args:
        metrics_of (callable): metrics of statistics and labels.
        statistics (`torch.Tensor` of shape `(N, …)`), labels (`torch.Tensor` of shape `(N, 4)`): of each completion;
            labels are its tokens, whether it ended, its group, and the tokens of its prompt.
        domain_of (`dict[int, str]`): the domain of each group; none for no domains.
    """
    found = {}
    for domain in sorted(set(domain_of.values())):
        own = torch.tensor([domain_of[group] == domain for group in labels[:, 2].tolist()])
        if not bool((own & (labels[:, 1] != 0)).any()):
            logger.warning("domain %s: none of its completions ended, so it has no metrics", domain)
            continue
        metrics = metrics_of(statistics[own], labels[own])
        found.update({f"{DOMAIN_PREFIX}{domain}/{name}": value for name, value in metrics.items()})
    return found
