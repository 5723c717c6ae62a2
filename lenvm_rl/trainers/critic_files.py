"""The task critic in the checkpoints of a run: written, compared, and read into the critic of a run that goes on."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open

from lenvm_rl.forms import SAME_ARCHITECTURE
from lenvm_rl.trainers.critic import TaskCritic

CRITIC_FOLDER = "critic"
SHOWN = 3


def check_same_critic(checkpoint: str, critic: TaskCritic | None) -> None:
    """Raise unless the critic in a checkpoint is the one that this run has, weights aside.

    Args:
        checkpoint (`str`): a folder.
        critic ([`TaskCritic`], *optional*): of the run, `None` if it has none.

    Raises:
        `FileNotFoundError`: the run has a critic and the checkpoint none.
        `ValueError`: the run has none, or one of another shape; what differs is named.
    """
    folder = Path(checkpoint, CRITIC_FOLDER)
    if critic is None and folder.is_dir():
        raise ValueError(
            f"The checkpoint '{checkpoint}' has a task critic, and this run has none (critic='lenvm'): resume with the "
            "`critic=` that it was written with, or start a new run from its weights (`model=`)."
        )
    if critic is None:
        return
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The checkpoint '{checkpoint}' has no folder '{CRITIC_FOLDER}', so it was not written by LenVMPPOTrainer "
            "with a learned critic: resume from one that was, or start a new run from its weights."
        )
    differences = _differences(folder, critic)
    if differences:
        raise ValueError(
            f"The task critic in '{folder}' is of another shape than this run's: {'; '.join(differences)}. Resume with "
            f"the `critic=` (and critic_init) that it was written with, or start a new run with critic='{folder}'."
        )


def _differences(folder: Path, critic: TaskCritic) -> list[str]:
    there = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    here = critic.config.to_dict()
    found = [
        f"{name} {theirs} there and {ours} here"
        for name in SAME_ARCHITECTURE
        for theirs, ours in [(_of_decoder(each, name) for each in (there, here))]
        if theirs != ours
    ]
    if there.get("head", "mlp") != here["head"]:
        found.append(f"a head of kind '{there.get('head', 'mlp')}' there and '{here['head']}' here")
    adapters = [sorted(each.get("adapters") or {}) for each in (there, here)]
    if adapters[0] != adapters[1]:
        found.append(f"adapters {adapters[0]} there and {adapters[1]} here")
    frozen = {name for name, weight in critic.named_parameters() if not weight.requires_grad}
    moved = sorted(frozen ^ (there.get("frozen") or {}).keys())
    if moved and not found:
        kind = "learn there and not" if moved[0] in frozen else "are frozen there and not"
        found.append(f"{len(moved)} weights, such as {', '.join(moved[:SHOWN])}, {kind} here")
    shapes, ours = _shapes(folder), {name: list(weight.shape) for name, weight in critic.state_dict().items()}
    others = sorted(name for name in shapes if shapes[name] != ours.get(name))
    if others and not found:
        found.append(f"weights of other names or sizes, such as {', '.join(others[:SHOWN])}")
    return found


def _of_decoder(settings: dict, name: str):
    decoder = settings["backbone_config"]
    return decoder.get(name, (decoder.get("text_config") or {}).get(name))


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _shapes(folder: Path) -> dict[str, list[int]]:
    found = {}
    for path in _files(folder):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
def read_critic(checkpoint: str, critic: TaskCritic) -> None:
    """Take up the weights of the critic in a checkpoint, of which [`check_same_critic`] has found it to be the same."""
    weights, read = critic.state_dict(), set()
    for path in _files(Path(checkpoint, CRITIC_FOLDER)):
        with safe_open(path, "pt", device=str(critic.device)) as file:
            for name in file.keys():  # noqa: SIM118
                weights[name].copy_(file.get_tensor(name))
                read.add(weights[name].data_ptr())
    # Names of one tensor are saved once.
    lacking = [name for name, weight in weights.items() if weight.data_ptr() not in read]
    if lacking:
        raise ValueError(
            f"The critic in '{os.path.join(checkpoint, CRITIC_FOLDER)}' lacks weights: {', '.join(lacking[:SHOWN])}."
        )
