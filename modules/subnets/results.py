"""What a subnet search found: its ScoredSubnets, their accuracy on the test set, tables and the picture."""
import os

from ..figures import new_figure, pareto_front, save_figure
from ..files import write_csv
from ..modeling.complexity import config_complexity
from ..search_space.encoding import parse_subnet, subnet_config
from ..training.evaluate import accuracy
from .evaluate import calibrated_network
from .search import COLUMNS, ScoredSubnet


def all_members(space, history, found):
    """ScoredSubnet of every entry of the history, the fastest first; found: ScoredSubnets of this search."""
    rounds = {}
    for member in found:
        rounds.setdefault(str(member.subnet), member.round)
    subnets = [(key, parse_subnet(key, space.supernet)) for key in history.entries]
    members = [ScoredSubnet(subnet, space.ms(subnet), history.entries[key], rounds.get(key)) for key, subnet in subnets]
    return sorted(members, key=lambda member: (member.ms, *member.rank()))


def evaluate_best(model, best, calibration, test, job):
    """{encoding: Accuracy} on the test set of {Window: [ScoredSubnet, …]}, each tested once.

    test: this rank's share; calibration: all images, on every rank.
    """
    subnets = {str(member.subnet): member.subnet for members in best.values() for member in members}
    return {key: accuracy(calibrated_network(model, subnet, calibration, job.alone()), test, job)
            for key, subnet in subnets.items()}


def write_results(folder, space, members, best, tested, kind, say):
    """search.png, scored.csv and best_c…_d….csv of each window; the best are also said."""
    files = [os.path.join(folder, name) for name in ('search.png', 'scored.csv')]
    draw_search(files[0], members, best, f'{space.supernet}: {len(members)} {kind} subnets, {space.predictor.platform}')
    write_scored(files[1], members)
    for window, chosen in best.items():
        files.append(os.path.join(folder, f'best_c{window.high:g}_d{window.high - window.low:g}.csv'))
        write_best(files[-1], space, chosen, tested)
        for member in chosen:
            say(f'{window}: {member.ms:.4g} ms  held-out {member.scores[0]:.2f}%  test {tested[str(member.subnet)]}  '
                f'{member.subnet}')
    say('\n  '.join(['written:', *files]))


def _point(member):
    return member.ms, member.scores[0]


def write_scored(path, members):
    """CSV of all ScoredSubnets: subnet, ms, top1, top5, loss, round, and pareto (1 on the front, else 0)."""
    front = {str(member.subnet) for member in pareto_front(members, _point)}
    write_csv(path, ('subnet', 'ms', *COLUMNS, 'round', 'pareto'),
               [(m.subnet, f'{m.ms:.4f}', *(f'{value:.4f}' for value in m.scores), m.round, int(str(m.subnet) in front))
                for m in members])


def write_best(path, space, members, tested):
    """CSV of the best ScoredSubnets with what evaluate_best() gave, best first."""
    rows = []
    for member in members:
        complexity = config_complexity(subnet_config(space.supernet, member.subnet).blocks)
        numbers = member.ms, *complexity, member.scores[0], *tested[str(member.subnet)][:3]
        rows.append((member.subnet, *(f'{value:.4f}' for value in numbers)))
    write_csv(path, ('subnet', 'ms', 'MFLOPs', 'Mparams', 'valid_top1', 'test_top1', 'test_top5', 'test_loss'), rows)


def draw_search(path, members, best, title):
    """Picture of accuracy over latency: all ScoredSubnets, the Pareto front, and the best of each {Window: best}."""
    figure, axes = new_figure(figsize=(8, 5), layout='constrained')
    for label, colour, part in (('evolved', '#1f6f8b', [m for m in members if m.round != 0]),
                                ('random start', '#b8b8b8', [m for m in members if m.round == 0])):
        if part:
            axes.scatter([m.ms for m in part], [m.scores[0] for m in part], s=9, alpha=0.6, color=colour,
                         linewidths=0, label=f'{label}: {len(part)} subnets')
    front = pareto_front(members, _point)
    axes.plot([m.ms for m in front], [m.scores[0] for m in front], color='#d1495b', marker='.', linewidth=1.2,
              label=f'Pareto front: {len(front)}')
    for i, (window, chosen) in enumerate(best.items()):
        axes.axvspan(*window, color='#edae49', alpha=0.15, label='latency windows' if i == 0 else None)
        axes.scatter([m.ms for m in chosen], [m.scores[0] for m in chosen], s=45, facecolors='none',
                     edgecolors='#d1495b', label='tested on the test set' if i == 0 else None)
    axes.set(xlabel='predicted INT8 latency (ms)', ylabel='top-1 on held-out training images (%)', title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right', fontsize=8)
    save_figure(figure, path)
