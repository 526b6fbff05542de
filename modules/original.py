"""What flags of the original's command lines and keys of its train.yaml are here, where they are not the same.

cli.parser() and settings.py read this. A flag or key that a script or recipe knows itself is never looked up, so
that nothing here changes what a command line of ours means.
"""
# {name of the original: the names here; of them the first that a script or recipe has is meant}
RENAMED = {
    'max_time_budget': ('num_rounds',),
    'mutation_size': ('num_mutations',),
    'crossover_size': ('num_crossovers',),
    'parent_size': ('parent_sample_size',),
    'cycles': ('num_spaces',),
    'batch_size_per_gpu': ('train_batch_size', 'batch_size', 'eval_batch_size'),
    'train_batch_size': ('batch_size', 'batch_size_per_gpu'),
    'post_bn_calibration_batch_num': ('num_calib_batches',),
    'data_loader_workers_per_gpu': ('num_workers',),
    'manual_seed': ('seed',),
    'epochs': ('num_epochs',),
    'lr_warmup': ('warmup_epochs',),
    'max_grad_norm': ('grad_clip_norm',),
    'resume': ('checkpoint_path',),
    'debug_batches': (),
    # as scripts of this kind call them, the original's or its forerunners'
    'n_epochs': ('num_epochs', 'epochs'),
    'num_epochs': ('epochs',),
    'lr': ('learning_rate', 'base_lr'),
    'learning_rate': ('base_lr',),
    'test_batch_size': ('eval_batch_size', 'batch_size'),
    'workers': ('num_workers',),
    'output_dir': ('output_path',),
    'output_path': ('output_dir',),
}
_LAUNCHER = 'the launcher says it'
# {flag without a counterpart in some scripts: why}
WITHOUT = {
    'print_freq': 'progress is shown by the clock, not by steps',
    'test_only': 'this script trains nothing',
    'augment': 'images of calibration and evaluation are not augmented',
    **dict.fromkeys(('gpu', 'dist_url', 'dist-url', 'dist_backend', 'dist-backend', 'num_machines', 'num-machines',
                     'machine_rank', 'machine-rank'), _LAUNCHER),
}
SECTIONS = ('optimizer', 'lr_scheduler')        # of its train.yaml


def renamed(name, known):
    """What a name of the original is among the `known` ones here: itself first; None where there is nothing."""
    return name if name in known else next((new for new in RENAMED.get(name, ()) if new in known), None)


def reason(name):
    """Why a name of the original that renamed() does not find is left out; None for one that is not of the original."""
    return WITHOUT.get(name) or ('nothing here depends on it' if name in RENAMED else None)


def is_original(keys, known):
    """Whether keys, of which some are not among the `known` ones here, are those of the original's train.yaml."""
    return any(key in SECTIONS or key in RENAMED for key in keys if key not in known)
