"""The numbers that steer the load schedule.

What each is worth: benchmarks/ablate_schedule.py, where the effect of half and of twice the value is in brackets."""

# -- What steps cost --------------------------------------------------------------------------------------------------

HALF_LIFE = 100
NOISE = 0.05
MOST_SURPRISED = 3.0
PACE_SHARE = 0.5

# -- What drafts are worth --------------------------------------------------------------------------------------------

PRIOR = 4.0
PRIOR_ACCEPTANCE = 0.7
POOL_HALF_LIFE = 512.0
ROW_DECAY = 0.5 ** (1 / 8)
LAST_ROUND = 0.5

# -- How often is planned ---------------------------------------------------------------------------------------------

PLAN_LASTS = 16
MOST_PROBE_INTERVAL = 256
