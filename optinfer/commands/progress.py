"""``optinfer progress``: which exercises are solved."""

import argparse

from optinfer.course.records import progress


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    print(progress())
    return 0
