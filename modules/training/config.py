"""Configurations: a YAML file of known keys, overridden by flags of the same names."""
import argparse
import contextlib
import dataclasses
import math
import os
import typing

import yaml

from ..errors import UserError
from ..files import write_text
from ..original import is_original, renamed
from .log import note


class _Loader(yaml.SafeLoader):
    """YAML without keys given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f'{key.value} is given twice', problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _short(value, show=repr):
    """A value as an error line shows it."""
    text = show(value)
    return text if len(text) <= 60 else text[:57] + '...'


def setting(default, help, least=0, **limits):
    """A key of a configuration; least, most, below, choices: what its values may be."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default, metadata={'help': help})
    if not isinstance(default, (bool, str)):
        limits = {'least': least, 'most': math.inf if isinstance(default, float) else 10 ** 9} | limits
    return dataclasses.field(default=default, metadata={'help': help, **limits})


def read_yaml(path):
    """The keys and values of a YAML file as a dict; UserError with file and line for anything else."""
    try:
        with open(path, encoding='utf-8') as file:
            content = yaml.load(file, _Loader)
    except (yaml.YAMLError, ValueError) as error:       # ValueError: not UTF-8, a 13th month
        mark = getattr(error, 'problem_mark', None)
        where = f'{path}:{mark.line + 1}' if mark else path
        reason = getattr(error, 'problem', None) or ('not text' if isinstance(error, UnicodeError) else error)
        raise UserError(f'{where}: not YAML ({_short(reason, str)})') from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected keys and values, found {type(content).__name__}')
    return content


def load_config(kind, path, overrides=None, section=None):
    """`kind` (a dataclass) from a YAML file; keys of `section` in it win over the top ones, `overrides` over all.

    overrides: {key: value}, None where a flag was not given. The original's train.yaml is taken too (original.py): a
    line names its keys that mean nothing here. Raises UserError: no such file, unknown key, or a value of another type,
    each with the file and the key.
    """
    content = _of_the_original(path, read_yaml(path), kind)
    sections = {key: value for key, value in content.items() if isinstance(value, dict)}
    values = {key: value for key, value in content.items() if key not in sections}
    for name, part in sections.items():
        if name not in kind.SECTIONS:
            raise UserError(f'{path}: unknown section {_short(name)}; known: {" ".join(kind.SECTIONS)}')
        checked = {key: _checked(path, f'{name}.{key}', key, value, kind) for key, value in part.items()}
        if name == section:
            values.update(checked)
    values = checked_values(path, values, kind)
    values.update((key, value) for key, value in (overrides or {}).items() if value is not None)
    return kind(**values)


def checked_values(path, values, kind):
    """{key: value} of a file as `kind`, a dataclass of setting()s, has them; UserError with file and key."""
    return {key: _checked(path, key, key, value, kind) for key, value in values.items()}


def _of_the_original(path, content, kind):
    """The original's train.yaml by the keys here, without sections; any other content as it is."""
    known = [field.name for field in dataclasses.fields(kind)]
    if not is_original(content, (*known, *kind.SECTIONS)):
        return content
    taken, unknown = {key: content.pop(key) for key in kind.SECTIONS if key in content}, []

    def take(part, prefix=''):
        for key, value in part.items():
            name = renamed(key, known)
            if isinstance(value, dict):
                take(value, f'{prefix}{key}.')
            elif name is None or value is None:
                unknown.append(f'{prefix}{key}')
            elif taken.setdefault(name, value) != value:
                raise UserError(f'{path}: {prefix}{key}: {_short(value)}, but {name} is {_short(taken[name])} already')

    take(content)
    if unknown:
        note(f'{path}: keys of the original without a meaning here: {" ".join(unknown)}')
    return taken


def _checked(path, shown, key, value, config):
    fields = {field.name: field for field in dataclasses.fields(config)}
    if key not in fields:
        raise UserError(f'{path}: unknown key {_short(shown)}; known: {" ".join(fields)}')
    kind = typing.get_type_hints(config)[key]
    if kind is float and not isinstance(value, bool):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            value = float(value)                        # 1, and 1e-5, which YAML takes for text
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise UserError(f'{path}: {shown}: {_short(value)} is not of type {kind.__name__}')
    if problem := _problem(fields[key], value):
        raise UserError(f'{path}: {shown}: {_short(value, str)} {problem}')
    return value


def _problem(field, value):
    """What is wrong with a value of the right type, by the field's `least`, `most`, `below` and `choices`."""
    allowed = field.metadata
    if 'choices' in allowed and value not in allowed['choices']:
        return f'is not one of {" ".join(allowed["choices"])}'
    if isinstance(value, float) and not math.isfinite(value):
        return 'is not a finite number'
    if 'least' in allowed and value < allowed['least']:
        return 'is negative' if value < 0 <= allowed['least'] else f'is less than {allowed["least"]}'
    if 'most' in allowed and value > allowed['most']:
        return f'is more than {allowed["most"]}'
    if 'below' in allowed and value >= allowed['below']:
        return f'is not below {allowed["below"]}'
    return None


def add_config_arguments(parser, kind, skip=()):
    """A flag for every key of a dataclass but `skip`; not given, it is None and the file's value counts."""
    for field in (field for field in dataclasses.fields(kind) if field.name not in skip):
        value = typing.get_type_hints(kind)[field.name]
        options = {'action': argparse.BooleanOptionalAction} if value is bool else {'type': _parse(value, field)}
        parser.add_argument(f'--{field.name}', help=f'{field.metadata["help"]}; default: the config file\'s', **options)


def _parse(kind, field):
    def parse(text):
        if problem := _problem(field, value := kind(text)):
            raise argparse.ArgumentTypeError(f'{text} {problem}')
        return value
    parse.__name__ = kind.__name__
    return parse


def save_config(config, folder, name):
    """Write the effective configuration to <folder>/<name>, which load_config() reads again."""
    write_text(os.path.join(folder, name), yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
