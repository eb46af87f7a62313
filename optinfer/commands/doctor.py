"""``optinfer doctor``: what this machine is, and how each part of the course will run on it."""

import argparse

from optinfer import doctor


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 if something without which the course cannot run is missing."""
    findings = doctor.examine()
    print(doctor.report(findings))
    return 1 if any(finding.fatal for finding in findings) else 0
