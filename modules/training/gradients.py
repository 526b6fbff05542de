"""Gradients averaged over ranks, in buckets that travel while the last backward pass of a step still runs."""
import torch
import torch.distributed as dist

BUCKET = 25 * 2 ** 20       # bytes: large enough for a network's full speed, small enough to leave early


class GradientAverage:
    """The mean over ranks of the gradients of `parameters`, of one step; every rank must have them for the same ones.

        gradients = GradientAverage(parameters, job)
        first_loss.backward()
        gradients.backward(last_loss)           # or any pass: finish() sends what has not left
        gradients.finish()

    Ranks send the same buckets in the same order, since they run the same networks. Gradients are divided by the number
    of ranks, then added up: in which bucket one travels does not change it.
    """

    def __init__(self, parameters, job):
        self.parameters, self.ranks = list(parameters), job.world_size
        self._sent, self._bucket, self._bytes, self._travelling = set(), [], 0, []

    def backward(self, loss):
        """loss.backward() of the last loss; what it does not reach leaves at once, the others as they are complete."""
        if self.ranks == 1:
            loss.backward()
            return
        reached = _reached(loss)
        self._send_all(p for p in self.parameters if p not in reached)
        hooks = [p.register_post_accumulate_grad_hook(self._send) for p in self.parameters if p in reached]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self):
        """Send what has not left, and put the means in place."""
        if self.ranks == 1:
            return
        self._send_all(p for p in self.parameters if p not in self._sent)
        self._leave()
        for gradients, flat, work in self._travelling:
            work.wait()
            torch._foreach_copy_(gradients, [part.view_as(gradient) for gradient, part in zip(
                gradients, flat.split([gradient.numel() for gradient in gradients]))])

    def _send_all(self, parameters):
        for parameter in parameters:
            self._send(parameter)

    def _send(self, parameter):
        if parameter.grad is None:
            return
        self._sent.add(parameter)
        self._bucket.append(parameter.grad)
        self._bytes += parameter.grad.numel() * parameter.grad.element_size()
        if self._bytes >= BUCKET:
            self._leave()

    @torch.no_grad()
    def _leave(self):
        """Start the reduction of the bucket, a copy: so it may lie in memory as the network likes it."""
        if self._bucket:
            flat = torch.cat([gradient.reshape(-1) for gradient in self._bucket]).div_(self.ranks)
            self._travelling.append((self._bucket, flat, dist.all_reduce(flat, async_op=True)))
            self._bucket, self._bytes = [], 0


def average_gradients(parameters, job):
    """Mean of the gradients over ranks; every rank must have gradients for the same ones."""
    GradientAverage(parameters, job).finish()


def _reached(loss):
    """The parameters to whose gradients loss.backward() will add."""
    todo, seen, reached = [loss.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, 'variable'):
            reached.add(node.variable)
        todo += [following for following, _ in node.next_functions]
    return reached
