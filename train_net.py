#!/usr/bin/env python3
"""Train or evaluate; the flags of Mask2Former's train_net.py. The work is done in sim_m2f/engine."""

import argparse
import sys

from sim_m2f.cli import guarded
from sim_m2f.commands import train

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    train.add_arguments(parser)
    sys.exit(guarded(train, parser.parse_args()))
