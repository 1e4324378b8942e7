"""Who stands still while others wait: by the points that each rank has passed, and its signs of work."""

import socket
import time
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore

from harness.distributed.heartbeat import BEAT_S, Beat, Heartbeat, Lag
from harness.distributed.rendezvous import serve_store


def beats(*passed: int, work: dict[int, int] | None = None, long: tuple[int, ...] = ()) -> dict[int, Beat]:
    """Beats of ranks that have passed so many points."""
    return {rank: Beat(1, n, "backward", (work or {}).get(rank, 0), rank in long) for rank, n in enumerate(passed)}


def test_a_rank_that_others_wait_for_too_long_is_stuck():
    lag = Lag()
    assert lag.find_stuck(beats(7, 6, 7), now=0, patience=60) is None
    assert lag.find_stuck(beats(7, 6, 7), now=60, patience=60) is None
    assert lag.find_stuck(beats(7, 6, 7), now=61, patience=60) == 1


def test_ranks_that_all_stand_at_one_point_wait_for_rank_0s_work_and_none_is_stuck():
    lag = Lag()
    for now in range(0, 10_000, 100):
        assert lag.find_stuck(beats(7, 7, 7), now, patience=60) is None


def test_a_slow_rank_is_not_stuck_while_it_passes_points_or_shows_work_or_said_that_it_takes_long():
    moving, working, long = Lag(), Lag(), Lag()
    for minute in range(20):
        assert moving.find_stuck(beats(100, minute), 60 * minute, patience=60) is None
        assert working.find_stuck(beats(100, 3, work={1: minute}), 60 * minute, patience=60) is None
        assert long.find_stuck(beats(100, 3, long=(1,)), 60 * minute, patience=60) is None


def test_the_wait_counts_from_when_others_came_and_not_from_the_ranks_last_point():
    """All compile for two minutes; the first to be done waits for the other, which is not stuck for that."""
    lag = Lag()
    for now in range(0, 120, 10):
        assert lag.find_stuck(beats(3, 3), now, patience=60) is None
    assert lag.find_stuck(beats(4, 3), 120, patience=60) is None
    assert lag.find_stuck(beats(4, 3), 170, patience=60) is None
    assert lag.find_stuck(beats(4, 3), 181, patience=60) == 1


def test_the_store_of_the_ranks_listens_where_they_look_for_it_and_nowhere_else():
    store = serve_store("127.0.0.1", timedelta(seconds=5))
    socket.create_connection(("127.0.0.1", store.port), timeout=5).close()
    with pytest.raises(OSError, match=r"refused|unreachable|assign"):
        socket.create_connection(("127.0.0.2", store.port), timeout=5)


def test_a_process_that_does_not_know_the_secret_ends_no_run():
    """Anyone on the address can connect; what it writes stands under other names."""
    server = serve_store("127.0.0.1", timedelta(seconds=5))
    PrefixStore("secret", server).set("turn", "0")
    heartbeat = Heartbeat(PrefixStore("secret", server), rank=0, watched=[0], who="here")
    heartbeat.start()
    stranger = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
    stranger.set("failed", '{"rank": 0, "error": "a joke"}')
    stranger.set("/failed", '{"rank": 0, "error": "a joke"}')
    time.sleep(2.5 * BEAT_S)
    assert heartbeat.failure is None
    heartbeat.close()
