"""What each part of a student network copies: its channels, its input and target from the teacher, and the loss.

A part is a searchable stage, `stem` or `head` (macro_arch.ENDS).
"""
import torch

from ..search_space.macro_arch import ENDS, IMAGE_CHANNELS, SEARCHABLE_STAGES
from ..training.data import NORMALIZATIONS
from ..training.losses import alpha_divergence, nsr_loss

STEM, HEAD = ENDS


def part_of(block_id):
    """stage3 of stage3_1; stem and head are their own parts."""
    return block_id.split('_')[0]


def parts_of(superspace):
    """All parts of a hyperspace's networks, in order."""
    return (STEM, *superspace.searchable_stages, HEAD)


def loss_name(part):
    """What the loss of a part is called."""
    return 'KL' if part == HEAD else 'NSR'


def teacher_channels(teacher, superspace, part):
    """(channels of the input, of the target) of a part; for the head the latter are the teacher's classes."""
    if part == STEM:
        return IMAGE_CHANNELS, teacher.stage_channels[SEARCHABLE_STAGES[0]][0]
    if part == HEAD:
        return teacher.stage_channels[superspace.searchable_stages[-1]][1], teacher.classifier.out_features
    return teacher.stage_channels[part]


def teacher_maps(teacher, superspace, part, images):
    """(input, target) of a part for images (N, 3, H, W), normalised as the teacher wants them.

    The stem's input are the images as a supernet sees them, which may want another normalisation.
    """
    if part == STEM:
        return _as_supernets_see(images, teacher.mean_std), teacher.forward_stages(images, ['stage0'])['stage0'][1]
    if part == HEAD:
        last = superspace.searchable_stages[-1]
        maps = teacher.forward_stages(images, [last, HEAD])
        return maps[last][1], maps[HEAD][1]
    output, stage_input = teacher.forward_to_stage(images, part)
    return stage_input, output


def _as_supernets_see(images, mean_std):
    (mean, std), (new_mean, new_std) = (
        (torch.tensor(values, device=images.device).view(3, 1, 1) for values in pair)
        for pair in (mean_std, NORMALIZATIONS['imagenet']))
    return (images * std + mean - new_mean) / new_std


def kd_loss(part, output, target, nsr_signal):
    """NSR of feature maps; of the head the mean KL divergence of the student's answers from the target's."""
    if part == HEAD:
        return alpha_divergence(output, target, alpha=1).mean()
    return nsr_loss(output, target, nsr_signal)
