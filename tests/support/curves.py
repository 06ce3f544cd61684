"""The costs of rounds that the tests take instead of measured ones."""

from mlx_mtp.decoding.draft_length import CostCurve

# Relative costs of rounds where drafting pays, as on the machines this is made for.
CURVE = CostCurve([1, 1.1, 1.3, 1.5, 1.75, 2.06, 2.3, 2.6, 2.8], 0.05, 0.02)
