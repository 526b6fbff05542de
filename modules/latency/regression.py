"""Fitting a KernelModel to sums: published latencies are items, each a sum over blocks of sums over kernels.

Two steps. `fit_nets` (torch) trains the nets on the relative error of the items. `fit_corrections` then finds
the log factors of single kernels or blocks that explain what is left: a ridge regression through the sums
whose prior is the nets, so what the items do not pin stays at the nets' prediction.
"""
import numpy as np
from scipy.sparse import coo_matrix, diags, identity, vstack
from scipy.sparse.linalg import lsmr

from ..search_space.block import Block, out_size
from .kernel_model import KernelModel, block_features, kernel_features, kernel_work, kernels_of
from .kernels import Kernel

MIN_KERNELS_FOR_A_NET = 8           # with fewer figures a kernel is taken as proportional to its work
DELTA = 0.05                        # Huber threshold in log ms: single measurements have outliers of 2x..90x
PRIOR = 2e-3                        # weight of (log rate - TYPICAL_RATE)^2 in the loss: shares of a sum that
                                    # the figures leave open (such as swish against se) stay plausible
TYPICAL_RATE = {'conv-bn-relu': -17.5, 'dwconv-bn-relu': -16.0, 'fc': -15.5, 'global-avgpool': -9.0}
ELEMENTWISE_RATE = -13.6            # log ms per unit of work: the published add and addrelu kernels


def _incidence(lists):
    """(CSR matrix [lists, distinct elements] of counts, the distinct elements)."""
    index, rows, columns = {}, [], []
    for i, elements in enumerate(lists):
        for element in elements:
            rows.append(i)
            columns.append(index.setdefault(element, len(index)))
    shape = len(lists), len(index)
    return coo_matrix((np.ones(len(rows)), (rows, columns)), shape).tocsr(), list(index)


class Design:
    """Items as sums: items -> blocks -> kernels. An item is a list of Blocks (or Kernels measured alone)."""

    def __init__(self, items):
        self.item_block, self.blocks = _incidence(items)
        self.block_kernel, self.kernels = _incidence(
            [[b] if isinstance(b, Kernel) else kernels_of(b) for b in self.blocks])
        self.overhead = np.array([isinstance(b, Block) for b in self.blocks], float)

    def block_ms(self, model):
        """ms of every distinct block, [blocks]."""
        sums = self.block_kernel @ model.kernel_ms(self.kernels) + self.overhead * model.overhead
        return sums * model.block_factor(self.blocks)

    def predict(self, model):
        """ms of every item, [items]."""
        return self.item_block @ self.block_ms(model)


def _mlp(torch, inputs, hidden, bias=0.0, constant=False):
    """Two hidden layers that start near `bias`; `constant`: only a bias, the rest of the sizes is ignored."""
    sizes = [inputs, 1] if constant else [inputs, hidden, hidden, 1]
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    with torch.no_grad():
        layers[-1].weight.mul_(0.0 if constant else 0.1)
        layers[-1].bias.fill_(bias)
    layers[-1].weight.requires_grad_(not constant)
    modules = [m for layer in layers for m in (layer, torch.nn.SiLU())][:-1]
    return torch.nn.Sequential(*modules)


def _as_net(torch, layers):
    """A trainable net of a KernelModel's layers; of a single layer, which ignores sizes, only the bias is."""
    modules = []
    for weight, bias in layers:
        linear = torch.nn.Linear(*weight.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.as_tensor(weight.T))
            linear.bias.copy_(torch.as_tensor(bias))
        linear.weight.requires_grad_(len(layers) > 1)
        modules += [linear, torch.nn.SiLU()]
    return torch.nn.Sequential(*modules[:-1])


def _layers(net):
    return [(m.weight.detach().numpy().T.astype(float), m.bias.detach().numpy().astype(float))
            for m in net if hasattr(m, 'weight')]


def _csr_rows(matrix, rows):
    """(distinct columns of the rows, position of each entry's row, of its column, the entries)."""
    part = matrix[rows]
    columns, position = np.unique(part.indices, return_inverse=True)
    return columns, np.repeat(np.arange(len(rows)), np.diff(part.indptr)), position, part.data


def _from_nothing(torch, design, inputs, block_factor, hidden):
    """What fit_nets() begins with: (kernel types, typical log rate of each kernel, ModuleDict of nets, block types or
    None, log ms of a block's overhead)."""
    names = np.array([kernel.name for kernel in design.kernels])
    types = list(dict.fromkeys(names))
    rates = {name: TYPICAL_RATE.get(name, ELEMENTWISE_RATE) for name in types}
    nets = {str(t): _mlp(torch, inputs, hidden, rates[name], np.sum(names == name) < MIN_KERNELS_FOR_A_NET)
            for t, name in enumerate(types)}
    block_names = sorted({b.name for b in design.blocks if isinstance(b, Block)}) if block_factor else None
    if block_factor:
        nets['block'] = _mlp(torch, block_features(design.blocks[:1], block_names).shape[1], hidden)
    return types, [rates[name] for name in names], torch.nn.ModuleDict(nets), block_names, -4.0


def _from_base(torch, design, base):
    """The same of a KernelModel that knows the design's kernels and block types."""
    nets = {str(t): _as_net(torch, layers) for t, layers in enumerate(base.nets.values())}
    block_names = None
    if base.block_net:
        block_names, layers = base.block_net
        nets['block'] = _as_net(torch, layers)
    rates = np.log(base.kernel_ms(design.kernels) / kernel_work(design.kernels))
    return list(base.nets), rates, torch.nn.ModuleDict(nets), block_names, np.log(max(base.overhead, 1e-9))


def fit_nets(platform, design, ms, groups, tiled, block_factor, epochs=50, hidden=48, batch=512, lr=4e-3,
             seed=0, base=None):
    """KernelModel whose nets minimise the Huber loss of log ms.

    ms: [items]; groups: [(item indices, how many of them to draw per epoch), …]; tiled: see
    kernel_model.kernel_features; block_factor: whether whole blocks, with an overhead, were measured (else
    the model is a plain sum of kernels). base: KernelModel whose nets, scaled to the items, are trained on, and whose
    rates take the place of the typical ones; `tiled`, `block_factor` and `hidden` are its own then.
    """
    import torch

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)

    def tensor(array):
        return torch.as_tensor(np.asarray(array), dtype=torch.float32)

    if base is not None:
        base = base.scaled(float(np.median(ms / design.predict(base))))
        tiled, block_factor = base.tiled, base.block_net is not None
    features = kernel_features(design.kernels, tiled)
    log_work = tensor(np.log(kernel_work(design.kernels)))
    begin = _from_nothing(torch, design, features.shape[1], block_factor, hidden) if base is None else _from_base(
        torch, design, base)
    types, typical, nets, block_names, overhead = begin
    type_of = np.array([types.index(kernel.name) for kernel in design.kernels])
    typical, features, overhead = tensor(typical), tensor(features), torch.nn.Parameter(tensor(overhead))
    if block_factor:
        block_x = tensor(block_features(design.blocks, block_names))

    def forward(items):
        """(log ms of the items, squared deviation of their kernels' rates from the typical ones)."""
        blocks, row, column, count = _csr_rows(design.item_block, items)
        kernels, block_row, kernel_column, kernel_count = _csr_rows(design.block_kernel, blocks)
        rate = torch.zeros(len(kernels))
        for t in np.unique(type_of[kernels]):
            chosen = np.flatnonzero(type_of[kernels] == t)
            rate = rate.index_add(0, torch.as_tensor(chosen), nets[str(t)](features[kernels[chosen]])[:, 0])
        kernel_ms = torch.exp(rate + log_work[kernels])
        sums = torch.zeros(len(blocks))
        if block_factor:
            sums = sums + torch.exp(overhead) * tensor(design.overhead[blocks])
        sums = sums.index_add(0, torch.as_tensor(block_row), kernel_ms[kernel_column] * tensor(kernel_count))
        if block_factor:
            sums = sums * torch.exp(nets['block'](block_x[blocks])[:, 0])
        item_ms = torch.zeros(len(items)).index_add(0, torch.as_tensor(row), sums[column] * tensor(count))
        return torch.log(item_ms), ((rate - typical[kernels]) ** 2).mean()

    log_ms = tensor(np.log(ms))
    parameters = [p for p in [*nets.parameters(), overhead] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-4)
    steps = epochs * -(-sum(draw for _, draw in groups) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        drawn = np.concatenate([rng.choice(group, draw, replace=draw > len(group)) for group, draw in groups])
        rng.shuffle(drawn)
        for start in range(0, len(drawn), batch):
            items = drawn[start:start + batch]
            predicted, deviation = forward(items)
            loss = torch.nn.functional.huber_loss(predicted, log_ms[items], delta=DELTA) / DELTA
            loss = loss + PRIOR * deviation
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    kernel_nets = {name: _layers(nets[str(t)]) for t, name in enumerate(types)}
    block_net = (block_names, _layers(nets['block'])) if block_factor else None
    overhead_ms = float(np.exp(overhead.item())) if block_factor else 0.0
    return KernelModel(platform, kernel_nets, tiled, overhead_ms, block_net)


def fit_corrections(model, design, ms, items, prior, noise):
    """{Kernel or Block: log factor} that explain the residuals of `items` (indices).

    Ridge regression through the sums: factors 1 + x with x ~ N(0, prior^2), relative error of an item
    ~ N(0, noise^2). Kernels are corrected where the model is a plain sum of kernels, else blocks.
    """
    if model.block_net:
        terms, part = design.blocks, diags(design.block_ms(model))
        matrix = design.item_block[items] @ part
    else:
        terms, part = design.kernels, diags(model.kernel_ms(design.kernels))
        matrix = design.item_block[items] @ design.block_kernel @ part
    weight = 1 / (noise * ms[items])
    residual = (ms[items] - np.asarray(matrix.sum(1)).ravel()) * weight
    system = vstack([diags(weight) @ matrix * prior, identity(len(terms))]).tocsr()
    target = np.concatenate([residual, np.zeros(len(terms))])
    x = prior * lsmr(system, target, atol=1e-8, btol=1e-8, maxiter=4000)[0]
    used = np.unique(design.item_block[items].indices) if model.block_net else np.unique(matrix.indices)
    factors = np.log(np.maximum(1 + x, 0.02))
    return {terms[i]: float(factors[i]) for i in used}


def interpolate_corrections(corrections, kernels):
    """Corrections for those of `kernels` that have none, between output sizes of otherwise equal kernels.

    Published rows have three resolutions; without this the ones between would fall back to the bare nets.
    """
    by_sizes = {}
    for kernel, factor in corrections.items():
        by_sizes.setdefault(kernel._replace(hw=0), []).append((_out(kernel), factor))
    found = {}
    for kernel in kernels:
        known = sorted(by_sizes.get(kernel._replace(hw=0), ()))
        if kernel not in corrections and known and known[0][0] <= _out(kernel) <= known[-1][0]:
            found[kernel] = float(np.interp(_out(kernel), *zip(*known)))
    return found


def _out(kernel):
    return out_size(kernel.hw, max(kernel.stride, 1))
