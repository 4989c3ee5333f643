"""What image and point tell each other, where no labels say who is right: beyond the paper."""
import statistics

import torch
from torch import Tensor


def information(image_names: Tensor, point_names: Tensor, classes: int) -> float:
    """The mutual information of two namings (N,) of the same objects, in nats.

    I = sum_kl t_kl log( t_kl / (t_k. t_.l) ), where t_kl is the share of objects that image
    calls k and point calls l. It is log C at most. Two witnesses that err independently, given
    the object, tell each other most when both tell the truth (arXiv 1802.08887). If all objects
    have one name, they agree and tell nothing.
    """
    def of_pairs(point_names: Tensor) -> float:
        counts = torch.bincount(image_names * classes + point_names, minlength=classes ** 2)
        together = counts.view(classes, classes).double() / len(point_names)
        apart = together.sum(dim=1, keepdim=True) * together.sum(dim=0)
        # xlogy: a pair of names that does not occur counts 0.
        gained = torch.xlogy(together, together) - torch.xlogy(together, apart)
        return gained.sum().item()

    # Estimated from N objects, I is too large by about (C - 1)^2 / 2N. The mean over 20 shuffles
    # of the pairs is subtracted, so that names without any relation give about 0.
    random = torch.Generator().manual_seed(0)
    by_chance = []
    for _ in range(20):
        order = torch.randperm(len(point_names), generator=random)
        by_chance.append(of_pairs(point_names[order]))
    return of_pairs(point_names) - statistics.mean(by_chance)
