"""Parameter groups and learning-rate schedules."""
import math

from ..modeling.ops.lsq_plus import QBase
from ..modeling.ops.op import is_norm


def parameter_groups(model, weight_decay):
    """Two groups: weights with `weight_decay`; norms, biases and LSQ+'s sw, sa, beta without."""
    plain = {id(p) for module in model.modules() if is_norm(module) for p in module.parameters()}
    plain |= {id(p) for module in model.modules() if isinstance(module, QBase)
              for p in (module.sw, module.sa, module.beta)}
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if id(parameter) in plain or name.endswith('bias') else decayed).append(parameter)
    return [{'params': decayed, 'weight_decay': weight_decay}, {'params': others, 'weight_decay': 0.0}]


def cosine(base, step, total):
    """Learning rate after `step` of `total` steps, from `base` down to 0 along a half cosine."""
    return 0.5 * base * (1 + math.cos(math.pi * min(step, total) / max(1, total)))


def set_learning_rate(optimizer, value):
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group['lr'] = value


def warmup_cosine(base, step, total, warmup):
    """Learning rate of step 0, 1, … of `total`: linear up to `base` over `warmup` steps, then a half cosine to 0."""
    if step < warmup:
        return base * (step + 1) / warmup
    return cosine(base, step - warmup, total - warmup)


def warmup_linear(base, step, total, warmup):
    """The same with a straight line down to 0 instead of the cosine."""
    if step < warmup:
        return base * (step + 1) / warmup
    return base * (1 - min(step - warmup, total - warmup) / max(1, total - warmup))
