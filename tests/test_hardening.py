"""Malformed encodings and tables: one error line that names the culprit, code 2, nothing written.

The same for flags, checkpoints and pictures: test_hardening_*.py.
"""

import random
import shutil

import pytest

from modules.search_space.encoding import EncodingError, parse_subnet, parse_supernet
from modules.search_space.sampling import sample_subnet

from .hardening import every, refused, short, world

SUPERNETS = [
    '',
    ' ',
    '222-11',
    '222-1111',
    '2222-111',
    '333-111',
    '22x-111',
    '222-119',
    '222-11x',
    '222-111-0',
    'demo',
    'demo-',
    'demo-222-1 1',
    'onnxw-222222-111111',
    'nospace-222-111',
    'demo-２２２-111',
    '222–111',
    'demo-222-111\n',
    '222-111/../../x',
    'spaceevo@nowhere',
    '@',
    'spaceevo@vnni',
    'None',
    '-1',
]
SUBNETS = [
    '',
    'maximum',
    'd',
    'd1_k3_w16_e0_r32',
    'd1#1#1#1#1_k_w_e_r32',
    'SEQnet@vnni-A0',
    '1e9',
    'd1##1_k3_w16_e1_r32',
    'd999999#1#1#1#1_k3_w16_e1_r32',
    'd-1#1#1#1#1_k3_w16_e1_r32',
    'd1#1#1#1#1_k3#3#3#3#3_w16#16#16#24#48_enan#inf#1#1#1_r32',
]
BLOCK_IDS = [
    '',
    'stage0_0',
    'stage7_0',
    'stage1_9',
    'stage1_-1',
    'stage1_0_0',
    'stage1_00',
    'Stage1_0',
    'stage4',
    'stage1_',
    'stage1_1_',
    'stage１_0',
    'stage1_0/..',
    'stage1 _0',
    '*',
    'stage1_x',
]


def mutations(count=60):
    """Valid subnet encodings of the demo space with one to three characters dropped, doubled, changed or added."""
    rng, supernet, found = random.Random(0), parse_supernet('demo-222-111'), []
    while len(found) < count:
        text = list(str(sample_subnet(supernet, rng)))
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(text))
            text[place : place + 1] = rng.choice(
                (
                    [],
                    [text[place]] * 2,
                    [rng.choice('0123456789#_.dkwer -+eNone٣\t')],
                    [text[place], rng.choice('#_.x\n')],
                )
            )
        text = ''.join(text)
        try:
            parse_subnet(text, supernet)
        except EncodingError:
            found.append(text)
    return found


def shown(text, length=24):
    """The beginning of a text as an error line shows it."""
    return repr(text[:length])[1:-1]


SUPERNET_READERS = ['choices', 'supernet', 'downstream', 'subnets']
SUBNET_READERS = [('accuracy', 'subnet_choice'), ('downstream', 'subnet_name')]


@pytest.mark.parametrize('run, text', every('latency', SUPERNET_READERS, SUPERNETS, '222-119'), ids=short)
def test_supernets(run, text):
    flag = '--supernet_choices' if run == 'choices' else '--supernet_choice'
    refused(world().base(run, [f'{flag}={text}']), shown(text))


@pytest.mark.parametrize('reader, text', every(('latency', 'subnet_choice'), SUBNET_READERS, SUBNETS, 'd1#1'),
                         ids=short)
def test_subnets(reader, text):
    run, flag = reader
    refused(world().base(run, [f'--{flag}={text}']), shown(text))


def test_mutated_subnets():
    for text in mutations():
        refused(world().base('latency', [f'--subnet_choice={text}']), shown(text))


@pytest.mark.parametrize('run, text', every('block_kd', ['lsq_block_kd', 'lut'], BLOCK_IDS, 'stage1_9'), ids=short)
def test_block_ids(run, text):
    refused(world().base(run, [f'--stage_list={text}']), shown(text))


# ---- tables

@pytest.mark.parametrize('run', ['choices', 'spaces'])
def test_a_bad_row_of_a_lut(run, tmp_path):
    """All bad rows: test_lut.py."""
    path = tmp_path / 'demo' / 'stage1_2_1.csv'
    shutil.copytree(world().inputs / 'luts' / 'demo', path.parent)
    lines = path.read_text().split('\n')
    lines[2] = 'x'
    path.write_text('\n'.join(lines))
    refused(world().base(run, ['--lut_path', str(tmp_path)]), f'{path}:3', '1 columns')


FILES = {  # content of a block LUT: what is said of it
    'empty': (b'', 'empty'),
    'binary': (bytes(range(256)), 'not plain text'),
    'utf16': ('3#24'.encode('utf-16'), 'not plain text'),
    'no_end': (b'3#24#1.0,1x16x16x16,0.5,1.0,0.1,0.', 'cut off'),
    'json': (b'{"a": 1}\n', 'columns'),
}


@pytest.mark.parametrize('name', FILES)
def test_lut_files(name, tmp_path):
    content, reason = FILES[name]
    folder = tmp_path / 'demo'
    shutil.copytree(world().inputs / 'luts' / 'demo', folder)
    (folder / 'stage1_2_1.csv').write_bytes(content)
    refused(world().base('choices', ['--lut_path', str(tmp_path)]), 'stage1_2_1.csv', reason)
    for data in (content, b'\x1f\x8b' + content, (b'\x1f\x8b\x08' + bytes(20))):
        (folder / 'stage1_2_1.csv').unlink(missing_ok=True)
        (folder / 'stage1_2_1.csv.gz').write_bytes(data)
        refused(world().base('choices', ['--lut_path', str(tmp_path)]), 'stage1_2_1.csv.gz')
    (folder / 'stage1_2_1.csv.gz').unlink()
    refused(world().base('choices', ['--lut_path', str(tmp_path)]), str(folder), 'stage1_2_1')
    (folder / 'stage1_2_1.csv').mkdir()
    refused(world().base('choices', ['--lut_path', str(tmp_path)]), 'stage1_2_1.csv')


INPUTS = {  # lines of input.csv: what is said of them; {ok} is a good line
    'missing': (None, 'no such file'),
    'empty': (b'', 'no subnet'),
    'comments': (b'# nothing\n\n', 'no subnet'),
    'two_columns': (b'demo,222-111\n', 'line 1: 2 values, expected <superspace>,<supernet_choice>,<subnet_choice>'),
    'four_columns': (b'{ok}\n{ok},1\n', 'line 2'),
    'twice': (b'{ok}\n{ok}\n', 'line 2: the same subnet as in line 1'),
    'superspace': (b'nospace,222-111,min\n', "line 1: no superspace 'nospace'"),
    'supernet': (b'{ok}\ndemo,222-11,min\n', 'line 2'),
    'subnet': (b'demo,222-111,d1_k3\n', 'line 1'),
    'other_space': (b'onnxw,111111-000000,{subnet}\n', 'line 1'),
    'semicolons': (b'demo;222-111;{subnet}\n', 'line 1'),
    'quote': (b'demo,222-111,"{subnet}\n', 'line 1'),
    'binary': (b'\x80\x81\xff\x00\xfe' * 9, 'bad.csv'),
    'latin1': (b'{ok}\n# caf\xe9\n', 'line 2'),
    'utf16': ('demo,222-111'.encode('utf-16'), 'bad.csv'),
    'nul': (b'demo,222-111,\0\n', 'line 1'),
    'header': (b'superspace,supernet_choice,subnet_choice\n{ok}\n', 'line 1'),
    'folder': ('folder', 'bad.csv'),
}


INPUT_READERS = ['onnx_tools.benchmark', 'onnx_tools.eval_onnx', 'tflite_tools.export_tflite',
                 'tflite_tools.eval_tflite', 'tflite_tools.benchmark']


@pytest.mark.parametrize('script, name', every('onnx_tools.export_onnx', INPUT_READERS, INPUTS, 'subnet'))
def test_input_csv(script, name, tmp_path):
    content, reason = INPUTS[name]
    path = tmp_path / 'bad.csv'
    ok = (world().inputs / 'input.csv').read_bytes().strip()
    if content == 'folder':
        path.mkdir()
    elif content is not None:
        path.write_bytes(content.replace(b'{ok}', ok).replace(b'{subnet}', ok.split(b',')[2]))
    refused(world().attempt(script, ['--input', str(path), '--model_path', '{out}']), str(path), reason)


BLOCK = 'ResNetBlock_16_16_16_3_0.5_1_relu'
TABLES = {  # a block table: what is said of it
    'not_json': ('{', 'not JSON'),
    'empty': ('', 'not JSON'),
    'list': ('[1]', 'not a JSON object'),
    'binary': (b'\x80\xff', 'not JSON'),
    'twice': (f'{{"{BLOCK}": 1, "{BLOCK}": 1}}', f'{BLOCK}: given twice'),
    'negative': (f'{{"{BLOCK}": -1}}', '-1'),
    'zero': (f'{{"{BLOCK}": 0}}', '0 is not'),
    'nan': (f'{{"{BLOCK}": NaN}}', 'nan'),
    'inf': (f'{{"{BLOCK}": 1e999}}', 'inf'),
    'text': (f'{{"{BLOCK}": "1"}}', "'1'"),
    'null': (f'{{"{BLOCK}": null}}', 'None'),
    'true': (f'{{"{BLOCK}": true}}', 'True'),
    'nested': (f'{{"{BLOCK}": {{"ms": 1}}}}', 'ms'),
    'key': ('{"x": 1}', 'x: not'),
    'key_parts': ('{"A_1_2_3": 1}', 'A_1_2_3'),
    'key_number': ('{"ResNetBlock_16_16_16_3_x_1_relu": 1}', 'ResNetBlock_16_16_16_3_x_1_relu'),
    'key_form': ('{"ResNetBlock_112_16_16_3_1_1_relu": 1}', 'written ResNetBlock_112_16_16_3_1.0_1_relu'),
    'deep': ('[' * 100000, 'bad.json'),
    'huge_int': (f'{{"{BLOCK}": {"9" * 5000}}}', 'bad.json'),
    'no_blocks': ('{}', 'bad.json'),
}


@pytest.mark.parametrize('run, name', every('latency', ['choices', 'subnets', 'lut', 'accuracy'], TABLES, 'negative'))
def test_block_tables(run, name, tmp_path):
    content, reason = TABLES[name]
    path = tmp_path / 'bad.json'
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    refused(world().base(run, ['--platform', str(path)]), '' if name == 'no_blocks' else reason, str(path))


PLATFORMS = ['nowhere', 'nowhere.json', '../latency/onnx_lut', 'onnx_lut/', '/', '.', '..', 'pixel4',
             'cortexA76cpu_tflite21', 'a' * 300]


@pytest.mark.parametrize('run, platform', every('latency', ['choices', 'subnets', 'lut'], PLATFORMS, 'nowhere'),
                         ids=short)
def test_platforms(run, platform):
    refused(world().base(run, [f'--platform={platform}']), shown(platform))
