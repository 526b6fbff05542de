"""eval_specific_net.py as in the published commands, on checkpoints as they are published."""
import csv
import os

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import eval_specific_net
from modules.modeling.complexity import config_complexity
from modules.search_space.encoding import subnet_config
from modules.zoo import find_subnet, load_network

from .checkpoints import call, fails, published_root
from .launching import run_script

pytestmark = pytest.mark.usefixtures('one_thread')
SHORT = ['--batch_size', 3, '--num_calib_batches', 2, '--num_workers', 0, '--device', 'cpu']


def write_pictures(root, classes):
    """Class folders train/ and val/ of crops of two photographs: 4 and 2 pictures a class."""
    for number, name in enumerate(classes):
        for part, count in (('train', 4), ('val', 2)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                photo, left = Image.fromarray(load_sample_images().images[number % 2]), 40 * i + 10 * number
                photo.crop((left, left, left + 96, left + 96)).save(root / part / name / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """Three of ImageNet's 1000 classes: the first, the second, the last."""
    return write_pictures(tmp_path_factory.mktemp('imagenet'), ['n01440764', 'n01443537', 'n15075141'])


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A working folder with checkpoints/supernet_training/spaceevo@vnni/."""
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'supernet_training').symlink_to(published_root())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _rows(path):
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize('command', [
    'eval_specific_net.py --model_name spaceevo@vnni --dataset_dir ${IN} --quant_mode',
    'eval_specific_net.py --model_name spaceevo@vnni --dataset_dir ${IN}',
    'eval_specific_net.py --model_name SEQnet@vnni-A0 --dataset_dir ${IN}'])
def test_published_commands_run_as_written(command, tree, imagenet, monkeypatch, capsys):
    words = command.replace('${IN}', str(imagenet)).split()[1:]
    assert call(eval_specific_net, monkeypatch, *words, *SHORT, '--num_eval_images', 2) == 0
    out, err = capsys.readouterr()
    name, kind = words[1], 'int8' if '--quant_mode' in words else 'fp32'
    file = 'lsq.pth' if kind == 'int8' else 'checkpoint.pth'
    assert f'{name} in {kind} from checkpoints/supernet_training/spaceevo@vnni/{file}' in out
    assert '3 of the 1000 classes of ImageNet' in err
    rows = _rows(tree / 'checkpoints' / 'eval_specific_net' / f'{name}_{kind}.csv')
    assert len(rows) == (1 if name.startswith('SEQnet') else 2)
    assert list(rows[0]) == ['subnet', 'top1', 'top5', 'loss', 'MFLOPs', 'Mparams', 'ms']
    if name.startswith('SEQnet'):
        supernet, subnet = find_subnet(name)
        mflops, mparams = config_complexity(subnet_config(supernet, subnet).blocks)
        assert rows[0]['subnet'] == str(subnet) and rows[0]['MFLOPs'] == f'{mflops:.4f}'
        assert rows[0]['Mparams'] == f'{mparams:.4f}' and float(rows[0]['ms']) > 1
    else:
        assert f'{name} max: top-1' in out and f'{name} min: top-1' in out
        assert float(rows[0]['MFLOPs']) > float(rows[1]['MFLOPs'])


def test_two_ranks_share_the_images_and_the_network_can_be_saved(tree, imagenet, monkeypatch, capsys):
    args = ['--model_name', 'SEQnet@vnni-A0', '--dataset_dir', imagenet, '--quant_mode', *SHORT]
    output = run_script('eval_specific_net.py', *args, '--output_path', 'two', ranks=2)
    assert output.count('(6 images)') == 1
    assert call(eval_specific_net, monkeypatch, *args, '--save_network', 'net.pth', '--output_path', 'one') == 0
    assert '(6 images)' in capsys.readouterr().out
    one, two = (_rows(tree / folder / 'SEQnet@vnni-A0_int8.csv')[0] for folder in ('one', 'two'))
    assert float(one['loss']) == pytest.approx(float(two['loss']), rel=0.02)
    network = load_network('net.pth')
    assert network.get_classifier().is_quantised and network.num_classes == 1000
    with torch.no_grad():
        assert torch.isfinite(network(torch.randn(1, 3, 160, 160))).all()


def test_mistakes_end_in_one_line_and_code_2(tmp_path, imagenet, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ['--dataset_dir', imagenet, *SHORT]

    def said(text, *args):
        fails(eval_specific_net, monkeypatch, capsys, text, *base, *args)

    said('published are spaceevo@pixel4', '--model_name', 'SEQnet@vnni-A9')
    said('no checkpoint of spaceevo@pixel4: expected checkpoints/supernet_training/spaceevo@pixel4/lsq.pth or '
         'checkpoints/supernet_training/mobilew-122222-155400-align0/lsq.pth',
         '--model_name', 'SEQnet@pixel4-A0', '--quant_mode')
    said('spaceevo@vnni is a supernet', '--model_name', 'spaceevo@vnni', '--save_network', 'x.pth')
    folder = write_pictures(tmp_path / 'cats', ['cat', 'dog'])
    said('the data set has 2 classes, ', '--model_name', 'SEQnet@vnni-A0', '--dataset_dir', folder,
         '--checkpoint_path', published_root())
    said('fp32 weights', '--model_name', 'SEQnet@vnni-A0', '--quant_mode', '--checkpoint_path',
         published_root() / 'spaceevo@vnni' / 'checkpoint.pth')
    assert not [name for name in os.listdir(tmp_path) if name != 'cats']
