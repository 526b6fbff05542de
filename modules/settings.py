"""Settings of a task: a dataclass, whose fields are flags, keys of a YAML file, and what a stopped run insists on.

The dataclass alone has defaults, limits and help texts, and goes whole to the function that carries the task out.
"""
import argparse
import contextlib
import dataclasses
import math
import os
import typing

import yaml

from .cli import note
from .errors import UserError
from .files import write_text
from .original import is_original, renamed


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


def setting(default, help, flags=None, const=None, in_file=True, decides=True, **limits):
    """A field of a settings dataclass, with the values that it may have.

    limits: least, most, above, below (numbers), choices. flags: names of its flag, its own by default, () for none;
    const: value of the flag without one; in_file: whether a YAML file may have it as a key; decides: whether the
    result depends on it, so that a stopped run is resumed with the same value or not at all.
    """
    if not isinstance(default, (bool, str)) and 'above' not in limits:
        limits = {'least': 0} | limits
    metadata = {'help': help, 'flags': flags, 'const': const, 'in_file': in_file, 'decides': decides, **limits}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def with_default(kind, name, default, **metadata):
    """The field `name` of a settings dataclass with another default, for a subclass of it; metadata: of setting()."""
    old = kind.__dataclass_fields__[name]
    return dataclasses.field(default=default, metadata={**old.metadata, **metadata})


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

    overrides: {key: value}, such as vars() of parsed flags, None where a flag was not given. The original's train.yaml
    is taken too (original.py): a line names its keys that mean nothing here. Raises UserError: no such file, unknown
    key, or a value of another type, each with the file and the key.
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
    known = {field.name for field in dataclasses.fields(kind)}
    values.update((key, value) for key, value in (overrides or {}).items() if key in known and value is not None)
    return kind(**values)


def checked_values(path, values, kind):
    """{key: value} of a file as `kind`, a dataclass of setting()s, has them; UserError with file and key."""
    return {key: _checked(path, key, key, value, kind) for key, value in values.items()}


def _of_the_original(path, content, kind):
    """The original's train.yaml by the keys here, without sections; any other content as it is."""
    known = list(_keys(kind))
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


def _keys(kind):
    """{key of a YAML file: field} of a settings dataclass."""
    return {field.name: field for field in dataclasses.fields(kind) if field.metadata.get('in_file', True)}


def _checked(path, shown, key, value, config):
    fields = _keys(config)
    if key not in fields:
        raise UserError(f'{path}: unknown key {_short(shown)}; known: {" ".join(fields)}')
    kind, _ = _kind(config, fields[key])
    if kind is float and not isinstance(value, bool):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            value = float(value)                        # 1, and 1e-5, which YAML takes for text
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise UserError(f'{path}: {shown}: {_short(value)} is not of type {kind.__name__}')
    if problem := _problem(fields[key], value):
        raise UserError(f'{path}: {shown}: {_short(value, str)} {problem}')
    return value


def _kind(config, field):
    """(type of a field's value, whether it is of several such: tuple[int, ...])."""
    hint = typing.get_type_hints(config)[field.name]
    inner = [kind for kind in typing.get_args(hint) if kind not in (type(None), Ellipsis)]
    return (inner[0], typing.get_origin(hint) is tuple) if inner else (hint, False)


def _problem(field, value):
    """What is wrong with a value of the right type, by the limits of its field."""
    allowed = field.metadata
    if 'choices' in allowed and value not in allowed['choices']:
        return f'is not one of {" ".join(map(str, allowed["choices"]))}'
    if isinstance(value, (str, bool, list, dict)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return 'is not a finite number'
    if 'above' in allowed and value <= allowed['above']:
        return f'is not more than {allowed["above"]}'
    if 'least' in allowed and value < allowed['least']:
        return 'is negative' if value < 0 <= allowed['least'] else f'is less than {allowed["least"]}'
    if value > allowed.get('most', 10 ** 9 if isinstance(value, int) else math.inf):
        return f'is more than {allowed.get("most", 10 ** 9)}'
    if 'below' in allowed and value >= allowed['below']:
        return f'is not below {allowed["below"]}'
    return None


class _Switch(argparse.Action):
    """--x and --no_x (also --no-x)."""

    def __init__(self, option_strings, dest, default=None, help=None):
        no = [f'--no{dash}{option[2:]}' for option in option_strings for dash in '-_']
        super().__init__([*option_strings, *no], dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option=None):
        setattr(namespace, self.dest, not option.startswith(('--no-', '--no_')))


def add_settings(parser, kind, skip=(), from_file=False):
    """A flag for every field of a settings dataclass but `skip`.

    from_file: a flag that is not given is None, and the value of the YAML file counts.
    """
    for field in (field for field in dataclasses.fields(kind) if field.name not in skip):
        meta, (value, several) = field.metadata, _kind(kind, field)
        if meta['flags'] == ():
            continue
        default = dataclasses.MISSING if from_file and meta['in_file'] else field.default
        names = meta['flags'] or (field.name,)
        options = {'help': meta['help'], 'default': None if default == () else default}
        if default is dataclasses.MISSING:
            options.update(help=f'{meta["help"]}; default: the config file\'s', default=None)
        if value is bool:
            options['action'] = 'store_true' if default is False else _Switch
        else:
            options |= {'type': _parse(value, field), 'choices': meta.get('choices')}
            options |= {'nargs': '+'} if several else {'nargs': '?', 'const': meta['const']} if meta['const'] else {}
        parser.add_argument(*(f'--{name}' for name in names), **options)


def settings_of(kind, args, **others):
    """The settings dataclass of parsed flags (add_settings()); others: {field: value} that win over them."""
    values = {}
    for field in dataclasses.fields(kind):
        value = getattr(args, (field.metadata['flags'] or (field.name,))[0], dataclasses.MISSING)
        if value is not dataclasses.MISSING:
            values[field.name] = tuple(value or ()) if _kind(kind, field)[1] else value
    return kind(**values | others)


def deciding(settings):
    """{field: value} of what a result depends on, as plain values: a stopped run is resumed with the same."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)
              if field.metadata['decides']}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _parse(kind, field):
    def parse(text):
        if problem := _problem(field, value := kind(text)):
            raise argparse.ArgumentTypeError(f'{text} {problem}')
        return value
    parse.__name__ = kind.__name__
    return parse


def save_config(config, folder, name):
    """Write the effective configuration to <folder>/<name>, which load_config() reads again."""
    values = {name: getattr(config, name) for name in _keys(type(config))}
    values = {name: value for name, value in values.items() if value not in (None, ())}
    write_text(os.path.join(folder, name), yaml.safe_dump(values, sort_keys=False))
