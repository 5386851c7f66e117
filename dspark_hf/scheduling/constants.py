"""The numbers that steer the load schedule, beside the guess that `CostModel` begins with.

In brackets: tokens a second with half and with twice the value, as a share of those with the value itself, geometric
mean over simulated machines, heads and batches (benchmarks/ablate_schedule.py, 200 rounds from nothing). None is fitted
to a machine: they are round numbers, and the schedule comes to 0.98 of the best length known in hindsight with all but
one of them halved or doubled.
"""

# -- What steps cost ------------------------------------------------------------------------------------------------

# Rounds after which half of what they said about a direction is forgotten, once newer ones say something about it
# [1.000, 1.000].
HALF_LIFE = 100
# How far the seconds of a round are from what rounds like it take, as a share of them [1.000, 0.998].
NOISE = 0.05
# A surprise counts up to so many standard deviations: a round that something interrupted says nothing about the next
# [1.000, 0.999].
MOST_SURPRISED = 3.0
# A device that slows down is slower everywhere: what share of a surprise is taken for that. High, as pace changes no
# decision, and what is mistaken for a difference between lengths does [0.999, 0.999].
PACE_SHARE = 0.5

# -- What drafts are worth --------------------------------------------------------------------------------------------

# Drafts of evidence that the confidence is right as it is, before verification is believed over it [1.000, 1.001].
PRIOR = 4.0
# Share of drafts accepted of a head of which nothing is known; published heads reach 0.6 to 0.9 [1.001, 0.988; its root
# and its square].
PRIOR_ACCEPTANCE = 0.7
# Evidence fades: half of it is forgotten after so many tested drafts of all rows [1.000, 1.000].
POOL_HALF_LIFE = 512.0
# The same of a row, a round: half in eight of them [1.000, 1.000; its root and its square].
ROW_DECAY = 0.5 ** (1 / 8)
# What share the last round has in what is expected of a row's next drafts [0.998, 0.999].
LAST_ROUND = 0.5

# -- How often is planned ---------------------------------------------------------------------------------------------

# Rounds that a plan is used for, at most: one, and twice as many each time that it is found right again [1.000, 1.000].
PLAN_LASTS = 16
# Rounds without drafts before they are tried again, at most: one, and twice as many each time that they fail
# [1.000, 1.000].
MOST_PROBE_INTERVAL = 256
