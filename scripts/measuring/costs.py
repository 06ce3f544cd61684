"""How long a measurement of rounds takes, as an argument of several measurements."""

import argparse

from mlx_mtp.decoding.timing import MeasuringPlan


def add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="Time each round once per turn, in one turn only.")


def measuring_plan(args: argparse.Namespace) -> MeasuringPlan:
    return MeasuringPlan(warm_up=2, repetitions=(1, 1)) if args.quick else MeasuringPlan()
