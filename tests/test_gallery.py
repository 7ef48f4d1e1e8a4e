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


def test_every_check_that_catches_a_bug_is_tried_on_the_right_library():
    assert {id(bug.check) for bug in gallery.BUGS.values()} <= {id(check) for check in gallery.CHECKS.values()}
