"""Both trainers with everything cut up over two processes (FSDP2, DeepSpeed): the numbers are those of whole models."""

import json
from itertools import product
from types import SimpleNamespace

import pytest
from engines import run_two
from places import PATHS
from trainer_parts import grpo, random_lenvm

from lenvm_rl.trainers.sharding import check_engine, check_shards

SCRIPT = """
import json, os, shutil, sys
sys.path[:0] = {paths!r}
engine, folder = sys.argv[1:]
sharded, zero = engine != "ddp", engine.startswith("zero")
from engines import is_cut, start, whole
start(engine)

import pytest
import torch

from trainer_parts import counts_of_w8, grpo, ppo, random_lenvm

from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.modeling.length_value_model import LengthValueModel

# What the run's is compared with, in each precision of the decoder; ZeRO-3 would cut up what is made later.
before = random_lenvm().state_dict()
alone = {{name: LengthValueModel.from_pretrained(folder + "/lenvm", dtype=name) for name in ("float32", "bfloat16")}}

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
            run_two(script, folder, engine=engine)
        return json.loads(results.read_text())

    return launched


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_shards_give_the_numbers_of_whole_models(launch, engine):
    ours, theirs = launch(engine), launch("ddp")
    for name in ("grpo", "ppo"):
        for sharded, whole in zip(ours[name], theirs[name], strict=True):
            assert len(sharded) == 2 and sharded == pytest.approx(whole, abs=1e-5)
    # A resumed run goes on as the unbroken one.
    for resumed, unbroken in zip(ours["resumed"], ours["grpo"], strict=True):
        assert resumed == pytest.approx(unbroken, abs=1e-5)


def test_a_checkpoint_goes_on_under_the_engine_that_wrote_it():
    def launched(fsdp=None, zero=None):
        plugins = dict(
            fsdp_plugin=SimpleNamespace(fsdp_version=fsdp), deepspeed_plugin=SimpleNamespace(zero_stage=zero)
        )
        accelerator = SimpleNamespace(state=SimpleNamespace(**plugins))
        return SimpleNamespace(accelerator=accelerator, is_fsdp_enabled=bool(fsdp), is_deepspeed_enabled=bool(zero))

    runs = {
        "none": launched(),
        "FSDP2": launched(fsdp=2),
        "DeepSpeed ZeRO-2": launched(zero=2),
        "DeepSpeed ZeRO-3": launched(zero=3),
    }
    for (wrote, _), (engine, run) in product(runs.items(), repeat=2):
        if wrote == engine:
            check_engine(wrote, "run/checkpoint-1", run)
            # Of a checkpoint from before engines were written down.
            check_engine(None, "run/checkpoint-1", run)
        else:
            with pytest.raises(ValueError, match="run/checkpoint-1"):
                check_engine(wrote, "run/checkpoint-1", run)


@pytest.mark.parametrize(("engine", "variable"), [("FSDP", "FSDP"), ("DeepSpeed", "DEEPSPEED")])
def test_an_engine_that_accelerate_leaves_out_without_a_word_is_an_error(tmp_path, monkeypatch, engine, variable):
    trainer = grpo(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(ValueError, match=f"launched with a config for {engine}.*launch with torchrun for DDP"):
        check_shards(trainer)
