"""Malformed encodings and tables: one error line that names the culprit, code 2, nothing written.

The same for flags, checkpoints and pictures: test_hardening_*.py.
"""

import random
import shutil

import pytest

from modules.search_space.encoding import EncodingError, parse_subnet, parse_supernet
from modules.search_space.sampling import sample_subnet

from .hardening import refused, world

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
    '9' * 5000,
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
    'd' + '1#' * 5000 + '1_k3_w3_e1_r32',
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


def mutations(count=100):
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


@pytest.mark.parametrize('run', ['latency', 'choices', 'supernet', 'downstream', 'subnets'])
@pytest.mark.parametrize('text', SUPERNETS, ids=lambda text: ascii(text[:20]))
def test_supernets(run, text):
    flag = '--supernet_choices' if run == 'choices' else '--supernet_choice'
    refused(world().base(run, [f'{flag}={text}']), shown(text))


@pytest.mark.parametrize('text', SUBNETS, ids=lambda text: ascii(text[:20]))
def test_subnets(text):
    refused(world().base('latency', [f'--subnet_choice={text}']), shown(text))
    refused(world().base('accuracy', [f'--subnet_choice={text}']), shown(text))
    refused(world().base('downstream', [f'--subnet_name={text}']), shown(text))


@pytest.mark.parametrize('text', mutations(), ids=lambda text: ascii(text[:30]))
def test_mutated_subnets(text):
    refused(world().base('latency', [f'--subnet_choice={text}']), shown(text))


@pytest.mark.parametrize('run', ['block_kd', 'lsq_block_kd', 'lut'])
@pytest.mark.parametrize('text', BLOCK_IDS)
def test_block_ids(run, text):
    refused(world().base(run, [f'--stage_list={text}']), shown(text))


# ---- tables

ROWS = {
    'columns_5': ('{stage},1x16x{hw}x{hw},0.5,1.0,0.1', '5 columns'),
    'columns_7': ('{row},1', '7 columns'),
    'one_column': ('x', '1 columns'),
    'empty_line': ('', 'an empty line'),
    'nan': ('{stage},1x16x{hw}x{hw},nan,1.0,0.1,0.2', "NSR loss 'nan'"),
    'inf': ('{stage},1x16x{hw}x{hw},0.5,1.0,0.1,inf', "latency (ms) 'inf'"),
    'huge': ('{stage},1x16x{hw}x{hw},0.5,1.0,0.1,1e999', 'latency (ms) inf'),
    'negative': ('{stage},1x16x{hw}x{hw},-0.5,1.0,0.1,0.2', "NSR loss '-0.5'"),
    'zero': ('{stage},1x16x{hw}x{hw},0.0000,1.0,0.1,0.2', 'NSR loss 0'),
    'text': ('{stage},1x16x{hw}x{hw},a lot,1.0,0.1,0.2', "NSR loss 'a lot'"),
    'spaces': ('{stage},1x16x{hw}x{hw}, 0.5,1.0,0.1,0.2', "NSR loss ' 0.5'"),
    'shape': ('{stage},16x{hw}x{hw},0.5,1.0,0.1,0.2', 'input shape'),
    'not_square': ('{stage},1x16x{hw}x7,0.5,1.0,0.1,0.2', 'input shape'),
    'input_width': ('{stage},1x17x{hw}x{hw},0.5,1.0,0.1,0.2', 'input width 17'),
    'input_size': ('{stage},1x16x999999x999999,0.5,1.0,0.1,0.2', '999999'),
    'kernel': ('9#16#1.0,1x16x{hw}x{hw},0.5,1.0,0.1,0.2', 'kernel 9'),
    'window': ('3#999#1.0,1x16x{hw}x{hw},0.5,1.0,0.1,0.2', 'width 999'),
    'expand': ('3#24#7,1x16x{hw}x{hw},0.5,1.0,0.1,0.2', 'expand ratio 7'),
    'depth': ('{stage}_{stage}_{stage}_{stage},1x16x{hw}x{hw},0.5,1.0,0.1,0.2', 'depth'),
    'quotes': ('"{stage}","1x16x{hw}x{hw}",0.5,1.0,0.1,0.2', 'input shape'),
    'semicolons': ('{stage};1x16x{hw}x{hw};0.5;1.0;0.1;0.2', '1 columns'),
    'header': ('sub_stage,input_shape,loss,flops,params,latency', 'input shape'),
    'not_ascii': ('{stage},1x16x{hw}x{hw},0.5,1.0,0.1,0.2µ', 'not plain text'),
    'nul': ('{stage},1x16x{hw}x{hw},0.5,1.0,0.1,0.2\0', 'latency (ms)'),
}


@pytest.mark.parametrize('name', ROWS)
def test_lut_rows(name, tmp_path):
    text, reason = ROWS[name]
    folder = tmp_path / 'demo'
    shutil.copytree(world().inputs / 'luts' / 'demo', folder)
    path = folder / 'stage1_2_1.csv'
    lines = path.read_text().split('\n')
    stage, shape, *_ = lines[2].split(',')
    lines[2] = text.format(stage=stage.split('_')[0], hw=shape.split('x')[-1], row=lines[2])
    path.write_text('\n'.join(lines), encoding='utf-8')
    refused(world().base('choices', ['--lut_path', str(tmp_path)]), f'{path}:3', reason)
    refused(world().base('spaces', ['--lut_path', str(tmp_path)]), f'{path}:3', reason)


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
    'two_columns': (b'demo,222-111\n', 'line 1'),
    'four_columns': (b'{ok}\n{ok},1\n', 'line 2'),
    'twice': (b'{ok}\n{ok}\n', 'line 2'),
    'superspace': (b'nospace,222-111,min\n', 'line 1'),
    'supernet': (b'{ok}\ndemo,222-11,min\n', 'line 2'),
    'subnet': (b'demo,222-111,d1_k3\n', 'line 1'),
    'other_space': (b'onnxw,111111-000000,{subnet}\n', 'line 1'),
    'semicolons': (b'demo;222-111;{subnet}\n', 'line 1'),
    'quote': (b'demo,222-111,"{subnet}\n', 'line 1'),
    'binary': (b'\x80\x81\xff\x00\xfe' * 9, 'bad.csv'),
    'latin1': (b'{ok}\n# caf\xe9\n', 'line 2'),
    'utf16': ('demo,222-111'.encode('utf-16'), 'bad.csv'),
    'nul': (b'demo,222-111,\0\n', 'line 1'),
    'long': (b'demo,222-111,' + b'1#' * 100000 + b'\n', 'line 1'),
    'header': (b'superspace,supernet_choice,subnet_choice\n{ok}\n', 'line 1'),
    'folder': ('folder', 'bad.csv'),
}


@pytest.mark.parametrize('run', ['random_export', 'benchmark', 'eval_onnx'])
@pytest.mark.parametrize('name', INPUTS)
def test_input_csv(run, name, tmp_path):
    content, reason = INPUTS[name]
    path = tmp_path / 'bad.csv'
    ok = (world().inputs / 'input.csv').read_bytes().strip()
    if content == 'folder':
        path.mkdir()
    elif content is not None:
        path.write_bytes(content.replace(b'{ok}', ok).replace(b'{subnet}', ok.split(b',')[2]))
    refused(world().base(run, ['--input', str(path)]), str(path), reason)


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
    'deep': ('[' * 100000, 'bad.json'),
    'huge_int': (f'{{"{BLOCK}": {"9" * 5000}}}', 'bad.json'),
    'no_blocks': ('{}', 'bad.json'),
}


@pytest.mark.parametrize('name', TABLES)
def test_block_tables(name, tmp_path):
    content, reason = TABLES[name]
    path = tmp_path / 'bad.json'
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    for run in ('latency', 'choices', 'subnets', 'lut', 'accuracy'):
        refused(world().base(run, ['--platform', str(path)]), '' if name == 'no_blocks' else reason, str(path))
    refused(world().base('latency', ['--fallback', '--platform', str(path)]), str(path), reason)


@pytest.mark.parametrize(
    'platform',
    [
        'nowhere',
        'nowhere.json',
        '../latency/onnx_lut',
        'onnx_lut/',
        '/',
        '.',
        '..',
        'pixel4',
        'cortexA76cpu_tflite21',
        'a' * 300,
    ],
)
@pytest.mark.parametrize('run', ['latency', 'choices', 'subnets', 'lut'])
def test_platforms(run, platform):
    refused(world().base(run, [f'--platform={platform}']), shown(platform))
