"""Value models that share their decoder, in a run whose weights are cut up: the numbers are those of DDP."""

import json
from itertools import product

import pytest
from engines import run_two
from places import PATHS
from test_trainers_forms import base_policy, lenvm_on, saved_policy
from trainer_parts import grpo

from lenvm_rl.trainers.sharding import check_engine

SCRIPT = """
import json, os, shutil, sys
sys.path[:0] = {paths!r}
engine, folder, *cases = sys.argv[1:]
from engines import is_cut, start, whole
start(engine)

import torch
from functools import partial

from peft import LoraConfig
from test_trainers_forms import LORA, base_policy
from trainer_parts import counts_of_w8, grpo

from lenvm_rl.modeling.completions import completion_logits
from lenvm_rl.modeling.length_value_model import LengthValueModel
from lenvm_rl.trainers import LenVMGRPOTrainer

cut = engine in ("fsdp2", "zero3")
apart = {{form: LengthValueModel.from_pretrained(f"{{folder}}/lenvm_{{form}}", base=base_policy())
         for form in ("adapter", "head")}}

def check_values(model, form):
    ids = torch.arange(6, 14).reshape(2, 4) + int(os.environ["RANK"])
    batch = (ids, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), ids.flip(1), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    with torch.no_grad():
        ours, expected = (completion_logits(each, *batch, chunk_size=1) for each in (model, apart[form]))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert float(expected.std()) > 0.05

def run(case, resume=None, **changes):
    form, base, beta = case.split()
    if base == "adapters":
        torch.manual_seed(2)
        changes["trainer"] = partial(LenVMGRPOTrainer, peft_config=LoraConfig(**LORA, init_lora_weights=False))
    common = dict(per_device_train_batch_size=4, num_generations=8, length_coef=0.5, max_steps=2, shaping_coef=0.5,
                  length_gate="all", ddp_backend="gloo", save_strategy="steps", save_steps=1, beta=float(beta),
                  use_cpu=not engine.startswith("zero"))
    trainer = grpo(f"{{folder}}/{{engine}}/{{case}}", counts_of_w8, f"{{folder}}/lenvm_{{form}}",
                   policy=folder + "/policy", **{{**common, **changes}})
    trainer.train(resume_from_checkpoint=resume)
    reads = form == "head" and trainer.beta > 0
    assert (trainer._frozen._reference is not None) == reads
    for name, weight in trainer.length_value_model.state_dict().items():
        assert not is_cut(weight) and torch.equal(weight, apart[form].state_dict()[name]), name
    assert all(is_cut(weight) == cut for weight in trainer.model.parameters())
    if not trainer.args.bf16:
        check_values(trainer.length_value_model, form)
    log = [[entry[key] for entry in trainer.state.log_history if key in entry]
           for key in ("loss", "lenvm/value_mean", "advantage/length_std", "grad_norm", "kl")]
    return log, [whole(weight).flatten().tolist() for weight in trainer.model.parameters() if weight.requires_grad]

results = {{case: run(case) for case in cases}}
last = cases[-1]
if len(cases) > 1:
    # The precision that TRL trains in by default.
    run(last, bf16=True, output_dir=f"{{folder}}/{{engine}}/half")
    results["resumed"] = run(last, resume=f"{{folder}}/{{engine}}/{{last}}/checkpoint-1")
if torch.distributed.get_rank() == 0:
    with open(f"{{folder}}/{{engine}}/{{len(cases)}}.json", "w") as file:
        json.dump(results, file)
"""
CASES = [f"{form} adapters {beta}" for form, beta in product(("head", "adapter"), (0, 0.1))]
CASES += ["adapter reference 0.1", "head reference 0.1"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(engine, *cases)` gives what two processes of the script logged under that engine, case by case."""
    folder = tmp_path_factory.mktemp("bases")
    saved_policy(folder / "policy")
    for form in ("adapter", "head"):
        lenvm_on(base_policy(), form).save_pretrained(folder / f"lenvm_{form}")
    script = folder / "two.py"
    script.write_text(SCRIPT.format(paths=PATHS))

    def launched(engine, *cases):
        results = folder / engine / f"{len(cases)}.json"
        if not results.exists():
            run_two(script, folder, *cases, engine=engine)
        return json.loads(results.read_text())

    launched.folder = folder
    return launched


def close(ours, theirs):
    """Whether two runs logged the same, and ended with the same weights, to 1e-5."""
    for pair in zip(ours, theirs, strict=True):
        for mine, other in zip(*pair, strict=True):
            assert mine == pytest.approx(other, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_a_shared_base_in_shards_gives_the_numbers_of_whole_ones(launch, engine):
    ours, theirs = launch(engine, *CASES), launch("ddp", *CASES)
    for case in CASES:
        close(ours[case], theirs[case])
        assert len(ours[case][0][0]) == 2
    # A resumed run goes on as the unbroken one.
    close(ours["resumed"], ours[CASES[-1]])


@pytest.mark.slow
def test_a_base_in_shards_has_the_values_of_a_whole_one(tmp_path, launch):
    launch("fsdp2", "head adapters 0")
    checkpoint = launch.folder / "fsdp2" / "head adapters 0" / "checkpoint-1"
    with pytest.raises(ValueError, match="was written under FSDP2, and this run goes on without shards"):
        check_engine(
            json.loads((checkpoint / "lenvm_state_rank0.json").read_text())["engine"], str(checkpoint), grpo(tmp_path)
        )
