#!/usr/bin/env python3
"""Train or evaluate; the flags of Mask2Former's train_net.py. The work is done in sim_m2f/engine."""

import sys

from sim_m2f.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
