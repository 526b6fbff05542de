"""Losses."""
import torch

NSR_SIGNALS = ('teacher', 'student')
_MIN_VARIANCE = 1e-6


def nsr_loss(student, teacher, signal='teacher'):
    """Noise-to-signal ratio of a student's feature maps; (N, C, H, W) twice to a scalar.

    Mean over batch and channels of (mean over space of (student - teacher)^2) / (variance over space of the
    teacher's channel). signal='student' divides by the student's variance, the unbiased one, as the code did that made
    the published block LUTs.
    """
    if signal not in NSR_SIGNALS:
        raise ValueError(f'signal {signal!r} is not one of {" ".join(NSR_SIGNALS)}')
    student, teacher = student.float(), teacher.float()
    noise = (student - teacher).square().mean((2, 3))
    source = teacher if signal == 'teacher' else student
    return (noise / source.var((2, 3), unbiased=signal == 'student').clamp_min(_MIN_VARIANCE)).mean()


class NSRLoss(torch.nn.Module):
    """nsr_loss() as a module."""

    def __init__(self, signal='teacher'):
        super().__init__()
        self.signal = signal

    def forward(self, student, teacher):
        return nsr_loss(student, teacher, self.signal)


def alpha_divergence(student, teacher, alpha, clip=None):
    """Alpha-divergence of class probabilities, a value for each image; logits (N, classes) twice to (N,).

    With q the student's and p the teacher's probabilities:
    D_alpha(p || q) = (sum_i q_i (p_i / q_i)^alpha - 1) / (alpha (alpha - 1)), and its limits: alpha 1 is
    KL(p || q), alpha 0 is KL(q || p). No gradient reaches the teacher.

    The gradient for the student is -1/alpha sum_i q_i (p_i / q_i)^alpha d log q_i. `clip` bounds the importance
    weight (p_i / q_i)^alpha there and in the value; KL(p || q) has none and is not clipped.
    Source: AlphaNet (Wang et al., ICML 2021), eq. 3 to 6.
    """
    log_q, log_p = student.float().log_softmax(-1), teacher.detach().float().log_softmax(-1)
    if alpha == 1:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if alpha == 0:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    with torch.no_grad():
        weight = (alpha * (log_p - log_q)).exp()
        if clip is not None:
            weight = weight.clamp_max(clip)
        weighted = log_q.exp() * weight
        value = (weighted.sum(-1) - 1) / (alpha * (alpha - 1))
    surrogate = -(weighted * log_q).sum(-1) / alpha         # has the wanted gradient
    return value + surrogate - surrogate.detach()


def adaptive_alpha_loss(student, teacher, alpha_min=-1.0, alpha_max=1.0, clip=5.0):
    """Mean over images of the larger of the two alpha-divergences; logits (N, classes) twice to a scalar.

    Small alphas punish a student that is too sure, large ones a student that misses what the teacher holds
    possible. Source: AlphaNet, eq. 7.
    """
    return torch.maximum(alpha_divergence(student, teacher, alpha_min, clip),
                         alpha_divergence(student, teacher, alpha_max, clip)).mean()
