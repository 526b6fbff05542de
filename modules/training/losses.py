"""Losses."""
NSR_SIGNALS = ('teacher', 'student')
_MIN_VARIANCE = 1e-6


def nsr_loss(student, teacher, signal='teacher'):
    """Noise-to-signal ratio of a student's feature maps; (N, C, H, W) twice to a scalar.

    Mean over batch and channels of (mean over space of (student - teacher)^2) / (variance over space of the
    teacher's channel). signal='student' divides by the student's variance, as the code did that made the
    published block LUTs.
    """
    if signal not in NSR_SIGNALS:
        raise ValueError(f'signal {signal!r} is not one of {" ".join(NSR_SIGNALS)}')
    student, teacher = student.float(), teacher.float()
    noise = (student - teacher).square().mean((2, 3))
    source = teacher if signal == 'teacher' else student
    return (noise / source.var((2, 3), unbiased=False).clamp_min(_MIN_VARIANCE)).mean()
