"""``python -m megatron_ee`` is the command ``megatron-ee``, also under ``torchrun -m``."""

import sys

from megatron_ee.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
