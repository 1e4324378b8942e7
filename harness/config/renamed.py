"""Settings and files that had another name before: old name -> what to write today."""

RENAMED = {  # of version 0.1, and what else has changed with the name
    "data.batch_size": "data.global_batch_size",
    "data.batches_ahead": "data.prefetch_batches",
    "data.block_shards": "data.shuffle_block_shards",
    "augment.scale": "augment.crop_side",
    "augment.flip": "augment.hflip_prob",
    "augment.flip_vertical": "augment.vflip_prob",
    "augment.rotate": "augment.rotation_degrees",
    "augment.rotate_probability": "augment.rotation_prob",
    "augment.corners": "augment.fill, and its value 'picture' is 'image'",
    "augment.mixup": "augment.mixup_prob",
    "augment.cutmix": "augment.cutmix_prob",
    "optim.clip": "optim.max_grad_norm",
    "run.log_every": "run.sync_every",
    "run.keep": "run.keep_checkpoints",
    "run.max_minutes": "run.time_limit_minutes",
    "run.resume": "run.on_changed_settings, and its values 'same' and 'force' are 'refuse' and 'accept'",
    "eval.unit": "eval.batch_size",
    "eval.positives": "eval.positive_classes",
    "eval.logit_adjust": "eval.prior_correction, which is true or false",
    "eval.breakdown": "eval.subgroups",
}
RENAMED_FILES = {"seed.yaml": "notebook2021.yaml", "8gpu.yaml": "ham10000_8gpu.yaml", "p100.yaml": "ham10000_p100.yaml"}
