"""Settings that cannot be, alone or together: pure.

In: settings by dotted name. Out: nothing, or an error. What stays true: each error names the settings and the values found.
"""


def check(settings: dict) -> None:
    """Refuse settings that cannot be, or that contradict each other.

    Args:
        settings: by dotted name, as from `config.flat`.

    Raises:
        ValueError: naming the setting and the value found.
    """
    at_least = {
        **{
            "data.image_size": 16,
            "data.global_batch_size": 2,
            "data.lanes": 1,
            "data.shuffle_block_shards": 0,
            "data.threads": 0,
        },
        **{"data.prefetch_batches": 1, "data.demo_images": 0, "augment.rotation_degrees": 0, "augment.brightness": 0},
        **{
            "augment.contrast": 0,
            "augment.saturation": 0,
            "optim.lr": 0,
            "optim.weight_decay": 0,
            "optim.max_grad_norm": 0,
        },
        **{"optim.warmup_epochs": 0, "optim.micro_batch": 0, "run.epochs": 1, "run.patience": 1, "run.seed": 0},
        **{
            "run.sync_every": 1,
            "run.save_every_minutes": 0,
            "run.keep_checkpoints": 1,
            "run.time_limit_minutes": 0,
            "eval.batch_size": 1,
        },
        **{"eval.image_size": 0, "eval.prior_correction": 0},
    }
    for key, least in at_least.items():
        if not settings[key] >= least:
            raise ValueError(f"The '{key}' setting must be at least {least}. Got {settings[key]} instead.")
    shares = ("hflip_prob", "vflip_prob", "rotation_prob", "cutout", "mixup_prob", "cutmix_prob")
    for key in (*(f"augment.{name}" for name in shares), "optim.label_smoothing", "eval.sensitivity"):
        if not 0 <= settings[key] <= 1:
            raise ValueError(f"The '{key}' setting must be between 0 and 1. Got {settings[key]} instead.")
    if not 0 <= settings["optim.ema"] < 1:
        raise ValueError(
            f"The 'optim.ema' setting must be at least 0 and below 1, as 0.999. Got {settings['optim.ema']} instead."
        )
    if settings["run.seed"] >= 2**62:
        raise ValueError(f"The 'run.seed' setting must be below 2^62. Got {settings['run.seed']} instead.")
    if 0 < settings["eval.image_size"] < 16:
        raise ValueError(
            f"The 'eval.image_size' setting must be 0 or at least 16. Got {settings['eval.image_size']} instead."
        )
    low, high = settings["augment.crop_side"]
    if not 0 < low <= high <= 1:
        raise ValueError(f"The 'augment.crop_side' setting must be 0 < LOW <= HIGH <= 1. Got {low}, {high} instead.")
    _check_pairs(settings)


def _check_pairs(settings: dict) -> None:
    """Refuse settings that contradict each other."""
    if settings["optim.warmup_epochs"] > settings["run.epochs"]:
        raise ValueError(
            f"'optim.warmup_epochs' ({settings['optim.warmup_epochs']}) must not exceed 'run.epochs' ({settings['run.epochs']})."
        )
    mixup, cutmix = settings["augment.mixup_prob"], settings["augment.cutmix_prob"]
    if mixup + cutmix > 1:
        raise ValueError(
            f"'augment.mixup_prob' ({mixup}) and 'augment.cutmix_prob' ({cutmix}) are probabilities of the same pairs: their sum must "
            "not exceed 1."
        )
    if mixup + cutmix and settings["data.global_batch_size"] % 2:
        raise ValueError(
            f"'augment.mixup_prob' and 'augment.cutmix_prob' mix pairs: 'data.global_batch_size' ({settings['data.global_batch_size']}) must be even."
        )


def check_classes(settings: dict, counts: dict[str, int]) -> None:
    """Refuse settings that this data makes senseless.

    Args:
        counts: training images of each class.

    Raises:
        ValueError: mixing or balancing, where there is one class.
    """
    if sum(1 for images in counts.values() if images) > 1:
        return
    for key in ("augment.mixup_prob", "augment.cutmix_prob", "optim.balance"):
        if settings[key] not in (0, "none"):
            raise ValueError(
                f"'{key}' ({settings[key]}) needs several classes, and the training split of 'data.path' "
                f"({settings['data.path']}) has one. Set {key} to {'none' if key == 'optim.balance' else 0}."
            )
