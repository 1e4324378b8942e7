"""One run on disk: folder, lock, stop requests, progress, checkpoints, log."""
