"""`python -m shards`: the command line of packed datasets."""

from shards.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
