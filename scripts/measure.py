"""Measure what README.md and docs report. `measure.py MEASUREMENT --help` describes a measurement."""

import argparse
import sys
from importlib import import_module

# Each measurement is a module of the package `measuring`. Only the requested module is imported.
MEASUREMENTS = {
    "pair": "how well a drafter fits its target, on text that is not in their training data",
    "rules": "accepted draft tokens per round when sampling, by acceptance rule",
    "schema": "tokens per round with a JSON Schema and without",
    "kv": "tokens per round and bytes of the cache with quantized K/V and without",
    "context": "memory, acceptance and time per round of long contexts",
    "formula": "the speed of rounds compared with a cost formula, for given chances of acceptance",
    "published": "the cost and speed of rounds at the size of a published model, with random weights",
    "memory": "the planned memory of published models, without their weights",
    "mapped": "memory and time of mapped per-layer embeddings compared with resident ones",
    "ops": "the number of operations of a round at the sizes of published models",
    "host": "the processor time of the host per round",
    "pause": "the pause of running texts while a long prompt is read",
    "copies": "the choice of copied draft tokens, simulated on cost curves of Macs",
    "lengths": "the automatic draft length, simulated on recorded texts",
    "convert": "time and peak memory of the conversion of a large checkpoint",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    subparsers = parser.add_subparsers(dest="measurement", metavar="MEASUREMENT", required=True)
    for name, summary in MEASUREMENTS.items():
        subparser = subparsers.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if sys.argv[1:2] == [name]:
            module = import_module(f"measuring.{name}")
            subparser.description = module.__doc__
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
