"""How well a map in words agrees with the true one."""
import pytest

from measure import map_score


def test_maps_score_for_pieces_within_a_metre():
    truth = 'bed at x +1, y -2; lamp at x +0, y +3; lamp at x -1, y +3'
    assert map_score(truth, truth) == 1
    assert map_score(truth, 'bed at x +2, y -1; lamp at x -1, y +3') == pytest.approx(2 / 3)
    assert map_score(truth, 'bed at x +3, y -2; lamp') == 0
    assert map_score(truth, '') == 0
    assert map_score('none', 'none') == 1


def test_listing_more_than_there_is_does_not_pay():
    spot = 'bin at x +1, y +1; bin at x +1, y +1'
    crowd = 'bin at x +1, y +1; ' * 9
    assert map_score(spot, spot) == 1
    assert map_score(spot, crowd) == pytest.approx(2 / 9)


def test_the_pairing_that_pairs_most_counts():
    truth = 'bin at x +0, y +3; bin at x +1, y +2'
    assert map_score(truth, 'bin at x +0, y +2; bin at x +0, y +4') == 1
