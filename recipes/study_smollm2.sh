#!/usr/bin/env bash
# Everything that a length value model is good for, on SmolLM2-135M-Instruct.
#
#     bash recipes/study_smollm2.sh              all stages, one after the other
#     bash recipes/study_smollm2.sh rl lens      some of them
#
# A stage that is done is left out, and an interrupted one goes on where it was. Needs the environments of `make test`
# and `make test-vllm`. Beside each stage stands about how long it takes on two cores.
set -euo pipefail

MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
# Published files: ifeval/, mt_bench/, self_instruct/, gsm8k/, lifebench/
DATA=${DATA:-data}
OUT=${OUT:-outputs/smollm2}
SEEDS=${SEEDS:-0}
STEPS=${STEPS:-40}

LENVM=$OUT/lenvm
# Ends the names of the folders of trained policies: with nothing, or with _cap.
CAP=
TRAIN=$OUT/arithmetic/train.jsonl
TEST=$OUT/arithmetic/test.jsonl
PYTHON=${PYTHON:-.venv/bin/python}
VLLM=${VLLM:-.venv-vllm/bin/python}
export PYTHONPATH=. TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=2 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}

# A stage runs its commands until they have all succeeded once; those that train and what follows, for these seeds.
stage() {
    local name=$1 mark=$OUT/done/$1
    case $name in rl | trained | curves | cap) mark+=" seeds $SEEDS steps $STEPS" ;; esac
    mkdir -p "$OUT/done"
    if [ -e "$mark" ]; then echo "== $name: done before"; return; fi
    echo "== $name"
    "stage_$name"
    touch "$mark"
}

stage_fetch() { # 1 minute
    [ -e "$MODEL/config.json" ] || "$PYTHON" recipes/fetch_smollm2.py
}

stage_prompts() { # seconds
    "$PYTHON" recipes/instruction_prompts.py --data_dir "$DATA" --output "$OUT/prompts.jsonl" \
        --domains ifeval=60 mt_bench=60 self_instruct=200 seed_tasks=150 gsm8k=150
    "$PYTHON" recipes/arithmetic_questions.py --output_dir "$OUT/arithmetic"
}

stage_rollouts() { # 70 minutes on one core: about 1000 tokens in 4 seconds
    "$VLLM" recipes/sample_rollouts.py --model_name_or_path "$MODEL" --backend vllm --chat true \
        --dataset_name "$OUT/prompts.jsonl" --keep_columns domain --num_samples 6 --max_new_tokens 512 \
        --temperature 0.7 --batch_size 1024 --output "$OUT/rollouts_text.jsonl" \
        --engine_arguments '{"dtype": "bfloat16", "max_model_len": 1536, "max_num_seqs": 128}'
    "$VLLM" recipes/sample_rollouts.py --model_name_or_path "$MODEL" --backend vllm --chat true \
        --dataset_name "$TRAIN" --limit 160 --prompt_column question --keep_columns domain --num_samples 8 \
        --max_new_tokens 512 --temperature 0.7 --batch_size 1024 --output "$OUT/rollouts_arithmetic.jsonl" \
        --engine_arguments '{"dtype": "bfloat16", "max_model_len": 1536, "max_num_seqs": 128}'
}

# A head on five layers of the frozen policy.
fit_head() { # OUTPUT_DIR EPOCHS ROLLOUTS...
    "$PYTHON" recipes/pretrain_lenvm.py --rollouts "${@:3}" --model_name_or_path "$MODEL" --form head \
        --layers 10 15 20 25 30 --frozen_dtype bfloat16 --truncated drop --learning_rate 1e-3 --weight_decay 0.1 \
        --num_train_epochs "$2" --per_device_train_batch_size 16 --per_device_eval_batch_size 2 --eval_share 0.1 \
        --domain_column domain --use_cpu true --save_strategy epoch --resume true --report_to none --output_dir "$1"
}

stage_lenvm() { # 40 minutes on one core for the states of the frozen decoder, then a minute for each pass
    fit_head "$LENVM" 2 "$OUT/rollouts_text.jsonl" "$OUT/rollouts_arithmetic.jsonl"
}

# What a head loses against an adapter, on the first three completions of each prompt that ended. Not among the stages
# that run by default.
stage_forms() { # 70 minutes on one core
    "$PYTHON" - "$OUT" "$LENVM" <<'EOF'
import sys
from collections import Counter

from lenvm_rl.rollouts.record import read_rollout_files, read_rollouts, write_rollouts

out, lenvm = sys.argv[1:]
rollouts, metadata = read_rollout_files([f"{out}/rollouts_text.jsonl", f"{out}/rollouts_arithmetic.jsonl"])
held_out = set(map(tuple, read_rollouts(f"{lenvm}/held_out.jsonl")[0]["prompt_ids"][:]))
seen, rows = Counter(), []
for row, (ids, reason) in enumerate(zip(rollouts["prompt_ids"][:], rollouts["finish_reason"][:])):
    if reason == "stop" and tuple(ids) not in held_out:
        seen[tuple(ids)] += 1
        rows += [row] if seen[tuple(ids)] <= 3 else []
write_rollouts(f"{out}/three_each.jsonl", rollouts.select(rows), metadata)
EOF
    local options=(--rollouts "$OUT/three_each.jsonl" --eval_rollouts "$LENVM/held_out.jsonl" --truncated drop
        --model_name_or_path "$MODEL" --frozen_dtype bfloat16 --gamma "$("$PYTHON" -c "
import json, sys
print(json.load(open(sys.argv[1] + '/config.json'))['gamma'])" "$LENVM")" --weight_decay 0.1 --domain_column domain
        --use_cpu true --report_to none --resume true --save_total_limit 2)
    "$PYTHON" recipes/pretrain_lenvm.py "${options[@]}" --form head --layers 10 15 20 25 30 --learning_rate 1e-3 \
        --num_train_epochs 2 --per_device_train_batch_size 16 --per_device_eval_batch_size 2 --save_strategy epoch \
        --output_dir "$OUT/lenvm_head"
    "$PYTHON" recipes/pretrain_lenvm.py "${options[@]}" --form adapter --bf16 true --learning_rate 5e-4 \
        --warmup_steps 10 --num_train_epochs 1 --per_device_train_batch_size 8 --per_device_eval_batch_size 4 \
        --save_strategy steps --save_steps 60 --output_dir "$OUT/lenvm_adapter"
}

stage_prediction() { # 5 minutes on one core
    "$PYTHON" -m eval.length_prediction --rollouts "$LENVM/held_out.jsonl" --length_value_model "$LENVM" \
        --base "$MODEL" --value_dtype bfloat16 --forward_tokens 4096 --domain_column domain \
        --output_dir "$OUT/length_prediction"
}

lengths() { # OUTPUT_DIR OPTION...
    local output_dir=$1
    shift
    "$VLLM" -m eval.length_control --policy "$MODEL" --length_value_model "$LENVM" --backend vllm --dtype bfloat16 \
        --value_dtype bfloat16 --dataset_name "$DATA/lifebench/data_lite_no_summary.jsonl" --rule patient \
        --temperature 0.7 --min_p 0.05 --engine_arguments '{"enforce_eager": true}' --output_dir "$output_dir" "$@"
}

stage_control() { # 70 minutes on one core
    local arms=(--arms base prompt guided)
    lengths "$OUT/length_control" --targets 64 128 --modes equal_to at_most "${arms[@]}"
    lengths "$OUT/length_control_least" --targets 64 128 --modes at_least "${arms[@]}"
    lengths "$OUT/length_control_both" --targets 64 128 --modes equal_to --arms guided+prompt
    lengths "$OUT/length_control_32" --targets 32 --modes equal_to at_most "${arms[@]}"
}

# Sums, tilted and cut, of a policy; all policies alike.
tradeoff() { # POLICY OUTPUT_DIR OPTION...
    local policy=$1 output_dir=$2
    shift 2
    "$VLLM" -m eval.tradeoff --policy "$policy" --base "$MODEL" --length_value_model "$LENVM" --task gsm8k \
        --dataset_name "$TEST" --chat true --backend vllm --dtype bfloat16 --value_dtype bfloat16 --temperature 0.7 \
        --top_k 15 --min_p 0.05 --num_prompts 96 --num_samples 2 --budget_quantiles 0.5 --best_of 2 \
        --max_new_tokens 256 --batch_size 96 --engine_arguments '{"enforce_eager": true}' --output_dir "$output_dir" "$@"
}

stage_tradeoff() { # 10 minutes on one core
    tradeoff "$MODEL" "$OUT/tradeoff" --strengths 0.5 1 2
}

# The task's reward alone and the length stream, by GRPO and by PPO, and two penalties.
REFRESH=(--refresh_steps 10 --refresh_completions 320 --refresh_learning_rate 1e-3)
POLICIES="task lenvm lenvm_strong task_ppo lenvm_ppo lenvm_ppo_strong kimi arora"
train() { # NAME RECIPE OPTION...
    local name=$1 recipe=$2
    shift 2
    # On a CPU glibc hands every large block back to the system, which took over a quarter of a step's time.
    for seed in $SEEDS; do
        MALLOC_MMAP_THRESHOLD_=67108864 MALLOC_TRIM_THRESHOLD_=1073741824 \
            "$VLLM" "recipes/$recipe.py" --config recipes/configs/smollm2_arithmetic.yaml \
            --model_name_or_path "$MODEL" --dataset_name "$TRAIN" --length_value_model "$LENVM" --max_steps "$STEPS" \
            --seed "$seed" --output_dir "$OUT/rl$CAP/seed_$seed" --trained_name "$name" "$@"
    done
}

stage_rl() { # 25 to 35 minutes on one core for each of these, and 8 GB
    local critic=(--critic_form head --critic_learning_rate 1e-3)
    train task grpo_shaped --length_coef 0
    train lenvm grpo_shaped --length_coef 4 "${REFRESH[@]}"
    train lenvm_strong grpo_shaped --length_coef 8 "${REFRESH[@]}"
    train task_ppo ppo_shaped --length_coef 0 "${critic[@]}"
    train lenvm_ppo ppo_shaped --length_coef 4 "${critic[@]}" "${REFRESH[@]}"
    train lenvm_ppo_strong ppo_shaped --length_coef 8 "${critic[@]}" "${REFRESH[@]}"
    train kimi grpo_shaped --length_coef 0 --reward_funcs reward.gsm8k.gsm8k_reward reward.baselines.gsm8k_kimi
    train arora grpo_shaped --length_coef 0 --reward_funcs reward.baselines.gsm8k_arora
}

stage_trained() { # 5 minutes on one core for each policy
    for seed in $SEEDS; do
        for name in $POLICIES; do
            tradeoff "$OUT/rl$CAP/seed_$seed/$name" "$OUT/trained$CAP/seed_$seed/$name" --strengths 1 --prompt_only false
        done
    done
}

stage_curves() { # seconds
    local runs=()
    for name in $POLICIES; do
        for seed in $SEEDS; do runs+=("$name=$OUT/rl$CAP/seed_$seed/$name"); done
    done
    "$PYTHON" -m eval.curves --runs "${runs[@]}" --output_dir "$OUT/curves$CAP"
}

# The task's reward alone and the length stream where a cap of 256 tokens cuts next to nothing, with a length value model
# of the sums alone. These two are not among the stages that run by default.
stage_sums() { # 9 minutes on one core
    fit_head "$OUT/lenvm_sums" 4 "$OUT/rollouts_arithmetic.jsonl"
}

stage_cap() { # 40 to 50 minutes on one core for each policy, and 9 GB
    local CAP=_cap LENVM=$OUT/lenvm_sums POLICIES="task lenvm"
    local longer=(--max_completion_length 256 --vllm_max_model_length 352 --per_device_train_batch_size 8
        --gradient_accumulation_steps 4)
    train task grpo_shaped --length_coef 0 "${longer[@]}"
    train lenvm grpo_shaped --length_coef 4 "${longer[@]}" "${REFRESH[@]}"
    stage_trained
    stage_curves
}

stage_queue() { # 10 minutes on one core
    "$VLLM" -m eval.speed queue --model "$MODEL" --length_value_model "$LENVM" --dtype bfloat16 \
        --dataset_name "$LENVM/held_out.jsonl" --requests 56 --places 8
}

stage_lens() { # 5 minutes on one core
    "$PYTHON" -m eval.length_tokens --rollouts "$LENVM/held_out.jsonl" --length_value_model "$LENVM" --base "$MODEL" \
        --value_dtype bfloat16 --forward_tokens 4096 --min_prompts 10 --output_dir "$OUT/length_tokens"
    "$PYTHON" -m eval.viewer --rollouts "$LENVM/held_out.jsonl" --length_value_model "$LENVM" --base "$MODEL" \
        --value_dtype bfloat16 --rows 0 5 --output "$OUT/viewer.html"
}

for name in "${@:-fetch prompts rollouts lenvm prediction control tradeoff rl trained curves queue lens}"; do
    for each in $name; do stage "$each"; done
done
