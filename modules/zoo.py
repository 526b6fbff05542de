"""Published networks as torch modules, also by timm.create_model('seqnet_vnni_a0') once this is imported.

    get_subnet('SEQnet@vnni-A0', num_classes=10, pretrained=True)    static network from its supernet's checkpoint
    load_network('checkpoints/downstream/…/lsq.pth')                 a network that was written by save_network()
"""
import os
import sys
from collections.abc import Mapping

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureInfo, generate_default_cfgs, register_model

from .errors import UserError
from .modeling.network import FeatureMaps, Network, feature_stages
from .modeling.ops.lsq_plus import quantisation_of, quantised_ops, requantise, set_fp32_mode, set_quant_mode
from .modeling.supernet import Supernet
from .search_space.encoding import parse_subnet, parse_supernet, subnet_config
from .search_space.named import find_subnet, find_supernet, named_subnets, named_supernets
from .search_space.superspace import SearchSpaceError
from .training.checkpoint import (
    checkpoint_folder,
    checkpoint_name,
    load_checkpoint,
    load_weights,
    model_state,
    quantisation_in,
    save_checkpoint,
)
from .training.log import note

CHECKPOINTS = os.path.join('checkpoints', 'supernet_training')
MOST_CLASSES = 10 ** 6                  # a file that says more is damaged
CLASSIFIER = 'stages.logits.blocks.0.linear.weight'         # of a supernet


def find_checkpoint(supernet, quant_mode, root=CHECKPOINTS, align_sample=False, name=None):
    """Path of a supernet's trained weights below `root`: lsq.pth with quant_mode, else checkpoint.pth.

    Looked for in <root>/<published name>/, <root>/<supernet>-align0/ (-align1 with align_sample) and in root itself;
    where root is a file, it is that. `name`: a published name to say in the error. UserError lists what was
    expected where there is none.
    """
    if os.path.isfile(root):
        return os.fspath(root)
    supernet = parse_supernet(supernet)
    names = [known for known, encoding in named_supernets().items() if encoding == str(supernet)]
    published = [] if align_sample else [os.path.join(root, known) for known in names]
    folders = [*published, checkpoint_folder(root, supernet, align_sample), root]
    paths = [os.path.join(folder, checkpoint_name(quant_mode)) for folder in folders]
    for path in paths:
        if os.path.isfile(path):
            return path
    shown = name or (f'{names[0]} ({supernet})' if names else str(supernet))
    other = os.path.join(checkpoint_folder(root, supernet, not align_sample), checkpoint_name(quant_mode))
    hint = f'; there is {other}: {"leave out" if align_sample else "give"} --align_sample'
    hint = hint if os.path.isfile(other) else ''
    raise UserError(f'no checkpoint of {shown}: expected {" or ".join(paths)}{hint}')


def load_supernet(supernet, path, quant_mode=False):
    """Supernet with the weights of a checkpoint file, in int8 with quant_mode; as many classes as the file has.

    quant_mode None: in int8 where the file's LSQ+ scales are trained.
    UserError: no such file, not this supernet's weights, or in int8 weights whose scales were never trained.
    """
    supernet = parse_supernet(supernet)
    checkpoint = load_checkpoint(path)
    try:
        weights = model_state(checkpoint)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    if CLASSIFIER not in weights:
        raise UserError(f'{path}: not the weights of supernet {supernet}: no {CLASSIFIER}')
    shape, features = tuple(weights[CLASSIFIER].shape), max(supernet.superspace.input_widths('logits'))
    if len(shape) != 2 or shape[1] != features or not 0 < shape[0] <= MOST_CLASSES:
        raise UserError(f'{path}: not the weights of supernet {supernet}: {CLASSIFIER} of shape {shape}, expected '
                        f'(classes, {features})')
    whole = requantise(set_quant_mode(Supernet(supernet, shape[0])), **quantisation_in(checkpoint, path))
    load_weights(whole, weights, f'{path}: not the weights of supernet {supernet}')
    trained = any(op.scales_initialized for op in quantised_ops(whole))
    if quant_mode and not trained:
        raise UserError(f'{path}: fp32 weights, whose LSQ+ scales were never trained; int8 needs lsq.pth')
    return whole if quant_mode or quant_mode is None and trained else set_fp32_mode(whole)


def get_subnet(name, num_classes=1000, pretrained=False, quant_mode=False, checkpoint_path=CHECKPOINTS):
    """Static Network of a published subnet name such as 'SEQnet@vnni-A0'.

    pretrained: with the weights of its supernet's checkpoint, <checkpoint_path>/<supernet>/checkpoint.pth, or
    lsq.pth for quant_mode (int8); <supernet> is the published name, or the encoding with -align0. A path is the
    file itself. The head is a new one where the checkpoint has other classes. Batch-norm statistics are the
    supernet's: calibrate them on images. Not pretrained: random weights.
    UserError: unknown name, no such checkpoint, weights that do not fit.
    """
    supernet, subnet = find_subnet(name)
    path = None
    if pretrained:
        path = pretrained if isinstance(pretrained, (str, os.PathLike)) else find_checkpoint(
            supernet, quant_mode, checkpoint_path, name=named_subnets()[name][0])
    return build_network(supernet, subnet, num_classes, path, quant_mode)


def build_network(supernet, subnet, num_classes=1000, path=None, quant_mode=False):
    """Static Network of a subnet of a supernet; path: the supernet's checkpoint, else random. 0 classes: features."""
    if path is None:
        network = Network.build(supernet, subnet, num_classes)
        if quant_mode:
            set_quant_mode(network)
    else:
        whole = load_supernet(supernet, path, quant_mode)
        whole.set_active_subnet(subnet)
        network = whole.get_active_subnet()
    if num_classes != network.num_classes:
        network.reset_classifier(num_classes)
    return network


def take_out(supernet, subnets, path, quant):
    """Static Networks of a supernet's subnets with a checkpoint's weights and head; with `quant` the first is in int8.

    The others are in int8 too where the checkpoint is. Scales that it lacks are left to be initialised on images.
    """
    whole = load_supernet(supernet, path, None if quant else False)
    networks = []
    for subnet in subnets:
        whole.set_active_subnet(subnet)
        networks.append(whole.get_active_subnet())
    if quant and not any(op.is_quantised for op in quantised_ops(whole)):
        note(f'{path}: fp32 weights: int8 begins with LSQ+ scales that are initialised on the training images')
        set_quant_mode(networks[0])
    return networks


def network_checkpoint(network, supernet, subnet, quant_mode, **more):
    """What a file holds from which load_network() builds the network; `more` is stored beside it."""
    return {'supernet': str(supernet), 'subnet': str(subnet), 'num_classes': network.num_classes,
            'quant_mode': bool(quant_mode), **quantisation_of(network), 'state_dict': network.state_dict(), **more}


def save_network(path, network, supernet, subnet, quant_mode, **more):
    """Write network_checkpoint() to a file, whole or not at all."""
    save_checkpoint(path, network_checkpoint(network, supernet, subnet, quant_mode, **more))


def load_network(path):
    """The static Network, in eval mode, of a file by save_network() or downstream_cls.py, in int8 if it was.

    With the bits of weights and the zero points that it was trained with.
    """
    state = load_checkpoint(path)
    supernet, subnet, num_classes, quant_mode, quantisation = _described(state, path)
    network = requantise(build_network(supernet, subnet, num_classes, None, quant_mode), **quantisation)
    if state.get('fp32_head') is True:
        network.get_classifier().set_fp32_mode()
    load_weights(network, state['state_dict'], f'{path}: not the weights of {subnet}')
    return network.eval()


def subnet_of(path):
    """(encoding.Supernet, encoding.Subnet) of a file that load_network() reads."""
    return _described(load_checkpoint(path), path)[:2]


def _described(state, path):
    """(Supernet, Subnet, number of classes, whether in int8, quantisation_in()) that the file of a network says.

    UserError names the file.
    """
    kinds = {'supernet': str, 'subnet': str, 'num_classes': int, 'quant_mode': bool, 'state_dict': Mapping}
    for key, kind in kinds.items():
        if not isinstance(state, dict) or key not in state:
            raise UserError(f'{path}: not a network of downstream_cls.py or eval_specific_net.py: no {key!r} in it')
        if not isinstance(state[key], kind) or kind is int and isinstance(state[key], bool):
            raise UserError(f'{path}: damaged: {key} is a {type(state[key]).__name__}')
    if not 0 <= state['num_classes'] <= MOST_CLASSES:
        raise UserError(f'{path}: damaged: num_classes {state["num_classes"]}')
    try:
        supernet = parse_supernet(state['supernet'])
        subnet = parse_subnet(state['subnet'], supernet, 'weights')
        return supernet, subnet, state['num_classes'], state['quant_mode'], quantisation_in(state, path)
    except SearchSpaceError as error:
        raise UserError(f'{path}: {error}') from None


def timm_name(name):
    """seqnet_vnni_a0 of SEQnet@vnni-A0."""
    return name.lower().replace('@', '_').replace('-', '_')


def _default_cfg(name):
    resolution = find_subnet(name)[1].resolution
    return {'input_size': (3, resolution, resolution), 'pool_size': (1, 1), 'crop_pct': 0.875,
            'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
            'num_classes': 1000, 'first_conv': 'stages.first_conv.0.conv.conv',
            'classifier': 'stages.logits.0.linear', 'license': 'mit'}


default_cfgs = generate_default_cfgs({timm_name(_name): _default_cfg(_name) for _name in named_subnets()})


def _create(name, pretrained=False, num_classes=1000, quant_mode=False, drop_rate=0.0, in_chans=3, global_pool='avg',
            features_only=False, out_indices=None, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None,
            **unknown):
    """A SEQnet with timm's options; pretrained: a checkpoint of its supernet below ./checkpoints, or pretrained_cfg's
    `file`."""
    for option in unknown:
        raise UserError(f'{timm_name(name)}: no option {option!r}')
    for option, value, only in (('in_chans', in_chans, 3), ('global_pool', global_pool, 'avg')):
        if value != only:
            raise UserError(f'{timm_name(name)}: {option} {value!r}: only {only!r} is possible')
    if out_indices is not None and not features_only:
        raise UserError(f'{timm_name(name)}: out_indices goes with features_only=True')
    cfg = dict(default_cfgs[timm_name(name)].default.to_dict(), architecture=timm_name(name))
    for given in (pretrained_cfg, pretrained_cfg_overlay):
        if given is not None and not isinstance(given, str):
            given = given if isinstance(given, dict) else given.to_dict()
            cfg.update((key, value) for key, value in given.items() if value is not None)
    network = get_subnet(name, num_classes, pretrained and (cfg.get('file') or True), quant_mode)
    network.drop_rate = drop_rate
    if features_only:
        network = _feature_maps(name, network, out_indices)
    network.pretrained_cfg = network.default_cfg = cfg
    return network


def _feature_maps(name, network, out_indices):
    """FeatureMaps with timm's feature_info; out_indices: which of the maps at strides 2, 4, 8, 16, 32."""
    infos = [{'num_chs': channels, 'reduction': reduction, 'module': f'stages.{stage}'}
             for stage, channels, reduction in feature_stages(network.config)]
    count = len(infos)
    indices = range(-out_indices, 0) if isinstance(out_indices, int) else range(count) if out_indices is None \
        else out_indices
    if not indices or not all(-count <= i < count for i in indices):
        raise UserError(f'{timm_name(name)}: out_indices {out_indices}: there are {count} maps, 0 to {count - 1}')
    indices = [i % count for i in indices]
    maps = FeatureMaps(network, [infos[i]['module'].partition('.')[2] for i in indices])
    maps.feature_info = FeatureInfo(infos, indices)
    return maps


def _register(name):
    def create(pretrained=False, **options):
        return _create(name, pretrained, **options)
    create.__name__, create.__doc__ = timm_name(name), f'{name} of SpaceEvo (ICCV 2023).'
    create.__module__ = __name__
    setattr(sys.modules[__name__], create.__name__, register_model(create))


for _name in named_subnets():
    _register(_name)

__all__ = ['build_network', 'find_checkpoint', 'find_subnet', 'find_supernet',
           'get_subnet', 'load_network', 'load_supernet', 'named_subnets', 'named_supernets', 'network_checkpoint',
           'save_network', 'subnet_config', 'take_out', 'timm_name', *map(timm_name, named_subnets())]
