from megatron_fc.preflight.plain_table import plain_table

HEADER = ("Name", "Text")
ROWS = [("a", "one\nmore"), ("some name", "megatron-fc train and all other commands")]


def test_columns_are_as_wide_as_their_text() -> None:
    assert plain_table(HEADER, ROWS, width=200).splitlines() == [
        "Name       Text",
        "---------  ----------------------------------------",
        "a          one",
        "           more",
        "some name  megatron-fc train and all other commands",
    ]


def test_the_widest_column_folds() -> None:
    lines = plain_table(HEADER, ROWS, width=30).splitlines()
    assert max(map(len, lines)) == 30
    assert lines[-3:] == ["some name  megatron-fc train", "           and all other", "           commands"]


def test_no_column_gets_narrower_than_a_word_or_two() -> None:
    assert max(map(len, plain_table(HEADER, ROWS, width=5).splitlines())) == len("some name  ") + 12
