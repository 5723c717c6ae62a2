"""Made-up rollouts of ragged lengths, for tests that need no policy. Ids 6 to 63 are words, 1 ends a completion."""

import torch

EOS = 1


def make_rollout(prompt, completion, reason="stop", group=0, **extra):
    return {
        "prompt": "",
        "prompt_ids": list(prompt),
        "completion_ids": list(completion),
        "finish_reason": reason,
        "group": group,
        **extra,
    }


def random_rollouts(count, seed=0, longest=12, cut_share=0.3):
    """Ragged rollouts over ids 6..63, some of them cut."""
    draw = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(6, 64, (length,), generator=draw).tolist()

    rollouts = []
    for index in range(count):
        prompt = ids(int(torch.randint(1, 7, (), generator=draw)))
        completion = ids(int(torch.randint(1, longest, (), generator=draw)))
        cut = bool(torch.rand((), generator=draw) < cut_share)
        rollouts.append(
            make_rollout(prompt, completion if cut else [*completion, EOS], "length" if cut else "stop", index // 2)
        )
    return rollouts
