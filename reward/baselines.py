"""Length penalties ready for `reward_funcs`, as `reward.baselines.gsm8k_gr3`; `reward.length_penalties` explains them.

Their knobs are the papers' where there are any, and otherwise fit a `max_completion_length` of 512 tokens for GSM8K and
4096 for mathematics (`reward.mathematics`), with targets of a quarter of that. For the sandbox they fit what its base
policy writes, 12 tokens in the mean and 48 at the 99th percentile. With other knobs, make one in a module of your own.

Stateful ones (`leash`, `laser_d`) need the callback [`reward.checkpointing.RewardStates`] to resume; the trainers of
`lenvm_rl` add it themselves.
"""

from trl.rewards import get_cosine_scaled_reward, get_soft_overlong_punishment

# These two are in reward/gsm8k.py, and can be had from here, too.
from reward.gsm8k import gsm8k_kimi as gsm8k_kimi
from reward.gsm8k import gsm8k_linear as gsm8k_linear
from reward.gsm8k import gsm8k_reward
from reward.length_penalties import (
    ALPLengthReward,
    AroraLengthReward,
    CosineLengthReward,
    GR3LengthReward,
    KimiLengthReward,
    L1ExactLengthReward,
    L1MaxLengthReward,
    LaserLengthReward,
    LinearLengthReward,
    ShorterBetterLengthReward,
    SoftOverlongLengthReward,
    TruncationLengthReward,
)
from reward.mathematics import math_reward
from reward.sandbox import sandbox_reward
from reward.stateful_penalties import LaserDLengthReward, LeashLengthReward

# TRL's own, in which all answers pay. The cosine grades mathematics itself: it needs conversations, and the gold
# answers in the column `solution`.
trl_soft_overlong_512 = get_soft_overlong_punishment(512, 128)
trl_soft_overlong_4096 = get_soft_overlong_punishment(4096, 1024)
trl_math_cosine_4096 = get_cosine_scaled_reward(4096)

# GSM8K.
gsm8k_truncation = TruncationLengthReward(gsm8k_reward, limit=128)
gsm8k_soft_overlong = SoftOverlongLengthReward(gsm8k_reward, max_length=512, cache=128)
gsm8k_cosine = CosineLengthReward(gsm8k_reward, max_length=512)
gsm8k_arora = AroraLengthReward(gsm8k_reward)
gsm8k_alp = ALPLengthReward(gsm8k_reward)
gsm8k_l1_exact = L1ExactLengthReward(gsm8k_reward)
gsm8k_l1_max = L1MaxLengthReward(gsm8k_reward)
gsm8k_laser = LaserLengthReward(gsm8k_reward, target_length=128)
gsm8k_laser_d = LaserDLengthReward(gsm8k_reward, candidates=range(64, 513, 64))
gsm8k_shorter_better = ShorterBetterLengthReward(gsm8k_reward)
gsm8k_gr3 = GR3LengthReward(gsm8k_reward)
gsm8k_leash = LeashLengthReward(gsm8k_reward, target_length=128)

# Mathematics.
math_linear = LinearLengthReward(math_reward, alpha=0.4, max_length=4096)
math_kimi = KimiLengthReward(math_reward)
math_truncation = TruncationLengthReward(math_reward, limit=1024)
math_soft_overlong = SoftOverlongLengthReward(math_reward, max_length=4096, cache=1024)
math_cosine = CosineLengthReward(math_reward, max_length=4096)
math_arora = AroraLengthReward(math_reward)
math_alp = ALPLengthReward(math_reward)
math_l1_exact = L1ExactLengthReward(math_reward)
math_l1_max = L1MaxLengthReward(math_reward)
math_laser = LaserLengthReward(math_reward, target_length=1024)
math_laser_d = LaserDLengthReward(math_reward, candidates=range(512, 4097, 512))
math_shorter_better = ShorterBetterLengthReward(math_reward)
math_gr3 = GR3LengthReward(math_reward)
math_leash = LeashLengthReward(math_reward, target_length=1024)

# The sandbox. Prices per token are higher than the papers': its completions have tens of tokens, not thousands.
sandbox_linear = LinearLengthReward(sandbox_reward, alpha=0.4, max_length=48)
sandbox_kimi = KimiLengthReward(sandbox_reward)
sandbox_truncation = TruncationLengthReward(sandbox_reward, limit=24)
sandbox_soft_overlong = SoftOverlongLengthReward(sandbox_reward, max_length=48, cache=36)
sandbox_cosine = CosineLengthReward(sandbox_reward, max_length=48)
sandbox_arora = AroraLengthReward(sandbox_reward)
sandbox_alp = ALPLengthReward(sandbox_reward, beta=5e-3)
sandbox_l1_exact = L1ExactLengthReward(sandbox_reward, target_length=12, alpha=1e-2)
sandbox_l1_max = L1MaxLengthReward(sandbox_reward, target_length=12, alpha=1e-2)
sandbox_laser = LaserLengthReward(sandbox_reward, target_length=12)
sandbox_laser_d = LaserDLengthReward(sandbox_reward, candidates=range(4, 129, 4))
sandbox_shorter_better = ShorterBetterLengthReward(sandbox_reward, beta=2e-2)
sandbox_gr3 = GR3LengthReward(sandbox_reward)
sandbox_leash = LeashLengthReward(sandbox_reward, target_length=10)
