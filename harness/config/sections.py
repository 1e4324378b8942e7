"""Every setting, once, with its unit, default and range.

In: values of a YAML file or the command line. Out: frozen dataclasses. Invariants: a value out of its range, or settings that
contradict each other, are an error with the setting's name and the value found, wherever the object is made.
"""

from dataclasses import dataclass, field
from typing import Literal

from shards.remote import Access
from shards.storage import is_url, without_secrets


def _refuse(key: str, must: str, found) -> None:
    raise ValueError(f"The '{key}' setting must be {must}. Got {found} instead.")


def _at_least(section: str, settings: object, **least: float) -> None:
    for name, low in least.items():
        if not getattr(settings, name) >= low:  # also where it is NaN
            _refuse(f"{section}.{name}", f"at least {low}", getattr(settings, name))


def _shares(section: str, settings: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            _refuse(f"{section}.{name}", "between 0 and 1", getattr(settings, name))


MEAN = (0.485, 0.456, 0.406)  # of ImageNet, which torchvision's weights were trained with
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Data:
    """What is read, and how."""

    path: str = "data/demo"
    """folder of packed shards, or its URL (s3://, gs://, az://, https://, hf://, ...)"""
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
    decoded_cache: Literal["none", "host", "device", "auto"] = "none"
    """where decoded images of the training split are kept after their first use: host (memory that the processes of a machine share),
    device (each GPU keeps all), auto: the first of device and host with room to spare; where one has not, the next is taken and said"""
    cache_dir: str = ""
    """of a URL: folder on a disk of this machine where its files are kept, for all processes; empty: the user's cache directory"""
    cache_gb: float = 20.0
    """of a URL: most that is kept there, in 10^9 bytes; 0 keeps nothing and reads each image by its range"""
    patience_s: float = 300.0
    """of a URL: seconds without a byte, tried again and again, until a read fails"""
    allow_leak: bool = False
    """train although training groups are in an evaluation split; the results say so"""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """a training sample that cannot be decoded: fail the run, or skip and report it"""

    def __post_init__(self):
        """Check the ranges."""
        _at_least("data", self, demo_images=0, image_size=16, global_batch_size=2, lanes=1, shuffle_block_shards=0)
        _at_least("data", self, threads=0, prefetch_batches=1, cache_gb=0, patience_s=1)

    @property
    def access(self) -> Access:
        """How a URL is read."""
        return Access(self.cache_dir, self.cache_gb, self.patience_s)


@dataclass(frozen=True)
class Augment:
    """Random views of training images; all of it happens on the device, in one interpolation."""

    crop_side: tuple[float, float] = (0.7, 1.0)
    """smallest and largest side of the random square crop, as a share of the stored image's short side (not
    torchvision's `scale`, a share of the area)"""
    hflip_prob: float = 0.5
    """probability of a horizontal flip"""
    vflip_prob: float = 0.5
    """probability of a vertical flip"""
    rotation_degrees: float = 180.0
    """largest angle of a random rotation, in degrees"""
    rotation_prob: float = 1.0
    """probability of a rotation"""
    fill: Literal["image", "black"] = "image"
    """what a rotated crop shows beyond its square: the rest of the stored image, or black"""
    brightness: float = 0.1
    """brightness is multiplied by 1 +- this"""
    contrast: float = 0.1
    """contrast is multiplied by 1 +- this"""
    saturation: float = 0.1
    """saturation is multiplied by 1 +- this"""
    cutout: float = 0.0
    """side of a square that is blanked out, as a share of the image's side (DeVries and Taylor, 2017); 0 disables"""
    mixup_prob: float = 0.0
    """probability that two neighbours in the stream are blended, with weights from Beta(0.5, 0.5) (Zhang et al., 2018)"""
    cutmix_prob: float = 0.0
    """probability that two neighbours in the stream exchange a square, whose area is uniform: Beta(1, 1) (Yun et al., 2019)"""

    mean: tuple[float, float, float] | Literal["auto"] = "auto"
    """mean red, green and blue, from 0 to 1, that is subtracted from every view; auto: the model's own (its
    weights file or timm says it), or ImageNet's"""
    std: tuple[float, float, float] | Literal["auto"] = "auto"
    """standard deviation of red, green and blue that every view is divided by; auto: as for mean"""

    def __post_init__(self):
        """Check the ranges."""
        if not all(0 <= value <= 1 for value in self.normalization[0]):
            _refuse("augment.mean", "three numbers from 0 to 1 (pixels are divided by 255)", self.mean)
        if not all(0 < value <= 1 for value in self.normalization[1]):
            _refuse("augment.std", "three numbers above 0, up to 1 (pixels are divided by 255)", self.std)
        low, high = self.crop_side
        if not 0 < low <= high <= 1:
            _refuse("augment.crop_side", "0 < LOW <= HIGH <= 1", f"{low}, {high}")
        _shares("augment", self, "hflip_prob", "vflip_prob", "rotation_prob", "cutout", "mixup_prob", "cutmix_prob")
        _at_least("augment", self, rotation_degrees=0, brightness=0, contrast=0, saturation=0)
        if self.mixup_prob + self.cutmix_prob > 1:
            raise ValueError(
                f"'augment.mixup_prob' ({self.mixup_prob}) and 'augment.cutmix_prob' ({self.cutmix_prob}) are probabilities "
                "of the same pairs: their sum must not exceed 1."
            )

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the colours; ImageNet's where the setting is auto still."""
        return tuple(self.mean) if self.mean != "auto" else MEAN, tuple(self.std) if self.std != "auto" else STD

    @property
    def group_size(self) -> int:
        """How many neighbours of the stream are mixed, and so must be on one rank: 2, or 1 for none."""
        return 2 if self.mixup_prob or self.cutmix_prob else 1


@dataclass(frozen=True)
class Model:
    """What is trained."""

    name: str = "resnet50"
    """a torchvision classification model, or timm/NAME (pip install -e ".[timm]")"""
    weights: str = "imagenet1k_v2"
    """imagenet1k_v1, imagenet1k_v2, none (train from scratch), or a .safetensors or .pth file"""
    head: Literal["auto", "keep", "new"] = "auto"
    """last layer of the weights: auto (kept where it has as many outputs, and is not known to be of other classes), keep (or the start
    is refused), or new"""
    drop_path: float | Literal["auto"] = "auto"
    """highest probability that a residual branch is left out in training, rising linearly with depth (Huang et al., 2016); auto: the
    model's own"""
    sync_batchnorm: bool = False
    """batch normalisation over all processes, not over each one's images; needs GPUs"""

    def __post_init__(self):
        """Check the ranges."""
        if self.drop_path != "auto" and not 0 <= self.drop_path < 1:
            _refuse("model.drop_path", "auto, or at least 0 and below 1", self.drop_path)


@dataclass(frozen=True)
class Optim:
    """How it is trained."""

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    """optimizer; adam adds weight decay to the gradient, adamw applies it to the weights"""
    lr: float = 3e-4
    """peak learning rate"""
    weight_decay: float = 0.05
    """weight decay; of adamw decoupled: each step takes learning rate times this off a weight, and spares biases and norms"""
    layer_decay: float = 1.0
    """factor of the learning rate for each block between a weight and the output, as 0.75 (BEiT; Bao et al., 2022); 1 disables"""
    freeze_epochs: int = 0
    """first epochs in which the head alone is trained, and everything else is as in evaluation; 0 disables"""
    momentum: float = 0.9
    """momentum, of sgd alone"""
    schedule: Literal["constant", "cosine"] = "cosine"
    """learning rate after the warm-up: constant, or along a half cosine to zero at the last step"""
    warmup_epochs: float = 1.0
    """epochs over which the learning rate rises linearly from zero"""
    label_smoothing: float = 0.0
    """label smoothing: share of a label's weight that is spread over all classes"""
    balance: Literal["none", "weights", "logit-adjust", "sampler"] = "none"
    """class imbalance: weighted loss, logit adjustment (Menon et al., 2021), or a class-balanced sampler"""
    max_grad_norm: float = 0.0
    """maximum gradient norm; 0 disables clipping"""
    ema: float = 0.0
    """EMA decay; when set, the EMA weights are validated and evaluated; 0 disables"""
    micro_batch: int | Literal["auto"] = 0
    """maximum images of one forward pass on a process; 0 means its whole share of the batch; auto: as many as fit into memory,
    halved from the whole share until they do"""

    def __post_init__(self):
        """Check the ranges."""
        _at_least("optim", self, lr=0, weight_decay=0, momentum=0, warmup_epochs=0, max_grad_norm=0)
        if self.micro_batch != "auto":
            _at_least("optim", self, micro_batch=0)
        _at_least("optim", self, freeze_epochs=0)
        _shares("optim", self, "label_smoothing")
        if not 0 < self.layer_decay <= 1:
            _refuse("optim.layer_decay", "above 0, up to 1", self.layer_decay)
        if not 0 <= self.ema < 1:
            _refuse("optim.ema", "at least 0 and below 1, as 0.999", self.ema)


@dataclass(frozen=True)
class Run:
    """How long, where to, and what is kept."""

    folder: str = "runs/run"
    """the run's folder; starting the same command again continues what is there"""
    epochs: int = 30
    """maximum number of epochs"""
    patience: int = 10
    """epochs without improvement after which training stops"""
    monitor: Literal["loss", "balanced_accuracy", "macro_f1", "last"] = "balanced_accuracy"
    """validation score that chooses the best weights and stops early; last: validation chooses nothing, the last epoch's are kept"""
    seed: int = 0
    """seed of weights, order and augmentation"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """arithmetic of the forward pass; auto asks the device"""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """images and weights with their channels last in memory; auto: everywhere but on GPUs older than a V100"""
    tf32: bool = True
    """GPUs from Ampere on: fp32 products with 10 bits of mantissa, several times faster; false: all 23 bits"""
    deterministic: bool = False
    """only kernels that give the same bits again on the same GPUs, slower; a model with an operation that has none (AlexNet and
    VGG: adaptive pooling) fails at its first step; on a CPU runs repeat without it"""
    compile: bool = False
    """torch.compile the training step, minutes at the start; V100 and newer (no gain seen on a CPU, nor on an H200 at batch 64)"""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """torch.compile's: reduce-overhead replays the kernels of a pass as one CUDA graph (for small batches), max-autotune also tries out
    kernels, many minutes; without run.compile of no effect"""
    sync_every: int = 10
    """steps between synchronisations of the ranks: then losses are logged, and stop requests and a NaN loss are noticed"""
    save_every_minutes: float = 10.0
    """minutes between checkpoints inside an epoch; each epoch ends with one in any case"""
    keep_checkpoints: int = 2
    """latest checkpoints kept, beside the best weights"""
    checkpoint_dir: str = ""
    """local folder where checkpoints are saved first and then copied into the run folder, for one that lies on a slow or
    mounted disk; empty means into the run folder at once"""
    time_limit_minutes: float = 0.0
    """minutes after its start at which the run saves and stops as if asked, to start again later; 0 means no limit"""
    on_changed_settings: Literal["refuse", "accept"] = "refuse"
    """a run folder that holds other settings: refuse to continue it, or accept the new ones (the results say so)"""
    trackers: tuple[str, ...] = ("tensorboard",)
    """where the log's figures are shown, by Accelerate's names: tensorboard, wandb, mlflow, comet_ml, aim, ..."""
    profile: int = 0
    """steps recorded by torch.profiler, after ten steps of warm-up: a trace in the run folder, the ten longest operators in the
    log; 0 disables"""

    def __post_init__(self):
        """Check the ranges."""
        for name in ("folder", "checkpoint_dir"):
            if is_url(place := getattr(self, name)):
                _refuse(f"run.{name}", "a folder: only data are read from a URL", without_secrets(place))
        _at_least("run", self, epochs=1, patience=1, seed=0, sync_every=1, save_every_minutes=0, keep_checkpoints=1)
        _at_least("run", self, time_limit_minutes=0, profile=0)
        if self.seed >= 2**62:
            _refuse("run.seed", "below 2^62", self.seed)


@dataclass(frozen=True)
class Eval:
    """The final evaluation; validation between epochs always uses the single centre crop."""

    split: str = "test"
    """split that is evaluated at the end"""
    views: str = "dihedral8"
    """test-time augmentation: none, flips (4), dihedral8 (8), or spins:N (N random turns and flips)"""
    batch_size: int = 64
    """images of one forward pass in evaluation, the same at any number of processes"""
    image_size: int = 0
    """side of the model's input in validation and evaluation, in pixels; 0 means data.image_size"""
    positive_classes: tuple[str, ...] = ()
    """classes, or sums of them as mel+bcc, that get an operating point: a threshold chosen on validation"""
    sensitivity: float = 0.9
    """sensitivity that a threshold must reach on validation, 0 to 1"""
    prior_correction: bool = True
    """also report the metrics at a uniform class prior (after optim.balance: at the training prior; Menon et al., 2021)"""
    subgroups: tuple[str, ...] = ()
    """columns of the source by which the results are broken down"""

    def __post_init__(self):
        """Check the ranges."""
        _at_least("eval", self, batch_size=1)
        _shares("eval", self, "sensitivity")
        if self.image_size != 0 and self.image_size < 16:
            _refuse("eval.image_size", "0 or at least 16", self.image_size)


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)
    eval: Eval = field(default_factory=Eval)

    def __post_init__(self):
        """Check what settings of several sections make of each other."""
        if self.optim.warmup_epochs > self.run.epochs:
            raise ValueError(
                f"'optim.warmup_epochs' ({self.optim.warmup_epochs}) must not exceed 'run.epochs' ({self.run.epochs})."
            )
        if self.optim.freeze_epochs > self.run.epochs:
            raise ValueError(
                f"'optim.freeze_epochs' ({self.optim.freeze_epochs}) must not exceed 'run.epochs' ({self.run.epochs})."
            )
        if self.data.global_batch_size % self.augment.group_size:
            raise ValueError(
                "'augment.mixup_prob' and 'augment.cutmix_prob' mix pairs: 'data.global_batch_size' "
                f"({self.data.global_batch_size}) must be even."
            )
