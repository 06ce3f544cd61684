"""The costs of rounds that the tests use instead of measured costs."""

from typing import Any

import pytest

from mlx_mtp.decoding import calibration
from mlx_mtp.decoding.calibration import RoundCosts, choosing_policy
from mlx_mtp.decoding.draft_length import CostCurve, Costs, DraftPolicy
from mlx_mtp.decoding.shared_lengths import estimated
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.target import Target

# Relative costs of rounds on a machine where drafting pays.
CURVE = CostCurve([1, 1.1, 1.3, 1.5, 1.75, 2.06, 2.3, 2.6, 2.8], 0.05, 0.02)
# The same costs for rounds that wait. Rounds ahead cost a little less.
COSTS = Costs(CURVE, CURVE._replace(verify=[0.99 * cost for cost in CURVE.verify]))
# Without a drafter.
PLAIN = Costs(CURVE._replace(verify=[1]))
# Rounds that copy.
COPIED = tuple(1 + 0.1 * k for k in range(32))


def use_known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use fixed costs instead of measurements in this process: the same text is always drafted in the same way."""

    def measured(_: Target, drafter: Drafter | None, *__: Any, copied: tuple[int, ...] = (), **___: Any) -> Costs:
        costs = COSTS if drafter is not None else PLAIN
        return costs._replace(copied=COPIED[: 1 + max(copied, default=-1)])

    monkeypatch.setattr(calibration, "measure_rounds", measured)

    # The first rounds of a text measure nothing.
    def policy(costs: RoundCosts, k: int | None, *options: Any, copies: bool = False) -> DraftPolicy:
        if k is not None:
            return DraftPolicy(k, ahead=True)
        return choosing_policy(costs.read(*options), copies=copies)

    monkeypatch.setattr(RoundCosts, "policy", policy)
    # A server that another test has started may have measured those of passes that several texts share.
    monkeypatch.setattr(RoundCosts, "shared", lambda _, costs: estimated(costs))
    monkeypatch.setattr(calibration, "measure_shared", lambda *_: estimated(COSTS))
