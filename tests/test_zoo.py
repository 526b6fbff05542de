"""Published networks for others: timm models, pretrained slices, files of static networks, where checkpoints lie."""
import random

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from modules import zoo
from modules.errors import UserError
from modules.modeling.ops.lsq_plus import quantised_ops
from modules.modeling.supernet import Supernet
from modules.search_space import named
from modules.search_space.sampling import sample_subnet
from modules.zoo import build_network, find_checkpoint, get_subnet, load_network, load_supernet, save_network

from .checkpoints import random_supernet, write_supernet

pytestmark = pytest.mark.usefixtures('one_thread')
DEMO = 'demo-012-111'
SUBNET = str(sample_subnet(DEMO, random.Random(3)))


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """A published supernet of the demo hyperspace, SEQnet@demo-A0 in it, and both checkpoints below a root."""
    monkeypatch.setattr(named, '_results', lambda: {
        'specific_supernet_encoding_dict': {'spaceevo@demo': DEMO},
        'specific_subnet_encoding_dict': {'SEQnet@demo-A0': ['spaceevo@demo', SUBNET]}})
    for file, quant in (('checkpoint.pth', False), ('lsq.pth', True)):
        write_supernet(tmp_path / 'spaceevo@demo' / file, DEMO, 10, quant)
    return tmp_path


def test_a_timm_model_trains_and_has_timms_interface():
    network = timm.create_model('seqnet_vnni_a0', num_classes=5, drop_rate=0.2)
    optimizer = create_optimizer_v2(network, 'sgd', lr=0.1)
    images = torch.randn(2, 3, 48, 48)
    before = network.get_classifier().weight.clone()
    torch.nn.functional.cross_entropy(network(images), torch.tensor([0, 4])).backward()
    optimizer.step()
    assert not torch.equal(before, network.get_classifier().weight)
    assert network.drop_rate == 0.2 and network.num_classes == 5
    network.eval()
    features = network.forward_features(images)
    hidden = network.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, network.num_features) == (2, 1920)
    torch.testing.assert_close(network.get_classifier()(hidden), network(images))
    network.reset_classifier(0)
    torch.testing.assert_close(network(images), hidden)
    assert network.num_classes == 0 and isinstance(network.get_classifier(), torch.nn.Identity)
    network.reset_classifier(3)
    assert network(images).shape == (2, 3) and network.drop_rate == 0.2 and not network.get_classifier().is_quantised
    assert [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)] == [0.2]
    cfg = timm.data.resolve_model_data_config(network)
    assert cfg['input_size'] == (3, 160, 160) and cfg['mean'] == (0.485, 0.456, 0.406)
    assert network.get_submodule(network.pretrained_cfg['classifier']) is network.get_classifier()
    assert isinstance(network.get_submodule(network.default_cfg['first_conv']), torch.nn.Conv2d)
    with pytest.raises(ValueError, match="global_pool ''"):
        network.reset_classifier(3, '')


def test_timm_feature_maps_have_the_channels_and_reductions_they_say():
    image = torch.randn(1, 3, 75, 96)
    for options, reductions in (({}, [2, 4, 8, 16, 32]), ({'out_indices': (1, -1)}, [4, 32]),
                                ({'out_indices': 2}, [16, 32])):
        network = timm.create_model('seqnet_vnni_a0', features_only=True, **options).eval()
        with torch.no_grad():
            maps = network(image)
        assert network.feature_info.reduction() == reductions
        assert [m.shape for m in maps] == [(1, channels, -(-75 // r), 96 // r) for channels, r
                                           in zip(network.feature_info.channels(), reductions)]
        assert not any(key.startswith(('stages.logits', 'stages.final_expand')) for key in network.state_dict())


@pytest.mark.parametrize('options, said', [
    ({'drop_path_rate': 0.1}, "seqnet_vnni_a0: no option 'drop_path_rate'"), ({'in_chans': 1}, 'in_chans 1'),
    ({'global_pool': ''}, "global_pool ''"), ({'out_indices': (1,)}, 'features_only=True'),
    ({'features_only': True, 'out_indices': (5,)}, 'there are 5 maps'),
    ({'pretrained': True, 'pretrained_cfg_overlay': {'file': 'nowhere.pth'}}, 'nowhere.pth: no such checkpoint')])
def test_what_a_timm_model_cannot_do_is_a_clear_error(options, said):
    with pytest.raises(UserError, match=said):
        timm.create_model('seqnet_vnni_a0', **options)


def test_pretrained_networks_keep_their_scales_and_get_a_new_head_for_other_classes(demo):
    images = torch.randn(2, 3, 32, 32)
    for quant in (False, True):
        whole = random_supernet(DEMO, 10, quant).eval()
        whole.set_active_subnet(SUBNET)
        same = get_subnet('SEQnet@demo-A0', 10, True, quant, str(demo)).eval()
        with torch.no_grad():
            torch.testing.assert_close(same(images), whole(images))
        other = get_subnet('SEQnet@demo-A0', 7, True, quant, str(demo)).eval()
        head = other.get_classifier()
        assert head.is_quantised == quant and head.weight.shape == (7, 512) and not head.scales_initialized
        for ours, theirs in zip(quantised_ops(other)[:-1], quantised_ops(same)):
            assert ours.scales_initialized == quant and torch.equal(ours.sa, theirs.sa)
        with torch.no_grad():
            torch.testing.assert_close(other.forward_features(images), same.forward_features(images))
            assert other(images).shape == (2, 7) and head.scales_initialized == quant
    assert get_subnet('SEQnet@demo-A0', 0, True, True, str(demo)).num_classes == 0


def test_supernet_files_that_do_not_fit_are_clear_errors(demo):
    fp32, lsq = (str(demo / 'spaceevo@demo' / name) for name in ('checkpoint.pth', 'lsq.pth'))
    assert load_supernet(DEMO, lsq, True).num_classes == 10
    with pytest.raises(UserError, match=r'checkpoint.pth: fp32 weights, whose LSQ\+ scales were never trained'):
        load_supernet(DEMO, fp32, True)
    with pytest.raises(UserError, match=r'checkpoint.pth: not the weights of supernet demo-111-111: keys \d+ missing'):
        load_supernet('demo-111-111', fp32)
    torch.save({'epoch': 1}, demo / 'empty.pth')
    with pytest.raises(UserError, match='empty.pth: no weights in it'):
        load_supernet(DEMO, demo / 'empty.pth')
    torch.save({'a': torch.ones(1)}, demo / 'other.pth')
    with pytest.raises(UserError, match='other.pth: not the weights of supernet demo-012-111'):
        load_supernet(DEMO, demo / 'other.pth')


def test_checkpoints_are_found_where_they_may_lie(demo):
    def find(*args, **kwargs):
        return find_checkpoint(DEMO, *args, **kwargs).removeprefix(f'{demo}/')

    assert find(True, str(demo)) == 'spaceevo@demo/lsq.pth'
    assert find(False, str(demo / 'spaceevo@demo')) == 'checkpoint.pth'.join(['spaceevo@demo/', ''])
    assert find(False, str(demo / 'spaceevo@demo' / 'lsq.pth')) == 'spaceevo@demo/lsq.pth'
    with pytest.raises(UserError, match=r'no checkpoint of spaceevo@demo \(demo-012-111\): expected '
                                        r'\S+-align1/lsq.pth or \S+lsq.pth$'):
        find(True, str(demo), align_sample=True)
    (demo / f'{DEMO}-align1').mkdir()
    (demo / 'spaceevo@demo' / 'lsq.pth').rename(demo / f'{DEMO}-align1' / 'lsq.pth')
    assert find(True, str(demo), align_sample=True) == f'{DEMO}-align1/lsq.pth'
    with pytest.raises(UserError, match=r'expected \S+@demo/lsq.pth or \S+-align0/lsq.pth or .*; there is '
                                        r'\S+-align1/lsq.pth: give --align_sample$'):
        find(True, str(demo))


@pytest.mark.parametrize('num_classes, quant', [(7, True), (10, False), (0, True)])
def test_a_network_file_is_enough_to_build_the_network_again(tmp_path, num_classes, quant):
    network = build_network(DEMO, SUBNET, num_classes, None, quant)
    images = torch.randn(4, 3, 40, 40)
    with torch.no_grad():
        network.train()(images)                     # statistics, and scales
        save_network(tmp_path / 'network.pth', network, DEMO, SUBNET, quant, note='x')
        again = load_network(tmp_path / 'network.pth')
        assert not again.training and again.num_classes == num_classes
        assert all(op.is_quantised == quant == op.scales_initialized for op in quantised_ops(again))
        assert torch.equal(again(images), network.eval()(images))


def test_files_that_hold_no_network_are_clear_errors(tmp_path):
    torch.save({'state_dict': Supernet.build_from_str(DEMO, 10).state_dict()}, tmp_path / 'supernet.pth')
    with pytest.raises(UserError, match="supernet.pth: not a network of downstream_cls.py .*no 'supernet' in it"):
        load_network(tmp_path / 'supernet.pth')
    network = build_network(DEMO, SUBNET, 3)
    torch.save({**zoo.network_checkpoint(network, DEMO, SUBNET, False), 'num_classes': 4}, tmp_path / 'wrong.pth')
    with pytest.raises(UserError, match=r'wrong.pth: not the weights of .*linear.weight 3x512 instead of 4x512'):
        load_network(tmp_path / 'wrong.pth')
