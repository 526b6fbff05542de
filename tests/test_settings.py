"""Settings dataclasses: flags, YAML keys and what a stopped run insists on come from the same fields."""
import argparse
from dataclasses import dataclass

import pytest

from modules.errors import UserError
from modules.settings import add_settings, deciding, load_config, save_config, setting, settings_of, with_default


@dataclass(frozen=True, kw_only=True)
class Recipe:
    SECTIONS = ('quant',)
    epochs: int = setting(5, 'passes', flags=('num_epochs', 'n'), least=1)
    rate: float | None = setting(None, 'learning rate', above=0)
    share: float | None = setting(None, 'of a loss', const=0.5, most=1)
    sizes: tuple[int, ...] = setting((), 'pixels', least=16)
    kind: str = setting('a', 'which', choices=('a', 'b'))
    fast: bool = setting(True, 'in a hurry', decides=False)
    again: bool = setting(False, 'continue', in_file=False, decides=False)
    workers: int = setting(0, 'processes', flags=(), decides=False)


@dataclass(frozen=True, kw_only=True)
class Longer(Recipe):
    epochs: int = with_default(Recipe, 'epochs', 9)


def parsed(words, kind=Recipe, **options):
    parser = argparse.ArgumentParser()
    add_settings(parser, kind, **options)
    return parser.parse_args(words.split())


@pytest.mark.parametrize('words, changed', [
    ('', {}), ('--num_epochs 7', {'epochs': 7}), ('--n 7', {'epochs': 7}), ('--rate 0.1', {'rate': 0.1}),
    ('--share', {'share': 0.5}), ('--share 0.2', {'share': 0.2}), ('--sizes 16 32', {'sizes': (16, 32)}),
    ('--kind b', {'kind': 'b'}), ('--no_fast', {'fast': False}), ('--no-fast', {'fast': False}), ('--fast', {}),
    ('--again', {'again': True})])
def test_flags_are_the_fields(words, changed):
    assert settings_of(Recipe, parsed(words)) == Recipe(**changed)
    assert settings_of(Longer, parsed(words, Longer)) == Longer(**changed)


@pytest.mark.parametrize('words, said', [
    ('--num_epochs 0', 'less than 1'), ('--rate 0', 'not more than 0'), ('--rate nan', 'not a finite number'),
    ('--share 1.5', 'more than 1'), ('--sizes 8', 'less than 16'), ('--kind c', 'not one of a b'),
    ('--num_epochs many', 'invalid int'), ('--workers 3', 'unrecognized'), ('--num_epochs 9999999999', 'more than')])
def test_values_outside_their_limits_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        parsed(words)
    assert said in capsys.readouterr().err


def test_a_file_has_the_defaults_and_flags_win(tmp_path):
    path = tmp_path / 'x.yaml'
    path.write_text('epochs: 3\nfast: false\nkind: b\nquant:\n  epochs: 2\n')
    args = parsed('--kind a --again', from_file=True)
    recipe = load_config(Recipe, path, vars(args), 'quant')
    assert recipe == Recipe(epochs=2, fast=False, kind='a', again=True)
    save_config(recipe, tmp_path, 'y.yaml')
    assert load_config(Recipe, tmp_path / 'y.yaml') == Recipe(epochs=2, fast=False, kind='a')
    path.write_text('again: true\n')
    with pytest.raises(UserError, match='unknown key'):
        load_config(Recipe, path)


def test_what_a_resumed_run_insists_on():
    assert deciding(Recipe(sizes=(16,), again=True)) == {'epochs': 5, 'rate': None, 'share': None, 'sizes': [16],
                                                         'kind': 'a'}
