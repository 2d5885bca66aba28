import pytest
import torch

from ling_probe.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 8, 8), (2, 3, 4, 7)])
def test_singular_values_end_near_one_and_directions_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = orthogonalise(matrices)
    values = torch.linalg.svdvals(flat)
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert ((flat * (u @ v)).sum((-2, -1)) / (flat.norm(dim=(-2, -1)) * (u @ v).norm(dim=(-2, -1)))).min() > 0.95


def test_each_matrix_of_a_stack_is_its_own():
    stack = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalise(stack)[1], orthogonalise(stack[1]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(orthogonalise(stack * 1000), orthogonalise(stack), atol=1e-4, rtol=1e-4)


def test_steps_are_as_large_as_promised_and_descend():
    target = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    weight = torch.nn.Parameter(torch.zeros(8, 16))
    optimizer = Muon([weight], lr=0.05)
    losses = []
    for _ in range(300):
        before = weight.detach().clone()
        loss = (weight - target).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        # A semi-orthogonal [8, 16] has entries of root mean square 1/4; times 0.2 sqrt(16) that is 0.2, AdamW's.
        assert (weight.detach() - before).pow(2).mean().sqrt().item() < 0.05 * 0.2 * 1.25
    assert losses[-1] < 0.1 * losses[0]


def test_weight_decay_shrinks_without_a_gradient_signal():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 0.95))
