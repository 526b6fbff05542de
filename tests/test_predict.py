"""Exported models say how pictures become their input: predict.py and the documented snippet do it."""
import os

import numpy as np
import pytest
from PIL import Image

from modules.deploy.predict import prepare, preprocessing
from modules.deploy.runtimes import ONNX
from modules.modeling.ops.op import resize
from modules.training.data import open_data, to_floats
from onnx_tools import export_onnx, predict

from .blocks import write_trained
from .checkpoints import call, fails
from .conftest import ROOT

pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """(INT8 model of a network trained on digits, {file of a test picture: class})."""
    folder = tmp_path_factory.mktemp('predict')
    write_trained(folder / 'net.pth')
    with pytest.MonkeyPatch.context() as patch:
        assert call(export_onnx, patch, '--network', folder / 'net.pth', '--quant_mode', '--dataset', 'digits',
                    '--num_workers', 0, '--model_path', folder / 'models', '--num_calib_batches', 2,
                    '--reduce_range') == 0
    test, files = open_data('', 'digits').test, {}
    for number in range(60):
        picture, label = test.source[int(test.indices[number])]
        path = folder / f'{number}.png'
        picture.save(path)
        files[str(path)] = str(label)
    return str(next((folder / 'models').glob('*int8.onnx'))), files


def _answers(out, top):
    lines = [line.rsplit(': ', 1) for line in out.splitlines()]
    assert all(answer.count('%') == top for _, answer in lines)
    return {path: answer.split()[0] for path, answer in lines}


def test_predict_names_the_classes(exported, monkeypatch, capsys):
    model, files = exported
    facts = ONNX.metadata(ONNX.read(model))
    assert facts['classes'] == list('0123456789') and facts['preprocessing']['stretch']
    assert facts['preprocessing']['resolution'] == 32 and facts['preprocessing']['image_size'] == 48
    assert call(predict, monkeypatch, '--model', model, '--top', 2, *files) == 0
    answers = _answers(capsys.readouterr().out, 2)
    assert answers.keys() == files.keys()
    assert np.mean([answers[path] == label for path, label in files.items()]) > 0.85


def test_the_documented_snippet_answers_alike(exported, monkeypatch, capsys):
    model, files = exported
    with open(os.path.join(ROOT, 'docs', 'your_pictures.md'), encoding='utf-8') as f:
        snippet = f.read().partition('```python\n')[2].partition('```')[0]
    names = {}
    exec(snippet, names)
    call(predict, monkeypatch, '--model', model, '--top', 1, *files)
    ours = _answers(capsys.readouterr().out, 1)
    theirs = {path: max((shares := names['classify'](model, path)), key=shares.get) for path in files}
    assert np.mean([ours[path] == theirs[path] for path in files]) >= 0.95


def test_pictures_are_cut_as_in_evaluation(exported, tmp_path):
    rng = np.random.default_rng(0)
    for label in 'ab':
        for number in range(6):
            path = tmp_path / label / f'{number}.png'
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (150, 210, 3), np.uint8)).save(path)
    data = open_data(tmp_path, image_size=96, valid_size=1)
    facts = {'preprocessing': preprocessing(data, 96, 64)}
    assert facts['preprocessing']['resize_short_side'] == 110 and not facts['preprocessing']['stretch']
    for index in range(len(data.test)):
        pixels, _ = data.test[index]
        with Image.open(data.test.source.name(int(data.test.indices[index]))) as picture:
            theirs = prepare(picture, facts)
        assert (resize(to_floats(pixels, data.test.mean_std)[None], 64) == theirs).all()


def test_mistakes_are_one_line(exported, tmp_path, monkeypatch, capsys):
    model, files = exported
    (tmp_path / 'text.jpg').write_text('no picture')
    (tmp_path / 'x.onnx').write_text('no model')
    picture = next(iter(files))
    fails(predict, monkeypatch, capsys, 'not a picture that can be read', '--model', model, tmp_path / 'text.jpg')
    fails(predict, monkeypatch, capsys, 'not a model of this exporter', '--model', tmp_path / 'x.onnx', picture)
    fails(predict, monkeypatch, capsys, 'No such file', '--model', tmp_path / 'y.onnx', picture)
    fails(predict, monkeypatch, capsys, 'No such file', '--model', model, tmp_path / 'gone.jpg')
