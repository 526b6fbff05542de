"""What a pipeline does: a YAML file with what is searched for, and the scripts' own flags, by step."""
from dataclasses import dataclass, field, replace

from ..errors import UserError
from ..settings import checked_values, read_yaml, setting

OWN_FLAGS = ('for_data', 'datasets', 'baselines', 'finds_nothing', 'steps')      # keys that are no flags
CHOOSE_DATA = ('dataset_path', 'valid_size')    # read before it is known which data set there is
SECTIONS = ('teacher', 'block_kd', 'block_kd_lsq', 'predictor', 'block_lut', 'space_search', 'supernets',
            'supernets_lsq', 'subnet_search', 'finish', 'accuracy', 'latency')
STEP_KEYS = 'planned_minutes', 'train_steps'    # of a step, beside the flags of its script


@dataclass(frozen=True)
class Settings:
    """steps: {name of a step: {'planned_minutes': …, 'train_steps': of training, flag of its script: value, …}}."""
    superspace: str = setting('demo', 'hyperspace that is searched')
    teacher_arch: str = setting('efficientnet-lite0', 'teacher of block KD')
    datasets: list = setting(['imagenet'], 'the first of these that can be had; imagenet: class folders')
    for_data: dict = setting({}, '{data set: {key: value}}, where a data set wants others than stand here')
    dataset_path: str = setting('dataset', 'folder of the data set')
    valid_size: int = setting(5000, 'training images held out for the subnet search, at most a fifth', least=1)
    platform: str = setting('', 'latency platform; default: this machine is measured')
    measured_name: str = setting('demo_host', 'platform that this machine is registered as')
    latency: float = setting(0.0, 'INT8 ms that a network may take; 0: by latency_quantile', least=0)
    latency_quantile: float = setting(0.5, 'quantile of the latencies of random subnets of random spaces', least=0,
                                      most=1)
    latency_width: float = setting(0.15, 'share of the latency that the window searched takes', least=0, below=1)
    latency_loss_t: float = setting(0.1, 'as search_block_kd.py takes it', least=0)
    latency_loss_a: float = setting(0.01, 'as search_block_kd.py takes it', least=0)
    align_sample: bool = setting(True, 'all blocks of a stage share k, w, e')
    compare_flops: bool = setting(True, 'search, train and deploy by FLOPs too')
    compare_types: str = setting('', 'a space by hand to compare with: block types by stage, such as 111')
    baselines: list = setting([], 'ready-made networks to compare with: names of timm')
    finds_nothing: bool = setting(False, 'so few steps that results mean nothing; the summary says so')
    init_block_kd: bool = setting(True, 'supernets start from the blocks of block KD')
    batch_size: int = setting(32, 'images a step, a process', least=1)
    nproc_per_node: int = setting(0, 'processes of each training; 0: none but side by side on CPU cores', least=0)
    seed: int = setting(0, 'seed of all steps', least=0)
    steps: dict = field(default_factory=dict)

    def of(self, dataset):
        """The Settings for a data set."""
        return replace(self, **self.for_data.get(dataset, {}))

    def flags(self, step, *without):
        """The script's flags in the section of a step, as words; keys `without` are left out."""
        words = []
        for key, value in self.steps.get(step, {}).items():
            if key not in (*STEP_KEYS, *without) and value is not False:
                values = [] if value is True else value if isinstance(value, list) else [value]
                words += [f'--{key}', *values]
        return words


def load_settings(path, overrides):
    """Settings of a YAML file; overrides: {key: value or None}. UserError for what is not known, with file and key."""
    content = read_yaml(path)
    steps = content.pop('steps', {})
    values = checked_values(path, content, Settings)
    if not isinstance(steps, dict):
        raise UserError(f'{path}: steps: expected names and flags')
    known = [*SECTIONS, *(f'baseline {model}' for model in values.get('baselines', ()))]
    for name, section in steps.items():
        if name not in known:
            raise UserError(f'{path}: steps: unknown {name}; known: {", ".join(known)}')
        if not isinstance(section, dict):
            raise UserError(f'{path}: steps: {name}: expected flags and values')
    if values.get('baselines') and 'supernets' not in steps:
        raise UserError(f'{path}: baselines: trained beside the supernets, which have no section in steps')
    overrides = {key: value for key, value in overrides.items() if value is not None}
    for name, own in values.get('for_data', {}).items():
        where = f'{path}: for_data: {name}'
        if not isinstance(own, dict) or {*OWN_FLAGS, *CHOOSE_DATA}.intersection(own):
            raise UserError(f'{where}: expected keys and values, without {", ".join(OWN_FLAGS + CHOOSE_DATA)}')
        values['for_data'][name] = checked_values(where, own, Settings) | overrides
    return Settings(steps=steps, **values | overrides)
