"""RoomQuestions: what a fine-tuning run reads of a room."""
from questions import RoomQuestions
from rooms import CATEGORIES, CLASSES


def test_maps_alone_and_after_questions():
    rooms = RoomQuestions('train', 0, 4)
    for i in range(4):
        overview = rooms.maps[i][1]
        assert rooms.map_of(i)['conversations'][1]['value'] == overview
        assert len(rooms.map_of(i)['conversations']) == 2
        # after the questions of every second room
        assert (rooms[i]['conversations'][-1]['value'] == overview) == (i % 2 == 1)


def test_held_out_rooms_are_asked_for_no_map_and_nothing_in_words():
    rooms = RoomQuestions('val', 0, 4)
    for i in range(4):
        said = [turn['value'] for turn in rooms[i]['conversations'][1::2]]
        assert rooms.maps[i][1] not in said
        assert sorted(said) == sorted(record['ground_truth'] for record in rooms.questions[i])


def test_an_item_has_six_pictures_and_what_they_show():
    rooms = RoomQuestions('train', 0, 4)
    item = rooms[0]
    assert len(item['images']) == 6
    assert item['conversations'][0]['value'].startswith('<image>' * 6)
    assert not any('<image>' in turn['value'] for turn in item['conversations'][1:])
    assert item['seen'].shape == (6, 16, len(CLASSES) + 3)
    assert item['stand'].shape == (len(CATEGORIES), 3)


def test_records_know_their_rooms():
    rooms = RoomQuestions('val', 0, 6)
    assert [record['id'] for record in rooms.records] == list(range(len(rooms.records)))
    for room, questions in enumerate(rooms.questions):
        mine = [record['question'] for record in rooms.records if record['room'] == room]
        assert mine == [record['question'] for record in questions]
