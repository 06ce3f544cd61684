"""The costs of rounds that the tests use instead of measured costs."""

from mlx_mtp.decoding.draft_length import CostCurve, Costs

# Relative costs of rounds on a machine where drafting pays.
CURVE = CostCurve([1, 1.1, 1.3, 1.5, 1.75, 2.06, 2.3, 2.6, 2.8], 0.05, 0.02)
# The same costs for rounds that wait. Rounds ahead cost a little less.
COSTS = Costs(CURVE, CURVE._replace(verify=[0.99 * cost for cost in CURVE.verify]))
# Without a drafter.
PLAIN = Costs(CURVE._replace(verify=[1]))
# Rounds that copy.
COPIED = tuple(1 + 0.1 * k for k in range(32))
