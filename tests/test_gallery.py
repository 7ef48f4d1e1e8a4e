"""Every planted bug is caught by a check that the right library passes."""

import pytest

from tests import gallery


@pytest.mark.parametrize("name", gallery.CHECKS)
def test_the_right_library_passes(name):
    found = gallery.CHECKS[name]()
    assert not found.caught, found.measured


@pytest.mark.parametrize("name", gallery.BUGS)
def test_planted_bug_is_caught(name):
    found = gallery.examine(gallery.BUGS[name])
    assert found.caught, found.measured


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_noise_of_any_release_that_is_a_tenth_off_is_caught(factor):
    model = gallery.build("anchored", noise_multiplier=1.5)
    for noise in gallery.drawn_noise(model):
        assert gallery.p_value(noise) > 1e-4
        assert gallery.p_value(factor * noise) < gallery.REJECTED


def test_every_check_that_catches_a_bug_is_tried_on_the_right_library():
    assert {id(bug.check) for bug in gallery.BUGS.values()} <= {id(check) for check in gallery.CHECKS.values()}
