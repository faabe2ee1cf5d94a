import numpy as np

from prime_jax.scaling import points


def test_runs_without_a_gap_share_a_budget():
    flops = np.array([1.00e18, 3.0e18, 1.02e18, 3.05e18, 1.01e18])
    found = points.assign_budgets(flops, None)
    np.testing.assert_array_equal(found == found[0], [True, False, True, False, True])
    np.testing.assert_allclose(found[[0, 1]], [1.01e18, 3.025e18], rtol=1e-3)


def test_stated_budgets_group_whatever_convention_they_count_in():
    flops = np.array([2e18, 2.1e18, 2.05e18, 9e18])
    found = points.assign_budgets(flops, np.array([1.0, 1.0, 2.0, 2.0]))
    np.testing.assert_allclose(
        found, [np.sqrt(4.2) * 1e18] * 2 + [np.sqrt(18.45) * 1e18] * 2, rtol=1e-5
    )


def test_a_budget_bears_its_planned_value():
    found = points.assign_budgets(
        np.array([0.998e18, 1.004e18, 3.0e18]), np.array([1e18, 1e18, 3e18])
    )
    np.testing.assert_array_equal(found, [1e18, 1e18, 3e18])


def test_nearly_equal_stated_budgets_are_one():
    stated = np.array([1e18, 1.004e18, 1e18, 0.993e18, 3e18, 3.01e18])
    found = points.assign_budgets(stated * [1, 1.01, 0.99, 1, 1, 1], stated)
    np.testing.assert_array_equal(found, [1e18] * 4 + [3e18] * 2)


def test_runs_alone_in_their_budget_are_resampled_together():
    np.testing.assert_array_equal(points.strata(np.array([1.0, 2, 3, 3, 3, 4])), [0, 0, 3, 3, 3, 0])


def test_amounts_of_compute_are_budgets_or_doublings_of_a_continuum():
    def levels(flops):
        flops = np.array(flops)
        return points.budget_levels(points.assign_budgets(flops, None), flops)

    assert levels([1e18, 1.04e18, 1.08e18]) == 1
    assert levels([1e18, 1.04e18, 1e20]) == 2
    assert levels([1e18, 1e19, 1e20]) == 3
    assert levels(np.geomspace(1e18, 17e18, 200)) == 4
