"""Networks of a few blocks for the exporters' tests, and a demo subnet that was trained."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modules.modeling.layout import LAYOUTS
from modules.modeling.network import Network
from modules.modeling.ops.lsq_plus import set_quant_mode
from modules.search_space.block import Block
from modules.search_space.encoding import SubnetConfig, parse_supernet
from modules.search_space.sampling import min_subnet
from modules.training.data import open_data, train_loader
from modules.zoo import save_network

DEMO = parse_supernet('demo-012-000')
SEARCHED = sorted(name for name in LAYOUTS if name.startswith(('Mobile', 'ResNet', 'Fused')))
# {activation: (kernel, stride)}: kernel 7, and a stride in two of the cases
CASES = {'relu': (3, 2), 'relu6': (5, 1), 'hswish': (3, 1), 'swish': (7, 2)}


def some_block(name, cin=16, cout=24, kernel=3, stride=2, activation='relu', hw=9, count=1, seed=0):
    """Network of blocks of one type, the first with the stride, with a random batch norm that also turns signs."""
    torch.manual_seed(seed)
    blocks, size = [], hw
    for i in range(count):
        stride = stride if i == 0 else 1
        blocks.append(Block(name, size, cin if i == 0 else cout, cout, kernel, 2, stride, activation))
        size = -(-size // stride)
    network = Network(SubnetConfig(hw, {'stage': blocks})).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, -1.5, 1.5)
            module.weight.data[0] = 0
            torch.nn.init.normal_(module.bias, 0.2, 0.3)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.1, 0.4)
    return network, torch.randn(8, cin, hw, hw)


def difference(ours, theirs):
    """rms of the difference over the standard deviation."""
    return np.sqrt(np.mean((ours - theirs) ** 2)) / ours.std()


def subnet_list(path, *subnets, text=None):
    """Write an input.csv of subnets of DEMO, or `text`; returns its path."""
    path.write_text(text or ''.join(f'demo,{DEMO.choice},{subnet}\n' for subnet in subnets))
    return path


def write_trained(path):
    """Write a demo subnet trained on digits, then LSQ+, by save_network()."""
    data, subnet = open_data('', 'digits', image_size=32), min_subnet(DEMO)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network.build(DEMO, subnet, 10)
        for epochs, rate in ((4, 0.05), (1, 0.01)):
            optimizer = torch.optim.SGD(network.parameters(), rate, 0.9, nesterov=True)
            for epoch in range(epochs):
                for images, labels in train_loader(data.train, 32, epoch):
                    F.cross_entropy(network.train()(images), labels).backward()
                    torch.nn.utils.clip_grad_value_(network.parameters(), 1)
                    optimizer.step()
                    optimizer.zero_grad()
            set_quant_mode(network)
    save_network(path, network, DEMO, subnet, True)


def each_once():
    """Every block type with every activation; of each type one is quick enough for each run, the rest is slow."""
    return [pytest.param(name, activation, marks=() if i % len(CASES) == j else pytest.mark.slow)
            for i, name in enumerate(SEARCHED) for j, activation in enumerate(CASES)]
