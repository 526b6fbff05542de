"""Figures without a display: matplotlib's Agg canvas, whatever backend a notebook uses; files are written whole."""
from .files import atomic_path


def new_figure(rows=1, columns=1, squeeze=True, **options):
    """(figure, axes) as pyplot.subplots gives them; options: matplotlib.figure.Figure's, such as figsize (inches).

    squeeze False: axes are an array whatever their number.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=squeeze)


def save_figure(figure, path):
    """Write the figure to `path` (PNG); what of a text is no Unicode, as in odd file names, becomes question marks."""
    from matplotlib.text import Text
    for text in figure.findobj(Text):
        written = text.get_text().encode('utf-8', 'replace').decode('utf-8')
        if written != text.get_text():
            text.set_text(written)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png', dpi=120, bbox_inches='tight')


def pareto_front(items, point):
    """Items of which none quicker is as accurate, the quickest first; point(item): its (ms, accuracy)."""
    front = []
    for item in sorted(items, key=lambda item: (point(item)[0], -point(item)[1])):
        if not front or point(item)[1] > point(front[-1])[1]:
            front.append(item)
    return front
