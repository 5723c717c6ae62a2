"""Both trainers with everything cut up over two processes (FSDP2, DeepSpeed): the numbers are those of whole models."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from places import PATHS
from trainer_parts import grpo, random_lenvm

from lenvm_rl.trainers.frozen import check_shards

SCRIPT = """
import json, os, shutil, sys
sys.path[:0] = {paths!r}
engine, folder = sys.argv[1:]
sharded, zero = engine != "ddp", engine.startswith("zero")
if engine == "fsdp2":
    # What `accelerate launch` sets for recipes/accelerate_configs/fsdp2.yaml.
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
                      FSDP_RESHARD_AFTER_FORWARD="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true",
                      FSDP_OFFLOAD_PARAMS="false", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
elif zero:
    # Likewise for recipes/accelerate_configs/deepspeed_zero2.yaml, and for stage 3.
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=engine[-1],
                      ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="none",
                      ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="none", ACCELERATE_DEEPSPEED_ZERO3_INIT="true",
                      ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true", ACCELERATE_TORCH_DEVICE="cpu")

import pytest
import torch
import transformers.training_args

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from trainer_parts import counts_of_w8, grpo, ppo, random_lenvm

from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.modeling.length_value_model import LengthValueModel

# What the run's is compared with, in each precision of the decoder; ZeRO-3 would cut up what is made later.
before = random_lenvm().state_dict()
alone = {{name: LengthValueModel.from_pretrained(folder + "/lenvm", dtype=name) for name in ("float32", "bfloat16")}}
make_state = PartialState.__init__

def on_processors(self, *arguments, **options):
    # accelerate runs FSDP on accelerators only, and leaves it out on a CPU without a word.
    make_state(self, *arguments, **options)
    if engine == "fsdp2" and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

if engine == "fsdp2":
    PartialState.__init__ = on_processors
if zero:
    # accelerate takes DeepSpeed with `use_cpu=False` alone, and transformers then asks a GPU for bfloat16.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True

def is_cut(weight):
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")

def whole(weight):
    if hasattr(weight, "ds_id"):
        import deepspeed
        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()

def check_frozen(model, cut):
    # The head is whole and float32 on every process, the decoder is cut, and nothing has moved.
    assert not any(is_cut(weight) or weight.dtype != torch.float32 for weight in model.head.parameters())
    for name, weight in model.named_parameters():
        assert is_cut(weight) == (cut and "backbone" in name), name
        now = whole(weight)
        assert torch.equal(now, before[name.replace(".module.", ".")].to(now.dtype)), name

def check_values(model, precision):
    ids = torch.arange(6, 14).reshape(2, 4) + int(os.environ["RANK"])
    batch = (ids, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), ids.flip(1), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    with torch.no_grad():
        ours, expected = (completion_logits(each, *batch, chunk_size=1) for each in (model, alone[precision]))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert float(expected.std()) > 0.1

def run(make, name, resume=False, **changes):
    common = dict(per_device_train_batch_size=4, num_generations=8, length_coef=0.5, length_gate="all", max_steps=2,
                  shaping_coef=0.5, ddp_backend="gloo", save_strategy="steps", save_steps=1, beta=0.1, use_cpu=not zero)
    trainer = make(f"{{folder}}/{{engine}}/{{name}}", counts_of_w8, folder + "/lenvm", policy=folder + "/policy",
                   **{{**common, **changes}})
    assert (trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled) == (engine == "fsdp2", zero)
    trainer.train(resume_from_checkpoint=resume)
    # Without stage 3, DeepSpeed cuts up gradients and optimizer state only.
    cut = engine in ("fsdp2", "zero3")
    assert all(is_cut(weight) == cut for weight in trainer.model.parameters())
    check_frozen(trainer.accelerator.unwrap_model(trainer.length_value_model), cut)
    if sharded:
        check_values(trainer.length_value_model, "bfloat16" if trainer.args.bf16 else "float32")
    return [[entry[key] for entry in trainer.state.log_history if key in entry]
            for key in ("loss", "lenvm/value_mean", "advantage/length_std", "kl")]

results = dict(grpo=run(grpo, "grpo"), ppo=run(ppo, "ppo", critic="lenvm"))
if sharded:
    # The precision that TRL trains in by default. Values are checked above: completions part from those of DDP.
    run(grpo, "half", bf16=True)
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(f"{{folder}}/{{engine}}/grpo/checkpoint-2")
    torch.distributed.barrier()
    results["resumed"] = run(grpo, "grpo", resume=True)
    with pytest.raises(ValueError, match="does not run under .*: launch with DDP, or use critic='lenvm'"):
        run(ppo, "critic")
if engine == "zero3":
    cut = LengthValueModel.from_pretrained(folder + "/lenvm")
    with pytest.raises(ValueError, match="give the trainer its path"):
        grpo(folder + "/cut", counts_of_w8, cut, policy=folder + "/policy", per_device_train_batch_size=4,
             num_generations=8, ddp_backend="gloo", use_cpu=False)
if torch.distributed.get_rank() == 0:
    with open(f"{{folder}}/{{engine}}.json", "w") as file:
        json.dump(results, file)
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(engine)` gives what two processes of the script logged under that engine."""
    from tiny import tiny_llama, tiny_tokenizer
    from trainer_parts import VOCAB

    folder = tmp_path_factory.mktemp("sharding")
    tiny_llama(VOCAB, seed=1).save_pretrained(folder / "policy")
    tiny_tokenizer(VOCAB).save_pretrained(folder / "policy")
    random_lenvm().save_pretrained(folder / "lenvm")
    script = folder / "two.py"
    script.write_text(SCRIPT.format(paths=PATHS))

    def launched(engine):
        results = folder / f"{engine}.json"
        if not results.exists():
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
            command += [str(script), engine, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(results.read_text())

    return launched


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_shards_give_the_numbers_of_whole_models(launch, engine):
    if engine != "fsdp2" and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install deepspeed")
    ours, theirs = launch(engine), launch("ddp")
    for name in ("grpo", "ppo"):
        for sharded, whole in zip(ours[name], theirs[name], strict=True):
            assert len(sharded) == 2 and sharded == pytest.approx(whole, abs=1e-5)
    # A resumed run goes on as the unbroken one.
    for resumed, unbroken in zip(ours["resumed"], ours["grpo"], strict=True):
        assert resumed == pytest.approx(unbroken, abs=1e-5)


@pytest.mark.parametrize(("engine", "variable"), [("FSDP", "FSDP"), ("DeepSpeed", "DEEPSPEED")])
def test_an_engine_that_accelerate_leaves_out_without_a_word_is_an_error(tmp_path, monkeypatch, engine, variable):
    trainer = grpo(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(ValueError, match=f"launched with a config for {engine}.*launch with torchrun for DDP"):
        check_shards(trainer)
