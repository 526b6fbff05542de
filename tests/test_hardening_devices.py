"""Malformed input of what makes platforms, TFLite models and of pipeline.py: one line, code 2, nothing written."""
import json
import os

import pytest

from .conftest import ROOT
from .hardening import every, refused, world

BUILD = ['--platform', 'my_host', '--data', '{in}/platforms', '--output', '{out}']
IMPORT = ['--platform', 'my_host', '--data', '{in}/platforms', '--table', '{in}/good.json']
EXPORT = ['--platform', 'onnx_lut', '--superspace', 'demo', '--output', '{out}/lut.json']
PIPELINE = ['--config-file', os.path.join(ROOT, 'pipelines', 'demo_quick.yaml'), '--dataset', 'digits', '--output_path',
            '{out}/demo']
MODELS = ['--input', '{in}/input.csv', '--model_path', '{out}']
BUILDERS = 'onnx_tools.build_predictor', 'tflite_tools.build_predictor'
NAMES = '', '.', '..', 'a/b', '../x', '/x', 'x.json', '.hidden', 'there', 'a' * 300

# {script: (arguments that are good, {flag: bad values})}
FLAGS = {
    BUILDERS[0]: (BUILD, {
        'minutes': ('0', '-1', 'nan', 'inf', 'x'), 'networks': ('0', '1.5', ''), 'max_drift': ('0', 'nan', 'x'),
        'max_disturbed': ('-0.1', '1.1', 'nan'),
        'seed': ('-1', 'x', '9' * 30), 'threads': ('0', 'many'), 'core': ('-1', '4095', 'x', '99999'),
        'superspace': ('mobile', '../demo', '')}),
    BUILDERS[1]: (BUILD, {'minutes': ('0',), 'threads': ('many',), 'superspace': ('mobile',)}),
    'onnx_tools.import_lut': (IMPORT, {'epochs': ('0', '-1', 'x', '1.5'), 'table': ('nowhere.json', '/', '')}),
    'onnx_tools.export_lut': (EXPORT, {'platform': ('nowhere', 'nowhere.json', '..', ''), 'superspace': ('x', ''),
                                       'output': ('lut.csv', '/', '{in}/input.csv/lut.json')}),
    'pipeline': (PIPELINE, {'dataset': ('cats', ''), 'seed': ('-1', 'x', '1.5'), 'output_path': ('{in}/input.csv',),
                            'platform': ('nowhere', 'nowhere.json', '..', 'tflite27_cpu_int8/'),
                            'latency': ('-1', 'nan', 'fast'), 'config-file': ('nowhere.yaml', '{in}/input.csv'),
                            'measured_name': NAMES[:-2] + ('onnx_lut', 'tflite27_cpu_int8')}),
    'tflite_tools.export_tflite': (MODELS, {'batch_size': ('0', 'x'), 'num_calib_batches': ('0', '1.5'),
                                            'network': ('nowhere.pth',), 'seed': ('x',), 'dataset': ('cats',)}),
    'tflite_tools.eval_tflite': (MODELS, {'num_eval_images': ('0', 'nan'), 'threads': ('0',), 'num_workers': ('-1',),
                                          'network': ('nowhere.pth', '{in}/input.csv')}),
    'tflite_tools.benchmark': (MODELS, {'warmup': ('0', 'x'), 'runs': ('-1', '1e3'), 'threads': ('0', 'nan'),
                                        'mask': ('', '0', 'xyz', '7;rm', '-1'), 'push_binary': ('nowhere',),
                                        'benchmark_binary': ('', 'a b', '$(id)', 'x;y'), 'adb': ('nowhere/adb',)}),
}
OTHERS = {'adb': ['--push_binary', __file__], 'push_binary': ['--adb']}
QUOTED = 'table', 'measured_name'           # whose error line says '' of what is empty
CASES = [(script, flag, value) for script, (_, flags) in FLAGS.items() for flag, values in flags.items()
         for value in values]


@pytest.fixture(scope='module')
def inputs():
    """The World's, with a platform named `there` and a good block table."""
    made = world()
    (made.inputs / 'platforms' / 'there').mkdir(parents=True, exist_ok=True)
    (made.inputs / 'good.json').write_text('{"ResNetBlock_16_16_16_3_0.5_1_relu": 1}')
    return made


@pytest.mark.parametrize('script, flag, value', CASES, ids=lambda value: value[:24])
def test_flags(inputs, script, flag, value):
    words = [f'--{flag}={value}', *OTHERS.get(flag, ())]
    culprit = inputs.arguments([value])[0].removesuffix('/lut.json')
    refused(inputs.attempt(script, [*FLAGS[script][0], *words]), culprit or "'" if flag in QUOTED else culprit or flag)


@pytest.mark.parametrize('script, name', every('onnx_tools.import_lut', BUILDERS, NAMES, 'there'))
def test_names_of_platforms(inputs, script, name):
    words = IMPORT if 'import' in script else BUILD
    refused(inputs.attempt(script, [*words, f'--platform={name}']), name[:200] or "''")


def test_a_table_to_import(inputs, tmp_path):
    """All their damages: test_hardening.py."""
    path = tmp_path / 'bad.json'
    path.write_text('{"x": 1}')
    refused(inputs.attempt('onnx_tools.import_lut', [*IMPORT, '--table', str(path)]), str(path), 'x: not')


LINE = ('{facts}\n{"chunk": 0, "reference_ms": 0.2, "seconds": 1.0, "rows": [["fit", 0.1, 0.01, '
        '"ResNetBlock_16_16_16_3_0.5_1_relu"]]}\n')
MEASUREMENTS = {  # measurements of a stopped run, {facts} its first line: what is said of them
    'binary': (b'\x80\xff\x00', 'older version'),
    'device': ('# {"device": "another"}\n', 'made with device another'),
    'csv': ('{facts}\nchunk,use,ms\n', 'not a line of this run'),
    'cells': ('{facts}\n{"chunk": 0}\n', 'not a line of this run'),
    'text': (LINE.replace('0.1,', '"quick",'), 'quick'),
    'nan': (LINE.replace('0.1,', 'NaN,'), 'finite'),
    'block': (LINE.replace('ResNetBlock', 'Res_Net'), 'not a line of this run'),
    'number': (LINE.replace('"chunk": 0', '"chunk": "x"'), 'not a line of this run'),
    'other_blocks': (LINE, 'chunk 0 holds other blocks'),
}


@pytest.mark.parametrize('name', MEASUREMENTS)
def test_measurements_of_a_stopped_run(inputs, name):
    from modules.deploy.devices import OnnxDevice
    content, reason = MEASUREMENTS[name]
    path = inputs.inputs / 'measured' / 'my_host' / 'measurements.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {'device': str(OnnxDevice(1)), 'superspaces': ['demo'], 'networks': 15, 'seed': 0}
    path.write_bytes(content.replace('{facts}', '# ' + json.dumps(facts)).encode() if isinstance(content, str)
                     else content)
    refused(inputs.attempt('onnx_tools.build_predictor', [*BUILD, '--superspace', 'demo', '--resume', '--output',
                                                          '{in}/measured']), str(path), reason)
