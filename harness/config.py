"""Every setting, once, with its unit; read from a YAML file and then from the command line.

In: arguments as `--config configs/ham10000.yaml --data.path data/ham10000`. Out: a frozen `Config`. What stays true:
an unknown key or a value of the wrong type is an error before anything starts; files do not inherit from each other.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from harness.limits import check

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class Data:
    """What is read, and how."""

    path: str = "data/demo"
    """folder of packed shards"""
    demo_images: int = 0
    """draw and pack this many demo lesions if the folder does not exist; 0 means never"""
    image_size: int = 224
    """side of the model's square input, in pixels"""
    global_batch_size: int = 64
    """images in one optimizer step over all processes"""
    lanes: int = 1
    """parts that the stream of samples is cut into; each batch takes as many images from each"""
    shuffle_block_shards: int = 0
    """samples are shuffled within this many consecutive shards; 0 means within all"""
    threads: int = 0
    """decoding threads of each process; 0 means one for each core it may use"""
    prefetch_batches: int = 4
    """batches decoded ahead of the one in use"""
    allow_leak: bool = False
    """train although training groups are in an evaluation split; the results say so"""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """what a training sample that cannot be decoded does: fail the run, or count for nothing and be reported"""


@dataclass(frozen=True)
class Augment:
    """How training pictures are varied; all of it happens on the device, in one interpolation."""

    crop_side: tuple[float, float] = (0.7, 1.0)
    """smallest and largest side of the random square crop, as a share of the stored picture's short side"""
    hflip_prob: float = 0.5
    """probability of a horizontal flip"""
    vflip_prob: float = 0.5
    """probability of a vertical flip"""
    rotation_degrees: float = 180.0
    """largest angle of a random turn, in degrees"""
    rotation_prob: float = 1.0
    """probability of a turn"""
    fill: Literal["image", "black"] = "image"
    """what a turned crop shows beyond its square: the rest of the stored picture, or black"""
    brightness: float = 0.1
    """brightness is multiplied by 1 +- this"""
    contrast: float = 0.1
    """contrast is multiplied by 1 +- this"""
    saturation: float = 0.1
    """saturation is multiplied by 1 +- this"""
    cutout: float = 0.0
    """side of a square that is blanked out, as a share of the picture's; 0 means none"""
    mixup_prob: float = 0.0
    """probability that two neighbours in the stream are blended (Zhang et al., 2018)"""
    cutmix_prob: float = 0.0
    """probability that two neighbours in the stream exchange a rectangle (Yun et al., 2019)"""


@dataclass(frozen=True)
class Model:
    """What is trained."""

    name: str = "resnet50"
    """a torchvision classification model, or timm/NAME (pip install -e ".[timm]")"""
    weights: str = "imagenet1k_v2"
    """imagenet1k_v1, imagenet1k_v2, none (train from scratch), or a .safetensors or .pth file"""
    sync_batchnorm: bool = False
    """batch normalisation over all processes, not over each one's images; needs GPUs"""


@dataclass(frozen=True)
class Optim:
    """How it is trained."""

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    """optimizer; adam adds weight decay to the gradient, adamw applies it to the weights"""
    lr: float = 3e-4
    """highest learning rate"""
    weight_decay: float = 0.05
    """weight decay"""
    momentum: float = 0.9
    """momentum, of sgd alone"""
    schedule: Literal["constant", "cosine"] = "cosine"
    """learning rate after the warm-up: constant, or along a half cosine to zero at the last step"""
    warmup_epochs: float = 1.0
    """epochs over which the learning rate rises linearly from zero"""
    label_smoothing: float = 0.0
    """share of a label's weight that is spread over all classes"""
    balance: Literal["none", "weights", "logit-adjust", "sampler"] = "none"
    """against rare classes being ignored: weigh their losses, adjust logits by class frequency (Menon et al., 2021), or
    draw each class equally often"""
    max_grad_norm: float = 0.0
    """largest norm of the gradients, which are scaled down to it; 0 means none"""
    ema: float = 0.0
    """decay of an average of the weights over steps, which is then what is validated and evaluated; 0 means none"""
    micro_batch: int = 0
    """most images of one forward pass on a process; 0 means its whole share of the batch"""


@dataclass(frozen=True)
class Run:
    """How long, where to, and what is kept."""

    folder: str = "runs/run"
    """the run's folder; starting the same command again continues what is there"""
    epochs: int = 30
    """most epochs"""
    patience: int = 10
    """epochs without a better score after which training stops"""
    monitor: Literal["loss", "balanced_accuracy", "macro_f1"] = "balanced_accuracy"
    """validation score that chooses the best weights and stops early"""
    seed: int = 0
    """seed of weights, order and augmentation"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """arithmetic of the forward pass; auto asks the device"""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """pictures and weights with their channels last in memory; auto: everywhere but on GPUs older than a V100"""
    compile: bool = False
    """compile the training step with torch.compile, which takes minutes at the start; for a V100 and newer (measure first: no
    gain was seen on a CPU, nor on an H200 with batches of 64)"""
    sync_every: int = 10
    """steps between entries of the log; stop requests and a loss that is no number are noticed as often"""
    save_every_minutes: float = 10.0
    """minutes between checkpoints inside an epoch; each epoch ends with one in any case"""
    keep_checkpoints: int = 2
    """newest checkpoints kept, beside the best weights"""
    checkpoint_dir: str = ""
    """local folder where checkpoints are saved first and then copied into the run folder, for one that lies on a slow or
    mounted disk; empty means into the run folder at once"""
    time_limit_minutes: float = 0.0
    """minutes after its start at which the run saves and stops as if asked, to start again later; 0 means no limit"""
    on_changed_settings: Literal["refuse", "accept"] = "refuse"
    """continue a run folder only with the same settings, or with others, too (they are noted in the results)"""
    trackers: tuple[str, ...] = ("tensorboard",)
    """where the log's figures are shown, by Accelerate's names: tensorboard, wandb, mlflow, comet_ml, aim, ..."""


@dataclass(frozen=True)
class Eval:
    """The final evaluation; validation between epochs is always of the plain view."""

    split: str = "test"
    """split that is evaluated at the end"""
    views: str = "dihedral8"
    """test-time augmentation: none, flips (4), dihedral8 (8), or spins:N (N random turns and flips)"""
    batch_size: int = 64
    """images of one forward pass, the same at any number of processes"""
    image_size: int = 0
    """side of the model's input when it is judged, in pixels; 0 means data.image_size"""
    positive_classes: tuple[str, ...] = ("mel", "mel+bcc+akiec")
    """classes (or sums of them) that a threshold is chosen for, on validation; those that a dataset lacks are left out"""
    sensitivity: float = 0.9
    """share of the positives that a threshold shall find"""
    prior_correction: float = 1.0
    """strength of a second reading at equal class frequencies (at those of training after optim.balance): 1 full, 0 none"""
    subgroups: tuple[str, ...] = ("sex", "age", "localization", "dx_type")
    """columns of the source that the results are broken down by; those that a dataset lacks are left out"""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)
    eval: Eval = field(default_factory=Eval)


# Settings that may differ when a run is continued: they do not change what is computed.
RUNTIME_KEYS = {
    *("data.path", "data.demo_images", "data.threads", "data.prefetch_batches"),
    *("run.folder", "run.sync_every", "run.save_every_minutes", "run.keep_checkpoints"),
    *("run.checkpoint_dir", "run.time_limit_minutes", "run.on_changed_settings", "run.trackers"),
}


def read_config(arguments: list[str], default: Path) -> Config:
    """Read settings: the file named by `--config` (else `default`), then the single settings, in that order.

    Raises:
        SystemExit: with code 2 and a sentence, for a key, a type or a value that cannot be.
    """
    parser = _parser()
    files, rest = _config_first(arguments)
    settings = parser.parse_args([*(files or ["--config", str(default)]), *rest])
    read = parser.instantiate(settings)
    config = Config(**{part.name: getattr(read, part.name) for part in fields(Config)})
    try:
        check(flat(config))
    except ValueError as error:
        parser.error(str(error))
    return config


def flat(config: Config) -> dict:
    """Settings by dotted name, as {'data.path': 'data/demo', ...}."""
    return {f"{part}.{key}": value for part, values in asdict(config).items() for key, value in values.items()}


def differences(old: dict, new: dict) -> list[str]:
    """Settings that change what is computed and differ, as `key: OLD is now NEW`; both as from `flat`."""

    def plain(value):
        return list(value) if isinstance(value, tuple) else value

    keys = sorted((set(old) | set(new)) - RUNTIME_KEYS)
    absent = "absent"
    return [
        f"{key}: {old.get(key, absent)} is now {new.get(key, absent)}"
        for key in keys
        if plain(old.get(key, absent)) != plain(new.get(key, absent))
    ]


def to_yaml(config: Config) -> str:
    """The settings as a file that `--config` reads."""
    plain = {
        part: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for part, values in asdict(config).items()
    }
    return yaml.safe_dump(plain, sort_keys=False)


def load_config(path: Path) -> Config:
    """Read a file that `to_yaml` wrote.

    Raises:
        ValueError: a file of another version of the harness, or a damaged one.
    """
    try:
        saved = yaml.safe_load(Path(path).read_text())
        parts = {part.name: part.type(**_tuples(saved[part.name])) for part in fields(Config)}
        return Config(**parts)
    except (TypeError, KeyError, AttributeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} is damaged, or of another version of the harness ({error}). Restore a copy, start a new run folder, or "
            "continue with the settings that you give now by --run.on_changed_settings accept."
        ) from error


def _tuples(values: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="launch/train.py", description="Train, evaluate, and continue what was interrupted.")
    parser.add_argument("--config", action="config", help="YAML file; settings after it on the command line win")
    for part in fields(Config):
        parser.add_class_arguments(part.type, part.name)
    return parser


def _config_first(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split off --config: the parser applies arguments in order, and the command line must win over the file."""
    files, rest, remaining = [], [], list(arguments)
    while remaining:
        word = remaining.pop(0)
        if word == "--config" and remaining:
            files += [word, remaining.pop(0)]
        elif word.startswith("--config="):
            files.append(word)
        else:
            rest.append(word)
    return files, rest
