"""The learning rate as a pure function of the step."""

import math

from nanogpt.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine down to `min_lr` (Loshchilov and Hutter 2017), then constant."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    progress = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)
