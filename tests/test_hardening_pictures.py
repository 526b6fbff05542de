"""Malformed pictures, tars and histories: one error line that names the culprit, code 2, nothing written."""

import gzip
import io
import os
import shutil
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from .hardening import every, refused, short, world

# ---- pictures


def picture(broken=False):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(data, 'JPEG')
    return data.getvalue()[: 200 if broken else None]


def class_folders(root, train=range(10), val=range(10), data=None, name='x.jpg', count=3):
    for part, classes in (('train', train), ('val', val)):
        (root / part).mkdir(parents=True, exist_ok=True)
        for label in classes:
            (root / part / f'c{label}').mkdir()
            for i in range(count):
                (root / part / f'c{label}' / f'{i}{name}').write_bytes(picture() if data is None else data)


def tars(root, members, damage=lambda data: data, mode='w'):
    root.mkdir()
    for name in ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode=mode) as tar:
            for member in members:
                info = tarfile.TarInfo(member)
                content = picture()
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        (root / name).write_bytes(damage(data.getvalue()))


PICTURES = [f'x/c{label}/{i}.jpg' for label in range(10) for i in range(3)]
FOLDERS = {
    'missing': lambda root: None,
    'empty': lambda root: root.mkdir(),
    'file': lambda root: root.write_text('x'),
    'only_train': lambda root: (root / 'train/c0').mkdir(parents=True),
    'no_classes': lambda root: class_folders(root, (), ()),
    'no_pictures': lambda root: class_folders(root, count=0),
    'text': lambda root: class_folders(root, data=b'text'),
    'truncated': lambda root: class_folders(root, data=picture(broken=True)),
    'nothing': lambda root: class_folders(root, data=b''),
    'other_files': lambda root: class_folders(root, name='x.txt'),
    'other_classes': lambda root: class_folders(root, val=(10, 11)),
    'links': lambda root: class_folders(root, data=b'\0' * 100),
    'bmp': lambda root: class_folders(root, data=b'BM' + b'\xff' * 60, name='.bmp'),
    'no_members': lambda root: tars(root, []),
    'no_members_in_folders': lambda root: tars(root, ['a.jpg', 'b.jpg']),
    'text_members': lambda root: tars(root, ['x/c0/a.txt']),
    'text_tar': lambda root: tars(root, PICTURES, lambda data: b'text'),
    'empty_tar': lambda root: tars(root, PICTURES, lambda data: b''),
    'gz': lambda root: tars(root, PICTURES, gzip.compress),
    'truncated_tar': lambda root: tars(root, PICTURES, lambda data: data[: len(data) // 2 + 100]),
    'damaged_tar': lambda root: tars(root, PICTURES, lambda data: data[:1000] + b'\xff' * 5000 + data[6000:]),
}


READERS = ['supernet', 'subnets', 'downstream', 'teacher', 'block_kd', 'lut', 'export']


@pytest.mark.parametrize('run, name', every('accuracy', READERS, FOLDERS, 'truncated') + every(
    'block_kd', [], ['empty', 'no_pictures', 'text_members']))
def test_folders_of_pictures(run, name, tmp_path):
    root = tmp_path / 'pictures'
    FOLDERS[name](root)
    before = sorted(os.listdir(root)) if root.is_dir() else None
    refused(world().base(run, ['--dataset=imagenet', f'--dataset_path={root}']), str(root))
    assert (sorted(os.listdir(root)) if root.is_dir() else None) == before


def test_another_number_of_classes(tmp_path):
    class_folders(tmp_path / 'pictures', range(3), range(3), count=8)
    for run in ('subnets', 'accuracy', 'export'):
        refused(world().base(run, ['--dataset=imagenet', f'--dataset_path={tmp_path}/pictures']), '3 classes', '.pth')


IDX = {
    'text': b'text',
    'empty': b'',
    'short': struct.pack('>iiii', 0x803, 60000, 28, 28) + bytes(100),
    'negative': struct.pack('>iiii', 0x803, -1, 28, 28),
    'no_gzip': b'\x1f\x8b' + bytes(10),
}


@pytest.mark.parametrize('ending', ['', '.gz'])
@pytest.mark.parametrize('name', IDX)
def test_idx_files(name, ending, tmp_path):
    for kind in ('train-images-idx3', 'train-labels-idx1', 't10k-images-idx3', 't10k-labels-idx1'):
        (tmp_path / f'{kind}-ubyte{ending}').write_bytes(IDX[name])
    refused(world().base('accuracy', ['--dataset=mnist', f'--dataset_path={tmp_path}']), 'train-images-idx3-ubyte')


def test_more_images_than_labels(tmp_path):
    for kind, count in (('train', 4), ('t10k', 3)):
        (tmp_path / f'{kind}-images-idx3-ubyte').write_bytes(struct.pack('>iiii', 0x803, 4, 8, 8) + bytes(256))
        (tmp_path / f'{kind}-labels-idx1-ubyte').write_bytes(struct.pack('>ii', 0x801, count) + bytes(count))
    refused(world().base('supernet', ['--dataset=mnist', f'--dataset_path={tmp_path}']), 't10k-labels-idx1-ubyte')


# ---- histories

HISTORIES = {
    'binary': b'\xff\xfe\x80\n',
    'facts': b'encoding,a,b\n',
    'header': b'{facts}\nencoding,a,b\n',
    'columns': b'{header}\nx,1\n',
    'text': b'{header}\nx,{text}\n',
    'twice': b'{header}\n{row}\n{row}\n',
    'nan': b'{header}\n{nan}\n',
    'encoding': b'{header}\nnothing{rest}\n',
    'quote': b'{header}\n"{row}\n',
    'nul': b'{header}\n\0\0\n',
    'empty_line': b'{header}\n\n',
}


PLACES = {'subnets': 'demo-222-111', 'spaces': 'demo/c2_t0.1_a0.01'}


@pytest.mark.parametrize('run, name', every('spaces', ['subnets'], HISTORIES, 'nan'))
def test_histories(run, name, tmp_path):
    folder = PLACES[run]
    shutil.copytree(world().inputs / 'runs' / run, tmp_path / 'out')
    path = tmp_path / 'out' / folder / 'history.csv'
    facts, columns, row = path.read_bytes().split(b'\n')[:3]
    encoding, *numbers = row.split(b',')
    values = {
        b'{facts}': facts,
        b'{header}': facts + b'\n' + columns,
        b'{row}': row,
        b'{text}': b','.join([b'x'] * len(numbers)),
        b'{rest}': b',1' * len(numbers),
        b'{nan}': encoding + b',nan' * len(numbers),
    }
    text = HISTORIES[name]
    for key, value in values.items():
        text = text.replace(key, value)
    path.write_bytes(text)
    refused(world().base(run, ['--resume'], out=tmp_path / 'out'), str(path))


SETTINGS = [b'', b'{', b'[]', b'5', b'{}', b'\xff', b'{"seed": 7}', b'[' * 100000]


@pytest.mark.parametrize('run, content', every('subnets', ['spaces'], SETTINGS, b'{'), ids=short)
def test_settings(run, content, tmp_path):
    """What a history depends on, its first line."""
    folder = PLACES[run]
    shutil.copytree(world().inputs / 'runs' / run, tmp_path / 'out')
    path = tmp_path / 'out' / folder / 'history.csv'
    path.write_bytes(b'# ' + content + path.read_bytes()[path.read_bytes().index(b'\n'):])
    refused(world().base(run, ['--resume'], out=tmp_path / 'out'), str(path))
