"""What makes training faster and changes its rounding: bf16 autocast, compiled fake-quantisers, memory order."""
import contextlib
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..modeling.ops.fake_quantise import check_quantisers, compile_quantisers
from ..settings import setting
from .log import note


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What every training has beside its recipe, and what decides nothing about its result."""
    resume: bool = setting(False, 'continue from the checkpoint in the output folder, if there is one', in_file=False,
                           decides=False)
    compile: str = setting('auto', 'fake-quantise in int8 by compiled kernels: on CPUs of a C++ compiler, on GPUs of '
                           'Triton; auto: where that works', const='on', choices=('auto', 'on', 'off'), in_file=False,
                           decides=False)
    channels_last: bool = setting(True, 'NHWC memory: faster on CPUs, not measured on GPUs', decides=False)
    num_workers: int = setting(0, 'loader processes per rank', flags=(), in_file=False, decides=False)


def choose_quantisers(choice, quant, device):
    """Use compiled fake-quantisers from now on or not, by --compile.

    UserError where they are asked for and cannot be compiled; for auto a line says so.
    """
    compile_quantisers(False)
    if choice == 'on' and not quant:
        note('--compile speeds up int8 training only')
    if not quant or choice == 'off':
        return
    compile_quantisers()
    try:
        check_quantisers(device)
    except UserError as error:
        if choice == 'on':
            raise
        compile_quantisers(False)
        note(f'{error}; int8 continues without them, slower')


def memory_format(settings):
    """Where the values of a pixel lie: side by side (NHWC), or each channel by itself (NCHW)."""
    return torch.channels_last if settings.channels_last else torch.contiguous_format


def use_amp(asked, device):
    """Whether to compute in bf16; a line says where that was asked for in vain."""
    if not asked:
        return False
    if device.type != 'cuda':
        note('--amp: only on GPUs; this run computes in float32')
        return False
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        note('--amp: this GPU has no bf16 of its own, and fp16 with a gradient scaler is not there; this run computes '
             'in float32')
        return False
    return True


def autocast(device, enabled):
    """Inside, convolutions and matrix products compute in bf16 where `enabled`; quantisers stay in float32."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()
