"""The numbers that a prediction for many GPUs is made from, and where each came from.

In: parsed options. Out: a `Job`, and sentences. Invariants: no number has another source than a file of a benchmark, an option, a setting,
the data sheet of a named GPU, or what the code does; what is not given costs nothing, and that is said.
"""

import math
from argparse import Namespace

from harness.model.build import outline
from launch.bench.measured import read_json, source_of
from launch.bench.scaling import Job
from launch.bench.setup import gradient_bytes
from shards.index import load

# GB/s each way of one GPU: half of what NVIDIA's data sheets give, which is both ways together.
LINKS = {
    "p100": (80, "P100 SXM2, NVLink"),
    "p100-pcie": (16, "P100, PCIe 3.0 x16"),
    "v100": (150, "V100 SXM2, NVLink"),
    "v100-pcie": (16, "V100, PCIe 3.0 x16"),
    "t4": (16, "T4, PCIe 3.0 x16"),
    "a100": (300, "A100 SXM4, NVLink"),
    "a100-pcie": (32, "A100, PCIe 4.0 x16"),
    "l4": (32, "L4, PCIe 4.0 x16"),
    "h100": (450, "H100 SXM5, NVLink"),
    "h100-pcie": (64, "H100, PCIe 5.0 x16"),
    "h200": (450, "H200 SXM, NVLink"),
    "b200": (900, "B200, NVLink"),
}
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes: DistributedDataParallel's defaults
NOT_GIVEN = "not given: costs nothing here"
GIVEN = "given"


def read_job(options: Namespace) -> tuple[Job, dict[str, str]]:
    """The numbers of a prediction; each by name as it is printed, with its source.

    Raises:
        ValueError, OSError: a number that is missing or cannot be, or a file of another benchmark; with what to do.
    """
    said: dict[str, str] = {}
    files = {name: read_json(name, path) for name in ("loader", "save", "remote") if (path := getattr(options, name))}
    steps = [read_json("step", path) for path in options.step or ()]
    measured = _measured(options, steps, said)
    gradients = _gradients(options, steps, said)
    images, image_bytes = _images(options, files, said)
    loader = _loader(options, files, said)
    checkpoint, interval = _checkpoints(options, files, said)
    job = Job(
        measured=measured,
        images=images,
        gradients=gradients,
        buckets=1 + max(0, math.ceil((gradients - FIRST_BUCKET) / BUCKET)),
        gpus_per_node=options.gpus_per_node,
        link=_link(options, said),
        network=1e9 * (options.network_gb_s or math.inf),
        latency=1e-6 * (options.latency_us or 0.0),
        loader=loader,
        loader_gpus=options.loader_gpus,
        image_bytes=image_bytes,
        storage=1e6 * (options.storage_mb_s or math.inf),
        lanes=options.config.data.lanes,
        checkpoint=checkpoint,
        interval=interval,
        sync_every=options.config.run.sync_every,
        global_batch=options.global_batch,
    )
    if options.network_gb_s:
        said["network"] = f"{options.network_gb_s:g} GB/s each way of a node ({GIVEN})"
    latency = f"{options.latency_us:g} us a message ({GIVEN})" if options.latency_us else NOT_GIVEN
    said["latency"] = f"{latency}; about {job.buckets} buckets a step, each with its own messages"
    return job, said


def _measured(options: Namespace, steps: list[dict], said: dict[str, str]) -> tuple[tuple[int, float], ...]:
    """(images, seconds) of each measured step."""
    if bool(steps) == bool(options.step_ms):
        raise ValueError(
            "The seconds of an optimizer step are needed, once: --step FILE, as `python -m launch.bench step --json FILE` "
            "writes it, or --step-ms with --batch."
        )
    if options.step_ms and len(options.batch or ()) != len(options.step_ms):
        raise ValueError(f"--batch must name the images of each --step-ms ({len(options.step_ms)}).")
    if steps and options.batch:
        raise ValueError("--batch belongs to --step-ms: the files of --step say theirs. Leave it out.")
    for path, found in zip(options.step or (), steps, strict=True):
        if found["processes"] != 1:
            raise ValueError(
                f"--step {path} was measured on {found['processes']} processes, so that their all-reduce is in it. Measure on one, and "
                "compare the row of so many GPUs with this file."
            )
        ms = found["step_ms"] + found["augment_ms"]
        said[f"step of {found['batch']}"] = (
            f"{ms:.2f} ms with augmentation, {found['setting']} ({source_of('step', path, found)})"
        )
    for ms, batch in zip(options.step_ms or (), options.batch or (), strict=True):
        said[f"step of {batch}"] = f"{ms:g} ms ({GIVEN})"
    pairs = [(found["batch"], 1e-3 * (found["step_ms"] + found["augment_ms"])) for found in steps]
    pairs += [(batch, 1e-3 * ms) for ms, batch in zip(options.step_ms or (), options.batch or (), strict=True)]
    if len({batch for batch, _ in pairs}) < len(pairs):
        raise ValueError("Two measured steps have the same batch size. Give one of each size.")
    return tuple(pairs)


def _gradients(options: Namespace, steps: list[dict], said: dict[str, str]) -> float:
    """Bytes that each step sums over GPUs."""
    if steps:
        models = {(found["model"], found["gradient_bytes"]) for found in steps}
        if len(models) > 1:
            raise ValueError(
                f"The files of --step are of several models: {', '.join(sorted(name for name, _ in models))}. Give those of one."
            )
        ((model, size),) = models
        source = "counted by step"
    elif names_setting(options, "model.name"):
        model = options.config.model.name
        n_classes = _classes(options)
        size, source = gradient_bytes(outline(model, n_classes)), f"counted, with {n_classes} classes"
    else:
        raise ValueError("Whose gradients are summed? Name the model: --model.name resnet50, or --config FILE.")
    said["gradients"] = (
        f"{size / 1e6:.1f} MB a step of {model} ({source}); in float32 under autocast, too, and not compressed"
    )
    return size


def _classes(options: Namespace) -> int:
    """Classes of the dataset, where one is named; else those of HAM10000, for the few numbers of the head."""
    return len(load(options.config.data.path, options.config.data.access).classes) if _names_data(options) else 7


def _link(options: Namespace, said: dict[str, str]) -> float:
    """Bytes/s each way of one GPU in its node."""
    if options.gpus_per_node == 1:
        return math.inf
    if options.link_gb_s:
        said["link"] = f"{options.link_gb_s:g} GB/s each way of a GPU in its node ({GIVEN})"
        return 1e9 * options.link_gb_s
    if not options.gpu:
        raise ValueError(
            "How fast do the GPUs of a node exchange gradients? Give --link-gb-s (the bus bandwidth that nccl-tests measures, or the "
            "GB/s of `torchrun --nproc-per-node 2 launch/doctor.py`), or --gpu KIND for its data sheet, or --gpus-per-node 1."
        )
    rate, title = LINKS[options.gpu]
    said["link"] = f"{rate} GB/s each way of a GPU in its node (data sheet of {title}: more than any program reaches)"
    return 1e9 * rate


def _images(options: Namespace, files: dict[str, dict], said: dict[str, str]) -> tuple[int, float]:
    """Images of an epoch, and mean bytes of one, 0 where storage is not asked about."""
    shards = None
    if _names_data(options) and not (options.images and (options.image_kb or not options.storage_mb_s)):
        shards = load(options.config.data.path, options.config.data.access).split("train")
    if options.images is None and shards is None:
        raise ValueError("How many images has an epoch? Give --images N, or --data.path (or --config FILE).")
    images = options.images or int(shards.samples.sum())  # pyright: ignore[reportOptionalMemberAccess] - one of them is there
    said["images"] = (
        f"{images} an epoch ({GIVEN if options.images else f'training split of {options.config.data.path}'})"
    )
    if not options.storage_mb_s:
        said["storage"] = NOT_GIVEN
        return images, 0.0
    if options.image_kb:
        size, source = 1e3 * options.image_kb, GIVEN
    elif shards is not None:
        size, source = float(shards.bytes.sum() / shards.samples.sum()), f"shards of {options.config.data.path}"
    elif "remote" in files:
        size, source = 1e6 * files["remote"]["cached_mb"] / files["remote"]["images"], "measured by remote"
    else:
        raise ValueError("How large is a stored image? Give --image-kb, or --data.path, or --remote FILE.")
    said["storage"] = (
        f"{options.storage_mb_s:g} MB/s for all nodes together ({GIVEN}), {size / 1e3:.1f} kB an image ({source}), data.lanes "
        f"{options.config.data.lanes}; each node reads its shards once in the epoch, as in the first, or where its cache is too small: "
        "without --storage-mb-s, the table is of epochs that a cache serves"
    )
    return images, size


def _loader(options: Namespace, files: dict[str, dict], said: dict[str, str]) -> float:
    """Images/s of the cores that `--loader-gpus` GPUs share."""
    if options.loader and options.loader_images_per_s:
        raise ValueError("Give --loader FILE or --loader-images-per-s, not both.")
    if options.loader_gpus > options.gpus_per_node:
        raise ValueError(
            f"--loader-gpus is {options.loader_gpus}, but a node has {options.gpus_per_node} GPUs. Lower it, or raise --gpus-per-node."
        )
    if options.loader_images_per_s:
        rate, source = options.loader_images_per_s, GIVEN
    elif options.loader:
        rate, source = files["loader"]["images_per_s"], source_of("loader", options.loader, files["loader"])
        source += f", {files['loader']['threads']} threads"
    elif options.remote:
        rate = files["remote"]["warm_cache_images_per_s"]
        source = source_of("remote", options.remote, files["remote"]) + ", a warm cache"
    else:
        said["loader"] = NOT_GIVEN
        return math.inf
    said["loader"] = (
        f"{rate:.0f} images/s on the cores of {options.loader_gpus} GPU(s) ({source}); every GPU is taken to have as many cores"
    )
    return rate


def _checkpoints(options: Namespace, files: dict[str, dict], said: dict[str, str]) -> tuple[float, float]:
    """Seconds of one, and between two."""
    if options.save and options.checkpoint_s:
        raise ValueError("Give --save FILE or --checkpoint-s, not both.")
    if not options.save and not options.checkpoint_s:
        said["checkpoints"] = NOT_GIVEN
        return 0.0, math.inf
    seconds = options.checkpoint_s or files["save"]["save_s"]
    minutes = options.minutes_between or options.config.run.save_every_minutes
    source = GIVEN if options.checkpoint_s else source_of("save", options.save, files["save"])
    between = GIVEN if options.minutes_between else "setting run.save_every_minutes"
    said["checkpoints"] = (
        f"{seconds:.2f} s ({source}), which rank 0 writes, beside the training at best: at the end of each epoch, and after {minutes:g} minutes ({between})"
    )
    return seconds, 60 * minutes


def _names_data(options: Namespace) -> bool:
    return names_setting(options, "data.path")


def names_setting(options: Namespace, key: str) -> bool:
    """Whether the command line names a setting, or a file of settings: else it is the demo's, which nobody asked about."""
    return any(word.split("=")[0] in (f"--{key}", "--config") for word in options.settings)
