"""``megatron-ee serve`` as a script, for torchrun, SLURM and checkouts that are not installed."""

import sys
from pathlib import Path


def main() -> int:
    """Run the command from this checkout; the exit status."""
    # Not the script's own folder: its file names are those of other packages too.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from megatron_ee.commands.main import main as command

    return command(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
