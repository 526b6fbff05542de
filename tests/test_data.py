"""Data sets, splits, augmentation and loaders, on real pictures: scikit-learn's photos and digits, Fashion-MNIST."""
import argparse
import gzip
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tarfile
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision import datasets

from modules.cli import run
from modules.errors import UserError
from modules.training import sources
from modules.training import tars as tars_module
from modules.training.data import (
    NORMALIZATIONS,
    BrokenImage,
    ImageSet,
    add_data_arguments,
    build_transforms,
    calibration_batches,
    eval_loader,
    open_data,
    train_loader,
)
from modules.training.sources import LAYOUTS, TARS, count_classes, to_rgb

SIZE = 32
FASHION = os.path.join(sources.DEBIAN, 'fashion-mnist')
needs_fashion = pytest.mark.skipif(not os.path.isdir(FASHION), reason='needs apt package dataset-fashion-mnist')
CHINA, FLOWER = (Image.fromarray(image) for image in load_sample_images().images)


def photos(count, side=64, seed=0):
    """Different real pictures: crops of scikit-learn's two photos, in turn."""
    rng = random.Random(seed)
    crops = []
    for i in range(count):
        x, y = rng.randrange(640 - side), rng.randrange(427 - side)
        crops.append((CHINA, FLOWER)[i % 2].crop((x, y, x + side, y + side)))
    return crops


def write_class_folders(root, train=40, val=10):
    for part, count, seed in (('train', train, 1), ('val', val, 2)):
        for i, photo in enumerate(photos(count, seed=seed)):
            folder = root / part / f'n0{i % 2}'
            folder.mkdir(parents=True, exist_ok=True)
            photo.save(folder / f'{part}_{i:03d}.JPEG', quality=95)
    return root


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp('folders'))


@pytest.fixture(scope='module')
def tars(tmp_path_factory, folders):
    root = tmp_path_factory.mktemp('tars')
    for name, part in zip(TARS, ('train', 'val')):
        with tarfile.open(root / name, 'w') as tar:
            tar.add(folders / part, part)
    return root


def load(path, *args, **kwargs):
    return open_data(path, *args, **{'image_size': SIZE, 'valid_size': 8, **kwargs})


def pixels(loader):
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(pixels(a), pixels(b), strict=True))


def names(image_set):
    return [os.path.basename(image_set.source.name(i)) for i in image_set.indices]


# ---------------------------------------------------------------- layouts

def test_class_folders(folders):
    data = load(folders)
    assert (len(data.train), len(data.valid), len(data.test), data.num_classes) == (32, 8, 10, 2)
    image, label = data.train[3]
    assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.uint8 and type(label) is int
    photo = Image.open(data.test.source.name(0)).resize((37, 37), Image.BICUBIC).crop((2, 2, 34, 34))
    expected = (np.asarray(photo) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    image = pixels(eval_loader(data.test, 1))[0][0]
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=1e-5)
    assert [label for _, label in data.test] == [0] * 5 + [1] * 5


def test_split_is_fixed(folders, tars):
    data = load(folders, seed=0)
    held_out = names(data.valid)
    assert not set(held_out) & set(names(data.train)) and len(set(held_out) | set(names(data.train))) == 40
    # the published permutation: the first valid_size entries of randperm with this seed
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2147483647))
    files = sorted(os.listdir(folders / 'train/n00')) + sorted(os.listdir(folders / 'train/n01'))
    assert held_out == [files[i] for i in order[:8]]
    assert names(load(folders, seed=5, augment='auto_augment_tf').valid) == held_out
    assert names(load(tars).valid) == held_out
    assert names(load(folders, labelled=False).valid) == held_out


def test_valid_size_is_capped(folders, capsys):
    assert len(load(folders, valid_size=50000).valid) == 8
    assert 'valid_size 50000 is more than a fifth of the 40 training images: 8' in capsys.readouterr().err
    assert len(load(folders, valid_size=0).train) == 40
    assert 'more than' not in capsys.readouterr().err


@pytest.mark.filterwarnings('ignore:This DataLoader will create 4 worker')
def test_tar_is_read_in_place_by_four_workers(tars, folders):
    data = load(tars)
    assert data.num_classes == 2
    assert same(eval_loader(data.test, 3, workers=4), eval_loader(load(folders).test, 3))
    assert same(train_loader(data.train, 4, epoch=1, workers=4), train_loader(load(folders).train, 4, epoch=1))
    assert sorted(os.listdir(tars)) == sorted([*TARS, *(name + '.index.json' for name in TARS)])


def kept_index(tar):
    members, keep = tars_module.tar_index(tar)
    keep()
    return members


def test_tar_index(tars, tmp_path, monkeypatch, capsys):
    for name in TARS:
        shutil.copy(tars / name, tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    tar = str(tmp_path / TARS[0])
    first = kept_index(tar)
    assert 'looking for the pictures' in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(tars_module, '_scan_tar', lambda path: pytest.fail('scanned again'))
        assert kept_index(tar) == first
    os.utime(tar, (1, 1))                               # another tar: not used any more
    assert kept_index(tar) == first and capsys.readouterr().err
    with open(tar + '.index.json', 'w') as f:           # cut off
        f.write('{"version": 1, "si')
    assert kept_index(tar) == first and capsys.readouterr().err
    os.remove(tar + '.index.json')
    os.mkdir(tar + '.index.json')                       # nothing can be written beside it
    assert kept_index(tar) == first
    assert len(os.listdir(tmp_path / 'cache/spaceevo')) == 1 and capsys.readouterr().err
    assert kept_index(tar) == first and not capsys.readouterr().err


def test_tar_of_class_tars(tars, folders, tmp_path):
    """ILSVRC2012_img_train.tar as it is published: one tar per class inside."""
    with tarfile.open(tmp_path / TARS[0], 'w') as tar:
        for label in ('n01', 'n00'):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode='w') as class_tar:
                for name in sorted(os.listdir(folders / 'train' / label)):
                    class_tar.add(folders / 'train' / label / name, name)
            member = tarfile.TarInfo(f'{label}.tar')
            member.size = inner.tell()
            inner.seek(0)
            tar.addfile(member, inner)
    shutil.copy(tars / TARS[1], tmp_path)
    assert same(train_loader(load(tmp_path).train, 8, epoch=0), train_loader(load(folders).train, 8, epoch=0))


def test_unlabelled_pictures(tmp_path):
    """Any depth and format; transparency on white; huge JPEGs are decoded smaller."""
    flower = FLOWER.crop((100, 0, 400, 300))
    drawing = flower.convert('RGBA')
    drawing.putalpha(Image.new('L', drawing.size, 0))
    (tmp_path / 'a/b').mkdir(parents=True)
    drawing.save(tmp_path / 'a/b/clear.png')
    flower.save(tmp_path / 'a/photo.webp')
    flower.convert('P').save(tmp_path / 'a/palette.png', transparency=0)
    flower.convert('L').save(tmp_path / 'grey.jpg')
    flower.convert('CMYK').save(tmp_path / 'print.jpg')
    FLOWER.resize((6400, 4270)).save(tmp_path / 'wallpaper.jpg')
    Image.new('RGBA', (3000, 1), 'black').save(tmp_path / 'line.png')
    os.symlink(tmp_path, tmp_path / 'a/loop')
    (tmp_path / 'README').write_text('not a picture')
    data = load(tmp_path, labelled=False, valid_size=2, normalize='half')
    assert (len(data.train), len(data.valid), data.num_classes) == (6, 1, 0) and data.test is data.valid
    source = data.train.source
    position = {os.path.relpath(source.name(i), tmp_path): i for i in range(len(source))}
    assert sorted(position) == ['a/b/clear.png', 'a/palette.png', 'a/photo.webp', 'grey.jpg', 'line.png',
                                'print.jpg', 'wallpaper.jpg']
    for i in range(len(source)):
        image, label = source[i]
        assert image.mode == 'RGB' and label == 0
        assert data.train.eval_transform(image).shape == data.train.transform(image).shape == (3, SIZE, SIZE)
    image = data.train.eval_transform(source[position['a/b/clear.png']][0])
    assert (image == 255).all()
    assert source[position['wallpaper.jpg']][0].size == (800, 534)
    assert len(list(eval_loader(data.valid, 4))) == 1 and len(train_loader(data.train, 2, epoch=0)) == 3


def test_sixteen_bit_and_palette_images():
    grey = np.asarray(CHINA.convert('L'))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(to_rgb(deep))[..., 0], grey)
    buffer = io.BytesIO()
    CHINA.quantize(256).save(buffer, 'png', transparency=bytes(range(256)))
    assert to_rgb(Image.open(buffer)).mode == 'RGB'


def test_digits(tmp_path):
    data = open_data(str(tmp_path / 'gone'), 'digits', image_size=SIZE)
    assert data.num_classes == 10 and len(data.train) + len(data.valid) + len(data.test) == 1797
    assert len(data.test) == 359 and len(data.valid) == (1797 - 359) // 5
    images, labels = pixels(eval_loader(data.test, 100))
    assert images.shape == (359, 3, SIZE, SIZE) and set(labels.tolist()) == set(range(10))
    assert not any('Flip' in str(step) for step in data.train.transform.transforms)
    # they can be told apart: nearest class mean, augmented training images against evaluation images
    train, train_labels = pixels(train_loader(data.train, 64, epoch=0))
    means = torch.stack([train[train_labels == c].mean(0) for c in range(10)]).flatten(1)
    right = torch.cdist(images.flatten(1), means).argmin(1) == labels
    assert right.float().mean() > 0.75


@needs_fashion
def test_fashion_mnist(tmp_path):
    data = open_data(tmp_path / 'none', 'fashion-mnist', image_size=SIZE, valid_size=5000)
    assert (len(data.train), len(data.valid), len(data.test), data.num_classes) == (55000, 5000, 10000, 10)
    assert not (tmp_path / 'none').exists()
    assert any('Flip' in str(step) for step in data.train.transform.transforms)
    loader = eval_loader(data.test, 50, limit=10)
    images, labels = pixels(loader)
    assert len(loader) == 10 and images.shape == (500, 3, SIZE, SIZE) and bool(images.isfinite().all())
    train, train_labels = pixels(train_loader(data.train, 64, epoch=0, start_step=len(data.train) // 64 - 10))
    means = torch.stack([train[train_labels == c].mean(0) for c in range(10)]).flatten(1)
    right = torch.cdist(images.flatten(1), means).argmin(1) == labels
    assert right.float().mean() > 0.55
    # torchvision's own layout comes first
    raw = tmp_path / 'FashionMNIST/raw'
    raw.mkdir(parents=True)
    for name in os.listdir(FASHION):
        with gzip.open(os.path.join(FASHION, name)) as f:
            content = f.read()
        if name.startswith('train-labels'):
            content = content[:8] + bytes(60000)        # every training label 0
        (raw / name.removesuffix('.gz')).write_bytes(content)
    assert {open_data(tmp_path, 'FashionMNIST').train.source[i][1] for i in range(50)} == {0}
    torchvision = datasets.FashionMNIST(tmp_path, train=False)
    ours = open_data(tmp_path, 'fashion_mnist').test.source
    assert np.array_equal(np.asarray(torchvision[7][0]), np.asarray(ours[7][0])[..., 0])
    assert torchvision[7][1] == ours[7][1]
    (raw / 't10k-labels-idx1-ubyte').write_bytes(b'\0\0\10\1\0\0')
    with pytest.raises(UserError, match='t10k-labels-idx1-ubyte: expected an idx file'):
        open_data(tmp_path, 'fashion-mnist')


def test_solar_cells(tmp_path):
    """ELPV as its package has it: whole cells, defective above a probability of a half, the same quarter for tests."""
    (tmp_path / 'elpv/images').mkdir(parents=True)
    lines = []
    for i, photo in enumerate(photos(64, side=120)):
        photo.convert('L').save(tmp_path / f'elpv/images/cell{i:04d}.png')
        lines.append(f'images/cell{i:04d}.png  {(0.0, 1 / 3, 2 / 3, 1.0)[i // 2 % 4]:.16f} {("mono", "poly")[i % 2]}\n')
    (tmp_path / 'elpv/labels.csv').write_text(''.join(lines))
    data = load(tmp_path, 'elpv', valid_size=8)
    assert (len(data.train), len(data.valid), len(data.test), data.num_classes) == (40, 8, 16, 2)
    assert sorted(data.test.source.labels) == [0] * 8 + [1] * 8
    assert names(load(tmp_path, 'ELPV', seed=7, valid_size=8).test) == names(data.test)
    assert 'Crop' not in str(data.test.transform)
    (tmp_path / 'elpv/labels.csv').write_text('images/cell0000.png functional\n')
    with pytest.raises(UserError, match='labels.csv: expected lines of picture, probability of a defect and type'):
        load(tmp_path, 'elpv')


@pytest.mark.slow
def test_data_sets_out_of_packages(tmp_path, monkeypatch):
    """Without being root, where a mirror can be reached."""
    monkeypatch.setattr(sources, 'DEBIAN', str(tmp_path / 'none'))
    for name, train, test in (('fashion-mnist', 60000, 10000), ('elpv', 1968, 656)):
        try:
            data = open_data(tmp_path, name, 0)
        except UserError as error:
            pytest.skip(str(error))
        assert (len(data.train), len(data.test)) == (train, test)
        assert not [entry for entry in os.listdir(tmp_path) if entry.startswith('.')]


def test_a_mirror_that_is_not_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'DEBIAN', str(tmp_path / 'none'))
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr(datasets.FashionMNIST, 'download', lambda self: (_ for _ in ()).throw(OSError('no route')))
    with pytest.raises(UserError, match="no route; Debian's package: apt-get: .*No such file"):
        open_data(tmp_path / 'here', 'fashion-mnist')
    assert not (tmp_path / 'here').exists()


def test_torchvision_data_set_by_name(tmp_path):
    """FGVC Aircraft and DTD as torchvision keeps them, with photos of our own; DTD trains on train and val."""
    root = tmp_path / 'fgvc-aircraft-2013b/data'
    (root / 'images').mkdir(parents=True)
    (root / 'variants.txt').write_text('A 1\nB 2\nC 3\n')
    for split, count in (('trainval', 20), ('test', 6)):
        for i, photo in enumerate(photos(count, side=120)):
            photo.save(root / f'images/{split}{i}.jpg')
        lines = [f'{split}{i} {"ABC"[i % 3]} {i % 3 + 1}\n' for i in range(count)]
        (root / f'images_variant_{split}.txt').write_text(''.join(lines))
    data = load(tmp_path, 'fgvc_aircraft', valid_size=3)
    assert (len(data.train), len(data.valid), len(data.test), data.num_classes) == (17, 3, 6, 3)
    assert 'RandomResizedCrop' in str(data.train.transform) and data.test[4][1] == 1
    assert names(load(tmp_path, 'FGVCAircraft', valid_size=3).valid) == names(data.valid)
    pickle.loads(pickle.dumps(data.train))[0]

    root = tmp_path / 'dtd/dtd'
    (root / 'labels').mkdir(parents=True)
    (root / 'images/dotted').mkdir(parents=True)
    for split in ('train', 'val', 'test'):
        photos(1)[0].save(root / f'images/dotted/{split}.jpg')
        (root / f'labels/{split}1.txt').write_text(f'dotted/{split}.jpg\n')
    data = load(tmp_path, 'dtd', valid_size=0)
    assert (len(data.train), len(data.test), data.num_classes) == (2, 1, 1)


def test_failed_download_is_one_line(tmp_path, monkeypatch):
    def download(self):
        raise urllib.error.URLError('no route to host')
    monkeypatch.setattr(datasets.CIFAR10, 'download', download)
    with pytest.raises(UserError) as error:
        open_data(tmp_path, 'cifar-10')
    assert str(error.value) == (f'--dataset cifar-10: expected its files under {tmp_path} as torchvision keeps them, '
                                'found none; downloading them failed: <urlopen error no route to host>')
    with pytest.raises(UserError, match='StanfordCars: .* cannot be downloaded'):
        open_data(tmp_path, 'StanfordCars')
    assert not os.listdir(tmp_path)

    def half_way(self):
        os.makedirs(self.raw_folder)
        raise urllib.error.URLError('no route to host')
    monkeypatch.setattr(datasets.MNIST, 'download', half_way)
    (tmp_path / 'mine').mkdir()
    for path in (tmp_path, tmp_path / 'new'):
        with pytest.raises(UserError, match='no route to host'):
            open_data(path, 'mnist')
    assert os.listdir(tmp_path) == ['mine']


def test_class_folders_by_themselves(folders, tmp_path, capsys):
    for label in ('n00', 'n01'):
        shutil.copytree(folders / 'train' / label, tmp_path / label)
    for name in ('.ipynb_checkpoints', '__MACOSX'):
        shutil.copytree(folders / 'train' / 'n00', tmp_path / name)
    (tmp_path / 'later').mkdir()
    data = load(tmp_path, valid_size=4)
    assert data.num_classes == count_classes(str(tmp_path)) == 2
    assert [len(part) for part in (data.train, data.valid, data.test)] == [28, 4, 8]
    assert '2 classes, 28 pictures to train on, 4 held out, 8 to test with' in capsys.readouterr().err
    unlabelled = load(tmp_path, valid_size=4, labelled=False)       # block KD never sees the test images
    assert unlabelled.test.indices.tolist() == data.test.indices.tolist()
    assert not set(data.test.indices) & set(data.train.indices)


# ---------------------------------------------------------------- error lines

def test_error_lines(folders, tars, tmp_path, capsys):
    def line(path, *args, **kwargs):
        with pytest.raises(UserError) as error:
            load(path, *args, **kwargs)
        assert '\n' not in str(error.value)
        return str(error.value)

    layouts = f'expected {LAYOUTS}'
    assert line(tmp_path / 'gone') == f'{tmp_path}/gone: {layouts}; found no such folder'
    assert line(tmp_path) == f'{tmp_path}: {layouts}; found nothing'
    (tmp_path / 'train').mkdir()
    for i in range(6):
        (tmp_path / f'note{i}.txt').write_text('')
    assert line(tmp_path).endswith('found note0.txt note1.txt note2.txt note3.txt note4.txt … (7 entries)')
    assert 'expected pictures (.jpg' in line(tmp_path, labelled=False)
    photos(1)[0].save(tmp_path / 'train/a.jpg')
    assert line(tmp_path).endswith('(pictures without labels do for block KD only)')
    (tmp_path / 'val').mkdir()
    assert line(tmp_path) == f'{tmp_path}/train: expected one folder per class; found a.jpg'
    (tmp_path / 'train/n00').mkdir()                    # without pictures it is no class
    assert line(tmp_path) == f'{tmp_path}/train: expected one folder per class; found a.jpg n00/'
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    os.rename(tmp_path / 'val/n01', tmp_path / 'val/n07')
    assert 'val: class n07 is not one of the 2 classes of' in line(tmp_path)
    shutil.rmtree(tmp_path / 'train/n01')
    assert line(tmp_path) == f'{tmp_path}/train: expected at least two classes; found n00/ alone'

    assert line(tmp_path, 'cifar11').startswith('--dataset cifar11: expected one of imagenet digits elpv CIFAR10')
    assert '--augment rand: not one of default' in line(folders, augment='rand')
    assert '--valid_size -1' in line(folders, valid_size=-1)
    assert 'normalize' in line(folders, normalize='tf')

    flat = tmp_path / 'flat'
    flat.mkdir()
    shutil.copy(tars / TARS[0], flat)
    assert f'found {TARS[0]}' in line(flat)
    with tarfile.open(flat / TARS[1], 'w') as tar:
        tar.add(folders / 'val/n00/val_000.JPEG', 'ILSVRC2012_val_00000001.JPEG')
    assert line(flat) == (f'{flat}/{TARS[1]}: expected members x/<class>/<file>; found ILSVRC2012_val_00000001.JPEG, '
                          'which has no class')
    assert len(load(flat, labelled=False).test) == 1
    (flat / TARS[1]).write_bytes(gzip.compress(b'x' * 2000))
    assert 'expected an uncompressed tar' in line(flat)
    with tarfile.open(flat / TARS[1], 'w'):
        pass
    assert 'found none' in line(flat)

    with pytest.raises(UserError, match='32 training images are fewer than one step of 2 x 20'):
        train_loader(load(folders).train, 20, epoch=0, world_size=2)
    with pytest.raises(SystemExit) as end:
        run(lambda args: open_data(str(tmp_path / 'gone')), lambda: None)
    assert end.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith('error: ')


def test_arguments():
    for flag in ('--dataset_path', '--dataset_dir', '--imagenet_path'):
        parser = argparse.ArgumentParser()
        add_data_arguments(parser)
        args = parser.parse_args([flag, 'x'])
        assert (args.dataset_path, args.dataset, args.valid_size, args.augment) == ('x', 'imagenet', 50000, 'default')
    assert parser.parse_args([]).dataset_path == './dataset'
    with pytest.raises(SystemExit):
        parser.parse_args(['--num_workers', '-1'])


# ---------------------------------------------------------------- randomness and loaders

@pytest.mark.parametrize('augment', ['default', 'auto_augment_tf'])
def test_pixels_are_a_function_of_seed_epoch_index(folders, augment):
    train = load(folders, augment=augment).train
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    image = train[0, 5][0]
    for epoch in range(8):
        train[epoch, 2]
    list(train_loader(train, 8, epoch=0, workers=1))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate() and states[2] == np.random.get_state()[1].tolist()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    assert torch.equal(train[5][0], image) and torch.equal(load(folders, augment=augment).train[0, 5][0], image)
    assert not torch.equal(train[1, 5][0], image)
    assert not torch.equal(load(folders, augment=augment, seed=1).train[5][0], image)
    with pytest.raises(IndexError):
        train[32]


def test_auto_augment_adds_to_default(folders):
    plain, auto = load(folders).train, load(folders, augment='auto_augment_tf').train
    different = sum(not torch.equal(plain[i][0], auto[i][0]) for i in range(len(plain)))
    assert different > len(plain) // 2
    policy = auto.transform.transforms[2]
    for pair in policy.policy:                          # all 50 operations run, with timm's and Pillow's versions
        for operation in pair:
            operation.prob = 1
            assert operation(CHINA).size == CHINA.size
            if operation.name == 'Posterize':
                kept = [operation.level_fn(level, operation.hparams)[0] for level in (0, 2.4, 2.5, 6, 10)]
                assert kept == [4, 4, 5, 6, 8]
                assert np.asarray(operation(CHINA)).max() > 0
    hparams = policy.policy[0][0].hparams
    assert len(hparams.pop('interpolation')) == 3
    assert hparams == {'translate_const': int(.45 * SIZE), 'img_mean': (124, 116, 104), 'magnitude_std': 0.5}


@pytest.mark.parametrize('augment', ['default', 'auto_augment_tf'])
def test_any_workers_ranks_and_start_step_see_the_same(folders, augment):
    def loader(**kwargs):
        return train_loader(train, kwargs.pop('batch_size', 4), epoch=2, seed=7, **kwargs)
    train = load(folders, augment=augment).train
    whole = list(loader())
    assert len(whole) == len(loader()) == 8
    assert same(loader(workers=2), loader())
    rest = loader(start_step=5, workers=1)
    assert len(rest) == 8 and [torch.equal(a[0], b[0]) for a, b in zip(rest, whole[5:], strict=True)] == [True] * 3
    assert list(loader(start_step=8)) == []
    for step, halves in enumerate(zip(*(loader(batch_size=2, rank=rank, world_size=2) for rank in (0, 1)))):
        assert torch.equal(torch.cat([images for images, _ in halves]), whole[step][0])
    assert not same(loader(), train_loader(train, 4, epoch=3, seed=7))
    assert not same(loader(), train_loader(train, 4, epoch=2, seed=8))
    assert len(train_loader(train, 5, epoch=0)) == 6


def test_skipped_steps_are_not_read(folders, monkeypatch):
    train = load(folders).train
    read = []
    real = type(train.source).__getitem__
    monkeypatch.setattr(type(train.source), '__getitem__', lambda self, i: read.append(i) or real(self, i))
    list(train_loader(train, 4, epoch=0, start_step=7))
    assert len(read) == 4


def test_signals_to_a_whole_job_leave_the_workers_alone(folders):
    """SLURM sends SIGTERM to every process of a job, a terminal Ctrl-C; the main process decides when they end."""
    loader = train_loader(load(folders).train, 2, epoch=0, workers=2)
    batches = iter(loader)
    assert next(batches) and next(batches)                  # one of each worker: both have begun
    workers = multiprocessing.active_children()
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    assert len(workers) == 2 and 2 + sum(1 for _ in batches) == len(loader)
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0


def test_loader_works_with_spawned_workers(tars):
    """Everything a worker gets can be pickled, also with auto_augment_tf and an open tar."""
    train = load(tars, augment='auto_augment_tf').train
    image = train[1, 3][0]
    again = pickle.loads(pickle.dumps(train))
    assert torch.equal(again[1, 3][0], image)
    pickle.dumps(train_loader(train, 4, epoch=0).loader.dataset)


def test_eval_loader_shares(folders):
    test = load(folders).test
    whole, labels = pixels(eval_loader(test, 3))
    assert len(whole) == 10 and [len(images) for images, _ in eval_loader(test, 3)] == [3, 3, 3, 1]
    shares = [pixels(eval_loader(test, 3, rank=rank, world_size=3, workers=rank))[0] for rank in range(3)]
    assert [len(share) for share in shares] == [4, 3, 3]
    for rank, share in enumerate(shares):
        assert torch.equal(share, whole[rank::3])
    assert pixels(eval_loader(test, 3, limit_images=4))[1].tolist() == [0, 0, 1, 1]
    assert pixels(eval_loader(test, 2, limit=2))[1].tolist() == [0, 0, 1, 1]
    assert [len(eval_loader(test, 2, rank=rank, world_size=2, limit=2)) for rank in (0, 1)] == [1, 1]
    assert len(pixels(eval_loader(test, 3, limit=99, limit_images=99))[0]) == 10
    assert list(eval_loader(load(folders, valid_size=0).valid, 3)) == []
    # and with anybody's loader
    assert len(list(DataLoader(test, 5))) == 2


def test_calibration_batches(folders):
    train = load(folders).train
    batches = calibration_batches(train, 5, 3, seed=1)
    assert len(batches) == 3 and same(batches, calibration_batches(load(folders, seed=9).train, 5, 3, seed=1))
    assert not same(batches, calibration_batches(train, 5, 3, seed=2))
    everything = pixels(eval_loader(train.evaluated(), 32))[0]
    images = pixels(batches)[0]
    assert [sum(torch.equal(image, other) for other in everything) for image in images] == [1] * 15
    assert len(pixels(calibration_batches(train, 20, 20))[0]) == 32


# ---------------------------------------------------------------- broken images

@pytest.fixture
def damaged(tmp_path):
    """Three broken pictures in train and two in val."""
    write_class_folders(tmp_path, train=20)
    whole = (tmp_path / 'train/n00/train_000.JPEG').read_bytes()
    (tmp_path / 'train/n00/train_000.JPEG').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'train/n01/train_001.JPEG').write_bytes(b'')
    os.remove(tmp_path / 'train/n00/train_002.JPEG')
    os.symlink(tmp_path / 'gone', tmp_path / 'train/n00/train_002.JPEG')
    (tmp_path / 'val/n00/val_000.JPEG').write_text('<html>not found</html>')
    buffer = io.BytesIO()
    photos(1)[0].save(buffer, 'png')
    (tmp_path / 'val/n01/val_009.JPEG').write_bytes(buffer.getvalue()[:200])
    return tmp_path


@pytest.mark.parametrize('workers', [0, 2])
def test_broken_images_are_skipped_and_counted(damaged, workers, capsys):
    data = load(damaged, valid_size=0)
    for epoch in range(2):
        sizes = [len(images) for images, _ in train_loader(data.train, 4, epoch, workers=workers)]
        assert len(sizes) == 5 and sum(sizes) == 17
    assert [len(images) for images, _ in eval_loader(data.test, 5, workers=workers)] == [4, 4]
    assert len(data.broken) == 5
    _, *lines = capsys.readouterr().err.splitlines()        # the first tells of the data
    assert len(lines) == 5 and lines[-1].startswith('broken image skipped (5 so far): ')
    assert any(line.endswith('train_001.JPEG: cannot identify image file') for line in lines)
    assert any(line.endswith('train_002.JPEG: No such file or directory') for line in lines)
    with pytest.raises(BrokenImage, match='val_000.JPEG: cannot identify'):
        data.test[0]


def test_batches_without_a_readable_image(damaged, capsys):
    data = load(damaged, valid_size=0)
    # evaluation leaves them out; training takes the next readable image, so that all ranks make the same steps
    assert sum(len(images) for images, _ in eval_loader(data.test, 1)) == 8
    for rank in (0, 1):
        sizes = [len(images) for images, _ in train_loader(data.train, 1, 0, rank=rank, world_size=2)]
        assert sizes == [1] * 10
    for label in ('n00', 'n01'):
        for name in os.listdir(damaged / 'train' / label):
            os.remove(damaged / 'train' / label / name)
    for loader in (train_loader(data.train, 4, 0, workers=1), calibration_batches(data.train, 4, 2)):
        with pytest.raises(UserError, match='not one picture could be read; the first: .*No such file'):
            list(loader)


class _Killed:
    """A source whose fourth picture the kernel's out-of-memory killer answers."""
    small = False

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new('RGB', (8, 8)), 0


def test_a_killed_loader_process_is_one_line():
    killed = ImageSet(_Killed(), range(8), build_transforms(8)[1], None, None, {}, NORMALIZATIONS['half'])
    with pytest.raises(UserError, match='a loader process was killed.*--num_workers.*--shm-size'):
        list(eval_loader(killed, 2, workers=1))


def test_broken_members_of_a_tar(tars, tmp_path):
    """A tar that was cut off: what is missing is skipped."""
    with tarfile.open(tmp_path / TARS[1], 'w') as tar:
        for i, photo in enumerate(photos(4)):
            buffer = io.BytesIO()
            photo.save(buffer, 'jpeg')
            member = tarfile.TarInfo(f'val/n00/{i}.jpg')
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    shutil.copy(tars / TARS[0], tmp_path)
    data = load(tmp_path)
    with open(tmp_path / (TARS[1] + '.index.json')) as f:
        index = json.load(f)
    os.truncate(tmp_path / TARS[1], index['offsets'][3] + 100)
    assert [len(images) for images, _ in eval_loader(data.test, 4, workers=1)] == [3]
    assert len(data.broken) == 1


def test_transforms_of_small_images():
    """The whole picture is kept: a lit border column of an 8 x 8 image survives evaluation."""
    train, evaluation = build_transforms(SIZE, small=True)
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 0] = 255
    tensor = evaluation(Image.fromarray(image))
    assert tensor.shape == (3, SIZE, SIZE) and (tensor[:, :, 0] > 240).all() and (tensor[:, :, 8:] < 15).all()
    assert train(Image.fromarray(image)).shape == (3, SIZE, SIZE)
    assert sys.getsizeof(pickle.dumps(train)) < 1 << 14
