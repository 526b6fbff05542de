"""Published networks as torch modules, also by timm.create_model('seqnet_vnni_a0')."""
import os
import sys

from timm.models import register_model

from .errors import UserError
from .modeling.network import Network
from .modeling.ops.lsq_plus import set_quant_mode
from .modeling.supernet import Supernet
from .search_space.named import find_subnet, find_supernet, named_subnets, named_supernets
from .training.checkpoint import load_weights

CHECKPOINTS = os.path.join('checkpoints', 'supernet_training')


def get_subnet(name, num_classes=1000, pretrained=False, quant_mode=False, checkpoint_path=CHECKPOINTS):
    """Static Network of a published subnet name such as 'SEQnet@vnni-A0'.

    pretrained: with the weights of its supernet's checkpoint, <checkpoint_path>/<supernet>/checkpoint.pth, or
    lsq.pth for quant_mode (int8); <supernet> is the published name, or the encoding with -align0. A path is the
    file itself. Else the weights are random. UserError: unknown name, no such checkpoint, weights that do not fit.
    """
    supernet, subnet = find_subnet(name)
    if pretrained:
        path = pretrained if isinstance(pretrained, (str, os.PathLike)) else _checkpoint(
            named_subnets()[name][0], supernet, quant_mode, checkpoint_path)
        whole = Supernet(supernet, num_classes)
        load_weights(whole, path, str(supernet))
        whole.set_active_subnet(subnet)
        network = whole.get_active_subnet()
    else:
        network = Network.build(supernet, subnet, num_classes)
    return set_quant_mode(network) if quant_mode else network


def _checkpoint(name, supernet, quant_mode, root):
    file = 'lsq.pth' if quant_mode else 'checkpoint.pth'
    paths = [os.path.join(root, folder, file) for folder in (name, f'{supernet}-align0')]
    for path in paths:
        if os.path.isfile(path):
            return path
    raise UserError(f'no checkpoint of {name}: expected {" or ".join(paths)}')


def timm_name(name):
    """seqnet_vnni_a0 of SEQnet@vnni-A0."""
    return name.lower().replace('@', '_').replace('-', '_')


def _register(name):
    def create(pretrained=False, num_classes=1000, quant_mode=False, **timm_options):
        unknown = [key for key in timm_options if key not in ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir')]
        if unknown:
            raise UserError(f'{timm_name(name)}: no option {unknown[0]!r}')
        return get_subnet(name, num_classes, pretrained, quant_mode)
    create.__name__, create.__doc__ = timm_name(name), f'{name} of SpaceEvo (ICCV 2023).'
    create.__module__ = __name__
    setattr(sys.modules[__name__], create.__name__, register_model(create))


for _name in named_subnets():
    _register(_name)

__all__ = ['find_subnet', 'find_supernet', 'get_subnet', 'named_subnets', 'named_supernets', 'timm_name',
           *map(timm_name, named_subnets())]
