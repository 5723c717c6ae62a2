"""Two processes of a script (gloo) under an engine that shards, with the settings that its config makes of a launch."""

import os
from importlib.util import find_spec

import launched
import pytest

# What `accelerate launch` sets for recipes/accelerate_configs/fsdp2.yaml.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
# Likewise for recipes/accelerate_configs/deepspeed_zero2.yaml, and for stage 3.
DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}


def run_two(script, *arguments, engine, timeout=300):
    """Run a script, which calls [`start`], in two processes; a test without the engine's package is skipped."""
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install deepspeed")
    launched.run_two(script, engine, *arguments, timeout=timeout)


def start(engine):
    """Set a process up for `"ddp"`, `"fsdp2"`, `"zero2"` or `"zero3"`, before anything else is imported."""
    if engine.startswith("zero"):
        os.environ.update(DEEPSPEED, ACCELERATE_DEEPSPEED_ZERO_STAGE=engine[-1])
        import transformers.training_args

        # accelerate takes DeepSpeed with `use_cpu=False` alone, and transformers then asks a GPU for bfloat16.
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    elif engine == "fsdp2":
        os.environ.update(FSDP2)
        _shard_on_processors()


def _shard_on_processors():
    # accelerate runs FSDP on accelerators only, and leaves it out on a CPU without a word.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    make_state = PartialState.__init__

    def on_processors(self, *arguments, **options):
        make_state(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = on_processors


def is_cut(weight):
    """Whether a process has a part of a weight only."""
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")


def whole(weight):
    """A weight, put together from its parts; all processes ask for it at once."""
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()
