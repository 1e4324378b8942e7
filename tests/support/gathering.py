"""Rows of three ranks, gathered in one piece and in many: `RANK=0 WORLD_SIZE=3 ... python tests/support/gathering.py OUT`.

OUT-RANK.json says of each size of a piece how many rows this rank got, and whether they are the right ones.
"""

import json
import sys
from pathlib import Path

import torch

from harness.distributed import collectives
from harness.distributed.world import World
from shards.terminal import run_and_exit

OF_RANK = (37, 0, 5)  # rows
SIZES = (2**26, 3 * 31 * 4, 1)  # bytes of a piece: all, some, and fewer than a row has


def rows_of(keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """Columns of several types and shapes that follow from the keys, with NaN and -0.0 among them."""
    floats = torch.stack([keys / 7, torch.where(keys % 3 == 0, torch.nan, -0.0)], 1).float()
    return {"labels": keys % 5 - 1, "probs": floats, "views": floats.repeat(1, 3).reshape(-1, 3, 2), "bad": keys > 20}


def main() -> int:
    world, found = World("fp32"), []
    all_keys = torch.randperm(sum(OF_RANK), generator=torch.Generator().manual_seed(1)) - 1
    mine = all_keys.split(list(OF_RANK))[world.rank]
    for size in SIZES:
        collectives.GATHERED_BYTES = size
        keys, columns = collectives.gather_rows(world, mine, rows_of(mine))
        expected = rows_of(keys)
        same = [columns[name].numpy().tobytes() == part.numpy().tobytes() for name, part in expected.items()]
        same += [columns[name].dtype == part.dtype for name, part in expected.items()]
        found.append([keys.tolist(), all(same)])
    Path(f"{sys.argv[1]}-{world.rank}.json").write_text(json.dumps(found))
    world.close()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
