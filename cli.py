"""``python cli.py fit --config recipes/sparse_pretrain.yaml``; the same as the ``sbn`` command."""

import sys

from sbn_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
