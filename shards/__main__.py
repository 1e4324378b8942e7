"""`python -m shards`: the command line of packed datasets."""

from shards.cli import main
from shards.terminal import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
