"""Configurations: a YAML file of known keys, overridden by flags of the same names."""
import argparse
import contextlib
import dataclasses
import os
import typing

import yaml

from ..cli import positive
from ..errors import UserError
from ..files import write_text


def load_config(kind, path, overrides=None, section=None):
    """`kind` (a dataclass) from a YAML file; keys of `section` in it win over the top ones, `overrides` over all.

    overrides: {key: value}, None where a flag was not given. Raises UserError: no such file, unknown key, or a
    value of another type, each with the file and the key.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, 'problem_mark', None)
        where = f'{path}:{mark.line + 1}' if mark else path
        raise UserError(f'{where}: not YAML ({getattr(error, "problem", None) or "not text"})') from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected keys and values, found {type(content).__name__}')
    sections = {key: value for key, value in content.items() if isinstance(value, dict)}
    values = {key: value for key, value in content.items() if key not in sections}
    for name, part in sections.items():
        if name not in kind.SECTIONS:
            raise UserError(f'{path}: unknown section {name!r}; known: {" ".join(kind.SECTIONS)}')
        checked = {key: _checked(path, f'{name}.{key}', key, value, kind) for key, value in part.items()}
        if name == section:
            values.update(checked)
    values = {key: _checked(path, key, key, value, kind) for key, value in values.items()}
    values.update((key, value) for key, value in (overrides or {}).items() if value is not None)
    return kind(**values)


def _checked(path, shown, key, value, config):
    kinds = {field.name: typing.get_type_hints(config)[field.name] for field in dataclasses.fields(config)}
    if key not in kinds:
        raise UserError(f'{path}: unknown key {shown!r}; known: {" ".join(kinds)}')
    kind = kinds[key]
    if kind is float and not isinstance(value, bool):
        with contextlib.suppress(ValueError, TypeError):
            value = float(value)                        # 1, and 1e-5, which YAML takes for text
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise UserError(f'{path}: {shown}: {value!r} is not of type {kind.__name__}')
    if kind in (int, float) and not value >= 0 and key not in config.SIGNED:
        raise UserError(f'{path}: {shown}: {value} is negative')
    return value


def add_config_arguments(parser, kind, skip=()):
    """A flag for every key of a dataclass but `skip`; not given, it is None and the file's value counts."""
    for field in (field for field in dataclasses.fields(kind) if field.name not in skip):
        value = typing.get_type_hints(kind)[field.name]
        options = {'action': argparse.BooleanOptionalAction} if value is bool else {'type': _parse(value)}
        parser.add_argument(f'--{field.name}', help=f'{field.metadata["help"]}; default: the config file\'s', **options)


def _parse(kind):
    def parse(text):
        return kind(text) if kind is str or float(text) == 0 else positive(kind)(text)
    parse.__name__ = kind.__name__
    return parse


def save_config(config, folder, name):
    """Write the effective configuration to <folder>/<name>, which load_config() reads again."""
    write_text(os.path.join(folder, name), yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
