"""``optinfer fetch``: the default model, into the cache."""

import argparse

from optinfer.models import default_model_path


def run(args: argparse.Namespace) -> int:
    """Fetch it if it is not there, and print its folder."""
    print(default_model_path())
    return 0
