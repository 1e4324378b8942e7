"""Laws of the prediction for many GPUs: what it may never claim, and that the limit it names is the one that counts."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bench.scaling import (
    SIZES,
    Job,
    all_reduce_seconds,
    describe_limits,
    predict,
    share_of_shards,
    step_seconds,
)

FREE = Job(measured=((64, 0.02),), images=10**9)  # all but the steps costs nothing
# One measured step, or two of which the larger takes longer and has the higher rate, as a GPU's do.
MEASURED = st.builds(
    lambda batch, seconds, factor, gain: ((batch, seconds), (batch * factor, seconds * (1 + (factor - 1) * gain))),
    st.integers(1, 256),
    st.floats(1e-3, 1.0),
    st.integers(2, 8),
    st.floats(0.1, 1.0),
)
JOBS = st.builds(
    Job,
    measured=MEASURED | MEASURED.map(lambda pair: pair[:1]),
    images=st.integers(1, 10**8),
    gradients=st.floats(0, 1e9),
    buckets=st.integers(1, 50),
    gpus_per_node=st.integers(1, 16),
    link=st.floats(1e7, 1e12),
    network=st.floats(1e7, 1e12),
    latency=st.floats(0, 1e-3),
    loader=st.floats(1, 1e6),
    image_bytes=st.floats(0, 1e6),
    storage=st.floats(1e6, 1e12),
    lanes=st.sampled_from([1, 4, 64]),
    checkpoint=st.floats(0, 60),
    interval=st.floats(0, 3600),
    global_batch=st.sampled_from([0, 64, 1000, 4096]),
)
GPUS = st.sampled_from(SIZES) | st.integers(1, 600)


@pytest.mark.parametrize("gpus", SIZES)
def test_where_nothing_but_steps_costs_anything_efficiency_is_1(gpus):
    row = predict(FREE, gpus)
    assert row.efficiency == pytest.approx((1, 1))
    assert row.images_per_s == pytest.approx((3200 * gpus, 3200 * gpus))
    assert row.limits == ("steps", "steps")


@given(JOBS, GPUS)
def test_efficiency_is_never_above_1_and_the_worst_bound_never_above_the_best(job, gpus):
    row = predict(job, gpus)
    assert 0 <= row.efficiency[0] <= row.efficiency[1] * (1 + 1e-9) <= 1 + 1e-6
    assert row.images_per_s[0] <= row.images_per_s[1] * (1 + 1e-9)


@given(JOBS, GPUS, st.sampled_from(["link", "network", "loader", "storage"]), st.floats(1, 100))
def test_more_of_anything_is_never_slower(job, gpus, name, factor):
    before, after = predict(job, gpus), predict(replace(job, **{name: factor * getattr(job, name)}), gpus)
    assert all(new <= old * (1 + 1e-9) for old, new in zip(before.epoch_s, after.epoch_s, strict=True))


REMOVED = {
    "gradients": {"gradients": 0.0, "latency": 0.0},
    "loader": {"loader": inf},
    "storage": {"storage": inf},
    "checkpoints": {"checkpoint": 0.0},
}


@given(JOBS, GPUS)
def test_the_named_limit_is_the_one_whose_removal_speeds_it_up_most(job, gpus):
    job = replace(job, interval=inf)  # else a faster part also saves checkpoints
    row = predict(job, gpus)
    if row.limits[0] == "images":
        return
    seconds = {name: predict(replace(job, **free), gpus).epoch_s for name, free in REMOVED.items()}
    instant = tuple((batch, 1e-12 * time) for batch, time in job.measured)
    seconds["steps"] = predict(replace(job, measured=instant), gpus).epoch_s
    for bound, name in enumerate(row.limits):
        assert seconds[name][bound] <= min(found[bound] for found in seconds.values()) * (1 + 1e-6) + 1e-9
        assert seconds[name][bound] <= row.epoch_s[bound]


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ({"gradients": 1e9, "network": 1e9}, "gradients"),
        ({"loader": 100.0}, "loader"),
        ({"image_bytes": 1e5, "storage": 1e7}, "storage"),
        ({"checkpoint": 100.0, "interval": 60.0}, "checkpoints"),
    ],
)
def test_what_is_made_slow_is_what_is_named(numbers, name):
    assert predict(replace(FREE, **numbers), 64).limits == (name, name)


@given(JOBS)
def test_one_gpu_sums_nothing(job):
    assert all_reduce_seconds(job, 1) == (0, 0)


def test_an_all_reduce_costs_what_the_formula_says():
    job = replace(FREE, gradients=1e9, gpus_per_node=4, link=1e11, network=1e10, latency=1e-5, buckets=2)
    within, between = 2 * 3 / 4 / 100, 2 * 1 / 2 / 10  # seconds: of 4 GPUs, of 2 nodes
    assert all_reduce_seconds(job, 4) == pytest.approx((within + 2 * 4e-5, within + 3 * 4e-5))
    assert all_reduce_seconds(job, 8) == pytest.approx((between + 3 * 4e-5, within + between + 4 * 4e-5))


@given(JOBS, GPUS)
def test_an_all_reduce_takes_at_worst_no_less_than_at_best(job, gpus):
    best, worst = all_reduce_seconds(job, gpus)
    assert best <= worst * (1 + 1e-9)


def test_an_epoch_is_its_whole_batches_and_where_there_is_none_images_are_the_limit():
    job = replace(FREE, images=7009)
    rows = [predict(job, gpus) for gpus in SIZES]
    assert [row.steps for row in rows] == [109, 54, 27, 13, 6, 3, 1, 0, 0, 0]
    assert [row.left_out for row in rows[:7]] == [33, 97, 97, 353, 865, 865, 2913]
    assert rows[7].limits == ("images", "images")
    assert rows[7].images_per_s == (0, 0)
    assert describe_limits(rows) == "steps from 1 GPU, images from 128 GPUs"


def test_a_fixed_global_batch_is_shared_out_until_a_gpu_would_get_no_image():
    job = replace(FREE, global_batch=64)
    assert [predict(job, gpus).share for gpus in (1, 3, 64)] == [64, 22, 1]
    assert predict(job, 128).limits == ("images", "images")


def test_with_one_measured_step_a_smaller_share_is_between_no_gain_and_proportion():
    assert step_seconds([(64, 0.02)], 16) == pytest.approx((0.005, 0.02))
    row = predict(replace(FREE, global_batch=64), 4)
    assert row.images_per_s == pytest.approx((3200, 12800))
    assert row.efficiency == pytest.approx((0.25, 1))


def test_with_two_measured_steps_those_between_lie_on_their_line():
    measured = [(256, 0.05), (64, 0.02)]
    assert step_seconds(measured, 64) == pytest.approx((0.02, 0.02))
    assert step_seconds(measured, 160) == pytest.approx((0.035, 0.035))
    assert step_seconds(measured, 512) == pytest.approx((0.1, 0.1))
    assert step_seconds(measured, 32) == pytest.approx((0.015, 0.02))


def test_each_epoch_ends_with_a_checkpoint_and_others_come_where_ranks_synchronise():
    job = replace(FREE, images=64 * 100, checkpoint=5.0)  # 2 s of steps
    assert predict(replace(job, checkpoint=1.5), 1).epoch_s == pytest.approx((3.5, 2))  # hidden at best
    assert predict(job, 1).epoch_s == pytest.approx((7, 5))  # one at a time: an epoch waits for that of the one before
    assert predict(replace(job, interval=0.5), 1).epoch_s == pytest.approx((27, 25))
    assert predict(replace(job, interval=0.0), 1).epoch_s == pytest.approx((52, 50))  # at steps 10, 20, ..., 90


def test_nodes_share_a_store_and_read_their_own_lanes_alone():
    assert [share_of_shards(1, nodes) for nodes in (1, 2, 64)] == [1, 1, 1]
    assert [share_of_shards(64, nodes) for nodes in (1, 2, 64, 128)] == [1, 1 / 2, 1 / 64, 1 / 64]
    assert share_of_shards(64, 3) == 23 / 64  # a piece of 21.3 lanes may touch 23
    job = replace(FREE, images=10**6, image_bytes=1e5, storage=1e9)
    assert predict(job, 64).epoch_s == pytest.approx((800, 800))  # 8 nodes, 100 GB each
    assert predict(replace(job, lanes=64), 64).epoch_s == pytest.approx((100, 100))


def test_a_loader_measured_on_the_cores_of_a_node_is_shared_by_its_gpus():
    job = replace(FREE, loader=6400.0, loader_gpus=8)
    assert predict(job, 1).limits == ("steps", "steps")
    assert predict(job, 8).images_per_s == pytest.approx((6400, 6400))
    assert predict(job, 16).images_per_s == pytest.approx((12800, 12800))
