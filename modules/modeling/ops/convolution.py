"""Convolutions whose backward pass is fast on CPUs where oneDNN's is not.

Depth-wise 5x5 and 7x7 kernels: oneDNN takes up to a hundred times as long for the weight gradient as for the forward
pass. But that gradient is a depth-wise convolution itself: of an image's input, with the image's output gradient as
the kernel and the stride as the dilation. So it runs at the speed of the forward pass.

Maps of a single pixel (squeeze-excitation, feature_mix): a 1x1 convolution is a linear layer there, whose gradients
are two matrix products, and oneDNN takes two to twenty times as long, as it lays out the weights again.
"""
import torch
import torch.nn.functional as F

_SMALLEST_KERNEL = 5                        # below it oneDNN's weight gradient is good


def conv2d(x, weight, bias, stride, padding, dilation, groups):
    """F.conv2d(), with a fast backward pass where there is one."""
    if torch.is_grad_enabled() and weight.requires_grad:
        if _is_slow(x, weight, dilation, groups):
            return _DepthwiseConv.apply(x, weight, bias, stride, padding, dilation, groups)
        return convolution(x, weight, bias, stride, padding, dilation, groups)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def convolution(x, weight, bias, stride, padding, dilation, groups):
    """F.conv2d(), of single pixels by a matrix product."""
    if _is_linear(x, weight, padding, groups):
        return F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def convolution_backward(grad, x, weight, bias_sizes, stride, padding, dilation, groups, mask):
    """Gradients of conv2d() to (x, weight, bias), None where the mask is False."""
    if _is_linear(x, weight, padding, groups):
        rows = grad.flatten(1)
        return [(rows @ weight.flatten(1)).view_as(x) if mask[0] else None,
                (rows.t() @ x.flatten(1)).view_as(weight) if mask[1] else None, rows.sum(0) if mask[2] else None]
    fast = mask[1] and _is_slow(x, weight, dilation, groups)
    grads = list(torch.ops.aten.convolution_backward(
        grad, x, weight, bias_sizes, stride, padding, dilation, False, [0, 0], groups,
        [mask[0], mask[1] and not fast, mask[2]]))
    if fast:
        grads[1] = _depthwise_weight_gradient(grad, x, weight, stride, padding)
    return grads


def _is_linear(x, weight, padding, groups):
    return (x.shape[2:] == weight.shape[2:] == (1, 1) and tuple(padding) == (0, 0) and groups == 1
            and x.device.type == 'cpu')


def _is_slow(x, weight, dilation, groups):
    kernel = weight.shape[2:]
    return (weight.shape[1] == 1 and groups == len(weight) == x.shape[1] and min(kernel) >= _SMALLEST_KERNEL
            and tuple(dilation) == (1, 1) and x.device.type == 'cpu' and x.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled('cpu'))


def _depthwise_weight_gradient(grad, x, weight, stride, padding):
    total = torch.zeros_like(weight)
    height, width = weight.shape[2:]
    for image, kernel in zip(x.split(1), grad.unbind()):
        correlation = F.conv2d(image, kernel.unsqueeze(1), None, 1, padding, stride, len(kernel))
        total += correlation[0, :, None, :height, :width]       # a stride may leave rows that no output used
    return total


class _DepthwiseConv(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, bias, *geometry):
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.bias_sizes = geometry, None if bias is None else [len(bias)]
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads = convolution_backward(grad, *ctx.saved_tensors, ctx.bias_sizes, *ctx.geometry, ctx.needs_input_grad[:3])
        return *grads, None, None, None, None
