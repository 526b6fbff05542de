"""What a class costs: confusion tables, accuracies by class, weights of rare classes."""
import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from sklearn.utils.class_weight import compute_class_weight

from modules.errors import UserError
from modules.training.classes import by_class, class_names, loss_weights, write_confusion
from modules.training.data import open_data
from modules.training.distributed import Job
from modules.training.downstream import mixed_loss
from modules.training.evaluate import accuracy, confusion_table


class _Fixed(torch.nn.Module):
    """Answers of its own: the images are the logits."""

    def forward(self, images):
        return images.flatten(1)


def test_confusion_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, answers = rng.integers(0, 4, (2, 200))
    table = confusion_table(torch.tensor(labels), torch.tensor(answers), 4)
    assert (table.numpy() == confusion_matrix(labels, answers)).all()


def test_accuracy_fills_the_table(tmp_path):
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    answers = torch.eye(3)[torch.tensor([0, 0, 1, 1, 0, 2])].view(6, 3, 1, 1)
    table = []
    result = accuracy(_Fixed(), [(answers[:4], labels[:4]), (answers[4:], labels[4:])], Job(), table)
    assert table[0].tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert result.classes == 3 and 'top-5' not in str(result) and 'top-5' in str(result._replace(classes=10))
    assert by_class(table[0], ['cat', 'dog', 'emu']) == 'by class: cat 66.7%, dog 50.0%, emu 100.0%'
    write_confusion(tmp_path / 'table.csv', table[0], ['cat', 'dog', 'emu'])
    with open(tmp_path / 'table.csv', newline='') as f:
        assert list(csv.reader(f))[1] == ['cat', '2', '1', '0']


def test_of_many_classes_the_worst_are_shown():
    table = np.diag(np.arange(1, 31)) + np.eye(30, k=1, dtype=int)
    line = by_class(table, [f'c{i}' for i in range(30)])
    assert line.startswith('the worst 20 of 30 classes: c0 50.0%, c1 66.7%') and 'c29' not in line


def test_balanced_weights_are_scikit_learns():
    data = open_data('', 'digits', valid_size=100)
    labels = [data.train.source[int(i)][1] for i in data.train.indices]
    weights = loss_weights('balanced', data.train, 10, 'cpu')
    assert np.allclose(weights, compute_class_weight('balanced', classes=np.arange(10), y=labels), atol=1e-6)
    assert loss_weights('none', data.train, 10, 'cpu') is None
    with pytest.raises(UserError, match='no training picture of 1 of the 11'):
        loss_weights('balanced', data.train, 11, 'cpu')


def test_rare_classes_weigh_more():
    logits = torch.zeros(4, 2, requires_grad=True)
    labels, weights = torch.tensor([0, 0, 0, 1]), torch.tensor([2 / 3, 2.0])
    mixed_loss(logits, labels, weights=weights).backward()
    assert torch.allclose(logits.grad[:3].sum(0), -logits.grad[3])


def test_names_of_classes():
    named = SimpleNamespace(num_classes=2, test=SimpleNamespace(source=SimpleNamespace(classes=('cat', 'dog'))))
    assert class_names(named) == ['cat', 'dog']
    assert class_names(open_data('', 'digits')) == [str(i) for i in range(10)]
